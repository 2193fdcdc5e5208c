"""What neighbours say of how a particle is pushed: sums over them, weighted by bumps of their distance.

Solvers of smoothed particles and position-based fluids (Macklin and Mueller 2013, doi 10.1145/2461912.2461984) move a
particle along the ways to its neighbours, by how dense and how quickly compressed the places of both are after the
step. A few rounds of messages find these sums again only from much data; told them, a network learns what they lack.
"""

from __future__ import annotations

from collections.abc import Sequence

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
FRAMES = 600  # of all trajectories that the gains are fitted to, at most
MOST = 10.0  # rms that a network sees of a term: encounters that are longer are too rare to learn from
RIDGE = 1e-4  # of the mean square of a term, added to it in the fit
NO_WAY = 1e-12  # squared, beside the square of the radius


def num_terms(num_kernels: int) -> int:
    """Return how many vectors `smoothed_terms` gives of each particle."""
    return len(AHEAD) * KINDS * num_kernels


def smoothed_terms(state: State, radius: float, dt: float, num_kernels: int) -> Tensor:
    """Return [n, t, d]: sums over the neighbours j of each free particle i, nearer than `radius` [unit of positions].

    With W one of `num_kernels` bumps of the distance, e the unit vector from i to j, u = v_j - v_i, rho a particle's
    density of neighbours and c the speed at which they come nearer, weighted likewise, these are the sums of W e,
    W u, W (u . e) e, W rho_j e, W c_j e, rho_i W e and c_i W e: as things are, and where all have gone on for one and
    for two steps of `dt`. The bumps are quadratic B-splines that end at the radius.

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
    spacing, size, parts = radius / (num_kernels + 1), ways.shape[1], []
    for number in range(num_kernels):  # one by one: all at once are large beside the edges
        bump = _spline((lengths / spacing - (number + 0.5)).abs())
        summed = segment_sum(bump * vectors, edges.starts).view(len(edges.starts), -1, size)
        parts.append(torch.cat([summed, summed[:, :1] * of_nodes[:, :, None]], 1))
    return torch.cat(parts, 1)


def _spline(away: Tensor) -> Tensor:
    """Return the quadratic B-spline at a distance in spacings, which ends at 1.5."""
    return torch.where(away < 0.5, 0.75 - away.square(), 0.5 * (1.5 - away).clamp(min=0).square())


def bounded(terms: Tensor) -> Tensor:
    """Return terms [n, t, d] in units of their rms with what is long shortened smoothly, to at most `MOST`."""
    return terms / (1 + terms.square().sum(2, keepdim=True) / MOST**2).sqrt()


@torch.no_grad()
def fitted_gains(trajectories: Sequence[Trajectory], radius: float, num_kernels: int) -> dict[str, list[float]]:
    """Return `term_rms` [t] and `term_gain` [t]: how much of each term changes of velocity contain, by least squares.

    The gains are the same along all axes, which may have constants besides. They are of terms in units of their rms,
    over all bumps.
    """
    every = max(1, sum(path.num_steps for path in trajectories) // FRAMES)
    gram: Tensor | float = 0.0
    for path in trajectories:
        for step in range(0, path.num_steps, every):
            state, after = path.frame(step), path.frame(step + 1)
            moved = state.free & after.active
            terms = smoothed_terms(state, radius, path.dt, num_kernels)[moved].transpose(1, 2).double()
            change = (after.velocities - state.velocities)[moved].double()
            constants = torch.eye(change.shape[1], device=change.device).double().expand(len(change), -1, -1)
            rows = torch.cat([terms, constants, change[:, :, None]], 2).flatten(0, 1)
            gram = gram + rows.T @ rows
    gram = torch.as_tensor(gram)
    known = num_terms(num_kernels)
    rows_in_all = gram.diagonal()[known:-1].sum().clamp(min=1)
    # One unit for all bumps of a kind: distances that are rarely seen would be blown up by their own.
    squares = (gram.diagonal()[:known] / rows_in_all).view(len(AHEAD), num_kernels, KINDS).mean(1, keepdim=True)
    rms = torch.where(squares > 0, squares.sqrt(), 1.0).expand(-1, num_kernels, -1).flatten()
    scales = torch.cat([rms, rms.new_ones(len(gram) - 1 - known)])
    system = gram[:-1, :-1] / (scales[:, None] * scales) + RIDGE * rows_in_all * torch.eye(len(scales)).to(gram)
    gains = torch.linalg.solve(system, gram[:-1, -1] / scales)[:known]
    return {"term_rms": rms.tolist(), "term_gain": gains.tolist()}
