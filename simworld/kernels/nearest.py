"""The nearest of other points, by all distances: for clouds of thousands, where no radius is known."""

from __future__ import annotations

import torch
from torch import Tensor

DISTANCES_AT_ONCE = 2**24


def nearest(points: Tensor, others: Tensor, count: int, *, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the distances [n, count] of the nearest `others` [m, d] to each of `points` [n, d], and their rows.

    Nearest first, a point itself too where it is one of the others; only those of `among` [m] bools, of which there
    must be `count` or more. Differences are taken before squares: far from the origin nothing is lost.
    """
    found = []
    for part in torch.split(points, max(1, DISTANCES_AT_ONCE // max(1, len(others)))):
        away = torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")
        away = away if among is None else torch.where(among, away, torch.inf)
        found.append(away.topk(count, largest=False))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
