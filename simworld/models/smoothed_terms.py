"""What neighbours say of how a particle is pushed: sums over them, weighted by bumps of their distance.

Solvers of smoothed particles and position-based fluids (Macklin and Mueller 2013, doi 10.1145/2461912.2461984) move a
particle along the ways to its neighbours, by how dense and how quickly compressed the places of both are after the
step. A few rounds of messages find these sums again only from much data; told them, a network learns what they lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simworld.graph import particle_edges
from simworld.kernels.neighbors import NeighborPairs, room
from simworld.kernels.segments import segment_sum
from simworld.space import shortest
from simworld.state import State
from simworld.trajectory import Trajectory

AHEAD = (0, 1, 2)  # steps at present velocities after which neighbours are looked at
KINDS = 7  # of sums for each bump and look ahead
FRAMES = 600  # that the gains are fitted to, about, and at least one of each trajectory
MOST = 20.0  # rms of a term: those that are longer are too rare to learn from
RIDGE = 1e-4  # of the mean square of a term, added to it in the fit
NO_WAY = 1e-12  # squared, beside the square of the radius


def num_terms(num_kernels: int) -> int:
    """Return how many vectors `smoothed_terms` gives of each particle."""
    return len(AHEAD) * KINDS * num_kernels


def smoothed_terms(state: State, radius: float, dt: float, num_kernels: int) -> Tensor:
    """Return [n, t, d]: sums over the neighbours j of each free particle i, nearer than `radius` [unit of positions].

    With W one of `num_kernels` bumps of the distance, e the unit vector from i to j, u = v_j - v_i, rho the density of
    neighbours of a free particle and c the speed at which they go away, weighted likewise (both 0 of what is not free),
    these are the sums of W e, W u, W (u . e) e, W rho_j e, W c_j e, rho_i W e and c_i W e: as things are, and where all
    have gone on for one and for two steps of `dt`. The bumps are quadratic B-splines that end at the radius.

    Raises:
        ValueError: there are so many pairs that their sums would not fit in memory.
    """
    kept = len(AHEAD) * num_kernels if torch.is_grad_enabled() else 1
    edge_bytes = 2 * kept * KINDS * state.positions[0].nbytes
    edges = particle_edges(state, radius, max_edges=room(state.device, edge_bytes))
    ends = [values.index_select(0, side) for values in (state.positions, state.velocities) for side in edges[:2]]
    ways, speeds = shortest(state, ends[0] - ends[1], edges.receivers), ends[2] - ends[3]
    found = [_sums(ways + dt * steps * speeds, speeds, edges, radius, num_kernels) for steps in AHEAD]
    return torch.cat(found, 1)


def _sums(ways: Tensor, speeds: Tensor, edges: NeighborPairs, radius: float, num_kernels: int) -> Tensor:
    lengths = (ways.square().sum(1, keepdim=True) + NO_WAY * radius**2).sqrt()
    towards = ways / lengths
    nearing = (speeds * towards).sum(1, keepdim=True)
    wide = (1 - (lengths / radius).square()).clamp(min=0).square()
    of_nodes = segment_sum(torch.cat([wide, wide * nearing], 1), edges.starts)
    of_senders = of_nodes.index_select(0, edges.senders)
    weights = torch.cat([torch.ones_like(nearing), nearing, of_senders], 1)
    vectors = torch.cat([(weights[:, :, None] * towards[:, None]).flatten(1), speeds], 1)
    places = lengths * ((num_kernels + 1) / radius)
    summed = vectors.new_zeros(len(edges.starts) * num_kernels, vectors.shape[1])
    for aside in (-1, 0, 1):  # a length is on three bumps
        numbers = places.detach().floor() + aside
        weights = _spline((places - numbers - 0.5).abs()) * ((numbers >= 0) & (numbers < num_kernels))
        rows = edges.receivers * num_kernels + numbers[:, 0].clamp(0, num_kernels - 1).long()
        summed = summed.index_add(0, rows, weights * vectors)
    by_node = summed.view(len(edges.starts), num_kernels, -1, ways.shape[1])
    return torch.cat([by_node, by_node[:, :, :1] * of_nodes[:, None, :, None]], 2).flatten(1, 2)


def _spline(away: Tensor) -> Tensor:
    """Return the quadratic B-spline at a distance in spacings, which ends at 1.5."""
    return torch.where(away < 0.5, 0.75 - away.square(), 0.5 * (1.5 - away).clamp(min=0).square())


def in_units(terms: Tensor, rms: Tensor) -> Tensor:
    """Return terms [n, t, d] in units of `rms` [t], what is long shortened smoothly, to at most `MOST`."""
    scaled = terms / rms.to(terms)[:, None]
    return scaled / (1 + scaled.square().sum(2, keepdim=True) / MOST**2).sqrt()


@torch.no_grad()
def fitted_gains(trajectories: Sequence[Trajectory], radius: float, num_kernels: int) -> dict[str, list[float]]:
    """Return `term_rms` [t], of all bumps of a kind together, and `term_gain` [t] of terms in these units.

    The gains say how much of each term changes of velocity contain, by least squares; they are the same along all
    axes, which may have constants besides.
    """
    known, count = num_terms(num_kernels), 1
    squares = torch.zeros(known).double()
    for terms, changes in _samples(trajectories, radius, num_kernels):
        squares, count = squares + terms.square().sum((0, 2)).cpu(), count + changes.numel()
    # One unit for all bumps of a kind: distances that are rarely seen would be blown up by their own.
    squares = (squares / count).view(len(AHEAD), num_kernels, KINDS).mean(1, keepdim=True)
    rms = torch.where(squares > 0, squares.sqrt(), 1.0).expand(-1, num_kernels, -1).flatten()
    gram: Tensor = torch.zeros(1).double()
    for terms, changes in _samples(trajectories, radius, num_kernels):
        constants = torch.eye(changes.shape[1]).to(changes).expand(len(changes), -1, -1)
        columns = [in_units(terms, rms).transpose(1, 2), constants, changes[:, :, None]]
        rows = torch.cat(columns, 2).flatten(0, 1)
        gram = gram + (rows.T @ rows).cpu()
    system = gram[:-1, :-1] + RIDGE * count * torch.eye(len(gram) - 1).double()
    gains = torch.linalg.solve(system, gram[:-1, -1])[:known]
    return {"term_rms": rms.tolist(), "term_gain": gains.tolist()}


def _samples(paths: Sequence[Trajectory], radius: float, num_kernels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield terms [m, t, d] and changes of velocity beyond gravity's [m, d] of those that move, in double precision."""
    every = max(1, sum(path.num_steps for path in paths) // FRAMES)
    for path, step in [(one, step) for one in paths for step in range(0, one.num_steps, every)]:
        state, after = path.frame(step), path.frame(step + 1)
        change, moved = after.velocities - state.velocities, state.free & after.active
        if "gravity" in state:
            change = change - path.dt * state.gravity[state.batch]
        terms = smoothed_terms(state, radius, path.dt, num_kernels)[moved]
        yield terms.double(), change[moved].double()
