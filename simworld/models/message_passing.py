"""Rounds of messages between bodies, each of which may change their velocities along the edges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.graph import Edges
from simworld.kernels import gather_sum, segment_sum
from simworld.state import State

KINDS = 4
MOST_AGAINST = 1.2  # a bound: what answers a speed must not grow from round to round
EDGES_AT_ONCE = 4096  # of 48 latents: about half a megabyte for each tensor of them


@dataclass(frozen=True, kw_only=True)
class EdgeTable:
    """What the rounds need to know of each edge, a row for each.

    `pairs` [e, 2] are senders and receivers, `starts` [n] the first edge of each receiver, `normals` [e, d] the
    directions of impulses (none, [e, 0], in the scalar form). `signs` [e, 1] is -1 where a body's own mirror
    image sends, whose speed along the normal is opposite. `calls` [e, k] are what an impulse may be
    proportional to, besides the closing speed. `kinds` [e, KINDS] are 1 for what an edge is and 0 for what it is
    not: a spring, two surfaces that touch, two that will by the end of the step, two that stay apart and to whose
    closing speed nothing answers.
    """

    inputs: Tensor
    normals: Tensor
    pairs: Tensor
    starts: Tensor
    signs: Tensor | None = None
    calls: Tensor | None = None
    kinds: Tensor | None = None

    def part(self, nodes: slice, edges: slice) -> EdgeTable:
        """Return the rows of some scenes, their bodies numbered from zero."""
        return EdgeTable(
            inputs=self.inputs[edges],
            normals=self.normals[edges],
            pairs=self.pairs[edges] - nodes.start,
            starts=self.starts[nodes] - edges.start,
            signs=None if self.signs is None else self.signs[edges],
            calls=None if self.calls is None else self.calls[edges],
            kinds=None if self.kinds is None else self.kinds[edges],
        )


class Block(nn.Module):
    """One round of messages: the relation network along every edge, the object network at every body.

    The relation network is a perceptron of (sender, receiver, edge features, closing speed, what the edge
    has given), whose first layer is applied to bodies before they are gathered to edges, and whose last is
    applied after the messages were summed: the same function with fewer operations.

    With `num_calls` an edge gives no impulse of its own accord, but one in proportion to what calls for it: against
    the closing speed, which changes from round to round, and by shares of the table's `calls`, which do not. The
    message says the factors, by other weights for each kind of edge, and `sizes` their learned logarithmic bounds.
    """

    def __init__(self, size: int, num_calls: int = 0) -> None:
        super().__init__()
        self.nodes = nn.Parameter(_uniform(size, 3 * size))
        self.bias = nn.Parameter(torch.zeros(3 * size))
        self.inputs = nn.Parameter(torch.cat([_uniform(size, size), torch.randn(2, size) * 0.5]))
        if num_calls == 0:
            self.impulse = nn.Parameter(torch.randn(size, 1) * 0.1 / size**0.5)
        self.heard = nn.Parameter(_uniform(size, size))
        self.update = nn.Parameter(_uniform(size, size))
        if num_calls > 0:
            self.gains = nn.Parameter(torch.randn(size, KINDS * (1 + num_calls)) * 0.1 / size**0.5)
            self.habits = nn.Parameter(torch.zeros(KINDS * (1 + num_calls)))
            self.sizes = nn.Parameter(torch.tensor([0.0] + [-2.0] * (num_calls - 1)))

    def forward(
        self, nodes: Tensor, moved: Tensor, given: Tensor, features: Tensor, ends: Tensor, table: EdgeTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents [n, size], velocities [n, d] and given impulses [e, 1] after this round.

        `ends` [e, 2] are the rows where senders and receivers stand in a table that has three for each body:
        what it is as a sender, as a receiver and to itself.
        """
        count, size = nodes.shape
        seen = torch.addmm(self.bias, nodes, self.nodes)
        met = gather_sum(seen.view(3 * count, size), ends)
        pair = moved.index_select(0, table.pairs.flatten()).view(len(ends), 2, moved.shape[1])
        sender = pair[:, 0] if table.signs is None else pair[:, 0] * table.signs
        closing = ((pair[:, 1] - sender) * table.normals).sum(1, keepdim=True)
        messages = functional.silu(torch.addmm(met, torch.cat([features, closing, given], 1), self.inputs))
        impulses = messages @ self.impulse if table.calls is None else self._answers(messages, closing, table)
        heard = segment_sum(messages, table.starts)
        inner = functional.silu(torch.addmm(seen[:, 2 * size :], heard, self.heard))
        moved = moved.index_add(0, table.pairs[:, 1], impulses * table.normals)
        return torch.addmm(nodes, inner, self.update), moved, given + impulses

    def _answers(self, messages: Tensor, closing: Tensor, table: EdgeTable) -> Tensor:
        assert table.calls is not None
        assert table.kinds is not None
        gains = torch.addmm(self.habits, messages, self.gains).view(len(messages), KINDS, 1 + table.calls.shape[1])
        gains = (gains * table.kinds[:, :, None]).sum(1)
        against = MOST_AGAINST * torch.sigmoid(gains[:, :1]) * (1 - table.kinds[:, -1:])
        return (table.calls * gains[:, 1:].tanh() * self.sizes.exp()).sum(1, keepdim=True) - closing * against


