"""Who interacts with whom: directed edges, sorted by receiver, never truncated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simworld.state import State

SPRING_TO_SECOND, SPRING_TO_FIRST, PAIR = 0, 1, 2
NUM_RELATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Directed edges, sorted by receiver: messages go from `senders` [e] to `receivers` [e].

    `relations` [e] says what joins them: a spring (the two directions told apart, since engines solve
    joints in order) or nearness. `springs` [e] is the row of the spring, -1 where there is none.
    """

    senders: Tensor
    receivers: Tensor
    relations: Tensor
    springs: Tensor


@torch.no_grad()
def object_edges(state: State, *, margin: float | None) -> Edges:
    """Return the edges between bodies: along springs, and between all others nearer than `margin`.

    Nearness is the distance between surfaces, in the unit of the positions; `margin=None` joins every pair
    of a scene. A pair that a spring joins has the spring's edges only. Fixed and inactive bodies receive
    nothing; inactive ones send nothing.
    """
    receives = state.active & ~state.fixed if "fixed" in state else state.active
    parts = [_pairs(state, receives, margin)]
    if "springs" in state and len(state.springs):
        parts.insert(0, _springs(state, receives))
    senders, receivers, relations, springs = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort(receivers, stable=True)
    return Edges(senders=senders[order], receivers=receivers[order], relations=relations[order], springs=springs[order])


Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def _springs(state: State, receives: Tensor) -> Columns:
    first, second = state.springs.unbind(1)
    rows = torch.arange(len(first), device=first.device)
    senders, receivers = torch.cat([first, second]), torch.cat([second, first])
    relations = torch.cat([torch.full_like(first, SPRING_TO_SECOND), torch.full_like(first, SPRING_TO_FIRST)])
    keep = (receives[receivers] & state.active[senders]).nonzero()[:, 0]
    return senders[keep], receivers[keep], relations[keep], rows.repeat(2)[keep]


def _pairs(state: State, receives: Tensor, margin: float | None) -> Columns:
    """Compare all bodies within each scene, the scenes padded to equal size."""
    place, start, size = _places(state)
    position = place.new_full((state.num_scenes * size,), -1)
    position[place] = torch.arange(state.num_entities, device=place.device)
    grid = position.view(state.num_scenes, size)
    near = _spread(receives, place, grid)[:, :, None] & _spread(state.active, place, grid)[:, None]
    near.diagonal(dim1=1, dim2=2).fill_(False)
    if "springs" in state and len(state.springs):
        first, second = state.springs.unbind(1)
        scene, row, column = state.batch[first], first - start[first], second - start[second]
        near[scene, row, column] = False
        near[scene, column, row] = False
    if margin is not None:
        points = _spread(state.positions, place, grid)
        reach = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        if "radii" in state:
            radii = _spread(state.radii, place, grid)
            reach = reach - (radii[:, :, None] + radii[:, None])
        near &= reach < margin
    scene, row, column = near.nonzero(as_tuple=True)
    receivers, senders = grid[scene, row], grid[scene, column]
    return senders, receivers, torch.full_like(senders, PAIR), torch.full_like(senders, -1)


def _places(state: State) -> tuple[Tensor, Tensor, int]:
    """Return each entity's cell in the padded grid, the first entity of its scene, and the grid's width."""
    counts = torch.bincount(state.batch, minlength=state.num_scenes)
    size = int(counts.max()) if state.num_scenes else 0
    start = (counts.cumsum(0) - counts)[state.batch]
    entity = torch.arange(state.num_entities, device=state.device)
    return state.batch * size + entity - start, start, size


def _spread(values: Tensor, place: Tensor, grid: Tensor) -> Tensor:
    """Return per-entity values in the padded grid, zero where it is empty."""
    flat = values.new_zeros(grid.numel(), *values.shape[1:])
    flat[place] = values
    return flat.view(*grid.shape, *values.shape[1:])
