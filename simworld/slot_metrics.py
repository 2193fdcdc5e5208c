"""What slots have found: objects apart from each other, where they are, and whether an embedding has collapsed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_MATCHED = 12  # columns of an exact matching, which takes 2^columns steps a row
COLLAPSED_STD, COLLAPSED_RANK, COLLAPSED_COSINE = 1e-3, 1.5, 0.999  # see Collapse.collapsed


def adjusted_rand_index(truth: Tensor, found: Tensor) -> float:
    """Return how far two labellings [p] of the same things agree, however their labels are named.

    1 for the same parts, 0 on average for parts drawn at random with the same sizes (Hubert and Arabie 1985,
    "Comparing partitions", equation 5): with n_ij the things in part i of one and part j of the other, a_i and b_j
    their sums and n all things, (sum C(n_ij, 2) - E) / ((sum C(a_i, 2) + sum C(b_j, 2)) / 2 - E) with
    E = sum C(a_i, 2) sum C(b_j, 2) / C(n, 2). It is 1 where both have a single part, or all parts of one thing each.

    Raises:
        ValueError: shapes differ, or there are no two things to compare.
    """
    if truth.shape != found.shape or truth.ndim != 1 or len(truth) < 2:
        raise ValueError(
            f"Labellings to compare are two [p] of the same things, two or more; got {list(truth.shape)} and "
            f"{list(found.shape)}."
        )
    _, rows = torch.unique(truth, return_inverse=True)
    _, columns = torch.unique(found, return_inverse=True)
    wide = int(columns.max()) + 1
    table = torch.bincount(rows * wide + columns, minlength=(int(rows.max()) + 1) * wide).view(-1, wide)
    both, one, other = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    expected = one * other / _pairs(table.sum())
    most = (one + other) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _pairs(counts: Tensor) -> float:
    counts = counts.double()
    return float((counts * (counts - 1) / 2).sum())


def foreground_ari(masks: Tensor, found: Tensor) -> Tensor:
    """Return the adjusted Rand index of each frame [T] over the pixels that show a body; NaN where fewer than two do.

    `masks` [T, h, w] are 0 where the background shows and k + 1 where body k does, `found` [T, h, w] the slot that
    has each pixel. How the background is divided counts for nothing, but a body given to the background's slot does.

    Raises:
        ValueError: shapes differ.
    """
    if masks.shape != found.shape or masks.ndim != 3:
        raise ValueError(f"Masks to compare are two [T, h, w]; got {list(masks.shape)} and {list(found.shape)}.")
    values = []
    for true, seen in zip(masks, found, strict=True):
        shown = true > 0
        enough = int(shown.sum()) > 1
        values.append(adjusted_rand_index(true[shown].long(), seen[shown].long()) if enough else math.nan)
    return torch.tensor(values, dtype=torch.float64)


def clip_ari(masks: Tensor, found: Tensor) -> float:
    """Return the adjusted Rand index over the body pixels of all frames together, so that swaps of slots count.

    Raises:
        ValueError: shapes differ, or no two pixels show a body.
    """
    if masks.shape != found.shape or masks.ndim != 3:
        raise ValueError(f"Masks to compare are two [T, h, w]; got {list(masks.shape)} and {list(found.shape)}.")
    shown = masks > 0
    return adjusted_rand_index(masks[shown].long(), found[shown].long())


def best_matching(scores: Tensor) -> Tensor:
    """Return for each row [n] of scores [n, k] a column of its own such that the scores' sum is the largest.

    Exact, by dynamic programming over the sets of columns that are taken (Held and Karp's recursion); among equals
    the columns of lower numbers are taken.

    Raises:
        ValueError: there are more rows than columns, too many columns, or scores that are not finite.
    """
    n, k = scores.shape
    if n > k:
        raise ValueError(f"Each of {n} rows needs a column of its own; there are {k} (more bodies than slots?).")
    if k > MOST_MATCHED:
        raise ValueError(f"A matching has at most {MOST_MATCHED} columns; got {k}.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("Scores to match by must be finite; got NaN or infinity.")
    values = scores.double().tolist()
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in values:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (total, chosen) in best.items():
            for column in range(k):
                if taken >> column & 1:
                    continue
                key, value = taken | 1 << column, total + row[column]
                if key not in longer or value > longer[key][0]:
                    longer[key] = (value, (*chosen, column))
        best = longer
    chosen = max(best.values(), key=lambda found: found[0])[1]
    return torch.tensor(chosen, dtype=torch.long)


def overlaps(masks: Tensor, found: Tensor, num_bodies: int, num_slots: int) -> Tensor:
    """Return shared pixels over joint pixels (IoU) of each body and slot, [T, num_bodies, num_slots]; 0 for none."""
    bodies = masks[..., None] == torch.arange(1, num_bodies + 1, dtype=masks.dtype)
    slots = found[..., None] == torch.arange(num_slots, dtype=found.dtype)
    bodies, slots = bodies.flatten(1, 2).float(), slots.flatten(1, 2).float()
    shared = bodies.transpose(1, 2) @ slots
    joint = bodies.sum(1)[:, :, None] + slots.sum(1)[:, None] - shared
    return shared / joint.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """How much of its space an embedding fills.

    `variances` are those of each dimension. `effective_rank` is the exponential of the entropy of the singular
    values of the centred embeddings, divided by their sum (Roy and Vetterli 2007): 1 if all lie on a line, the
    number of dimensions if they fill all alike; 0 if they are all the same. `mean_cosine` is the mean cosine of the
    angle between two different embeddings: 1 if all point the same way.
    """

    variances: tuple[float, ...]
    effective_rank: float
    mean_cosine: float
    scale: float

    def figures(self) -> dict[str, float]:
        """Return by name what tables show of it."""
        return {
            "effective_rank": self.effective_rank,
            "mean_cosine": self.mean_cosine,
            "mean_variance": sum(self.variances) / len(self.variances),
            "least_variance": min(self.variances),
        }

    @property
    def collapsed(self) -> bool:
        """Return whether all embeddings are the same, or differ along a single line, but for next to nothing."""
        spread = math.sqrt(sum(self.variances) / len(self.variances))
        small = spread <= COLLAPSED_STD * self.scale
        return small or self.effective_rank < COLLAPSED_RANK or self.mean_cosine > COLLAPSED_COSINE


def collapse(embeddings: Tensor) -> Collapse:
    """Return the diagnostics of embeddings [N, d].

    Raises:
        ValueError: there are fewer than two, or they are not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"Embeddings to judge are [N, d], two or more; got {list(embeddings.shape)}.")
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("Embeddings to judge must be finite; got NaN or infinity.")
    x = embeddings.double()
    centred = x - x.mean(0)
    parts = torch.linalg.svdvals(centred)
    total = float(parts.sum())
    shares = parts / total if total > 0 else parts
    entropy = float(-(shares * shares.clamp(min=1e-300).log()).sum())
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    count = len(x)
    cosine = (float(unit.sum(0).square().sum()) - float(unit.square().sum())) / (count * (count - 1))
    return Collapse(
        variances=tuple(centred.square().mean(0).tolist()),
        effective_rank=math.exp(entropy) if total > 0 else 0.0,
        mean_cosine=cosine,
        scale=float(x.square().mean().sqrt()),
    )
