"""Quantities in units of how they vary: as measured in a data set, or counted in as training shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Moments(nn.Module):
    """Mean and standard deviation [k] of a quantity, and the quantity in units of them.

    An online one begins with what it is given, as if that were one row, and goes on with what it is shown
    (`count`), like the normalizers of Pfaff et al. 2021.
    """

    mean: Tensor
    std: Tensor
    sums: Tensor | None  # [3, k]: how many rows, their sum and that of their squares

    def __init__(self, mean: Tensor, std: Tensor, *, online: bool) -> None:
        super().__init__()
        mean, std = mean.double(), std.double()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        rows = torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()])
        self.register_buffer("sums", rows if online else None)

    def forward(self, values: Tensor) -> Tensor:
        """Return rows [n, k] about their mean, in standard deviations."""
        mean, std = self._both(values)
        return (values - mean) / std

    def back(self, values: Tensor) -> Tensor:
        """Return the quantity [n, k] of normalized rows."""
        mean, std = self._both(values)
        return values * std + mean

    def by_spread(self, values: Tensor) -> Tensor:
        """Return rows [n, k] in standard deviations, from zero."""
        return values / self._both(values)[1]

    def by_length(self, values: Tensor) -> Tensor:
        """Return rows [n, k] by the length of all standard deviations together: directions stay as they are."""
        return values / self._both(values)[1].square().sum().sqrt()

    @property
    def size(self) -> int:
        """How many numbers a row has."""
        return len(self.mean)

    @torch.no_grad()
    def count(self, sums: Tensor) -> None:
        """Count in rows, of which `sums` [3, k] says how many, their sum and that of their squares."""
        if self.sums is not None:
            self.sums += sums.to(self.sums)

    def _both(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (self.mean, self.std) if self.sums is None else mean_and_std(self.sums)
        return mean.to(like), std.to(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = self.sums  # in double precision whatever the model computes in, or what is seen late would not count
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.sums = kept if kept is None else kept.to(self.mean.device)
        return moved


def summed(values: Tensor, noise_std: float = 0.0) -> Tensor:
    """Return [3, k]: of rows [..., k] how many they are, their sum and that of their squares, with noise added."""
    rows = values.reshape(-1, values.shape[-1]).double()
    count = torch.full_like(rows.sum(0), len(rows))
    return torch.stack([count, rows.sum(0), rows.square().sum(0) + count * noise_std**2])


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [k] of rows, the latter such that it can be divided by.

    What rounding leaves of a component that does not vary must not be blown up to unit size, nor what noise or another
    file has of it: it is measured by its mean or, where that is zero, by the field's other components.
    """
    count, total, squares = sums
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    flat = std <= 1e-7 * mean.abs()
    std = torch.where(flat, mean.abs(), std)
    return mean, torch.where(std > 0, std, float(std.max()) or 1.0)
