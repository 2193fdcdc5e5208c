"""The network of rigid bodies: its contacts against the engine's, its symmetries, what it conserves."""

from __future__ import annotations

import math

import pytest
import torch

from simworld import ObjectState, rollout
from simworld.models import RigidBodyNetwork, load_checkpoint, save_checkpoint
from simworld.models.contacts import SIDEWAYS, Poses, find_candidates, locate, shapes_of
from simworld.physics import push, push_episode, push_state, rotation_error
from simworld.quaternions import exponential, logarithm, rotations
from simworld.testing import check_simulator
from simworld.trajectory import Trajectory


@pytest.fixture(scope="module")
def episode():
    return push_episode([7, 0, 5], num_steps=60, num_bodies=6)


@pytest.fixture(scope="module")
def make_model(episode):
    def make(seed=0, **arguments):
        torch.manual_seed(seed)
        given = {"latent_size": 8, "num_message_passing_steps": 2, "num_sub_steps": 2, **arguments}
        model = RigidBodyNetwork(dt=0.02, statistics=RigidBodyNetwork.measure([episode]), **given)
        for block in model.blocks:  # as far from untrained as training would take it
            torch.nn.init.normal_(block.answer.weight, std=0.5 / 8**0.5)
        return model.double().eval()

    return make


def test_the_contract(make_model, episode):
    check_simulator(make_model(), episode.frame(20), episode.actions[20:30], tolerance=1e-8)


def test_ragged_scenes_go_as_they_go_alone(make_model, episode):
    other = push_episode([7, 0, 1], num_steps=10, num_bodies=3)
    model = make_model()
    both = ObjectState.cat([episode.frame(25), other.frame(5)])
    together = model.step(both, torch.cat([episode.actions[25], other.actions[5]]))
    for number, (path, t) in enumerate(((episode, 25), (other, 5))):
        alone = model.step(path.frame(t), path.actions[t])
        for name in alone.dynamic_fields:
            assert torch.allclose(together.scene(number)[name], alone[name], atol=1e-9), name


def test_target_is_the_inverse_of_integrate(make_model, episode):
    model = make_model()
    for t in range(0, 60, 3):
        state, after, action = episode.frame(t), episode.frame(t + 1), episode.actions[t]
        again = model.integrate(state, model.target(state, after, action), action)
        for name in ("positions", "velocities", "angular_velocities"):
            assert torch.allclose(again[name], after[name], atol=1e-12), name
        assert rotation_error(again.quats, after.quats).max() < 1e-6
        change = torch.randn(len(state), 12).double()
        assert torch.allclose(model.target(state, model.integrate(state, change, action), action), change, atol=1e-8)


def test_a_model_that_knows_the_target_reproduces_the_data(make_model, episode):
    model = make_model()

    class Cheat:
        dt = model.dt
        t = 0

        def step(self, state, action=None):
            change = model.target(state, episode.frame(self.t + 1), action)
            self.t += 1
            return model.integrate(state, change, action)

    path = rollout(episode.initial, episode.actions, simulator=Cheat())
    assert torch.allclose(path["positions"], episode["positions"], atol=1e-9)
    assert rotation_error(path["quats"], episode["quats"]).max() < 1e-6


def test_a_step_turns_and_shifts_with_its_input(make_model, episode):
    model, angle = make_model(), 0.7
    turn = torch.tensor([math.cos(angle / 2), 0, 0, math.sin(angle / 2)], dtype=torch.double)
    matrix, shift = rotations(turn[None])[0], torch.tensor([0.3, -0.2, 0.0]).double()
    for t in (15, 30, 45):
        state, action = episode.frame(t), episode.actions[t]
        turned = state.replace(
            positions=state.positions @ matrix.mT + shift,
            velocities=state.velocities @ matrix.mT,
            quats=product(turn, state.quats),
            angular_velocities=state.angular_velocities @ matrix.mT,
        )
        after, other = model.step(state, action), model.step(turned, action @ matrix.mT)
        assert torch.allclose(other.positions, after.positions @ matrix.mT + shift, atol=1e-9)
        assert torch.allclose(other.velocities, after.velocities @ matrix.mT, atol=1e-8)
        assert torch.allclose(other.angular_velocities, after.angular_velocities @ matrix.mT, atol=1e-7)
        assert rotation_error(other.quats, product(turn, after.quats)).max() < 1e-6


def product(p, q):
    real = p[0] * q[:, :1] - (q[:, 1:] @ p[1:])[:, None]
    cross = torch.linalg.cross(p[1:].expand_as(q[:, 1:]), q[:, 1:])
    return torch.cat([real, p[0] * q[:, 1:] + q[:, :1] * p[1:] + cross], 1)


