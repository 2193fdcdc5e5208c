"""How codes of objects change from frame to frame: by interactions, alone, or all of them joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Cores(nn.Module):
    """Interaction networks at several temporal offsets, side by side, and an aggregator of what they propose.

    A core is an object's own effect, the effects of all others on it, and what becomes of their sum. Not `related`,
    there are no pairs, and each object changes by itself.
    """

    def __init__(self, slot_size: int, latent_size: int, offsets: Sequence[int], *, related: bool) -> None:
        super().__init__()
        self.offsets, self.related = tuple(offsets), related
        count = len(self.offsets)
        self.own = _SideBySide(count, slot_size, latent_size, latent_size)
        if related:
            # The first layer of the perceptron of pairs, applied to objects before they are paired.
            self.receiver = _SideBySide(count, slot_size, latent_size)
            self.sender = _SideBySide(count, slot_size, latent_size)
            self.pair = _SideBySide(count, latent_size, latent_size)
        self.affector = _SideBySide(count, latent_size, latent_size)
        self.output = _SideBySide(count, slot_size + latent_size, latent_size, slot_size)
        self.aggregator = perceptron(count * slot_size, latent_size, slot_size)

    def forward(self, codes: Tensor, there: Tensor) -> Tensor:
        """Return the change [b, n, s] of codes [b, h, n, s], the present ones last; `there` [b, n, 1] is 1 or 0."""
        scenes, _, objects, _ = codes.shape
        past = torch.stack([codes[:, -offset] for offset in self.offsets]).flatten(1, 2)  # [k, b * n, s]
        effects = self.own(past)
        if self.related:
            one, other = (part(past).view(len(past), scenes, objects, -1) for part in (self.receiver, self.sender))
            pairs = (one[:, :, :, None] + other[:, :, None]).relu()
            effect = self.pair(pairs.flatten(1, 3)).relu().view(pairs.shape)
            others = 1 - torch.eye(objects, dtype=codes.dtype, device=codes.device)
            effects = effects + (effect * (others[..., None] * there[:, None])).sum(3).flatten(1, 2)
        proposed = self.output(torch.cat([past, self.affector(effects).relu()], 2))
        change: Tensor = self.aggregator(proposed.transpose(0, 1).flatten(1))
        return change.view(scenes, objects, -1)


class Joined(nn.Module):
    """A perceptron of the last codes of all objects, joined."""

    def __init__(self, *, num_objects: int, slot_size: int, latent_size: int, num_frames: int) -> None:
        super().__init__()
        size = num_objects * slot_size
        self.network = nn.Sequential(
            nn.Linear(num_frames * size, latent_size), nn.ReLU(), perceptron(latent_size, latent_size, size)
        )

    def forward(self, codes: Tensor, there: Tensor) -> Tensor:
        """Return the change as `Cores` does."""
        change: Tensor = self.network(codes.flatten(1))
        return change.view(codes[:, -1].shape)


class Recurrent(nn.Module):
    """An LSTM on the codes of all objects, joined; its memory [b, 2 m], output and cell, is the state's."""

    def __init__(self, *, num_objects: int, slot_size: int, latent_size: int) -> None:
        super().__init__()
        size = num_objects * slot_size
        self.size = latent_size
        self.cell = nn.LSTMCell(size, latent_size)
        self.answer = perceptron(size + latent_size, latent_size, size)

    def blank(self, codes: Tensor) -> Tensor:
        """Return the memory of who has seen nothing yet, for codes [b, n, s]."""
        return codes.new_zeros(len(codes), 2 * self.size)

    def remembering(self, codes: Tensor, memory: Tensor) -> Tensor:
        """Return the memory after codes [b, n, s] were seen."""
        output, cell = memory.chunk(2, 1)
        return torch.cat(self.cell(codes.flatten(1), (output, cell)), 1)

    def forward(self, codes: Tensor, memory: Tensor) -> Tensor:
        """Return the change [b, n, s] from the codes last seen, by what is remembered."""
        change: Tensor = self.answer(torch.cat([codes.flatten(1), memory[:, : self.size]], 1))
        return change.view(codes.shape)


class _SideBySide(nn.Module):
    """Perceptrons [k] of one shape, each of its own input [k, m, first size]: a layer between every two sizes."""

    def __init__(self, count: int, *sizes: int) -> None:
        super().__init__()
        bounds = [size**-0.5 for size in sizes[:-1]]
        self.weights = nn.ParameterList(
            torch.empty(count, *shape).uniform_(-bound, bound)
            for shape, bound in zip(pairwise(sizes), bounds, strict=True)
        )
        self.biases = nn.ParameterList(
            torch.empty(count, 1, size).uniform_(-bound, bound) for size, bound in zip(sizes[1:], bounds, strict=True)
        )

    def forward(self, values: Tensor) -> Tensor:
        """Return what each makes of its input, [k, m, last size]."""
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, values.relu() if number else values, weight)
        return values


def perceptron(size: int, latent_size: int, out: int) -> nn.Sequential:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(size, latent_size), nn.ReLU(), nn.Linear(latent_size, out))
