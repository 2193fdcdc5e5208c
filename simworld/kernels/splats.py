"""Compositing splats that were projected onto pictures: the PyTorch definition, and the tiles of the fast version.

A splat's opacity at a pixel's centre is min(0.999, o exp(-q / 2)), q the squared distance by its conic; less than 1/255
does not count. Splats are blended front to back until less than 1e-4 of the light would get through. These are the
rules and constants of 3D Gaussian splatting (Kerbl et al. 2023) and gsplat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

MOST_OPAQUE, LEAST_OPAQUE, LEAST_LIGHT = 0.999, 1 / 255, 1e-4
TILE = 16  # pixels along a tile's side
MOST_CHANNELS = 32  # composited together: a tile's sums lie on its thread's stack
FEW = 2**14  # splats for which another thread is not worth its start
MOST_PAIRS = 2**27  # of splats and tiles
PIXELS_AT_ONCE = 2**22  # pixel and splat pairs that the definition lays out together

Backend = Literal["torch", "warp"]

_THREADS: ContextVar[int | None] = ContextVar("tile_threads", default=None)


@contextmanager
def tile_threads(count: int) -> Iterator[None]:
    """Let compositing on CPU take `count` threads, whatever torch is set to.

    Around it are many short operations, which torch does faster with one thread than with several.
    """
    token = _THREADS.set(count)
    try:
        yield
    finally:
        _THREADS.reset(token)


def chosen_threads() -> int:
    """Return how many threads compositing takes on CPU: by default as many as torch."""
    return _THREADS.get() or torch.get_num_threads()


def threads_for(count: int) -> int:
    """Return how many threads on CPU are worth their start to go once through `count` splats."""
    return min(chosen_threads(), 1 + count // FEW)


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Splats on pictures of `width` by `height` pixels, sorted by picture, then front to back.

    `means` [n, 2] in pixels, `conics` [n, 3] (xx, xy, yy of the inverse covariance), `opacities` [n], `colors` [n, c],
    `radii` [n, 2] how far they reach, in whole pixels, and `pictures` [n], ascending, of `num_pictures`.
    """

    means: Tensor
    conics: Tensor
    opacities: Tensor
    colors: Tensor
    radii: Tensor
    pictures: Tensor
    num_pictures: int
    width: int
    height: int


def composite(splats: Projected, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return colours [b, h, w, c] and opacities [b, h, w, 1] of the pictures; differentiable in all but `radii`.

    `backend` is "torch", the definition, or "warp", tiles on as many threads as torch uses, on CPU and CUDA, float32;
    None chooses "warp" for float32 and "torch" for others.

    Raises:
        ValueError: there is no such backend, or "warp" is asked for in another precision than float32.
    """
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}.")
    single = splats.means.dtype == torch.float32
    if backend == "warp" and not single:
        raise ValueError(f"The warp backend composites float32; got {splats.means.dtype}. Convert, or use 'torch'.")
    if backend == "torch" or not single:
        return composite_reference(splats)
    from simworld.kernels.splats_warp import composite_tiles

    if splats.colors.shape[1] <= MOST_CHANNELS:
        return composite_tiles(splats)
    parts = [composite_tiles(replace(splats, colors=part)) for part in torch.split(splats.colors, MOST_CHANNELS, 1)]
    return torch.cat([colors for colors, _ in parts], -1), parts[0][1]


def composite_reference(splats: Projected) -> tuple[Tensor, Tensor]:
    """Define `composite`: every pixel goes through all splats of its picture."""
    rows = torch.searchsorted(
        splats.pictures, torch.arange(splats.num_pictures + 1, device=splats.means.device)
    ).tolist()
    pictures = [_picture(splats, slice(a, b)) for a, b in pairwise(rows)]
    colors, opacities = (torch.stack(parts) for parts in zip(*pictures, strict=True))
    return colors, opacities


def _picture(splats: Projected, rows: slice) -> tuple[Tensor, Tensor]:
    means, conics, opacities, colors = (
        value[rows] for value in (splats.means, splats.conics, splats.opacities, splats.colors)
    )
    x = torch.arange(splats.width, dtype=means.dtype, device=means.device) + 0.5
    y = torch.arange(splats.height, dtype=means.dtype, device=means.device) + 0.5
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    made = []
    for part in torch.split(pixels, max(1, PIXELS_AT_ONCE // max(1, len(means)))):
        dx, dy = (part[:, None] - means).unbind(-1)
        half = 0.5 * (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) + conics[:, 1] * dx * dy
        alphas = (opacities * torch.exp(-half)).clamp(max=MOST_OPAQUE)
        alphas = torch.where((half >= 0) & (alphas >= LEAST_OPAQUE), alphas, 0.0)
        through = torch.cumprod(1 - alphas, 1)
        # What would leave too little light is left out, with all behind it.
        alphas = torch.where(through > LEAST_LIGHT, alphas, 0.0)
        through = torch.cumprod(1 - alphas, 1)
        before = torch.cat([through.new_ones(len(part), 1), through], 1)
        made.append(torch.cat([(before[:, :-1] * alphas) @ colors, 1 - before[:, -1:]], 1))
    whole = torch.cat(made).reshape(splats.height, splats.width, -1)
    return whole[..., :-1], whole[..., -1:]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which splats each tile of 16 by 16 pixels has to go through, front to back.

    Tile t, numbered by picture, row and column, has those in rows `starts[t]` to `starts[t + 1]` of `splats`.
    """

    splats: Tensor
    starts: Tensor
    across: int
    down: int


def tiles_of(splats: Projected) -> Tiles:
    """Return the tiles of pictures, without gradients: every splat in each tile that its radii touch."""
    across, down = -(-splats.width // TILE), -(-splats.height // TILE)
    most = splats.means.new_tensor([across, down])
    means, radii = splats.means.detach(), splats.radii.to(splats.means.dtype)
    low = torch.minimum(((means - radii) / TILE).floor().clamp(min=0), most).int()
    high = torch.minimum(((means + radii) / TILE).ceil().clamp(min=0), most).int()
    sides = (high - low).clamp(min=0)
    counts = (sides[:, 0] * sides[:, 1]).long()
    refuse_giants(int(counts.sum()))
    who = torch.repeat_interleave(torch.arange(len(counts), device=means.device), counts)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(who), device=means.device) - first[who]
    wide = sides[who, 0]
    column, row = low[who, 0] + place % wide, low[who, 1] + torch.div(place, wide, rounding_mode="floor")
    tile = ((splats.pictures[who] * down + row) * across + column).int()
    tile, order = torch.sort(tile, stable=True)  # within a tile splats stay front to back
    edges = torch.arange(splats.num_pictures * down * across + 1, device=means.device, dtype=torch.int32)
    starts = torch.searchsorted(tile, edges).int()
    return Tiles(splats=who[order].int(), starts=starts, across=across, down=down)


def refuse_giants(pairs: int) -> None:
    """Raise a ValueError where there are more `pairs` of splats and tiles than can be gone through."""
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"The splats cover {pairs} tiles of {TILE} x {TILE} pixels in all; {MOST_PAIRS} can be gone through. "
            "They are giants, or the camera is among them: step back, take fewer pixels, or raise near_plane."
        )