def test_momentum_is_kept_between_bodies(make_model):
    """Far above the table, whatever the weights: neither momentum nor angular momentum changes in a collision."""
    start = push_state(
        torch.tensor([[0.0, 0.0, 5.0], [0.105, 0.02, 5.01], [0.2, 0.0, 5.0]]).double(),
        half_extents=torch.tensor([[0.05, 0.05, 0.05], [0.05, 0.04, 0.06], [0.04, 0.04, 0.04]]).double(),
        masses=torch.tensor([1.0, 0.5, 0.2]).double(),
        frictions=torch.full((3,), 0.5).double(),
        object_types=torch.tensor([0, 0, 1]),
        velocities=torch.tensor([[1.0, 0.1, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.2]]).double(),
        gravity=0.0,
    )
    path = rollout(start, simulator=make_model(num_sub_steps=50), num_steps=5)
    momenta = (start.masses[:, None] * path["velocities"]).sum(1)
    assert torch.allclose(momenta[-1], momenta[0], atol=1e-9)
    assert (path["velocities"][-1] - path["velocities"][0]).norm(dim=1).min() > 0.05
    assert torch.allclose(spin(path)[-1], spin(path)[0], atol=2e-4)
    assert spin(path)[0].norm() > 0.004


def spin(path):
    """Return the angular momentum about the origin, [T, 3]."""
    state = path.initial
    squares = state.half_extents.square()
    own = state.masses[:, None] * torch.where(
        (state.object_types == 1)[:, None], 0.4 * squares, (squares.sum(1, keepdim=True) - squares) / 3
    )
    axes = rotations(path["quats"].flatten(0, 1)).view(*path["quats"].shape[:2], 3, 3)
    turning = (axes * own[:, None]) @ axes.mT @ path["angular_velocities"][..., None]
    moving = torch.linalg.cross(path["positions"] - 5.0 * torch.eye(3).double()[2], path["velocities"], dim=-1)
    return (turning[..., 0] + state.masses[:, None] * moving).sum(1)


def test_what_is_far_off_falls_and_turns_as_free_bodies_do(make_model):
    start = push_state(
        torch.tensor([[0.0, 0.0, 9.0]]).double(),
        half_extents=torch.tensor([[0.03, 0.05, 0.07]]).double(),
        masses=torch.tensor([0.5]).double(),
        frictions=torch.tensor([0.5]).double(),
        object_types=torch.tensor([0]),
        angular_velocities=torch.tensor([[2.0, 3.0, 1.0]]).double(),
    )
    force = torch.tensor([[0.5, 0.0, 0.0]]).double().expand(8, 1, 3)
    path = rollout(start, force, simulator=make_model(num_sub_steps=20))
    truth = rollout(start, force, simulator=push.PushEngine())
    assert torch.allclose(path["positions"], truth["positions"], atol=1e-9)
    assert rotation_error(path["quats"], truth["quats"]).max() < 0.05


def test_quaternions_stay_unit(make_model, episode):
    path = rollout(episode.initial, episode.actions, simulator=make_model())
    assert (path["quats"].norm(dim=-1) - 1).abs().max() < 1e-12


def test_contacts_are_those_of_the_engine():
    """Each contact that MuJoCo finds stands among ours: point, normal and gap."""
    mujoco = pytest.importorskip("mujoco")
    found = dict.fromkeys(("table", "pair"), 0)
    for seed in range(8):
        path = push_episode([1, 0, seed])
        shapes = shapes_of(path.initial)
        (world,) = push._worlds(path.initial, 0.002)
        for t in range(0, 101, 4):
            state = path.frame(t)
            run = push._Run(world, push._pack(state))
            mujoco.mj_fwdPosition(world.model, run.data)
            poses = Poses(positions=state.positions, axes=rotations(state.quats), half_extents=state.half_extents)
            candidates = find_candidates(shapes, poses, 0.03)
            ours = locate(candidates, poses)
            for contact in run.data.contact:
                found["table" if min(contact.geom) == 0 else "pair"] += 1
                assert miss(contact, candidates.ends, ours, len(state)) < 2e-3
    assert found["table"] > 1000
    assert found["pair"] > 50


def miss(contact, ends, ours, count):
    """Return how far [m] the nearest of our contacts between the same two is from one of the engine's."""
    other, one = ((int(geom) - 1) % (count + 1) for geom in contact.geom)  # the engine's normal: to the second
    straight = (ends == torch.tensor([one, other])).all(1)
    signs = torch.where(straight, 1.0, -1.0)[:, None]
    here = (straight | (ends == torch.tensor([other, one])).all(1)) & (ours.beside[:, 0] < SIDEWAYS)
    away = (ours.points - torch.tensor(contact.pos)).norm(dim=1)
    tilted = (ours.normals * signs - torch.tensor(contact.frame[:3])).norm(dim=1)
    return float((away + 0.02 * tilted + (ours.gaps[:, 0] - contact.dist).abs())[here].min())


