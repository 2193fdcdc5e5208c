"""Parts of a graph with a halo, so that a network's latents need never exist for the whole of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simworld.kernels.graph_block import Connections


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a graph: its `nodes` [m] with those of the halo, which of these are its own, and its edges.

    `edges` holds for each edge set the numbers [e] of the whole's edges that are in the part, `connections` these edges
    among the part's nodes.
    """

    nodes: Tensor
    own: Tensor
    edges: list[Tensor]
    connections: list[Connections]


def parts_of(connections: Sequence[Connections], order: Tensor, size: int, hops: int) -> Iterator[Part]:
    """Yield parts of `size` nodes, consecutive in `order` [n], each with the nodes that reach it in `hops` messages.

    Among the part's nodes messages pass as in the whole graph for its own nodes, whose latents after `hops` rounds are
    those of the whole.
    """
    rows = torch.empty_like(order)
    for first in range(0, len(order), size):
        core = order[first : first + size]
        inside = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        inside[core] = True
        front = core
        for _ in range(hops):
            senders = torch.cat([each.senders[_incoming(each, front)] for each in connections])
            front = torch.unique(senders[~inside[senders]])
            inside[front] = True
        nodes = inside.nonzero()[:, 0]
        rows[nodes] = torch.arange(len(nodes), device=order.device)
        edges, among = [], []
        for each in connections:
            numbers = _incoming(each, nodes)
            numbers = numbers[inside[each.senders[numbers]]]
            edges.append(numbers)
            senders, receivers = rows[each.senders[numbers]], rows[each.receivers[numbers]]
            starts = torch.searchsorted(receivers, torch.arange(len(nodes), device=order.device))
            among.append(Connections(senders=senders, receivers=receivers, starts=starts))
        own = torch.zeros(len(order), dtype=torch.bool, device=order.device).index_fill_(0, core, True)[nodes]
        yield Part(nodes=nodes, own=own, edges=edges, connections=among)


def _incoming(connections: Connections, nodes: Tensor) -> Tensor:
    """Return the numbers of the edges that nodes [m] receive, in the order of the nodes."""
    ends = torch.cat([connections.starts[1:], connections.starts.new_tensor([len(connections.senders)])])
    starts = connections.starts[nodes]
    counts = ends[nodes] - starts
    which = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
    within = torch.arange(len(which), device=nodes.device) - (counts.cumsum(0) - counts)[which]
    return starts[which] + within
