"""Rounds of messages between bodies, each of which may change their velocities along the edges."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.graph import Edges
from simworld.kernels import gather_sum, segment_sum
from simworld.state import State

MOST_FIRMNESS = 1.2  # a bound: what answers a speed must not grow from round to round
MOST_DOUBT = 0.5  # how far a message may move a firmness, before it is bounded
EDGES_AT_ONCE = 4096  # of 48 latents: about half a megabyte for each tensor of them


@dataclass(frozen=True, kw_only=True)
class EdgeTable:
    """What the rounds need to know of each edge, a row for each.

    `pairs` [e, 2] are senders and receivers, `starts` [n] the first edge of each receiver, `normals` [e, d] the
    directions of impulses (none, [e, 0], in the scalar form). `signs` [e, 1] is -1 where a body's own mirror
    image sends, whose speed along the normal is opposite. `responses` [e, 5], where given,
    say how an edge responds: by a kick, once, and in each round by a share, its firmness, of what the closing speed
    is above or below its aim. Columns are firmness before it is bounded, aim, kick, 1 or, where nothing answers
    the closing speed, 0, and 1 or, where the edge can push but not pull in all its rounds together, 0.
    """

    inputs: Tensor
    normals: Tensor
    pairs: Tensor
    starts: Tensor
    signs: Tensor | None = None
    responses: Tensor | None = None

    def part(self, nodes: slice, edges: slice) -> EdgeTable:
        """Return the rows of some scenes, their bodies numbered from zero."""
        return EdgeTable(
            inputs=self.inputs[edges],
            normals=self.normals[edges],
            pairs=self.pairs[edges] - nodes.start,
            starts=self.starts[nodes] - edges.start,
            signs=None if self.signs is None else self.signs[edges],
            responses=None if self.responses is None else self.responses[edges],
        )


class Block(nn.Module):
    """One round of messages: the relation network along every edge, the object network at every body.

    The relation network is a perceptron of (sender, receiver, edge features, closing speed, what the edge
    has given), whose first layer is applied to bodies before they are gathered to edges, and whose last is
    applied after the messages were summed: the same function with fewer operations.

    Where the table says how edges respond, an edge gives no impulse of its own accord, and the message may only
    change its firmness by a little.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.nodes = nn.Parameter(_uniform(size, 3 * size))
        self.bias = nn.Parameter(torch.zeros(3 * size))
        self.inputs = nn.Parameter(torch.cat([_uniform(size, size), torch.randn(2, size) * 0.5]))
        self.impulse = nn.Parameter(torch.randn(size, 1) * 0.1 / size**0.5)
        self.heard = nn.Parameter(_uniform(size, size))
        self.update = nn.Parameter(_uniform(size, size))

    def forward(
        self,
        nodes: Tensor,
        moved: Tensor,
        given: Tensor,
        features: Tensor,
        ends: Tensor,
        table: EdgeTable,
        *,
        first: bool,
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
        impulses = messages @ self.impulse
        if table.responses is not None:
            firmness, aim, kick, answers, pulls = table.responses.unsqueeze(2).unbind(1)
            # Softsign, not a sigmoid: what early training has slackened can still be tightened.
            share = 0.5 + 0.5 * functional.softsign(firmness + MOST_DOUBT * impulses.tanh())
            impulses = MOST_FIRMNESS * answers * share * (aim - closing)
            impulses = torch.where(pulls > 0, impulses, torch.maximum(impulses, -given))
            moved = moved.index_add(0, table.pairs[:, 1], kick * table.normals) if first else moved
        heard = segment_sum(messages, table.starts)
        inner = functional.silu(torch.addmm(seen[:, 2 * size :], heard, self.heard))
        moved = moved.index_add(0, table.pairs[:, 1], impulses * table.normals)
        return torch.addmm(nodes, inner, self.update), moved, given + impulses


def pass_messages(
    blocks: nn.ModuleList, encoder: nn.Module, state: State, nodes: Tensor, moved: Tensor, table: EdgeTable
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
    blocks: nn.ModuleList, encoder: nn.Module, nodes: Tensor, moved: Tensor, table: EdgeTable
) -> tuple[Tensor, Tensor]:
    features = encoder(table.inputs)
    given = features.new_zeros(len(features), 1)
    ends = torch.add(table.pairs.new_tensor([0, 1]), table.pairs, alpha=3)
    for number, block in enumerate(blocks):
        nodes, moved, given = block(nodes, moved, given, features, ends, table, first=number == 0)
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
