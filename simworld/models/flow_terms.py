"""What the equations of incompressible flow say of velocities on a fixed mesh, by linear finite elements.

A pressure acts everywhere at once, which no few rounds of messages can do: it follows from all velocities through one
Poisson equation (Chorin 1968, doi 10.1090/S0025-5718-1968-0242392-2). What is computed here is coarse; a network that
is told it learns what it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kinds import OUTFLOW
from simworld.state import State
from simworld.trajectory import Trajectory

ACCELERATIONS = ("convection", "pressure_gradient", "potential_gradient", "diffusion")
PRESSURES = ("flow_pressure", "flow_potential")
FLOW = (*ACCELERATIONS, *PRESSURES)
GAINS = {"velocities": (1.0, 1.0, 1.0, 0.0), "pressures": (1.0, 0.0)}
"""How much of each term makes a field where a network adds nothing: the viscosity is unknown."""
FLAT = 1e-12  # the share of its longest side's square or cube that a cell with an inside has at least
ORDER = 4
"""How far the series of convection goes: the fourth order is stable to 2.8 cells in a step, the first never."""


class FlowTerms(NamedTuple):
    """Terms of the Navier-Stokes equations at nodes.

    `accelerations` [n, 4, d] in the order of `ACCELERATIONS`: -(u . grad) u on average over a step, -grad p and
    -grad q, in m/s^2, and the Laplacian of u in 1/(m s), to be multiplied by a viscosity. `pressures` [n, 2] in
    m^2/s^2: p, over the density, that keeps convected velocities free of divergence, and q, that takes out within a
    step what divergence they have.
    """

    accelerations: Tensor
    pressures: Tensor

    def named(self) -> dict[str, Tensor]:
        """Return [n, k] by the names in `FLOW`."""
        return dict(zip(FLOW, (*self.accelerations.unbind(1), *torch.split(self.pressures, 1, 1)), strict=True))


def flow_terms(state: State, dt: float) -> FlowTerms:
    """Return the terms of a flow's `velocities` [n, d] on the triangles or tetrahedra of `rest_positions`.

    The pressures are zero at nodes of the outflow, or at the first node of each connected part that has none. Cells
    with an inactive node are left out. Gradients with respect to velocities pass; none do with respect to the mesh.

    Raises:
        ValueError: cells are not of d + 1 nodes, or have no inside.
        ImportError: scipy is missing.
    """
    speeds = state["velocities"]
    names = ("rest_positions", "cells", "node_types", "batch", "active")
    mesh = state.derived(f"elements in {speeds.dtype}", names, lambda s: _elements(s, speeds.dtype))
    near = speeds[mesh.cells]
    gradients = torch.einsum("cka,ckb->cab", near, mesh.slopes)
    convection = _convection(mesh, gradients, near.mean(1), state.free, dt)
    divergence = gradients.diagonal(dim1=1, dim2=2).sum(1)
    sources = torch.stack(
        [torch.einsum("ckb,cb->ck", mesh.slopes, convection), divergence[:, None].expand_as(mesh.cells)], 2
    )
    sources = sources * -mesh.sizes[:, None, None] / speeds.new_tensor([1.0, mesh.cells.shape[1] * dt])
    pressures: Tensor = _Solved.apply(mesh.summed(sources), mesh.solve)  # type: ignore[no-untyped-call]
    falling = torch.einsum("ckm,ckb->cmb", pressures[mesh.cells], mesh.slopes)
    within = mesh.averaged(-torch.cat([convection[:, None], falling], 1))
    diffusion = mesh.summed(-torch.einsum("ckb,cab->cka", mesh.slopes, gradients) * mesh.sizes[:, None, None])
    return FlowTerms(torch.cat([within, (diffusion / mesh.shares[:, None])[:, None]], 1), pressures)


def _convection(mesh: _Elements, gradients: Tensor, winds: Tensor, free: Tensor, dt: float) -> Tensor:
    """Return [c, d], (u . grad) u in cells on average over a step, in which each `wind` [c, d] stays as it is.

    What is carried along changes by a series in the step, dt/2 of what carries away its own change and so on. Its
    first part alone lets a vortex that is carried far in a step grow without bounds. Only nodes that are `free` change.
    """
    carried = total = torch.einsum("cab,cb->ca", gradients, winds)
    for order in range(2, ORDER + 1):
        near = (mesh.averaged(carried) * free[:, None])[mesh.cells]
        carried = torch.einsum("cka,ckb,cb->ca", near, mesh.slopes, winds) * (-dt / order)
        total = total + carried
    return total


def check_flow(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a network of these arguments predicts a flow on a mesh that does not move."""
    outputs, sizes = arguments["outputs"], [arguments[f"num_{name}dimensions"] for name in ("", "rest_")]
    if outputs.get("velocities") != 1 or outputs.get("pressures", 0) != 0 or sizes not in ([0, 2], [0, 3]):
        raise ValueError(
            "incompressible=True is for flows on meshes that do not move: outputs = {velocities = 1, pressures = 0} or "
            "{velocities = 1}, num_dimensions = 0 and num_rest_dimensions = 2 or 3; got outputs "
            f"{dict(outputs)} and dimensions {sizes[0]} and {sizes[1]}."
        )


def flow_samples(trajectory: Trajectory, every: int) -> dict[str, Tensor]:
    """Return [m, k] by the names in `FLOW`: the terms at all nodes and each `every`-th frame."""
    found = [flow_terms(trajectory.frame(t), trajectory.dt).named() for t in range(0, len(trajectory), every)]
    return {name: torch.cat([one[name] for one in found]) for name in FLOW}


