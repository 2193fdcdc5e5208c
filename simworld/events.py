"""Events of trajectories, pairs of entities and the frames at which they come together, and how two lists agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCES_AT_ONCE = 2**22  # 32 MiB

Key = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class EventScores:
    """How many events were matched, predicted and true; scores of several cases are added and then read."""

    matched: int
    predicted: int
    true: int

    def __add__(self, other: EventScores) -> EventScores:
        return EventScores(
            matched=self.matched + other.matched,
            predicted=self.predicted + other.predicted,
            true=self.true + other.true,
        )

    @property
    def precision(self) -> float:
        """Return the share of predicted events that are true; NaN where none are predicted."""
        return self.matched / self.predicted if self.predicted else math.nan

    @property
    def recall(self) -> float:
        """Return the share of true events that are predicted; NaN where none are true."""
        return self.matched / self.true if self.true else math.nan

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall; 0 where one has no events, NaN where neither has."""
        return 2 * self.matched / (self.predicted + self.true) if self.predicted + self.true else math.nan


def contact_events(positions: Tensor, radii: Tensor, active: Tensor, margin: float = 0.0) -> Tensor:
    """Return [e, 3]: pairs i < j and the frames at which they come together, in order of frames.

    The gap |x_i - x_j| - r_i - r_j of a pair, from `positions` [T, n, d] and `radii` [n], goes from above `margin`
    to no more than it. Pairs that touch in frame 0 come together once they have parted. `active` is [n] or [T, n];
    a pair of which one is not there is apart.
    """
    if positions.ndim != 3 or radii.shape != positions.shape[1:2]:
        raise ValueError(
            f"Contacts need positions [T, n, d] and radii [n]; got {list(positions.shape)} and {list(radii.shape)}."
        )
    if active.dtype != torch.bool or active.shape not in (positions.shape[1:2], positions.shape[:2]):
        raise ValueError(f"active must be bool, [n] or [T, n]; got {list(active.shape)} of {active.dtype}.")
    count = positions.shape[1]
    reach = (radii[:, None] + radii).double() + margin
    one_way = torch.ones(count, count, dtype=torch.bool, device=positions.device).triu(1)
    there = active.expand(positions.shape[:2])
    at_once = 1 + max(1, DISTANCES_AT_ONCE // max(1, count**2))
    events = []
    for start in range(0, len(positions) - 1, at_once - 1):
        x, here = positions[start : start + at_once].double(), there[start : start + at_once]
        apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        together = (apart <= reach) & one_way & here[:, :, None] & here[:, None]
        frames, one, other = (together[1:] & ~together[:-1]).nonzero().unbind(1)
        events.append(torch.stack([one, other, frames + start + 1], 1))
    return torch.cat(events) if events else torch.empty(0, 3, dtype=torch.long, device=positions.device)


def event_f1(predicted: Tensor, true: Tensor, window: int) -> EventScores:
    """Return how events [e, 3] of pairs and frames agree: same pair, at most `window` frames apart, one to one."""
    ours, theirs = _matches(predicted, true, window)
    return EventScores(matched=int(ours.sum()), predicted=len(ours), true=len(theirs))


def event_changes(counterfactual: Tensor, factual: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the events [e, 3] that an intervention created and those that it removed.

    Events of the counterfactual without a match in the factual, in the sense of `event_f1`, and the other way round.
    """
    kept, still = _matches(counterfactual, factual, window)
    return counterfactual[~kept], factual[~still]


def _matches(predicted: Tensor, true: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return which events of each list [e, 3] have a partner in the other; in order of time as many as can be."""
    if window < 0:
        raise ValueError(f"window must be 0 frames or more; got {window}.")
    ours, theirs = _ordered(predicted), _ordered(true)
    found = torch.zeros(len(ours), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
    i = j = 0
    while i < len(ours) and j < len(theirs):
        (one, row), (other, column) = ours[i], theirs[j]
        if one[:2] == other[:2] and abs(one[2] - other[2]) <= window:
            found[0][row] = found[1][column] = True
            i, j = i + 1, j + 1
        elif one < other:
            i += 1
        else:
            j += 1
    return found[0].to(predicted.device), found[1].to(true.device)


def _ordered(events: Tensor) -> list[tuple[Key, int]]:
    if events.ndim != 2 or events.shape[1] != 3 or events.is_floating_point():
        raise ValueError(f"Events are whole numbers [e, 3], a pair and a frame; got {list(events.shape)}.")
    return sorted(((min(i, j), max(i, j), t), row) for row, (i, j, t) in enumerate(events.tolist()))
