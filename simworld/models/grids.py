"""Where the entities of scenes meet: grids that they give to and read from, and convolutions over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simworld.kernels.neighbors import room
from simworld.kernels.particle_grid import Stencil, from_grid, splines, to_grid
from simworld.models.unet import UNet

MARGIN = 2  # cells beyond each side of a box, so that what lies at it has all its nodes
ROUNDING = 1e-4  # of a cell, by which a box may be larger than whole cells
THIN = 0.05  # entities at a node, under which a mean over them fades to zero


@dataclass(frozen=True)
class Meeting:
    """Entities `rows` [r] of `scenes` [s] whose grids have the same `size`, at the nodes round them.

    Sums to nodes and from them are plain ones, and those weighted by the way from an entity to the node along each axis
    as well, so that slopes are told too.
    """

    scenes: Tensor
    rows: Tensor
    size: tuple[int, ...]
    stencils: tuple[Stencil, ...]

    @staticmethod
    def of(places: Tensor, batch: Tensor, active: Tensor, boxes: Tensor, network: UNet) -> list[Meeting]:
        """Return the meetings of entities at places [n, d] in boxes [b, d], in cells from the box's lower corner.

        Nodes lie one cell apart from `MARGIN` cells before that corner on; entities that have nodes beyond all that
        there are, or that are not `active` [n], take no part. The grids are those that the `network` can take.

        Raises:
            ValueError: the grids would not fit in memory.
        """
        multiple = network.multiple
        sizes = ((boxes - ROUNDING).ceil().long() + 2 * MARGIN + 1 + multiple - 1) // multiple * multiple
        _check_room(sizes, network, places.element_size())
        kinds, kind = torch.unique(sizes, dim=0, return_inverse=True)
        found = []
        for number, size in enumerate(kinds.tolist()):
            # Boxes of one size are one batch of convolutions.
            scenes, rows = (kind == number).nonzero()[:, 0], (kind[batch] == number).nonzero()[:, 0]
            numbers = torch.searchsorted(scenes, batch[rows])
            stencils = _stencils(places[rows] + MARGIN, numbers, active[rows], len(scenes), size)
            found.append(Meeting(scenes, rows, tuple(size), stencils))
        return found

    def summed(self, values: Tensor) -> Tensor:
        """Return [g, (1 + d) k] of values [r, k] of entities; the first k columns are the plain sums."""
        return torch.cat([to_grid(values, stencil) for stencil in self.stencils], 1)

    def convolved(self, network: nn.Module, values: Tensor) -> Tensor:
        """Return what a network of channels makes of values [g, k] of nodes, [g, o]."""
        channels = values.view(len(self.scenes), *self.size, -1).movedim(-1, 1)
        made: Tensor = network(channels).movedim(1, -1).flatten(0, -2)
        return made

    def read(self, values: Tensor) -> Tensor:
        """Return [r, (1 + d) k] of values [g, k] of nodes."""
        return torch.cat([from_grid(values, stencil) for stencil in self.stencils], 1)

    def nodes(self, like: Tensor) -> Tensor:
        """Return where the nodes of each scene are, [s, g / s, d], in cells from the lower corners of their boxes."""
        steps = [torch.arange(count, device=like.device) - MARGIN for count in self.size]
        places = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, -2).to(like)
        return places.expand(len(self.scenes), *places.shape)


def _stencils(
    places: Tensor, batch: Tensor, active: Tensor, num_scenes: int, size: Sequence[int]
) -> tuple[Stencil, ...]:
    """Return the stencil of entities at places [r, d] from the first node, and for each axis that weighted by ways."""
    numbers, weights, ways = splines(places)
    last = torch.tensor(size, device=places.device) - 1
    there = ((numbers >= 0) & (numbers <= last)).all(-1).all(-1) & active
    flat = batch[:, None]
    for axis, count in enumerate(size):
        flat = flat * count + numbers[..., axis].clamp(0, count - 1)
    plain = Stencil.of(flat, torch.where(there[:, None], weights, 0.0), num_scenes * math.prod(size))
    return (plain, *(plain.weighted(way) for way in ways.unbind(-1)))


def _check_room(sizes: Tensor, network: UNet, number_bytes: int) -> None:
    kept = network.num_kept if torch.is_grad_enabled() else 3 * network.width
    wanted = float(sizes.double().prod(1).sum())
    if wanted > room(sizes.device, kept * number_bytes):
        raise ValueError(
            f"Grids of up to {int(sizes.amax())} nodes along an axis have {wanted:.3g} nodes, which take about "
            f"{wanted * kept * number_bytes / 2**30:.3g} GiB; take wider cells, boundaries no wider than where "
            "entities are, or fewer scenes at once."
        )