def test_edges_across_touch_where_they_cross():
    """Two bars, one over the other, each standing on an edge: one contact, straight up, at the crossing."""
    extents = torch.tensor([[0.2, 0.05, 0.05], [0.05, 0.2, 0.05]], dtype=torch.double)
    rolled = [math.cos(math.pi / 8), math.sin(math.pi / 8)]
    quats = torch.tensor([[rolled[0], rolled[1], 0.0, 0.0], [rolled[0], 0.0, rolled[1], 0.0]], dtype=torch.double)
    reach = 0.05 * math.sqrt(2)
    positions = torch.tensor([[0.0, 0.0, 1.0], [0.03, 0.02, 1.0 + 2 * reach + 0.001]], dtype=torch.double)
    state = push_state(
        positions,
        half_extents=extents,
        masses=torch.ones(2).double(),
        frictions=torch.ones(2).double(),
        object_types=torch.tensor([0, 0]),
        quats=quats,
    )
    poses = Poses(positions=positions, axes=rotations(quats), half_extents=extents)
    candidates = find_candidates(shapes_of(state), poses, 0.01)
    ours = locate(candidates, poses)
    here = ours.beside[:, 0] < SIDEWAYS
    assert int(here.sum()) == 1
    assert torch.allclose(
        ours.points[here], torch.tensor([[0.03, 0.0, 1 + reach + 0.0005]], dtype=torch.double), atol=1e-7
    )
    assert torch.allclose(ours.normals[here], torch.tensor([[0.0, 0.0, -1.0]]).double(), atol=1e-9)
    assert float(ours.gaps[here]) == pytest.approx(0.001, abs=1e-9)


def test_gradients_are_those_of_finite_differences(make_model, episode):
    model, action = make_model(), episode.actions[30]

    def outcome(velocities):
        return model.step(episode.frame(30).replace(velocities=velocities), action).positions.square().sum()

    velocities = episode["velocities"][30].clone().requires_grad_()
    (slope,) = torch.autograd.grad(outcome(velocities), velocities)
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0)).double()
    ahead, behind = (float(outcome(velocities.detach() + s * 1e-8 * direction).detach()) for s in (1, -1))
    assert (ahead - behind) / 2e-8 == pytest.approx(float((slope * direction).sum()), rel=1e-4)


def test_gradients_of_weights_are_finite_at_rest(make_model):
    """Where nothing slips and nothing is pressed yet, lengths are zero and directions undefined."""
    model = make_model().float().train()
    path = push_episode([3, 0, 0], num_steps=1).to(torch.float32)
    model(path.initial).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_rotation_vectors_and_quaternions_are_inverse():
    vectors = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()
    vectors = 3.1 * vectors / vectors.norm(dim=1).max()  # less than half a turn
    vectors = torch.cat([vectors, 1e-9 * vectors, torch.zeros(1, 3).double()])
    assert torch.allclose(logarithm(exponential(vectors)), vectors, atol=1e-12)


def test_checkpoints_bring_it_back(make_model, episode, tmp_path):
    model = make_model()
    save_checkpoint(model.float(), tmp_path / "m.safetensors")
    again = load_checkpoint(tmp_path / "m.safetensors")
    state = episode.frame(9).to(torch.float32)
    assert again.step(state).identical(model.float().step(state))


def test_bad_input(make_model, episode):
    model, state = make_model(), episode.initial
    bare = ObjectState(positions=state.positions, velocities=state.velocities)
    with pytest.raises(ValueError, match="lacks quats, angular_velocities, masses, half_extents"):
        model.step(bare)
    with pytest.raises(ValueError, match=r"computes in torch.float64; got a state in torch.float32"):
        model.step(state.to(torch.float32))
    with pytest.raises(ValueError, match=r"takes forces \[6, 3\] in torch.float64, a row per body; got \[6, 2\]"):
        model.step(state, torch.zeros(6, 2).double())
    with pytest.raises(ValueError, match="0 .box. and 1 .ball."):
        model.step(state.replace(object_types=state.object_types + 1))
    with pytest.raises(ValueError, match="num_sub_steps must be a whole number"):
        RigidBodyNetwork(dt=0.02, statistics=model.scales, num_sub_steps=0)
    with pytest.raises(ValueError, match="margin must be a positive distance"):
        RigidBodyNetwork(dt=0.02, statistics=model.scales, margin=-1.0)
    with pytest.raises(ValueError, match="statistics lack speed"):
        RigidBodyNetwork(dt=0.02, statistics={})
    with pytest.raises(ValueError, match="at least one trajectory of two frames"):
        RigidBodyNetwork.measure([episode.window(0, 1)])


def test_the_shipped_model_follows_the_engine():
    """Two unseen episodes, one second each: far nearer to the engine than bodies that stay or go straight on."""
    model = load_checkpoint("push_3d_0")
    paths = [push_episode([2026, 2, number], num_steps=50).to(torch.float32) for number in range(2)]
    target = Trajectory.cat(paths)
    with torch.no_grad():
        path = rollout(target.initial, target.actions, simulator=model)
    for frame, part in ((20, 0.1), (50, 0.25)):
        missed = (path["positions"][frame] - target["positions"][frame]).norm(dim=1).mean()
        moved = (target["positions"][0] - target["positions"][frame]).norm(dim=1).mean()
        assert missed < part * moved
        turned = rotation_error(target["quats"][0], target["quats"][frame]).mean()
        assert rotation_error(path["quats"][frame], target["quats"][frame]).mean() < 2 * part * turned
