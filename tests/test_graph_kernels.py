from __future__ import annotations

import pytest
import torch

from simworld import Field, ObjectState, ParticleState
from simworld.graph import closings, object_edges, particle_edges, separations, to_pyg
from simworld.kernels import gather_sum, gather_sum_reference, segment_sum, segment_sum_reference
from simworld.state import State


def pairs(edges):
    return set(zip(edges.senders.tolist(), edges.receivers.tolist(), strict=True))


def expected(state: State, margin: float | None) -> set[tuple[int, int]]:
    """Every ordered pair by its definition, one at a time."""
    joined = {frozenset(row) for row in state.springs.tolist()} if "springs" in state else set()
    found = set()
    for s in range(len(state)):
        for r in range(len(state)):
            fixed = "fixed" in state and bool(state.fixed[r])
            if s == r or fixed or state.batch[s] != state.batch[r] or not (state.active[s] and state.active[r]):
                continue
            gap = (state.positions[s] - state.positions[r]).norm() - state.radii[s] - state.radii[r]
            if frozenset((s, r)) in joined or margin is None or gap < margin:
                found.add((s, r))
    return found


@pytest.mark.parametrize("margin", [0.0, 2.0, 40.0, None])
def test_edges_are_those_of_the_definition(episode, margin):
    state = type(episode.initial).cat([episode.frame(0), episode.frame(20)])
    state = state.replace(active=torch.rand(len(state), generator=torch.Generator().manual_seed(0)) < 0.8)
    edges = object_edges(state, margin=margin)
    assert pairs(edges) == expected(state, margin)
    assert len(pairs(edges)) == len(edges.senders)
    assert (edges.receivers.diff() >= 0).all()
    for node, start in enumerate(edges.starts.tolist()):
        assert start == int((edges.receivers < node).sum())


def test_ragged_scenes_see_only_themselves():
    small = ObjectState(positions=torch.rand(2, 2), velocities=torch.zeros(2, 2), radii=torch.ones(2))
    large = ObjectState(positions=torch.rand(5, 2), velocities=torch.zeros(5, 2), radii=torch.ones(5))
    state = ObjectState.cat([small, large, small])
    assert pairs(object_edges(state, margin=None)) == expected(state, None)
    assert pairs(object_edges(state, margin=0.5)) == expected(state, 0.5)


def test_springs_tell_their_direction(state):
    edges = object_edges(state, margin=0.0)
    count = len(state.springs)
    for sender, receiver, row in zip(
        *(x.tolist() for x in (edges.senders, edges.receivers, edges.springs)), strict=True
    ):
        if row >= 0:
            ends = state.springs[row % count].tolist()
            assert [sender, receiver] == (ends if row < count else ends[::-1])


def test_edges_follow_removal_and_movement(state):
    before = pairs(object_edges(state, margin=2.0))
    gone = state.replace(active=torch.arange(len(state)) != 3)
    assert pairs(object_edges(gone, margin=2.0)) == {p for p in before if 3 not in p}
    together = state.replace(positions=torch.zeros_like(state.positions))
    assert pairs(object_edges(together, margin=2.0)) == expected(together, 2.0)


def test_edges_follow_what_becomes_kinematic():
    kind = ObjectState.with_fields(kinematic=Field(unit="1", static=True, kind="bool"))
    state = kind(positions=torch.rand(3, 2), velocities=torch.zeros(3, 2), kinematic=torch.zeros(3, dtype=torch.bool))
    assert set(object_edges(state, margin=None).receivers.tolist()) == {0, 1, 2}
    scripted = state.replace(kinematic=torch.arange(3) == 1)
    assert set(object_edges(scripted, margin=None).receivers.tolist()) == {0, 2}


def test_particles_that_nothing_moves_send_only():
    state = ParticleState(
        positions=torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.2, 0.5], [0.1, 0.6]]),
        velocities=torch.zeros(4, 2),
        kinematic=torch.arange(4) == 1,
        active=torch.arange(4) != 3,
        boundaries=torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]),
        periodic=torch.tensor([[True, False]]),
    )
    assert pairs(particle_edges(state, 0.25)) == {(1, 0), (2, 0), (0, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[3, 0, 2, 1], [0, 0, 4], [5, 0], [0]])
