"""The box that a scene lies in: what leaves on one side of a periodic axis comes in on the other."""

from __future__ import annotations

import torch
from torch import Tensor

from simworld.state import State


def wrapped(state: State, positions: Tensor) -> Tensor:
    """Return positions [..., n, d] of the state's entities, moved into the box along its periodic axes.

    What lies in the box stays as it is, bit for bit.
    """
    if "periodic" not in state:
        return positions
    lower, size, periodic = _box(state)
    inside = lower + (positions - lower).remainder(size)
    # What lies just under the lower side is rounded up to the upper one, which is the lower one again.
    inside = torch.where(inside >= lower + size, lower, inside)
    return torch.where(periodic & ((positions < lower) | (positions >= lower + size)), inside, positions)


def outside(state: State, positions: Tensor) -> Tensor:
    """Return which of the positions [..., n, d] lie beyond a wall of the box, [..., n]; a periodic axis has none."""
    if "boundaries" not in state:
        return torch.zeros_like(positions[..., 0], dtype=torch.bool)
    lower, upper = state.boundaries[state.batch].unbind(1)
    beyond = (positions < lower) | (positions > upper)
    return (beyond & ~state.periodic[state.batch] if "periodic" in state else beyond).any(-1)


def inside(state: State, positions: Tensor) -> Tensor:
    """Return positions [..., n, d], those beyond a wall of the box moved to the wall; periodic axes have none."""
    if "boundaries" not in state:
        return positions
    lower, upper = state.boundaries[state.batch].unbind(1)
    kept = torch.minimum(torch.maximum(positions, lower), upper)
    return torch.where(state.periodic[state.batch], positions, kept) if "periodic" in state else kept


def shortest(state: State, ways: Tensor, entities: Tensor | None = None) -> Tensor:
    """Return ways [..., n, d] from one place to another, along periodic axes the shortest of those there are.

    Row i of `ways` belongs to entity i, or to `entities`[i].
    """
    if "periodic" not in state:
        return ways
    _, size, periodic = _box(state)
    if entities is not None:
        size, periodic = size.index_select(0, entities), periodic.index_select(0, entities)
    return torch.where(periodic, ways - size * (ways / size).round(), ways)


def _box(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower corner, size and periodic axes of the box round each entity, each [n, d]."""
    if "boundaries" not in state:
        raise ValueError("A state with periodic axes needs their ends; give it boundaries [b, 2, d].")

    def boxes(state: State) -> tuple[Tensor, Tensor, Tensor]:
        lower, upper = state.boundaries[state.batch].unbind(1)
        return lower, upper - lower, state.periodic[state.batch]

    return state.derived("box", ("boundaries", "periodic", "batch"), boxes)