class _Solved(torch.autograd.Function):
    """The solution of a symmetric system, whose gradient is the solution of the same system."""

    @staticmethod
    def forward(ctx: Any, sources: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return solve(sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Solved.apply(gradients[0], ctx.solve), None  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class _Elements:
    """Linear finite elements: nodes of `cells` [c, k], `slopes` [c, k, d] of their functions, `sizes` [c] of cells.

    `shares` [n] is what each node has of the cells around it, `solve` the inverse of Poisson's equation.
    """

    cells: Tensor
    slopes: Tensor
    sizes: Tensor
    shares: Tensor
    solve: Callable[[Tensor], Tensor]

    def summed(self, values: Tensor) -> Tensor:
        """Return [n, ...]: what cells have of their nodes [c, k, ...], added up."""
        made = values.new_zeros(len(self.shares), *values.shape[2:])
        return made.index_add(0, self.cells.flatten(), values.flatten(0, 1))

    def averaged(self, values: Tensor) -> Tensor:
        """Return [n, ...]: means of what is in the cells [c, ...] around each node, by their sizes."""
        sides = [1] * (values.ndim - 1)
        parts = values * (self.sizes / self.cells.shape[1]).view(-1, *sides)
        return self.summed(parts[:, None].expand(-1, self.cells.shape[1], *values.shape[1:])) / self.shares.view(
            -1, *sides
        )


def _elements(state: State, dtype: torch.dtype) -> _Elements:
    places, cells = state["rest_positions"].detach().double(), state["cells"]
    num, size = places.shape
    cells = cells[state.active[cells].all(1)]
    if cells.shape[1] != size + 1:
        raise ValueError(
            f"An incompressible flow in {size} dimensions is on cells of {size + 1} nodes; got cells of "
            f"{cells.shape[1]}. Cut them up, or use incompressible=False."
        )
    ways = places[cells[:, 1:]] - places[cells[:, :1]]
    insides = torch.linalg.det(ways).abs()
    flat = insides <= FLAT * ways.norm(dim=2).amax(1) ** size
    if bool(flat.any()):
        corners = cells[flat.nonzero()[0, 0]].tolist()
        raise ValueError(f"An incompressible flow fills cells; that of nodes {corners} has no inside. Take it out.")
    back = torch.linalg.inv(ways).transpose(1, 2)  # [c, d, d]: slopes of all functions but the first
    slopes = torch.cat([-back.sum(1, keepdim=True), back], 1)
    sizes = insides / math.factorial(size)
    shares = places.new_zeros(num).index_add(0, cells.flatten(), (sizes / (size + 1)).repeat_interleave(size + 1))
    joined = shares > 0
    held = ((state["node_types"] == OUTFLOW) & joined) if "node_types" in state else torch.zeros_like(joined)
    held |= _levels(cells, joined, held)
    local = torch.einsum("cia,cja->cij", slopes, slopes) * sizes[:, None, None]
    solve = _poisson(cells.cpu().numpy(), local.cpu().numpy(), (joined & ~held).cpu().numpy())
    slopes, sizes, shares = slopes.to(dtype), sizes.to(dtype), torch.where(joined, shares, 1.0).to(dtype)
    return _Elements(cells=cells, slopes=slopes, sizes=sizes, shares=shares, solve=solve)


def _levels(cells: Tensor, joined: Tensor, held: Tensor) -> Tensor:
    """Return [n], the first node of each connected part of a mesh in which none is held: pressures count from it."""
    sparse = needed("scipy.sparse", "A model of incompressible flows", "mesh")
    graphs = needed("scipy.sparse.csgraph", "A model of incompressible flows", "mesh")
    pairs = torch.combinations(torch.arange(cells.shape[1], device=cells.device))
    rows, columns = cells[:, pairs].reshape(-1, 2).T.cpu().numpy()
    graph = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(joined),) * 2)
    count, parts = graphs.connected_components(graph, directed=False)
    known = np.zeros(count, dtype=bool)
    known[parts[held.cpu().numpy()]] = True
    inside = joined.cpu().numpy().nonzero()[0]
    numbers, first = np.unique(parts[inside], return_index=True)
    found = torch.zeros_like(held)
    found[torch.from_numpy(inside[first[~known[numbers]]]).to(held.device)] = True
    return found


def _poisson(cells: Any, local: Any, open_nodes: Any) -> Callable[[Tensor], Tensor]:
    """Return what solves Poisson's equation [n, m] for sources [n, m]; values are 0 at nodes that are not open."""
    sparse = needed("scipy.sparse", "A model of incompressible flows", "mesh")
    factorized = needed("scipy.sparse.linalg", "A model of incompressible flows", "mesh").splu
    rows, columns = (np.broadcast_to(nodes, local.shape).ravel() for nodes in (cells[:, :, None], cells[:, None]))
    matrix = sparse.csc_matrix((local.ravel(), (rows, columns)), shape=(len(open_nodes),) * 2)
    factor = factorized(matrix[open_nodes][:, open_nodes]) if open_nodes.any() else None

    def solve(sources: Tensor) -> Tensor:
        given = sources.detach().cpu().double().numpy()
        found = np.zeros_like(given)
        if factor is not None:
            found[open_nodes] = factor.solve(given[open_nodes])
        return torch.from_numpy(found).to(sources)

    return solve
