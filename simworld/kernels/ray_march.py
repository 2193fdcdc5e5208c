"""Where rays run through the occupied cells of a grid: the samples that a radiance field is looked at."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PLACES_AT_ONCE = 2**22  # places on rays that the definition lays out together

Backend = Literal["torch", "warp"]


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    places: Tensor,
    occupied: Tensor,
    bounds: Tensor,
    step: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return distances [n] on rays, sorted by ray, then outwards, and the first and last of each ray, [r + 1].

    Rays from `origins` [r, 3] along unit `directions` [r, 3] are looked at every `step` from `near` to `far` [r], at
    `places` [r], 0 to 1, within each step; kept is what is in a cell of `occupied` [k, k, k] (x, y, z) of the box
    `bounds` [2, 3]. `backend` is "torch", the definition, or "warp", for the CPU, float32; None chooses.

    Raises:
        ValueError: the step is not positive, a ray has no end, there is no such backend, or "warp" is not able.
    """
    if not step > 0:
        raise ValueError(f"march needs a step above 0; got {step}.")
    if not bool(torch.isfinite(far - near).all()):
        raise ValueError("march needs rays that end; origins, directions or bounds are not finite.")
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}.")
    able = origins.dtype == torch.float32 and origins.device.type == "cpu"
    if backend == "warp" and not able:
        raise ValueError(f"The warp backend marches float32 on the CPU; got {origins.dtype} on {origins.device}.")
    given = (origins, directions, near, far, places, occupied, bounds)
    if backend == "torch" or not able:
        return march_reference(*given, step)
    from simworld.kernels.ray_march_warp import march_rays

    return march_rays(*given, step)


def march_reference(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    places: Tensor,
    occupied: Tensor,
    bounds: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Define `march`: lay all steps of all rays out, and keep those in occupied cells."""
    most = int(((far - near).max() / step).ceil()) if len(near) else 0
    scale = len(occupied) / (bounds[1] - bounds[0])
    found, counts = [], []
    for rows in torch.split(torch.arange(len(near), device=near.device), max(1, PLACES_AT_ONCE // max(1, most))):
        steps = torch.arange(most, device=near.device)
        at = near[rows, None] + (steps + places[rows, None]) * step
        inside = at < far[rows, None]
        spots = origins[rows, None] + at[..., None] * directions[rows, None]
        cells = ((spots - bounds[0]) * scale).long().clamp(0, len(occupied) - 1)
        inside &= occupied[cells[..., 0], cells[..., 1], cells[..., 2]]
        found.append(at[inside])
        counts.append(inside.sum(1))
    sums = torch.cat([torch.zeros(1, dtype=torch.long, device=near.device), *counts]).cumsum(0)
    return torch.cat([near.new_zeros(0), *found]), sums
