"""Splats in OpenUSD: one ParticleField3DGaussianSplat of a stage, with a sample for each frame of a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simworld.extras import needed
from simworld.kinds import SplatState
from simworld.render.harmonics import MOST_DEGREE, degree_of
from simworld.render.splats import decomposed, moved, splats_of
from simworld.saving import replacing

Array = np.ndarray[Any, np.dtype[Any]]
USD = (".usd", ".usda", ".usdc")
PLACE = "/splats"
REACH = 3.0  # standard deviations of splats that the box of a field holds
ATTRIBUTES: Mapping[str, tuple[str, str]] = {
    "means": ("positions", "Vec3fArray"),
    "quats": ("orientations", "QuatfArray"),
    "scales": ("scales", "Vec3fArray"),
    "opacities": ("opacities", "FloatArray"),
    "harmonics": ("radiance:sphericalHarmonicsCoefficients", "Vec3fArray"),
    "extent": ("extent", "Vec3fArray"),
}
"""Fields of SplatState, and the attributes of USD that hold them."""
FIELDS = tuple(name for name in ATTRIBUTES if name != "extent")
DEGREE = "radiance:sphericalHarmonicsDegree"


@dataclass(frozen=True)
class SplatFrames:
    """Splats at instants `dt` apart [s], None where there is one instant alone."""

    frames: tuple[SplatState, ...]
    dt: float | None


def write_usd(path: str | Path, frames: SplatState | Sequence[SplatState], *, dt: float | None = None) -> Path:
    """Write splats, or those of frames `dt` apart [s], as one field of a stage whose third axis is up; return its path.

    What does not change from frame to frame is written once. Splats that are not active are written with no opacity,
    so that rows stay the same splats throughout. Covariances are written as quaternions and scales, their axes nearest
    to those of the frame before.

    Raises:
        ValueError: the suffix is another, there is no frame, there are several and no dt, they differ in the degree of
            their harmonics, or one has no splat, several scenes or splats that `read_usd` would refuse.
        ImportError: usd-core is not there.
    """
    path, several = Path(path), [frames] if isinstance(frames, SplatState) else list(frames)
    _check(path, several, dt)
    pxr = _pxr("writing USD")
    stage = pxr.Usd.Stage.CreateInMemory()
    pxr.UsdGeom.SetStageUpAxis(stage, pxr.UsdGeom.Tokens.z)
    pxr.UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    field = pxr.UsdVol.ParticleField3DGaussianSplat.Define(stage, PLACE).GetPrim()
    stage.SetDefaultPrim(field)
    field.GetAttribute(DEGREE).Set(degree_of(several[0].harmonics))
    if len(several) > 1 and dt is not None:
        stage.SetTimeCodesPerSecond(1 / dt)
        stage.SetStartTimeCode(0)
        stage.SetEndTimeCode(len(several) - 1)
    _fill(field, several)
    with replacing(path, suffix=f".partial{path.suffix}") as partial:
        stage.GetRootLayer().Export(str(partial))
    return path


def read_usd(path: str | Path) -> SplatFrames:
    """Return the splats of a stage's one ParticleField3DGaussianSplat, at each instant that it has samples for.

    They are where the stage places them: turned, shifted and scaled with the prims that they lie in.

    Raises:
        ValueError: the file is none, has no or several fields of splats, or one that lacks an attribute, whose
            attributes differ in length, that is sheared, or that holds NaN, infinity or a zero quaternion.
        ImportError: usd-core is not there.
    """
    path = Path(path)
    if path.suffix not in USD:
        raise ValueError(f"Stages are read from {', '.join(USD)}; got '{path}'.")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    pxr = _pxr("reading USD")
    try:
        stage = pxr.Usd.Stage.Open(str(path))
    except pxr.Tf.ErrorException as error:
        raise ValueError(f"{path} is no stage of OpenUSD, or is damaged; copy it again.") from error
    found = [prim for prim in stage.Traverse() if prim.IsA(pxr.UsdVol.ParticleField3DGaussianSplat)]
    if len(found) != 1:
        named = ", ".join(str(prim.GetPath()) for prim in found[:8])
        raise ValueError(f"{path} must have one ParticleField3DGaussianSplat; got {len(found)} ({named}).")
    field, place, where = found[0], pxr.UsdGeom.Xformable(found[0]), f"{path}, {found[0].GetPath()}"
    moves = [pxr.UsdGeom.Xformable(field.GetStage().GetPrimAtPath(at)) for at in field.GetPath().GetPrefixes()]
    sampled = [_attribute(field, name) for name in FIELDS] + [move for move in moves if move]
    times = sorted({time for one in sampled for time in one.GetTimeSamples()})
    # A stage that does not say its unit is taken to be in the scene's own, metres.
    said = stage.HasAuthoredMetadata("metersPerUnit")
    unit = float(pxr.UsdGeom.GetStageMetersPerUnit(stage)) if said else 1.0
    frames = tuple(
        _placed(_frame(field, time, where), place.ComputeLocalToWorldTransform(time), unit, where)
        for time in times or [pxr.Usd.TimeCode.Default()]
    )
    steps = np.diff(times)
    if len(steps) and np.ptp(steps) > 1e-6 * steps.mean():
        raise ValueError(f"{path} has samples at uneven times, {times[:4]} ...; sample it evenly.")
    return SplatFrames(frames, float(steps.mean()) / stage.GetTimeCodesPerSecond() if len(steps) else None)


def _pxr(what: str) -> Any:
    for module in ("Gf", "Tf", "Usd", "UsdGeom", "UsdVol", "Vt"):
        needed(f"pxr.{module}", what, "formats", "usd-core>=26.3")
    pxr = needed("pxr", what, "formats", "usd-core>=26.3")
    if "ParticleField3DGaussianSplat" not in vars(pxr.UsdVol):
        raise ImportError(f"{what} needs usd-core>=26.3; install it with: pip install 'simworld[formats]'")
    return pxr


def _check(path: Path, frames: Sequence[SplatState], dt: float | None) -> None:
    if path.suffix not in USD:
        raise ValueError(f"Stages are written to {', '.join(USD)}; got '{path}'.")
    if not frames or (len(frames) > 1 and (dt is None or not dt > 0)):
        raise ValueError(f"write_usd needs a frame, and of several their dt > 0 in s; got {len(frames)}, dt {dt}.")
    for number, frame in enumerate(frames):
        if frame.num_scenes != 1 or not len(frame):
            raise ValueError(
                f"A stage holds the splats of one scene; frame {number} has {frame.num_scenes} scenes and {len(frame)} "
                "splats. Take scene(i) of each."
            )
    degrees = sorted({degree_of(frame.harmonics) for frame in frames})
    if len(degrees) > 1:
        raise ValueError(f"Frames of a stage have harmonics of one degree; got {degrees}. Pad those of the lower.")


def _fill(field: Any, frames: Sequence[SplatState]) -> None:
    """Set the attributes of a field: as samples where a frame differs from the first, else once."""
    samples = list(_contents(frames))
    first = samples[0]
    changing = {n for sample in samples for n in ATTRIBUTES if not np.array_equal(first[n], sample[n])}
    changing |= {"means"} if len(frames) > 1 else set()  # a rollout of what stays has as many instants
    for name in first.keys() - changing:
        _attribute(field, name).Set(_usd(name, first[name]))
    for time, sample in enumerate(samples):
        for name in changing:
            _attribute(field, name).Set(_usd(name, sample[name]), time)


def _contents(frames: Sequence[SplatState]) -> Iterator[dict[str, Array]]:
    """Yield what the attributes hold at each frame, as arrays of float32."""
    before = None
    for number, frame in enumerate(frames):
        before = decomposed(frame, before if before is not None and len(before) == len(frame) else None)
        clean = splats_of({name: before[name].detach().cpu().numpy() for name in before}, f"Frame {number}")
        found = {name: clean[name].numpy() for name in clean}
        found["opacities"] = found["opacities"] * frame.active.cpu().numpy()
        reach = REACH * found["scales"].max(1, keepdims=True)
        found["extent"] = np.stack([(found["means"] - reach).min(0), (found["means"] + reach).max(0)])
        found["harmonics"] = found["harmonics"].reshape(-1, 3)
        yield found


def _usd(name: str, value: Array) -> Any:
    pxr = _pxr("writing USD")
    if name == "quats":  # in memory the real part of a quaternion of USD stands last
        value = np.roll(value, -1, 1)
    return getattr(pxr.Vt, ATTRIBUTES[name][1]).FromNumpy(np.ascontiguousarray(value))


def _attribute(field: Any, name: str) -> Any:
    """Return the attribute of a field of SplatState, of half numbers where the file has these alone."""
    whole, half = (field.GetAttribute(ATTRIBUTES[name][0] + suffix) for suffix in ("", "h"))
    return half if half and half.HasAuthoredValue() and not whole.HasAuthoredValue() else whole


def _frame(field: Any, time: Any, where: str) -> SplatState:
    read = {name: _attribute(field, name).Get(time) for name in FIELDS}
    degree = field.GetAttribute(DEGREE).Get(time)
    missing = [ATTRIBUTES[name][0] for name in FIELDS if read[name] is None]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; export it anew.")
    if degree not in range(MOST_DEGREE + 1):
        raise ValueError(f"{where} has harmonics of degree {degree}; export it with 0 to {MOST_DEGREE}.")
    values = {name: np.array(value, dtype=np.float64) for name, value in read.items()}
    count, each = len(values["means"]), (degree + 1) ** 2
    lengths = {ATTRIBUTES[name][0]: len(value) for name, value in values.items()}
    if any(len(value) != (count * each if name == "harmonics" else count) for name, value in values.items()):
        raise ValueError(f"{where} has attributes of other lengths than its {count} positions need: {lengths}.")
    values["quats"] = np.roll(values["quats"].reshape(count, 4), 1, 1)
    values["harmonics"] = values["harmonics"].reshape(count, each, 3)
    return splats_of(values, where)


def _placed(splats: SplatState, matrix: Any, unit: float, where: str) -> SplatState:
    """Return splats turned, scaled and shifted by a stage's matrix, whose rows are as USD has them, in metres."""
    place = torch.tensor(matrix, dtype=torch.float64).T
    place[:3] *= unit
    if torch.equal(place, torch.eye(4, dtype=torch.float64)):
        return splats
    scale = float(torch.linalg.det(place[:3, :3]).abs()) ** (1 / 3)
    try:
        return moved(splats, place[:3, :3] / scale, place[:3, 3], scale)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where} is sheared, mirrored or scaled along an axis; apply its transforms.") from error