def pass_messages(
    blocks: Iterable[nn.Module], encoder: nn.Module, state: State, nodes: Tensor, moved: Tensor, table: EdgeTable
) -> tuple[Tensor, Tensor]:
    """Return the bodies' latents and velocities after all rounds of messages."""
    if torch.is_grad_enabled() or nodes.is_cuda or len(table.pairs) <= 2 * EDGES_AT_ONCE:
        return _rounds(blocks, encoder, nodes, moved, table)
    # Without gradients, scenes go through all rounds a few at a time, so that latents stay in the cache.
    done = []
    for here, there in _portions(state, table):
        done.append(_rounds(blocks, encoder, nodes[here], moved[here], table.part(here, there)))
    latents, velocities = zip(*done, strict=True)
    return torch.cat(latents), torch.cat(velocities)


def edge_signs(edges: Edges, like: Tensor) -> Tensor | None:
    """Return [e, 1]: -1 for edges from mirror images, else 1; None where no edge is from one."""
    if edges.walls is None:
        return None
    return torch.where(edges.walls >= 0, -1.0, 1.0).to(like)[:, None]


def _rounds(
    blocks: Iterable[nn.Module], encoder: nn.Module, nodes: Tensor, moved: Tensor, table: EdgeTable
) -> tuple[Tensor, Tensor]:
    features = encoder(table.inputs)
    given = features.new_zeros(len(features), 1)
    ends = torch.add(table.pairs.new_tensor([0, 1]), table.pairs, alpha=3)
    for block in blocks:
        nodes, moved, given = block(nodes, moved, given, features, ends, table)
    return nodes, moved


def _portions(state: State, table: EdgeTable) -> list[tuple[slice, slice]]:
    """Return ranges of bodies and of their edges, whole scenes of about `EDGES_AT_ONCE` edges together."""
    scenes = torch.searchsorted(state.batch, torch.arange(state.num_scenes, device=state.device))
    first_nodes = [*scenes.tolist(), state.num_entities]
    first_edges = [*table.starts[scenes].tolist(), len(table.pairs)]
    cuts = [0]
    for number in range(1, len(first_edges)):
        if first_edges[number] - first_edges[cuts[-1]] >= EDGES_AT_ONCE or number == len(first_edges) - 1:
            cuts.append(number)
    return [(slice(first_nodes[a], first_nodes[b]), slice(first_edges[a], first_edges[b])) for a, b in pairwise(cuts)]


def _uniform(rows: int, columns: int) -> Tensor:
    return nn.init.uniform_(torch.empty(rows, columns), -(rows**-0.5), rows**-0.5)
