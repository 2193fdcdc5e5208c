"""Sums from particles to the nodes of a grid and back: the transfers of the material point method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class Stencil:
    """To which nodes each particle belongs, and how much: `nodes` [n, m] below `num_nodes`, `weights` [n, m].

    `particles` [n m] are in the order of their nodes, each node's beginning at `starts` [g], and `order` [n m] says
    which of all weights each comes with.
    """

    nodes: Tensor
    weights: Tensor
    order: Tensor
    particles: Tensor
    starts: Tensor

    @staticmethod
    def of(nodes: Tensor, weights: Tensor, num_nodes: int) -> Stencil:
        """Return the stencil of nodes and weights, each [n, m]."""
        numbers, order = nodes.flatten().sort(stable=True)
        starts = torch.searchsorted(numbers, torch.arange(num_nodes, device=nodes.device))
        return Stencil(nodes, weights, order, order // nodes.shape[1], starts)

    @property
    def num_nodes(self) -> int:
        """How many nodes the grid has."""
        return len(self.starts)

    def weighted(self, factors: Tensor) -> Stencil:
        """Return the same nodes with weights multiplied by factors [n, m]."""
        return replace(self, weights=self.weights * factors)


def to_grid(values: Tensor, stencil: Stencil) -> Tensor:
    """Return [g, k]: for each node the sum of the values [n, k] of its particles, weighted.

    The order of summation is that of the particles. Differentiable once, in values and weights.
    """
    made: Tensor = _ToGrid.apply(values, stencil.weights, stencil)  # type: ignore[no-untyped-call]
    return made


def to_grid_reference(values: Tensor, stencil: Stencil) -> Tensor:
    """Define `to_grid`: weigh each value for each of its nodes, and add each where its node is."""
    rows = (stencil.weights[..., None] * values[:, None]).flatten(0, 1)
    return values.new_zeros(stencil.num_nodes, values.shape[1]).index_add(0, stencil.nodes.flatten(), rows)


def from_grid(values: Tensor, stencil: Stencil) -> Tensor:
    """Return [n, k]: for each particle the sum of the values [g, k] of its nodes, weighted.

    Differentiable once, in values and weights.
    """
    made: Tensor = _FromGrid.apply(values, stencil.weights, stencil)  # type: ignore[no-untyped-call]
    return made


def from_grid_reference(values: Tensor, stencil: Stencil) -> Tensor:
    """Define `from_grid`: look the nodes up, weigh and add them."""
    rows = values.index_select(0, stencil.nodes.flatten()).view(*stencil.nodes.shape, -1)
    return (stencil.weights[..., None] * rows).sum(1)


def splines(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the quadratic B-splines at places [n, d], in units of a grid's spacing from its first node.

    These are the 3^d nodes whose splines reach a particle: their numbers along each axis [n, m, d], their weights
    [n, m], which add up to 1, and the ways from particle to node [n, m, d]; the weighted ways add up to 0.
    """
    first = (places.detach() - 0.5).floor()
    beyond = places - first  # 0.5 to 1.5 from the first of three nodes
    along = torch.stack([(1.5 - beyond).square() / 2, 0.75 - (beyond - 1).square(), (beyond - 0.5).square() / 2], 1)
    steps = torch.tensor(list(product(range(3), repeat=places.shape[1])), device=places.device)
    weights = along[:, steps[:, 0], 0]
    for axis in range(1, places.shape[1]):
        weights = weights * along[:, steps[:, axis], axis]
    return first.long()[:, None] + steps, weights, steps - beyond[:, None]


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, stencil: Stencil) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.stencil = stencil
        return _gathered(values, weights, stencil)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        values, weights = ctx.saved_tensors
        nodes = ctx.stencil.nodes
        of_values = _spread(slope, weights, nodes) if ctx.needs_input_grad[0] else None
        of_weights = _products(slope, values, nodes) if ctx.needs_input_grad[1] else None
        return of_values, of_weights, None


class _FromGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, stencil: Stencil) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.stencil = stencil
        return _spread(values, weights, stencil.nodes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        values, weights = ctx.saved_tensors
        of_values = _gathered(slope, weights, ctx.stencil) if ctx.needs_input_grad[0] else None
        of_weights = _products(values, slope, ctx.stencil.nodes) if ctx.needs_input_grad[1] else None
        return of_values, of_weights, None


def _gathered(values: Tensor, weights: Tensor, stencil: Stencil) -> Tensor:
    """Return [g, k] of values [n, k]."""
    return _bags(values, stencil.particles, stencil.starts, weights.flatten()[stencil.order])


def _spread(values: Tensor, weights: Tensor, nodes: Tensor) -> Tensor:
    """Return [n, k] of values [g, k]."""
    starts = torch.arange(0, nodes.numel(), nodes.shape[1], device=nodes.device)
    return _bags(values, nodes.flatten(), starts, weights.flatten())


def _bags(values: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(rows, values.contiguous(), starts, per_sample_weights=weights, mode="sum")


def _products(of_nodes: Tensor, of_particles: Tensor, nodes: Tensor) -> Tensor:
    """Return [n, m]: the product of what each particle and each of its nodes have."""
    rows = of_nodes.index_select(0, nodes.flatten()).view(*nodes.shape, -1)
    return torch.einsum("nmk,nk->nm", rows, of_particles)
