"""Radiance fields fitted to photographs."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simworld.kernels.threads import workers
from simworld.models.checkpoint import write_tensors
from simworld.render.camera import Camera
from simworld.render.fields import (
    Bounds,
    HashField,
    RadianceField,
    header_of,
    read_field,
    render_field,
    tensors_of,
)
from simworld.render.images import psnr, ssim
from simworld.render.photos import Photos
from simworld.render.volume import composite_rays

RATES = {"HashField": 2e-2, "PositionalField": 5e-4}
LAST_RATE = 0.03  # of the first, which the rate of learning falls to
MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_RAYS, MOST_RAYS = 256, 2**16  # in a step
MOST_CELLS = 2**24  # looked at when the grid is first made
OCCUPANCY_EVERY, OCCUPANCY_FROM, OCCUPANCY_CELLS = 16, 128, 2**16  # steps, steps, and cells looked at


@dataclass(frozen=True, kw_only=True)
class FieldReport:
    """How a fit goes: steps and seconds so far, the mean squared error of colours, rays and samples of the last step.

    `psnr` [dB] and `ssim` are means over the photographs held out, None where they were not looked at.
    """

    step: int
    seconds: float
    loss: float
    rays: int
    samples: int
    psnr: float | None = None
    ssim: float | None = None


def fit_field(
    photos: Photos,
    *,
    valid: Photos | None = None,
    field: RadianceField | None = None,
    bounds: Bounds | None = None,
    minutes: float | None = None,
    num_steps: int | None = None,
    samples_per_step: int = 2**15,
    learning_rate: float | None = None,
    background: Tensor | Sequence[float] = (1.0, 1.0, 1.0),
    threads: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    log: Callable[[FieldReport], None] | None = None,
    report_every: int = 1000,
) -> RadianceField:
    """Return a field that looks like photographs: `field` itself, trained, or a new `HashField` within `bounds`.

    By default the bounds are those of what all cameras see, or of the photographs' points. Adam takes `num_steps`
    steps, or goes on for `minutes`; the rate of learning falls over either. A step has as many rays as make
    `samples_per_step` samples. Photographs with opacities are compared before random colours, others before
    `background` [3], which is also behind the photographs in `valid`, looked at every `report_every` steps and at the
    end. Each of `threads`, by default as many as torch uses, has a share of the rays: another number rounds otherwise.
    `out` is a file of `load_field` that is written at each report; with `resume` a file that is there is gone on with.

    Raises:
        ValueError: there is no photograph, no budget, a number is not positive, or the file is of another fit.
    """
    _check(photos, minutes, num_steps, samples_per_step, threads, report_every)
    path = None if out is None else Path(out)
    if field is None:
        field = field_for(photos, box_seen(photos) if bounds is None else bounds, seed=seed)
    fit = _Fit(field, photos, seed)
    fit.samples_per_step, fit.background = samples_per_step, torch.as_tensor(background).to(fit.background)
    if resume and path is not None and path.is_file():
        fit.restore(path)
    elif isinstance(fit.field, HashField):
        carve(fit.field, photos)
    rate = RATES[type(fit.field).__name__] if learning_rate is None else learning_rate
    count = threads or torch.get_num_threads()
    with workers(count) as pool:
        begin = time.monotonic() - fit.seconds
        while (progress := _progress(fit.step, fit.seconds, num_steps, minutes)) < 1:
            fit.advance(pool, count, rate * LAST_RATE**progress)
            fit.seconds = time.monotonic() - begin
            ends = _progress(fit.step, fit.seconds, num_steps, minutes) >= 1
            if ends or fit.step % report_every == 0:
                report = fit.report(valid, pool)
                if path is not None:
                    fit.save(path)
                if log is not None:
                    log(report)
    return fit.field


def box_seen(photos: Photos) -> Tensor:
    """Return the box [2, 3] round what photographs show: their points where known, or the ball that all cameras see.

    The ball is round the place that all cameras look towards.

    Raises:
        ValueError: the cameras do not look towards one place.
    """
    if photos.points is not None and len(photos.points) > 1:
        low, high = torch.quantile(photos.points.double(), photos.points.new_tensor([0.01, 0.99]).double(), dim=0)
        margin = 0.1 * (high - low).max()
        return torch.stack([low - margin, high + margin]).float()
    views = torch.stack([camera.viewmat.double().cpu() for camera in photos.cameras])
    ahead, places = views[:, 2, :3], -(views[:, :3, :3].transpose(1, 2) @ views[:, :3, 3:])[..., 0]
    across = torch.eye(3, dtype=ahead.dtype) - ahead[:, :, None] * ahead[:, None]
    whole = across.sum(0)
    if float(torch.linalg.eigvalsh(whole)[0]) < 1e-3 * len(photos):
        raise ValueError("The cameras do not look towards one place; give the bounds of what is to be fitted.")
    centre = torch.linalg.solve(whole, (across @ places[..., None]).sum(0)[:, 0])
    depths = ((centre - places) * ahead).sum(1)
    if not bool((depths > 0).all()):
        raise ValueError("The cameras do not look towards one place; give the bounds of what is to be fitted.")
    widest = [min(one.width / float(one.K[0, 0]), one.height / float(one.K[1, 1])) / 2 for one in photos.cameras]
    radius = float((depths * torch.sin(torch.atan(depths.new_tensor(widest)))).min())
    return torch.stack([centre - radius, centre + radius]).float()


def field_for(photos: Photos, bounds: Bounds, *, seed: int = 0) -> HashField:
    """Return a new field within `bounds`, as fine as the pixels of photographs are at its centre."""
    low, high = torch.as_tensor(bounds, dtype=torch.float64, device="cpu")
    centre, side = (low + high) / 2, float((high - low).max())
    away = [float((camera.position.double().cpu() - centre).norm()) for camera in photos.cameras]
    pixels = [distance / float(camera.K[0, 0]) for distance, camera in zip(away, photos.cameras, strict=True)]
    width = sorted(pixels)[len(pixels) // 2]  # of a pixel at the centre, in the scene's unit
    octaves = min(11, max(6, math.ceil(math.log2(side / width))))
    num_steps = min(1024, max(64, math.ceil(0.8 * float((high - low).norm()) / width)))
    return HashField(
        torch.stack([low, high]), finest=2**octaves, log2_rows=min(19, 2 * octaves + 1), num_steps=num_steps, seed=seed
    )


class _Fit:
    """A field in training, and all that a file has to hold for it to go on."""

    def __init__(self, field: RadianceField, photos: Photos, seed: int) -> None:
        self.field, self.photos, self.seed = field, photos, seed
        self.device = field.bounds.device
        self.pixels = _Pixels(photos, self.device)
        self.parameters = list(field.parameters())
        self.adam = torch.optim.Adam(self.parameters, lr=1.0, betas=(0.9, 0.99), eps=1e-15, fused=True)
        self.step, self.seconds, self.rays, self.samples, self.loss = 0, 0.0, FIRST_RAYS, 0, math.nan
        self.samples_per_step, self.background = 2**15, torch.ones(3, device=self.device)

    def advance(self, pool: ThreadPoolExecutor, threads: int, rate: float) -> None:
        """Take a step."""
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        if isinstance(self.field, HashField) and self.step % OCCUPANCY_EVERY == 0 and self.step >= OCCUPANCY_FROM:
            self.field.update_occupancy(drawn, count=MOST_CELLS if self.step == OCCUPANCY_FROM else OCCUPANCY_CELLS)
        rows = torch.randint(len(self.pixels), (self.rays,), generator=drawn)
        behind = torch.rand(self.rays, 3, generator=drawn)
        seeds = torch.randint(2**62, (threads,), generator=drawn).tolist()
        shares = zip(rows.chunk(threads), behind.chunk(threads), seeds, strict=False)
        done = list(pool.map(lambda share: self._share(*share), shares))
        slopes, errors, counts = zip(*done, strict=True)
        for parameter, parts in zip(self.parameters, zip(*slopes, strict=True), strict=True):
            parameter.grad = functools.reduce(torch.add, parts)
        self.loss, self.samples = sum(errors), sum(counts)
        if not math.isfinite(self.loss):
            raise ValueError(f"The fit went to infinity at step {self.step}; give a lower learning_rate.")
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.step += 1
        wanted = self.rays * min(2.0, max(0.5, self.samples_per_step / max(1, self.samples)))
        self.rays = min(MOST_RAYS, max(threads, int(wanted)))

    def _share(self, rows: Tensor, behind: Tensor, seed: int) -> tuple[list[Tensor], float, int]:
        """Return the gradients of the loss of some rays, their part of the squared error, and their samples."""
        rays = self.pixels.chosen(rows.to(self.device))
        behind = torch.where(rays.clear, behind.to(self.device), self.background)
        wanted = rays.colors * rays.opacities + behind * (1 - rays.opacities)
        generator = torch.Generator().manual_seed(seed)
        total, last, count = behind.new_zeros(()), 0.0, 0
        for one in self.field.passes(rays.origins, rays.directions, generator):
            seen = composite_rays(one.densities, one.colors, one.samples, behind)
            squares = (seen.colors - wanted).square().sum() / (3 * self.rays)
            total, last, count = total + squares, float(squares.detach()), count + len(one.densities)
        slopes = torch.autograd.grad(total, self.parameters, materialize_grads=True)
        return list(slopes), last, count

    def report(self, valid: Photos | None, pool: ThreadPoolExecutor) -> FieldReport:
        """Return how it goes, looked at from the cameras of `valid`."""
        found: dict[str, float] = {}
        if valid is not None and len(valid):
            made = list(pool.map(self._picture, valid.cameras))
            pairs = [(made[k], valid.picture(k, self.background)) for k in range(len(valid))]
            found["psnr"] = sum(float(psnr(a, b)) for a, b in pairs) / len(pairs)
            found["ssim"] = sum(float(ssim(a, b)) for a, b in pairs) / len(pairs)
        return FieldReport(
            step=self.step, seconds=self.seconds, loss=self.loss, rays=self.rays, samples=self.samples, **found
        )

    def _picture(self, camera: Camera) -> Tensor:
        with torch.no_grad():
            return render_field(self.field, camera, background=self.background).clamp(0, 1)

    def save(self, path: Path) -> None:
        """Write the field, with what is needed to go on."""
        state = {"seed": self.seed, "step": self.step, "seconds": self.seconds, "rays": self.rays}
        kept = {
            f"adam.{number}.{name}": self.adam.state[value][name]
            for number, value in enumerate(self.parameters)
            for name in MOMENTS
        }
        write_tensors(tensors_of(self.field) | kept, header_of(self.field) | {"fit": json.dumps(state)}, path)

    def restore(self, path: Path) -> None:
        """Go on from a file.

        Raises:
            ValueError: the file is not of this fit.
        """
        field, header, tensors = read_field(path)
        state = json.loads(header.get("fit", "{}"))
        if header_of(field) != header_of(self.field) or state.get("seed") != self.seed:
            raise ValueError(
                f"{path} is of another fit: its field, bounds or seed differ. Give another file for this one."
            )
        try:
            self.step, self.seconds, self.rays = int(state["step"]), float(state["seconds"]), int(state["rays"])
            for number, value in enumerate(self.parameters):
                moments = {name: tensors[f"adam.{number}.{name}"].to(value.device) for name in MOMENTS}
                if any(moment.shape != value.shape for moment in moments.values()):
                    raise ValueError("moments are of another size")
                self.adam.state[value] = {"step": torch.tensor(float(self.step), device=value.device), **moments}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a fit that could go on ({error}); begin anew.") from error
        self.field.load_state_dict(field.state_dict())


@torch.no_grad()
def carve(field: HashField, photos: Photos) -> None:
    """Mark as empty what of a field's cells a photograph with opacities sees nothing of."""
    side, size = len(field.occupied), field.bounds[1] - field.bounds[0]
    axes = [(torch.arange(side) + 0.5) / side * float(size[k]) + float(field.bounds[0, k]) for k in range(3)]
    reach = float(size.norm()) / side / 2  # from a cell's centre to its corners
    cells = field.possible.flatten().nonzero()[:, 0].cpu()
    for image, camera in zip(photos.images, photos.cameras, strict=True):
        if image.shape[-1] == 3 or not len(cells):
            continue
        places = torch.stack([axes[0][cells // side**2], axes[1][cells // side % side], axes[2][cells % side]], 1)
        view, K = camera.viewmat.float().cpu(), camera.K.float().cpu()
        here = places @ view[:3, :3].T + view[:3, 3]
        depth = here[:, 2]
        at = (here @ K.T)[:, :2] / depth[:, None]
        near = float(depth[depth > reach].min()) if bool((depth > reach).any()) else 1.0
        pixels = math.ceil(reach * float(torch.maximum(K[0, 0], K[1, 1])) / near) + 1
        pixels = min(pixels, max(camera.width, camera.height))
        full = (image[..., 3].cpu() > 0).float()[None, None]
        full = torch.nn.functional.max_pool2d(full, (2 * pixels + 1, 1), 1, (pixels, 0))
        full = torch.nn.functional.max_pool2d(full, (1, 2 * pixels + 1), 1, (0, pixels))[0, 0] > 0
        shown = (depth > reach) & (at >= 0).all(1) & (at < at.new_tensor([camera.width, camera.height])).all(1)
        across, down = at.long().clamp(min=0).unbind(1)
        seen = full[down.clamp(max=camera.height - 1), across.clamp(max=camera.width - 1)]
        cells = cells[~shown | seen]
    kept = torch.zeros(side**3, dtype=torch.bool)
    kept[cells] = True
    field.possible &= kept.view(side, side, side).to(field.possible.device)
    field.occupied &= field.possible


class _Pixels:
    """All pixels of photographs, with the rays through them."""

    def __init__(self, photos: Photos, device: torch.device) -> None:
        full = [
            torch.nn.functional.pad(image.to(device), (0, 4 - image.shape[-1]), value=255) for image in photos.images
        ]
        self.values = torch.cat([image.reshape(-1, 4) for image in full])
        self.clear = torch.tensor([image.shape[-1] == 4 for image in photos.images], device=device)
        self.starts = torch.tensor([0, *(image.shape[0] * image.shape[1] for image in full)], device=device).cumsum(0)
        self.widths = torch.tensor([camera.width for camera in photos.cameras], device=device)
        views = torch.stack([camera.viewmat.double().cpu() for camera in photos.cameras])
        Ks = torch.stack([camera.K.double().cpu() for camera in photos.cameras])
        turns = views[:, :3, :3]
        self.places = -(turns.transpose(1, 2) @ views[:, :3, 3:])[..., 0].float().to(device)
        self.turns = (turns.transpose(1, 2) @ torch.linalg.inv(Ks)).float().to(device)  # from pixels to directions

    def __len__(self) -> int:
        return len(self.values)

    def chosen(self, rows: Tensor) -> _Rays:
        """Return the rays through pixels by number."""
        which = torch.searchsorted(self.starts, rows, right=True) - 1
        place, width = rows - self.starts[which], self.widths[which]
        down = torch.div(place, width, rounding_mode="floor")
        pixels = torch.stack([place % width + 0.5, down + 0.5, torch.ones_like(down)], 1)
        ahead = torch.nn.functional.normalize((self.turns[which] @ pixels[..., None])[..., 0], dim=1)
        values = self.values[rows] / 255
        return _Rays(self.places[which], ahead, values[:, :3], values[:, 3:], self.clear[which, None])


class _Rays(NamedTuple):
    """Rays from `origins` [r, 3] along unit `directions` [r, 3], and the `colors` [r, 3] and `opacities` [r, 1] there.

    Where it is `clear` [r, 1], the photograph has opacities.
    """

    origins: Tensor
    directions: Tensor
    colors: Tensor
    opacities: Tensor
    clear: Tensor


def _progress(step: int, seconds: float, num_steps: int | None, minutes: float | None) -> float:
    """Return the part of the budget that is used up, of whichever is nearer its end."""
    steps = 0.0 if num_steps is None else step / num_steps
    return max(steps, 0.0 if minutes is None else seconds / (60 * minutes))


def _check(
    photos: Photos,
    minutes: float | None,
    num_steps: int | None,
    samples: int,
    threads: int | None,
    report_every: int,
) -> None:
    if not len(photos):
        raise ValueError("fit_field needs a photograph or more; got none.")
    if minutes is None and num_steps is None:
        raise ValueError("fit_field needs an end: give minutes, num_steps or both.")
    numbers = {"minutes": minutes, "num_steps": num_steps, "samples_per_step": samples, "threads": threads}
    for name, number in (numbers | {"report_every": report_every}).items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} of fit_field must be above 0; got {number}.")