def test_segment_sum_agrees_with_its_reference(dtype, sizes):
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    values = torch.randn(sum(sizes), 5, dtype=dtype, requires_grad=True)
    _agree(lambda v: segment_sum(v, starts), lambda v: segment_sum_reference(v, starts), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 40, 2000])
def test_gather_sum_agrees_with_its_reference(dtype, count):
    torch.manual_seed(count)
    index = torch.randint(0, 7, (count, 2))
    values = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    _agree(lambda v: gather_sum(v, index), lambda v: gather_sum_reference(v, index), values)


def _agree(fast, reference, values):
    weights = torch.randn_like(reference(values))
    (fast_gradient,) = torch.autograd.grad((fast(values) * weights).sum(), values)
    (gradient,) = torch.autograd.grad((reference(values) * weights).sum(), values)
    near = 1e-12 if values.dtype == torch.float64 else 1e-4  # hundreds of numbers near 1 are added up
    assert torch.allclose(fast(values), reference(values), rtol=near, atol=near)
    assert torch.allclose(fast_gradient, gradient, rtol=near, atol=near)


def test_message_passing_on_our_edges_agrees_with_torch_geometric(state):
    """The library's own aggregation over the exported graph is the oracle of ours."""
    from torch_geometric.utils import scatter

    data = to_pyg(state, margin=2.0)
    edges = object_edges(state, margin=2.0)
    data.validate()
    assert data.num_nodes == len(state)
    messages = data.velocities[data.edge_index[0]]
    assert messages.abs().sum() > 0
    wanted = scatter(messages, data.edge_index[1], dim=0, dim_size=len(state), reduce="sum")
    assert torch.allclose(segment_sum(messages, edges.starts), wanted)


def test_images_stand_behind_the_walls():
    """Every body and wall by definition: the image, what it is to the body, and how fast it comes."""
    state = ObjectState(
        positions=torch.tensor([[0.2, 0.5], [1.9, 0.9], [1.0, 0.5], [0.1, 0.1]]).double(),
        velocities=torch.tensor([[1.0, 2.0], [-3.0, 4.0], [1.0, 1.0], [5.0, 6.0]]).double(),
        radii=torch.tensor([0.15, 0.05, 0.1, 0.1]).double(),
        fixed=torch.tensor([False, False, False, True]),
        boundaries=torch.tensor([[[0.0, 0.0], [2.0, 1.0]]]).double(),
    )
    edges = object_edges(state, margin=0.12, walls=True)
    rows = (edges.walls >= 0).nonzero()[:, 0]
    found = {(int(edges.receivers[k]), int(edges.walls[k])): k for k in rows}
    assert set(found) == {(0, 0), (1, 1), (1, 3)}
    assert torch.equal(edges.senders[rows], edges.receivers[rows])
    assert (edges.receivers.diff() >= 0).all()
    images = {(0, 0): [-0.2, 0.5], (1, 1): [2.1, 0.9], (1, 3): [1.9, 1.1]}
    for (body, wall), k in found.items():
        flip = torch.tensor([-1.0, 1.0] if wall < 2 else [1.0, -1.0]).double()
        way = state.positions[body] - torch.tensor(images[body, wall]).double()
        assert torch.allclose(separations(state, edges)[k], way)
        assert torch.allclose(closings(state.velocities, edges)[k], state.velocities[body] * (1 - flip))
    everything = object_edges(state, margin=None, walls=True)
    assert int((everything.walls >= 0).sum()) == 12
    gone = state.replace(active=torch.tensor([True, False, True, True]))
    assert int((object_edges(gone, margin=0.12, walls=True).walls >= 0).sum()) == 1


def test_without_walls_edges_are_what_they_were(state):
    plain, walled = object_edges(state, margin=2.0), object_edges(state, margin=2.0, walls=True)
    assert plain.walls is None
    assert torch.equal(plain.senders, walled.senders)
    assert torch.equal(separations(state, plain), separations(state, walled))
    wanted = state.positions[plain.receivers] - state.positions[plain.senders]
    assert torch.equal(separations(state, plain), wanted)
