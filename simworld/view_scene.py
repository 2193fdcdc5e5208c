"""Films of scenes through a camera: trajectories side by side, their names, errors and colour bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.data import open_trajectories
from simworld.extras import needed
from simworld.fields import time_unit
from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.metrics import Row
from simworld.picture_metrics import picture_rows
from simworld.render.appearance import Look, to_splats
from simworld.render.bind import bind, pose
from simworld.render.camera import Camera
from simworld.render.field_shapes import field_to_splats
from simworld.render.fields import RadianceField, load_field
from simworld.render.files import WRITERS, read_splats, write_splats
from simworld.render.film import LONGEST, write_film
from simworld.render.scenes import WHITE, render
from simworld.render.shade import Shade
from simworld.render.splats import render_splats
from simworld.render.usd import USD, read_usd
from simworld.space import shortest
from simworld.state import State
from simworld.trajectory import Trajectory

TITLE, BAR = 22, 46  # pixels above pictures for names, and below for a colour bar
TRAJECTORIES, FIELD = (".h5", ".hdf5"), ".safetensors"
FILMS, SPLATS = (".mp4", ".gif", ".png"), tuple(WRITERS)
HIDDEN = 0.005  # share of what is seen of splats that may lie outside of a picture, at either end
IN_STRIP = 6  # frames of a film of which a picture is asked
MOST_FRAMES = 120  # of a film of worlds
TURNS, TURN = 60, 0.05  # pictures of a film round a scene that stands still, and how long each is shown [s]
SLOWEST, PACE = 1.0, 0.04  # s: the longest that frames are shown as long as they last, and how long others are shown


@dataclass(frozen=True, kw_only=True)
class Shot:
    """How a file is drawn: `size` of a panel in pixels, `angles` (azimuth, elevation) of the camera in degrees.

    Entities have the colours of a `field`, or states are dressed in the `splats` of a file, that follow by a `mode`.
    """

    size: tuple[int, int] = (480, 360)
    angles: tuple[float, float] = (-60.0, 20.0)
    field: str | None = None
    every: int = 1
    splats: Path | None = None
    mode: str = "knn"


def draw_scene(file: Path, out: Path, shot: Shot, *, compare: Path | None = None, episode: int = 0) -> list[Row]:
    """Draw a file of trajectories, splats or a field to another; return the errors of its pictures, if compared.

    Raises:
        ValueError: a file is of another kind, there is no such episode, or the two have other entities.
    """
    _check_asked(file, out, shot, compare, episode)
    if out.suffix not in FILMS:
        frames, dt, camera = scene_frames(file, shot, episode=episode, most=1 if out.suffix in SPLATS else None)
        _write_frames(out, frames, dt, shot.every, camera, file.stem)
        return []
    if file.suffix not in TRAJECTORIES:
        _film_splats(file, out, shot)
        return []
    predicted = _episode(file, episode)
    if compare is None:
        look = Look.of(predicted, field=shot.field)
        camera, dress = _camera(look, shot), _dress(predicted, shot)
        film_scene({file.stem: predicted}, path=out, camera=camera, look=look, dress=dress, every=shot.every)
        return []
    return _film_beside(predicted, _episode(compare, episode), out, shot, compare.name)


def scene_frames(
    file: Path, shot: Shot, *, episode: int = 0, most: int | None = None
) -> tuple[list[SplatState], float, Camera]:
    """Return a file's frames as splats, `most` of them or all, the time between them, and a camera that sees them.

    Raises:
        ValueError: the file is of another kind, or there is no such episode.
    """
    _check_asked(file, None, shot, None, episode)
    if file.suffix not in TRAJECTORIES:
        scenes, dt = _scenes(file, shot.every)
        found = [field_to_splats(scene) if isinstance(scene, RadianceField) else scene for scene in scenes[:most]]
        return found, dt, _round(found[0], shot, 1)[0]
    trajectory = _episode(file, episode)
    look = Look.of(trajectory, field=shot.field)
    dress = _dress(trajectory, shot) or (lambda state: to_splats(state, look))
    with torch.no_grad():
        frames = [dress(trajectory.frame(t)) for t in range(0, len(trajectory), shot.every)[:most]]
    return frames, trajectory.dt * shot.every, _camera(look, shot)


def playing_speed(dt: float, every: int = 1) -> float:
    """Return how many times as fast as recorded a film plays whose frames are `dt` apart, each `every`-th of them."""
    return 1.0 if dt / every <= SLOWEST else dt / every / PACE


def _check_asked(file: Path, out: Path | None, shot: Shot, compare: Path | None, episode: int) -> None:
    """Refuse what the files' kinds do not allow, before anything is drawn."""
    known = (*FILMS, ".html", *SPLATS, *USD)
    if out is not None and (out.suffix not in known or not out.parent.is_dir()):
        raise ValueError(f"--out must be a {', '.join(known)} in a folder that is there; got '{out}'.")
    drawn = (*TRAJECTORIES, *SPLATS, *USD, FIELD)
    if file.suffix not in drawn:
        raise ValueError(f"What is drawn is a {', '.join(drawn)}; got '{file}'.")
    for given in (file, compare):
        if given is not None and not given.is_file():
            raise ValueError(f"There is no file '{given}'; give one that is there.")
    if compare is not None and (file.suffix not in TRAJECTORIES or compare.suffix not in TRAJECTORIES):
        raise ValueError(f"--compare is for trajectories ({TRAJECTORIES[0]}); got '{file}' and '{compare}'.")
    if compare is not None and out is not None and out.suffix not in FILMS:
        raise ValueError(f"--compare draws panels beside each other, in {', '.join(FILMS)}; got '{out}'.")
    asked = {"--field": shot.field is not None, "--splats": shot.splats is not None, "--episode": episode > 0}
    if file.suffix not in TRAJECTORIES and any(asked.values()):
        said = next(name for name, there in asked.items() if there)
        raise ValueError(f"{said} is for trajectories ({TRAJECTORIES[0]}); '{file}' holds splats or a field.")


