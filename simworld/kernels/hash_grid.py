"""Features of points from grids of several resolutions, hashed where they are fine (Müller et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from typing import Literal, get_args

import torch
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)
CORNERS = tuple(product((0, 1), repeat=3))

Backend = Literal["torch", "warp"]


@dataclass(frozen=True)
class GridLevels:
    """Grids over the unit cube: `resolutions`, cells along a side, of each level, in a table of rows of features.

    A level whose corners fit into `most_entries`, a power of two, has a row for each; others share that many by hash.

    Raises:
        ValueError: there is no level, a resolution is not positive or beyond 65535, or the entries no power of two.
    """

    resolutions: tuple[int, ...]
    most_entries: int

    def __post_init__(self) -> None:
        if not self.resolutions or not all(0 < resolution < 2**16 for resolution in self.resolutions):
            raise ValueError(f"A grid needs levels of 1 to 65535 cells along a side; got {self.resolutions}.")
        if self.most_entries < 8 or self.most_entries > 2**26 or self.most_entries & (self.most_entries - 1):
            raise ValueError(f"The entries of a level must be a power of two, 2^3 to 2^26; got {self.most_entries}.")

    @staticmethod
    def geometric(num_levels: int, coarsest: int, finest: int, most_entries: int) -> GridLevels:
        """Return levels that grow from the coarsest to the finest by one factor.

        Raises:
            ValueError: there is no level, or the finest is coarser than the coarsest.
        """
        if num_levels < 1 or not 0 < coarsest <= finest:
            raise ValueError(f"A grid needs levels from coarse to fine; got {num_levels} from {coarsest} to {finest}.")
        growth = (finest / coarsest) ** (1 / max(1, num_levels - 1))
        return GridLevels(tuple(int(coarsest * growth**level + 1e-6) for level in range(num_levels)), most_entries)

    @property
    def entries(self) -> tuple[int, ...]:
        """Rows of each level."""
        return tuple(min((resolution + 1) ** 3, self.most_entries) for resolution in self.resolutions)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each level, and at the end the number of all rows."""
        return tuple(accumulate(self.entries, initial=0))

    def is_hashed(self, level: int) -> bool:
        """Whether a level has more corners than rows."""
        return (self.resolutions[level] + 1) ** 3 > self.most_entries


def encode(points: Tensor, table: Tensor, levels: GridLevels, *, backend: str | None = None) -> Tensor:
    """Return the features [n, l * f] of `points` [n, 3] in the unit cube, level after level; differentiable in both.

    `table` [m, f] has the rows of all levels. Points outside are taken to the cube's surface. `backend` is "torch",
    the definition, or "warp", compiled for the CPU, float32; None chooses "warp" where it is able.

    Raises:
        ValueError: shapes do not fit, there is no such backend, or "warp" is not able.
    """
    if points.ndim != 2 or points.shape[1] != 3 or table.ndim != 2 or len(table) != levels.starts[-1]:
        raise ValueError(
            f"encode takes points [n, 3] and a table [{levels.starts[-1]}, f]; got {list(points.shape)} and "
            f"{list(table.shape)}."
        )
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}.")
    able = points.dtype == table.dtype == torch.float32 and points.device.type == "cpu"
    if backend == "warp" and not able:
        raise ValueError(f"The warp backend encodes float32 on the CPU; got {points.dtype} on {points.device}.")
    if backend == "torch" or not able:
        return encode_reference(points, table, levels)
    from simworld.kernels.hash_grid_warp import encode_tables

    return encode_tables(points, table, levels)


def encode_reference(points: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
    """Define `encode`: at each level, the rows of the eight corners round a point, weighted by nearness."""
    made = []
    for level, resolution in enumerate(levels.resolutions):
        at = points.clamp(0, 1) * resolution
        cell = at.detach().long().clamp(max=resolution - 1)
        part = at - cell
        found = table.new_zeros(len(points), table.shape[1])
        for corner in CORNERS:
            side = torch.tensor(corner, device=points.device)
            weights = torch.where(side == 1, part, 1 - part).prod(1, keepdim=True)
            found = found + weights * table[row_of(cell + side, level, levels)]
        made.append(found)
    return torch.cat(made, 1)


def row_of(corners: Tensor, level: int, levels: GridLevels) -> Tensor:
    """Return the rows [n] of the table at `corners` [n, 3] of a level's cells."""
    x, y, z = corners.unbind(1)
    start, along = levels.starts[level], levels.resolutions[level] + 1
    if not levels.is_hashed(level):
        return start + x + along * (y + along * z)
    return start + ((x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & (levels.most_entries - 1))
