"""Convolutions over a grid at several spacings, in 2-D and 3-D (U-Net: Ronneberger et al. 2015, arXiv 1505.04597)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

FIRST_SHARE = 0.3  # of the usual size of weights at the end of a residual block, which so begins near the identity


class UNet(nn.Module):
    """From channels of a grid's nodes to channels of the same nodes, by a residual block at each spacing down and up.

    `widths` are the channels at each spacing, which doubles from one to the next. No norms: what is far away from
    a node has no part in what it gets but through the convolutions.
    """

    def __init__(self, num_inputs: int, widths: Sequence[int], num_outputs: int, num_dimensions: int) -> None:
        super().__init__()
        plain, transposed = (nn.Conv2d, nn.ConvTranspose2d) if num_dimensions == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.first = plain(num_inputs, widths[0], 3, padding=1)
        self.descending = nn.ModuleList(ResidualBlock(width, num_dimensions) for width in widths)
        self.ascending = nn.ModuleList(ResidualBlock(width, num_dimensions) for width in widths)
        self.coarser = nn.ModuleList(plain(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.finer = nn.ModuleList(transposed(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.last = plain(widths[0], num_outputs, 1)

    @property
    def width(self) -> int:
        """How many channels the widest layer at the first spacing has."""
        return max(self.first.in_channels, self.first.out_channels)

    @property
    def num_kept(self) -> int:
        """How many numbers training keeps for each node, at most."""
        return self.width + 20 * self.first.out_channels

    @property
    def multiple(self) -> int:
        """Of what the number of nodes along each axis must be a multiple."""
        return 1 << len(self.coarser)

    @property
    def reach(self) -> int:
        """Across how many nodes something can be felt."""
        spacings = [1 << level for level in range(len(self.descending))]
        return 1 + 4 * sum(spacings) + 2 * sum(spacings[:-1])

    def forward(self, channels: Tensor) -> Tensor:
        """Return [b, o, ...] of channels [b, i, ...]."""
        levels = [self.first(channels)]
        for level, block in enumerate(self.descending):
            if level:
                levels.append(self.coarser[level - 1](levels[-1]))
            levels[-1] = block(levels[-1])
        made = self.ascending[-1](levels[-1])
        for level in reversed(range(len(self.finer))):
            made = self.ascending[level](levels[level] + self.finer[level](made))
        last: Tensor = self.last(functional.silu(made))
        return last


class ResidualBlock(nn.Module):
    """What two convolutions of three nodes make of the channels, added to them."""

    def __init__(self, width: int, num_dimensions: int) -> None:
        super().__init__()
        kind = nn.Conv2d if num_dimensions == 2 else nn.Conv3d
        self.inner = kind(width, width, 3, padding=1)
        self.outer = kind(width, width, 3, padding=1)
        self.outer.weight.data.mul_(FIRST_SHARE)

    def forward(self, channels: Tensor) -> Tensor:
        """Return [b, c, ...] of as many channels."""
        made: Tensor = channels + self.outer(functional.silu(self.inner(functional.silu(channels))))
        return made