def _check_alike(predicted: Trajectory, recorded: Trajectory) -> None:
    one, other = predicted.initial, recorded.initial
    if type(one).__name__ != type(other).__name__ or len(one) != len(other):
        raise ValueError(
            f"--compare needs the same entities in both files; got a {type(one).__name__} of {len(one)} and a "
            f"{type(other).__name__} of {len(other)}."
        )
    if abs(predicted.dt / recorded.dt - 1) > 1e-3:
        raise ValueError(f"--compare needs frames of one dt; got {predicted.dt:g} and {recorded.dt:g}.")


def _film_beside(predicted: Trajectory, recorded: Trajectory, out: Path, shot: Shot, dataset: str) -> list[Row]:
    """Write recorded, predicted and its errors beside each other, as long as both are; return the pictures' errors."""
    _check_alike(predicted, recorded)
    length = min(len(predicted), len(recorded))
    predicted, recorded = predicted.window(0, length), recorded.window(0, length)
    look = Look.of(recorded, field=shot.field)
    camera, dress = _camera(look, shot), _dress(recorded, shot)
    errors = _apart(predicted, recorded, look)
    panels = {"recorded": recorded, "predicted": predicted}
    film_scene(panels, path=out, camera=camera, look=look, dress=dress, errors={"predicted": errors}, every=shot.every)
    clothe = dress or (lambda state: to_splats(state, look))
    horizons: list[int | str] = [h for h in (1, 20) if h < length - 1]
    return picture_rows(
        {"predicted": predicted}, recorded, camera, clothe, dataset=dataset, horizons=[*horizons, "all"]
    )


