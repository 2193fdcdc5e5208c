"""Scenes fitted to photographs and judged on others, what one could show without a fit beside them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from simworld.kernels.threads import workers
from simworld.metrics import Row
from simworld.render.camera import Camera
from simworld.render.fields import RadianceField, load_field, render_field, save_field
from simworld.render.files import FORMATS, read_splats, write_splats
from simworld.render.fit_fields import FieldReport, fit_field
from simworld.render.fit_splats import FitReport, SplatFit, fit_splats
from simworld.render.images import psnr, ssim
from simworld.render.photos import Photos
from simworld.render.splats import render_splats

BASELINES = ("mean_photo", "nearest_photo")
"""What can be shown without a fit: the mean of the known photographs, and the one taken from nearest by."""
FEW = 8  # photographs held out that are looked at while a fit runs
Color = tuple[float, float, float]
Watch = Callable[[FitReport | FieldReport], None]


def fit_splat_file(
    photos: Photos, out: Path, how: SplatFit, *, held: Photos | None = None, background: Color, watch: Watch | None
) -> Path:
    """Fit splats, write them to a file, and return it; what is needed to go on is kept in a file beside it.

    Raises:
        ValueError: `out` is of no format for splats, or the file beside it of another fit.
    """
    check_out(out, "splats")
    training = _training(out, photos)
    made = fit_splats(photos, how, valid=_few(held), background=background, training=training, watch=watch)
    write_splats(out, made)
    training.unlink(missing_ok=True)
    return out


def fit_field_file(
    photos: Photos,
    out: Path,
    *,
    held: Photos | None = None,
    minutes: float | None,
    num_steps: int | None,
    seed: int,
    background: Color,
    watch: Watch | None,
) -> Path:
    """Fit a radiance field, write it to a file, and return it; what is needed to go on is kept in a file beside it.

    Raises:
        ValueError: `out` is no .safetensors, or of another fit.
    """
    check_out(out, "nerf")
    training = _training(out, photos)
    made = fit_field(
        photos,
        valid=_few(held),
        minutes=minutes,
        num_steps=num_steps,
        background=background,
        seed=seed,
        out=training,
        resume=True,
        log=watch,
    )
    save_field(out, made)
    training.unlink(missing_ok=True)
    return out


def photo_rows(name: str, file: Path, known: Photos, held: Photos, *, dataset: str, background: Color) -> list[Row]:
    """Return PSNR [dB] and SSIM of a fitted file's pictures of photographs held out.

    Beside it what needs no fit: the mean of the known photographs, and the one that was taken from nearest by.

    Raises:
        ValueError: there is no photograph.
    """
    if not len(known) or not len(held):
        raise ValueError(f"There must be photographs known and held out; got {len(known)} and {len(held)}.")
    behind = torch.tensor(background)
    scene = load_field(file) if file.suffix == ".safetensors" else read_splats(file)

    def fitted(camera: Camera) -> Tensor:
        if isinstance(scene, RadianceField):
            return render_field(scene, camera, background=behind)
        return render_splats(scene, camera, background=behind)

    pictures = [known.picture(k, behind) for k in range(len(known))]
    same = [p for p in pictures if p.shape == pictures[0].shape]
    mean = torch.stack(same).mean(0)
    draws: dict[str, Callable[[Camera], Tensor]] = {
        name: fitted,
        BASELINES[0]: lambda _: mean,
        BASELINES[1]: lambda camera: pictures[_nearest(known, camera)],
    }
    rows = []
    with workers() as pool:
        for model, draw in draws.items():
            found = pool.map(lambda k, draw=draw: _likeness(draw, held, k, behind), range(len(held)))
            kept = [pair for pair in found if pair is not None]
            for metric, unit, values in zip(("psnr", "ssim"), ("dB", "1"), zip(*kept, strict=True), strict=False):
                rows.append(_row(model, dataset, metric, unit, values))
    return rows


def _training(out: Path, photos: Photos) -> Path:
    """Return the file in which a fit to these photographs is kept until it is done."""
    check = 0
    for image, camera in zip(photos.images, photos.cameras, strict=True):
        for value in (image, camera.viewmat, camera.K):
            check = zlib.crc32(value.contiguous().numpy().tobytes(), check)
    return out.with_name(f"{out.name}.{check:08x}.training")


def check_out(out: Path, kind: str) -> None:
    """Refuse before a fit of a kind, splats or nerf, what could not be written after it.

    Raises:
        ValueError: the file is of no format for the kind, or its folder is not there.
    """
    formats = FORMATS if kind == "splats" else (".safetensors",)
    if out.suffix not in formats:
        raise ValueError(f"{kind} are written to {', '.join(formats)}; got --out '{out}'.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no folder '{out.parent}' for --out '{out}'; make it.")


def _row(model: str, dataset: str, metric: str, unit: str, values: tuple[float, ...]) -> Row:
    return Row(
        model=model,
        dataset=dataset,
        metric=metric,
        horizon="all",
        value=fmean(values),
        unit=unit,
        trajectories=len(values),
        spread=stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
    )


@torch.no_grad()
def _likeness(
    draw: Callable[[Camera], Tensor], held: Photos, number: int, background: Tensor
) -> tuple[float, float] | None:
    """Return PSNR and SSIM; None where a naive picture is of another size than the photograph."""
    picture, photo = draw(held.cameras[number]), held.picture(number, background)
    if picture.shape != photo.shape:
        return None
    shown = picture.clamp(0, 1)
    return float(psnr(shown, photo)), float(ssim(shown, photo))


def _nearest(known: Photos, camera: Camera) -> int:
    """Return which photograph was taken from nearest by, in the direction nearest to the camera's."""
    away = torch.stack([one.viewmat for one in known.cameras]) - camera.viewmat
    places = torch.stack([one.position for one in known.cameras]) - camera.position
    scale = places.norm(dim=1).mean()
    return int((places.norm(dim=1) / scale + away[:, 2, :3].norm(dim=1)).argmin())


def _few(held: Photos | None) -> Photos | None:
    if held is None or len(held) <= FEW:
        return held
    return held.chosen(list(range(0, len(held), len(held) // FEW))[:FEW])
