"""How a solid is strained, along the edges of its mesh and at its nodes: what stresses follow from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simworld.kernels.graph_block import Connections
from simworld.state import State

FLAT = 1e-4  # of the mean square of ways: added, so that gradients are found where edges lie in a line or plane


def edge_strains(fields: State | Mapping[str, Tensor], edges: Connections, *, rates: bool) -> Tensor:
    """Return [..., e, 1]: Green's strain along each edge, or the rate [1/s] at which it grows, of one or all frames.

    (|x|^2 - |X|^2) / 2|X|^2 with the way x between an edge's ends and X at rest, or x . v / |X|^2 with the difference
    v of their velocities: zero however a body has moved and turned as a whole.
    """
    rest = along(fields["rest_positions"], edges).square().sum(-1, keepdim=True)
    ways = along(fields["positions"], edges)
    if rates:
        return (ways * along(fields["velocities"], edges)).sum(-1, keepdim=True) / rest
    return (ways.square().sum(-1, keepdim=True) - rest) / (2 * rest)


def node_strains(fields: State | Mapping[str, Tensor], edges: Connections, *, rates: bool) -> Tensor:
    """Return [..., n, k]: Almansi's strain at each node, or the rate of deformation [1/s], of one or all frames.

    Symmetric tensors in the axes of space, as stresses are: their k = d (d + 1) / 2 parts on and above the diagonal,
    row by row (stresses have their diagonal first). (1 - F^-T F^-1) / 2, and the symmetric part of the gradient of
    velocities; gradients are those that fit the edges of a node best (least squares), in the plane or line in which
    these lie if they do not span space, and none of a node without edges. Both are zero where a body has moved and
    turned as a whole.
    """
    ways = along(fields["positions"], edges)
    size = ways.shape[-1]
    squares = _summed(ways, ways, edges)
    scale = squares.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    added = torch.where(scale > 0, FLAT * scale, 1.0) * torch.eye(size, dtype=ways.dtype, device=ways.device)
    back = torch.linalg.inv(squares + added)
    within = squares @ back  # onto the directions that edges span
    if rates:
        found = within @ _summed(along(fields["velocities"], edges), ways, edges) @ back
        found = (found + found.transpose(-1, -2)) / 2
    else:
        to_rest = _summed(along(fields["rest_positions"], edges), ways, edges) @ back
        found = (within.transpose(-1, -2) @ within - to_rest.transpose(-1, -2) @ to_rest) / 2
    row, column = torch.triu_indices(size, size, device=ways.device)
    parts: Tensor = found[..., row, column]
    return parts


def along(values: Tensor, edges: Connections) -> Tensor:
    """Return [..., e, d]: how a quantity [..., n, d] differs from an edge's sender to its receiver."""
    return values.index_select(-2, edges.receivers) - values.index_select(-2, edges.senders)


def _summed(values: Tensor, ways: Tensor, edges: Connections) -> Tensor:
    """Return [..., n, d, d]: the outer products of values and ways [..., e, d], added up at receivers."""
    products = values[..., :, None] * ways[..., None, :]
    shape = (*products.shape[:-3], len(edges.starts), *products.shape[-2:])
    return products.new_zeros(shape).index_add(-3, edges.receivers, products)
