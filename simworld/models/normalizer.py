"""Quantities in units of how they vary: as measured in a data set, or counted in as training shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST_SEEN = 1e7  # rows, after which an online normalizer stays as it is


class Moments(nn.Module):
    """Mean and standard deviation [k] of a quantity, and the quantity in units of them.

    An online one begins with what it is given, as if that were one row, and in training counts in every row that is
    normalized, until `MOST_SEEN` (as the normalizers of Pfaff et al. 2021 do).
    """

    mean: Tensor
    std: Tensor
    sums: Tensor | None  # [3, k]: how many rows, their sum and that of their squares

    def __init__(self, mean: Tensor, std: Tensor, *, online: bool) -> None:
        super().__init__()
        self.register_buffer("mean", mean.double(), persistent=False)
        self.register_buffer("std", std.double(), persistent=False)
        rows = torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()]).double()
        self.register_buffer("sums", rows if online else None)

    def forward(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Return rows [n, k] about their mean, in standard deviations; those `where` [n] are counted in."""
        self._count(values if where is None else values[where])
        mean, std = self._both(values)
        return (values - mean) / std

    def back(self, values: Tensor) -> Tensor:
        """Return the quantity [n, k] of normalized rows."""
        mean, std = self._both(values)
        return values * std + mean

    def by_spread(self, values: Tensor) -> Tensor:
        """Return rows [n, k] in standard deviations, from zero: what is turned round changes its sign."""
        self._count(values)
        return values / self._both(values)[1]

    def by_length(self, values: Tensor) -> Tensor:
        """Return rows [n, k] by the length of all standard deviations together: directions stay as they are."""
        self._count(values)
        return values / self._both(values)[1].square().sum().sqrt()

    @property
    def size(self) -> int:
        """How many numbers a row has."""
        return len(self.mean)

    def _both(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.sums is None:
            return self.mean.to(like), self.std.to(like)
        count, total, squares = self.sums
        mean = total / count
        std = sound((squares / count - mean.square()).clamp(min=0).sqrt(), mean)
        return mean.to(like), std.to(like)

    @torch.no_grad()
    def _count(self, values: Tensor) -> None:
        if self.sums is not None and self.training and len(values) and float(self.sums[0, 0]) < MOST_SEEN:
            rows = values.detach().double()
            self.sums += torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = self.sums  # in double precision whatever the model computes in, or what is seen late would not count
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.sums = kept if kept is None else kept.to(self.mean.device)
        return moved


def sound(std: Tensor, mean: Tensor) -> Tensor:
    """Return standard deviations [k] by which to divide.

    What rounding leaves of a component that does not vary must not be blown up to unit size, nor what noise or another
    file has of it: it is measured by its mean or, where that is zero, by the field's other components.
    """
    flat = std <= 1e-7 * mean.abs()
    made = torch.where(flat, mean.abs(), std)
    return torch.where(made > 0, made, float(made.max()) or 1.0)