def film_worlds(worlds: Mapping[str, Trajectory], *, path: Path, size: tuple[int, int] = (400, 360)) -> Path:
    """Write worlds that part at an intervention beside each other, and the effect in colours; return the path.

    The first is the factual one and the second the one that is asked about.

    Raises:
        ValueError: the file is no film, or there is nothing that can be drawn of both worlds.
    """
    check_film(path)
    length = min(len(world) for world in worlds.values())
    panels = {name: world.window(0, length) for name, world in worlds.items()}
    (_, factual), (name, asked), *_ = panels.items()
    look, other = Look.of(factual), Look.of(asked)
    look = replace(look, low=torch.minimum(look.low, other.low), high=torch.maximum(look.high, other.high))
    if look.shade and other.shade:
        low, high = min(look.shade.low, other.shade.low), max(look.shade.high, other.shade.high)
        look = replace(look, shade=replace(look.shade, low=low, high=high))
    effect = _apart(asked, factual, look) * (asked.active & factual.active)
    camera = look.camera(width=size[0], height=size[1])
    every = max(1, -(-length // MOST_FRAMES))
    said = {name: effect}
    return film_scene(panels, path=path, camera=camera, look=look, errors=said, measure="effect", every=every)


def check_film(path: Path) -> None:
    """Raise a ValueError before long work if `film_worlds` could not write to this file after it."""
    if path.suffix not in FILMS or not path.parent.is_dir():
        raise ValueError(f"--film must be a {', '.join(FILMS)} in a folder that is there; got '{path}'.")


def _apart(one: Trajectory, other: Trajectory, look: Look) -> Tensor:
    """Return [T, n]: how far entities are from where they are in another trajectory, or a field in colours is off."""
    name = "positions" if "positions" in one.frames else (look.shade.field if look.shade else None)
    if name is None or name not in one.frames or name not in other.frames:
        raise ValueError("There is nothing to compare: neither positions nor a field in colours change in both.")
    apart = one[name] - other[name]
    if name == "positions":
        apart = shortest(one.initial, apart)
    return apart.flatten(2).norm(dim=2) if apart.ndim > 2 else apart.abs()


def _film_splats(file: Path, out: Path, shot: Shot) -> None:
    """Write the film of frames from one side, or of a scene that stands still a picture, or a film from all round."""
    scenes, dt = _scenes(file, shot.every)
    still = len(scenes) == 1
    cameras = _round(scenes[0], shot, TURNS if still and out.suffix != ".png" else 1)
    with torch.no_grad():
        views = [render(scene, camera, background=WHITE).clamp(0, 1) for scene in scenes for camera in cameras]
    write_film(out, torch.stack(views), dt=TURN if still else min(dt / playing_speed(dt, shot.every), LONGEST))


def _round(scene: SplatState | RadianceField, shot: Shot, count: int) -> list[Camera]:
    """Return cameras round splats or a field, that show nearly all; the first from where the shot says."""
    look = Look.box(*(scene.bounds.cpu() if isinstance(scene, RadianceField) else _seen_box(scene)))
    width, height = shot.size
    turns = [shot.angles[0] + 360 * number / count for number in range(count)]
    return [look.camera(width=width, height=height, azimuth=turn, elevation=shot.angles[1]) for turn in turns]


def _seen_box(splats: SplatState) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper corner [3] of the box that holds nearly all that is seen of splats."""
    there = splats.active
    covars = splats.covars[there] if "covars" in splats else covariances(splats.quats[there], splats.scales[there])
    spreads = covars.diagonal(dim1=1, dim2=2)
    weights = splats.opacities[there] * spreads.sum(1)
    ends = []
    for axis in range(3):
        order = splats.means[there, axis].argsort()
        shares = weights[order].cumsum(0) / weights.sum()
        rows = torch.searchsorted(shares, shares.new_tensor([HIDDEN, 1 - HIDDEN])).clamp(max=len(order) - 1)
        wide = 2 * spreads[order[rows], axis].sqrt() * shares.new_tensor([-1.0, 1.0])
        ends.append(splats.means[there, axis][order[rows]] + wide)
    low, high = torch.stack(ends, 1)
    return low, high


def _scenes(file: Path, every: int) -> tuple[Sequence[SplatState | RadianceField], float]:
    """Return a file's scene, or each `every`-th of its frames, and the time between them [s]."""
    if file.suffix not in USD:
        return [load_field(file) if file.suffix == FIELD else read_splats(file)], 1.0
    found = read_usd(file)
    return found.frames[::every], (found.dt or 1.0) * every


def _write_frames(out: Path, frames: list[SplatState], dt: float, every: int, camera: Camera, title: str) -> None:
    if out.suffix == ".html":
        from simworld.render.web import write_html

        write_html(out, frames, dt=dt, camera=camera, title=title, speed=playing_speed(dt, every))
    elif out.suffix in USD:
        from simworld.render.usd import write_usd

        write_usd(out, frames, dt=dt if len(frames) > 1 else None)
    else:
        write_splats(out, frames[0])


def _episode(file: Path, episode: int) -> Trajectory:
    with open_trajectories(file) as found:
        if episode >= len(found):
            raise ValueError(f"{file} holds {len(found)} episodes, from 0; got --episode {episode}.")
        return found[episode]


def _camera(look: Look, shot: Shot) -> Camera:
    return look.camera(width=shot.size[0], height=shot.size[1], azimuth=shot.angles[0], elevation=shot.angles[1])


def _dress(trajectory: Trajectory, shot: Shot) -> Callable[[State], SplatState] | None:
    """Return what poses the splats of a file, bound to the first frame, or None."""
    if shot.splats is None:
        return None
    binding = bind(read_splats(shot.splats), trajectory.initial, mode=shot.mode)  # type: ignore[arg-type]
    return lambda state: pose(binding, state)


def film_scene(
    panels: Mapping[str, Trajectory],
    *,
    path: str | Path,
    camera: Camera,
    look: Look,
    dress: Callable[[State], SplatState] | None = None,
    errors: Mapping[str, Tensor] | None = None,
    measure: str = "error",
    every: int = 1,
) -> Path:
    """Write trajectories of one length side by side as .mp4, .gif or .png, and return the path.

    `dress` turns a state into splats, by default `to_splats` with the `look`. `errors` [t, n] by panel add panels in
    which entities have the colours of how far they are from where they should be, or of another `measure`. A .png
    shows some frames in a row.

    Raises:
        ValueError: trajectories differ in length.
    """
    lengths = {len(t) for t in panels.values()}
    if len(lengths) != 1:
        raise ValueError(f"A film needs trajectories of one length; got lengths {sorted(lengths)}.")
    first = next(iter(panels.values()))
    length = lengths.pop()
    shown = range(0, length, every if Path(path).suffix != ".png" else max(every, -(-length // IN_STRIP)))
    wrong = None if not errors else _error_look(look, errors, first, measure)
    pictures = []
    for t in shown:
        row = [_picture(dress or (lambda s: to_splats(s, look)), p.frame(t), camera) for p in panels.values()]
        for name, values in (errors or {}).items():
            assert wrong is not None
            splats = to_splats(panels[name].frame(t), wrong, values=values[t])
            row.append(render_splats(splats, camera, background=WHITE).clamp(0, 1))
        pictures.append(torch.cat(row, 1))
    names = [*panels, *(f"{name}: {measure}" for name in errors or {})]
    scales = [look.shade if dress is None else None] * len(panels) + [wrong.shade if wrong else None] * len(
        errors or {}
    )
    unit = time_unit({name: field.unit for name, field in first.initial.fields.items()})
    times = [f"{t * first.dt:.2f} {unit}" for t in shown]
    dt = first.dt * every / playing_speed(first.dt * every, every)
    return write_film(path, framed(torch.stack(pictures), names, scales, times), dt=min(dt, LONGEST))


def framed(pictures: Tensor, names: Sequence[str], scales: Sequence[Shade | None], times: Sequence[str]) -> Tensor:
    """Return films [t, h, w, 3] of panels beside each other with their names, the time, and bars of colours below."""
    needed("PIL", "Names on a film", "view", "pillow")
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, _ = pictures.shape
    wide, below = width // len(names), BAR if any(scales) else 0
    bars = [_bar(scale, wide) if scale is not None else None for scale in scales]
    font = ImageFont.load_default(size=13)
    found = torch.empty(count, TITLE + height + below, width, 3, dtype=torch.uint8)
    for t in range(count):
        page = Image.new("RGB", (width, TITLE + height + below), "white")
        page.paste(Image.fromarray((pictures[t] * 255).round().byte().numpy()), (0, TITLE))
        pen = ImageDraw.Draw(page)
        for k, name in enumerate(names):
            said = f"{name}, {times[t]}" if k == 0 else name
            pen.text((k * wide + wide / 2, TITLE / 2), said, fill="black", anchor="mm", font=font)
        for k, bar in enumerate(bars):
            if bar is not None:
                page.paste(bar, (k * wide, TITLE + height))
        found[t] = torch.from_numpy(np.array(page))
    return found


def _picture(dress: Callable[[State], SplatState], state: State, camera: Camera) -> Tensor:
    return render_splats(dress(state), camera, background=WHITE).clamp(0, 1)


def _error_look(look: Look, errors: Mapping[str, Tensor], trajectory: Trajectory, measure: str) -> Look:
    finite = torch.cat([values[values.isfinite()].flatten() for values in errors.values()])
    name = "positions" if "positions" in trajectory.frames or look.shade is None else look.shade.field
    unit = trajectory.initial.fields[name].unit
    most = float(finite.max()) if len(finite) else 0.0
    return replace(look, shade=Shade(field=measure, unit=unit, low=0.0, high=most or 1.0))


def _bar(scale: Shade, width: int) -> Any:
    """Return an image [BAR, width] of a scale's colours between its ends."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (width, BAR), "white")
    span = torch.linspace(scale.low, scale.high, width // 2)
    colors = (scale.colors(span) * 255).round().byte()[None].repeat(10, 1, 1)
    left = (width - width // 2) // 2
    page.paste(Image.fromarray(colors.numpy()), (left, 4))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for place, said, anchor in ((left, f"{scale.low:.3g}", "lt"), (left + width // 2, f"{scale.high:.3g}", "rt")):
        pen.text((place, 18), said, fill="black", anchor=anchor, font=font)
    pen.text((width / 2, 31), scale.label, fill="black", anchor="mt", font=font)
    return page
