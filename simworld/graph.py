"""Who interacts with whom: directed edges, sorted by receiver, never truncated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simworld.kernels.graph_block import Connections
from simworld.kernels.neighbors import NeighborPairs, neighbor_pairs
from simworld.state import State

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Directed edges, sorted by receiver: messages go from `senders` [e] to `receivers` [e].

    `starts` [n] is the first edge of each receiver. `springs` [e] says what joins the two: -1 nearness, k
    spring k towards its second end, m + k spring k of m towards its first. The directions are told apart
    because engines solve joints in order.

    `walls` [e], where asked for, is -1 between bodies; 2 a + 0 or 1 marks an edge that a body's own mirror
    image sends it from behind the lower or the upper wall across axis a. A body that runs into a wall
    then meets what it would meet in an equal body.
    """

    senders: Tensor
    receivers: Tensor
    starts: Tensor
    springs: Tensor
    walls: Tensor | None = None


@torch.no_grad()
def object_edges(state: State, *, margin: float | None, walls: bool = False) -> Edges:
    """Return the edges between bodies: along springs, and between all others nearer than `margin`.

    Nearness is the distance between surfaces, in the unit of the positions; `margin=None` joins every pair
    of a scene. A pair that a spring joins has the spring's edges only. Fixed and inactive bodies receive
    nothing; inactive ones send nothing. With `walls`, bodies nearer to a wall of the state's `boundaries` than
    half of `margin` receive an edge from their image, which is then nearer than `margin`.
    """
    fixed = state.derived(f"edges.{margin}", _SOURCES, lambda s: _fixed_part(s, margin))
    points = state.positions[fixed.grid]
    near = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") < fixed.reach
    scene, row, column = near.nonzero(as_tuple=True)
    senders = torch.cat([fixed.senders, fixed.grid[scene, column]])
    receivers = torch.cat([fixed.receivers, fixed.grid[scene, row]])
    behind = None
    if walls:
        bodies, sides = _near_walls(state, margin)
        behind = torch.cat([torch.full_like(receivers, -1), sides])
        senders, receivers = torch.cat([senders, bodies]), torch.cat([receivers, bodies])
    receivers, order = torch.sort(receivers, stable=True)
    # Places past the springs are pairs; the last entry of the column of springs stands for all of them.
    return Edges(
        senders=senders[order],
        receivers=receivers,
        starts=torch.searchsorted(receivers, fixed.entities),
        springs=fixed.springs[order.clamp(max=len(fixed.springs) - 1)],
        walls=None if behind is None else behind[order],
    )


def particle_edges(state: State, radius: float, *, max_edges: int | None = None) -> NeighborPairs:
    """Return the edges between particles at most `radius` apart, from all active ones to those that are free.

    Kinematic particles receive nothing, since nothing moves them. `radius` is in the unit of the positions.

    Raises:
        ValueError: there would be more than `max_edges`, or than fit in memory.
    """
    return neighbor_pairs(
        state.positions,
        radius,
        batch=state.batch,
        boundaries=state.boundaries if "periodic" in state else None,
        periodic=state.periodic if "periodic" in state else None,
        active=state.active,
        receives=state.free,
        max_edges=max_edges,
    )


EDGES_OF_CELLS = {
    2: ((0, 1),),
    3: ((0, 1), (1, 2), (2, 0)),
    4: ((0, 1), (1, 2), (2, 3), (3, 0)),
    8: ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)),
}
"""Edges of lines, triangles, quads and hexahedra by number of nodes, which are in VTK's order."""
TETRAHEDRON = ((0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3))


def mesh_edges(state: State) -> Connections:
    """Return the edges of a mesh's `cells`, each once in both directions, worked out once for a whole rollout.

    Cells of four nodes are tetrahedra where rest positions (or positions) are in space, and quads in the plane.
    Nodes that are not active neither send nor receive.
    """
    return state.derived("mesh edges", ("cells", "active", "batch"), _mesh_edges)


@torch.no_grad()
def world_edges(state: State, radius: float, *, max_edges: int | None = None) -> Connections:
    """Return the edges between nodes at most `radius` apart in the world that no mesh edge joins (Pfaff et al. 2021).

    `radius` is in the unit of the positions. From all active nodes to those that are free.

    Raises:
        ValueError: there would be more than `max_edges`, or than fit in memory.
    """
    near, mesh, count = particle_edges(state, radius, max_edges=max_edges), mesh_edges(state), state.num_entities
    # Both are sorted by receiver and then by sender, so a pair is found among the mesh's by bisection.
    pairs, known = (edges.receivers * count + edges.senders for edges in (near, mesh))
    places = torch.searchsorted(known, pairs).clamp(max=max(len(known) - 1, 0))
    new = known[places] != pairs if len(known) else torch.ones_like(pairs, dtype=torch.bool)
    return _connections(near.senders[new], near.receivers[new], count)


