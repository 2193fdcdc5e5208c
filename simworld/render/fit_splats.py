"""Splats fitted to photographs, as 3D Gaussian splatting does (Kerbl et al. 2023)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from simworld.kernels.splats import tile_threads
from simworld.kernels.threads import one_thread
from simworld.kinds import SplatState
from simworld.render.grow import RATES, Adapted, densify, relocate, wander
from simworld.render.harmonics import MOST_DEGREE
from simworld.render.images import psnr, ssim
from simworld.render.photos import Photos
from simworld.render.rasterize import rasterization
from simworld.render.splats import planes
from simworld.render.starts import starting_points

Strategy = Literal["mcmc", "densify"]


@dataclass(frozen=True, kw_only=True)
class SplatFit:
    """How splats are fitted.

    It ends after `num_steps` pictures, or after `minutes` if these are given; rates fall with the share that is done.
    `most` is how many splats there may be, `degree` the highest of the harmonics, which are let in one after another
    every `degree_every` steps; `dissimilarity` is the weight of 1 - SSIM beside the mean absolute difference.
    `strategy` says how splats come and go: "densify" splits and clones where the picture pulls at them and drops the
    transparent ones (Kerbl et al. 2023, without resets of the opacities), "mcmc" moves the transparent ones onto
    others and lets all wander a little (Kheradmand et al. 2024). Every `refine_every` steps, from `refine_from` on
    until a share `refine_until` is done.
    """

    num_steps: int = 10_000
    minutes: float | None = None
    most: int = 20_000
    initial: int = 10_000
    degree: int = 2
    degree_every: int = 1000
    dissimilarity: float = 0.2
    strategy: Strategy = "mcmc"
    refine_from: int = 300
    refine_until: float = 0.8
    refine_every: int = 100
    evaluate_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "most", "initial", "degree_every", "refine_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be above 0; got {self.minutes}.")
        if self.degree not in range(MOST_DEGREE + 1) or not 0 <= self.dissimilarity <= 1:
            raise ValueError(
                f"degree must be 0 to {MOST_DEGREE} and dissimilarity 0 to 1; got {self.degree}, {self.dissimilarity}."
            )
        if self.strategy not in get_args(Strategy) or self.initial > self.most:
            raise ValueError(
                f"strategy must be one of {', '.join(get_args(Strategy))}, and initial no more than most; got "
                f"{self.strategy!r}, {self.initial} and {self.most}."
            )


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What the loop tells whoever watches: `psnr` [dB] and `ssim` of photographs held out, None where none are."""

    step: int
    seconds: float
    num_splats: int
    loss: float
    psnr: float | None = None
    ssim: float | None = None


def fit_splats(
    photos: Photos,
    how: SplatFit,
    *,
    valid: Photos | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    training: str | Path | None = None,
    watch: Callable[[FitReport], None] | None = None,
) -> SplatState:
    """Return splats that look like the photographs, before `background` where these have opacities.

    `training` is a file in which all that changes is kept at every report; where it is there, the fit goes on from it.
    Without a limit in minutes, on CPU, it goes on as if it had not been interrupted. Compositing takes as many threads
    as torch is set to, the rest one: it is made of operations too short for two.

    Raises:
        ValueError: there is no photograph, the file is of another fit, or the loss is no longer finite.
    """
    if not len(photos):
        raise ValueError("fit_splats needs a photograph or more; got none.")
    file = None if training is None else Path(training)
    with one_thread() as before, tile_threads(before):
        points, colors = starting_points(photos, how.initial, seed=how.seed)
        run = Adapted.start(points, colors, how.degree, named={**asdict(how), "background": list(background)})
        if file is not None and file.is_file():
            run.resume(file)
        _loop(run, photos, valid, how, torch.tensor(background), file, watch)
    return run.state()


def _loop(
    run: Adapted,
    photos: Photos,
    valid: Photos | None,
    how: SplatFit,
    background: Tensor,
    file: Path | None,
    watch: Callable[[FitReport], None] | None,
) -> None:
    since, loss = time.monotonic() - run.seconds, math.nan
    share = _share(run, how)
    while share < 1:
        loss = _step(run, photos, how, background, share)
        run.step, run.seconds = run.step + 1, time.monotonic() - since
        if how.refine_from <= run.step and share < how.refine_until and run.step % how.refine_every == 0:
            generator = _generator(how.seed, 1, run.step)
            (densify if how.strategy == "densify" else relocate)(run, how.most, generator)
        share = _share(run, how)
        if run.step % how.evaluate_every == 0 or share >= 1:
            if file is not None:
                run.save(file)
            if watch is not None:
                watch(_report(run, valid, background, loss))


def _share(run: Adapted, how: SplatFit) -> float:
    return run.step / how.num_steps if how.minutes is None else run.seconds / (60 * how.minutes)


def _step(run: Adapted, photos: Photos, how: SplatFit, background: Tensor, share: float) -> float:
    """Take one step down the loss of one photograph, and return the loss."""
    order = torch.randperm(len(photos), generator=_generator(how.seed, 2, run.step // len(photos)))
    number = int(order[run.step % len(photos)])
    degree = min(how.degree, run.step // how.degree_every)
    made, meta = _picture(run, photos, number, background, degree)
    target = photos.picture(number, background)
    loss = (1 - how.dissimilarity) * (made - target).abs().mean() + how.dissimilarity * (1 - ssim(made, target))
    whole = loss
    if how.strategy == "mcmc":
        whole = loss + 0.01 * (run.opacities().mean() + run.scales().mean())
    elif how.strategy == "densify":
        meta["means2d"].retain_grad()
    whole.backward()  # type: ignore[no-untyped-call]
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"The loss is not finite at step {run.step + 1}; look at the photographs and their cameras.")
    if how.strategy == "densify":
        run.pulled(meta["gaussian_ids"], meta["means2d"].grad, (target.shape[1], target.shape[0]))
    rate = RATES["means"] * run.extent * 0.01**share
    run.descend(rate)
    if how.strategy == "mcmc":
        wander(run, rate, _generator(how.seed, 3, run.step))
    return value


def _picture(
    run: Adapted, photos: Photos, number: int, background: Tensor, degree: int
) -> tuple[Tensor, dict[str, Any]]:
    camera = photos.cameras[number]
    near, far = planes(run["means"].detach(), camera.viewmat[None])
    made, _, meta = rasterization(
        run["means"],
        run["quats"],
        run.scales(),
        run.opacities(),
        run.harmonics(degree),
        camera.viewmat[None],
        camera.K[None],
        camera.width,
        camera.height,
        near_plane=near,
        far_plane=far,
        sh_degree=degree,
        backgrounds=background[None],
    )
    return made[0], meta


@torch.no_grad()
def _report(run: Adapted, valid: Photos | None, background: Tensor, loss: float) -> FitReport:
    found: dict[str, float] = {}
    if valid is not None and len(valid):
        made = [_picture(run, valid, k, background, run.degree)[0].clamp(0, 1) for k in range(len(valid))]
        pairs = [(one, valid.picture(k, background)) for k, one in enumerate(made)]
        found["psnr"] = sum(float(psnr(a, b)) for a, b in pairs) / len(pairs)
        found["ssim"] = sum(float(ssim(a, b)) for a, b in pairs) / len(pairs)
    return FitReport(step=run.step, seconds=run.seconds, num_splats=len(run["means"]), loss=loss, **found)


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator that is a function of the numbers alone, so that an interrupted fit goes on the same."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