def coarse_edges(state: State, num_levels: int) -> list[Connections]:
    """Return the edges of coarser meshes over the same nodes, by bi-stride pooling (Cao et al. 2023, arXiv 2210.02573).

    From each level to the next every second ring of nodes round the first one is kept, and nodes kept are joined that
    were at most two edges apart; so edges of level k span about 2^k edges of the mesh. The first node is the one with
    the greatest rest position along the first axis, then the second. Worked out once for a rollout.
    """
    sources = ("cells", "active", "batch", "rest_positions")
    levels = [mesh_edges(state)]
    for level in range(1, num_levels + 1):
        levels.append(state.derived(f"mesh edges {level}", sources, partial(_coarser, levels[-1])))
    return levels[1:]


def _coarser(edges: Connections, state: State) -> Connections:
    """Return the edges between nodes at even distances from a first one, at most two edges apart."""
    count = state.num_entities
    kept = _distances(edges, state) % 2 == 0
    # Pairs two edges apart: for each edge, all edges that lead on from its receiver, which are those it receives.
    degrees = torch.bincount(edges.receivers, minlength=count)
    first = kept[edges.senders]
    senders, middles = edges.senders[first], edges.receivers[first]
    repeats = degrees[middles]
    rows = torch.repeat_interleave(torch.arange(len(middles), device=middles.device), repeats)
    within = torch.arange(len(rows), device=rows.device) - (repeats.cumsum(0) - repeats)[rows]
    ends = edges.senders[edges.starts[middles][rows] + within]
    senders, receivers = torch.cat([edges.senders, senders[rows]]), torch.cat([edges.receivers, ends])
    new = kept[senders] & kept[receivers] & (senders != receivers)
    pairs = torch.unique(receivers[new] * count + senders[new])
    return _connections(pairs % count, pairs // count, count)


def _distances(edges: Connections, state: State) -> Tensor:
    """Return how many edges each node is from the first node of its part of the mesh; -1 for nodes without edges."""
    distances = torch.full_like(state.batch, -1)
    left = torch.zeros_like(state.batch, dtype=torch.bool)
    left[edges.receivers] = True
    order = torch.arange(len(left), device=left.device)
    for key in (*state.rest_positions.flip(1).unbind(1), state.batch):
        order = order[torch.argsort(key[order], stable=True, descending=key is not state.batch)]
    while bool(left.any()):
        # A first node for each scene at once; parts of a mesh that hang together with none of them come after.
        places = order[left[order]]
        scenes = state.batch[places]
        seeds = places[torch.cat([scenes.new_ones(1, dtype=torch.bool), scenes[1:] != scenes[:-1]])]
        front, distance = torch.zeros_like(left).index_fill_(0, seeds, True), 0
        while bool(front.any()):
            distances[front] = distance
            left &= ~front
            distance += 1
            ahead = torch.zeros_like(left).index_fill_(0, edges.receivers[front[edges.senders]], True)
            front = ahead & left
    return distances


def _mesh_edges(state: State) -> Connections:
    count, cells = state.num_entities, state["cells"]
    size = cells.shape[1]
    space = state["rest_positions" if "rest_positions" in state else "positions"].shape[1]
    ends = TETRAHEDRON if size == 4 and space == 3 else EDGES_OF_CELLS.get(size)
    if ends is None:
        raise ValueError(f"cells have {', '.join(map(str, EDGES_OF_CELLS))} nodes; got cells of {size}.")
    sides = cells[:, torch.tensor(ends, device=cells.device)].reshape(-1, 2)
    sides = sides[state.active[sides].all(1) & (sides[:, 0] != sides[:, 1])]
    pairs = torch.unique(torch.cat([sides[:, 0] * count + sides[:, 1], sides[:, 1] * count + sides[:, 0]]))
    return _connections(pairs % count, pairs // count, count)


def _connections(senders: Tensor, receivers: Tensor, count: int) -> Connections:
    starts = torch.searchsorted(receivers, torch.arange(count, device=receivers.device))
    return Connections(senders=senders, receivers=receivers, starts=starts)


def separations(state: State, edges: Edges) -> Tensor:
    """Return [e, d]: the way from each sender, or the image it stands for, to its receiver."""
    way = state.positions.index_select(0, edges.receivers) - state.positions.index_select(0, edges.senders)
    if edges.walls is None or "boundaries" not in state:
        return way
    rows = (edges.walls >= 0).nonzero()[:, 0]
    bodies, axes, sides = edges.receivers[rows], edges.walls[rows] // 2, edges.walls[rows] % 2
    depths = state.positions[bodies, axes] - state.boundaries[state.batch[bodies], sides, axes]
    return way.index_put((rows, axes), 2 * depths)


def closings(velocities: Tensor, edges: Edges) -> Tensor:
    """Return [e, d]: velocities [n, d] of receivers relative to those of their senders, or of their images."""
    relative = velocities.index_select(0, edges.receivers) - velocities.index_select(0, edges.senders)
    if edges.walls is None:
        return relative
    rows = (edges.walls >= 0).nonzero()[:, 0]
    axes = edges.walls[rows] // 2
    return relative.index_put((rows, axes), 2 * velocities[edges.receivers[rows], axes])


def to_pyg(state: State, *, margin: float | None) -> Data:
    """Return the state and its edges as a torch_geometric `Data`: fields by name, `edge_index` [2, e], `batch`.

    Raises:
        ImportError: torch-geometric is missing.
    """
    from torch_geometric.data import Data

    edges = object_edges(state, margin=margin)
    fields = {name: state[name] for name in state if state.fields[name].per == "entity"}
    return Data(
        **fields,
        edge_index=torch.stack([edges.senders, edges.receivers]),
        edge_springs=edges.springs,
        batch=state.batch,
        num_nodes=state.num_entities,
    )


_SOURCES = ("springs", "radii", "fixed", "kinematic", "batch", "active")


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """What does not depend on positions: the springs' edges, and from where on pairs are near.

    `grid` [b, s] lists the entities of each scene, `reach` [b, s, s] is the distance of centres under
    which column sends to row, minus infinity where it never does.
    """

    senders: Tensor
    receivers: Tensor
    springs: Tensor
    grid: Tensor
    reach: Tensor
    entities: Tensor


def _fixed_part(state: State, margin: float | None) -> _Fixed:
    receives = state.free
    grid, present = _grid(state)
    reach = torch.full((*grid.shape, grid.shape[1]), torch.inf, dtype=state.positions.dtype, device=state.device)
    if margin is not None:
        radii = state.radii[grid] if "radii" in state else state.positions.new_zeros(grid.shape)
        reach = radii[:, :, None] + radii[:, None] + margin
    joined = state.springs if "springs" in state else state.batch.new_zeros(0, 2)
    allowed = (receives[grid] & present)[:, :, None] & (state.active[grid] & present)[:, None]
    allowed.diagonal(dim1=1, dim2=2).fill_(False)
    scenes = state.batch[joined[:, 0]]
    first, second = (joined - grid[scenes, :1]).unbind(1)
    allowed[scenes, first, second] = False
    allowed[scenes, second, first] = False
    senders, receivers = torch.cat([joined, joined.flip(1)]).unbind(1)
    kept = (receives[receivers] & state.active[senders]).nonzero()[:, 0]
    return _Fixed(
        senders=senders[kept],
        receivers=receivers[kept],
        springs=torch.cat([kept, kept.new_tensor([-1])]),
        grid=grid,
        reach=reach.masked_fill(~allowed, -torch.inf),
        entities=torch.arange(state.num_entities, device=state.device),
    )


def _near_walls(state: State, margin: float | None) -> tuple[Tensor, Tensor]:
    """Return which bodies are near which walls, numbered as in `Edges.walls`."""
    if "boundaries" not in state:
        return state.batch[:0], state.batch[:0]
    lower, upper = state.boundaries[state.batch].unbind(1)
    depths = torch.stack([state.positions - lower, upper - state.positions], 2).flatten(1)
    near = state.free[:, None].expand_as(depths)
    if margin is not None:
        radii = state.radii if "radii" in state else torch.zeros_like(depths[:, 0])
        near = near & (2 * (depths - radii[:, None]) < margin)
    bodies, sides = near.nonzero(as_tuple=True)
    return bodies, sides


def _grid(state: State) -> tuple[Tensor, Tensor]:
    """Return the entities of each scene, [scenes, largest size], and which cells are filled."""
    counts = torch.bincount(state.batch, minlength=state.num_scenes)
    column = torch.arange(int(counts.max()) if len(counts) else 0, device=state.device)
    present = column < counts[:, None]
    entities = (counts.cumsum(0) - counts)[:, None] + column
    return torch.where(present, entities, 0), present
