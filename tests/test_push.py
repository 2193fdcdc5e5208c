"""The push engine against closed forms, conservation, restarts and bad input."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from simworld import ObjectState, rollout
from simworld.data.generate import read_recipe
from simworld.intervene import do, remove, scale
from simworld.physics import PushEngine, push_episode, push_state, rotation_error
from simworld.testing import check_simulator

FOLDER = Path(__file__).parents[1] / "datasets/push_3d"
GOLDEN = FOLDER / "first_episode.json"


def bodies(positions, types, *, extents=(0.05, 0.05, 0.05), masses=1.0, frictions=0.5, gravity=9.81, **changes):
    positions = torch.tensor(positions).double()
    count = len(positions)
    return push_state(
        positions,
        half_extents=torch.tensor(extents).double().expand(count, 3).clone(),
        masses=torch.as_tensor(masses).double().expand(count).clone(),
        frictions=torch.as_tensor(frictions).double().expand(count).clone(),
        object_types=torch.tensor(types),
        gravity=gravity,
        **{name: torch.tensor(value).double() for name, value in changes.items()},
    )


@pytest.fixture(scope="module")
def episode():
    return push_episode([7, 0, 1], num_steps=100)


def test_free_fall_is_met_to_first_order():
    """The engine's steps are semi-implicit: halving its time step halves the error in position, g t h / 2."""
    start = bodies([[0.0, 0.0, 3.0]], [1])
    wanted = 3.0 - 9.81 * 0.4**2 / 2
    errors = []
    for time_step in (0.004, 0.002, 0.001):
        path = rollout(start, simulator=PushEngine(0.02, time_step=time_step), num_steps=20)
        errors.append(abs(float(path["positions"][-1, 0, 2]) - wanted))
        assert float(path["velocities"][-1, 0, 2]) == pytest.approx(-9.81 * 0.4, rel=1e-9)
    assert errors[0] == pytest.approx(9.81 * 0.4 * 0.004 / 2, rel=0.01)
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.01)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("mu", [0.2, 0.6])
def test_a_sliding_box_stops_where_coulomb_says(mu):
    flat = (0.06, 0.06, 0.02)
    start = bodies([[0.0, 0.0, 0.02]], [0], extents=flat, frictions=mu, velocities=[[1.0, 0.0, 0.0]])
    path = rollout(start, simulator=PushEngine(), num_steps=60)
    assert float(path["positions"][-1, 0, 0]) == pytest.approx(1 / (2 * mu * 9.81), rel=0.03)
    assert path["velocities"][-1].norm() < 0.002


def test_a_force_is_held_for_the_step():
    start = bodies([[0.0, 0.0, 1.0]], [0], masses=2.0, gravity=0.0)
    after = PushEngine().step(start, torch.tensor([[3.0, -1.0, 0.5]]).double())
    assert torch.allclose(after.velocities, torch.tensor([[3.0, -1.0, 0.5]]).double() * 0.02 / 2.0, rtol=1e-9)


def test_a_free_spinning_box_keeps_momentum_and_nearly_its_energy():
    spin = [[2.0, 3.0, 1.0]]
    quats = [[math.cos(0.3), math.sin(0.3), 0.0, 0.0]]
    start = bodies(
        [[0.0, 0.0, 1.0]], [0], extents=(0.03, 0.05, 0.07), gravity=0.0, quats=quats, angular_velocities=spin
    )
    path = rollout(start, simulator=PushEngine(time_step=0.0005), num_steps=100)
    squares = start.half_extents[0].square()
    inertia = (squares.sum() - squares) / 3
    body = turned_back(path["quats"][:, 0], path["angular_velocities"][:, 0])
    momentum = turned_back(path["quats"][:, 0] * torch.tensor([1.0, -1, -1, -1]), body * inertia)
    energy = (body.square() * inertia).sum(1)
    assert torch.allclose(momentum, momentum[:1].expand_as(momentum), atol=0.01 * float(momentum[0].norm()))
    assert torch.allclose(energy, energy[:1], rtol=0.01)
    assert float((body[-1] - body[0]).norm()) > 0.5  # it does tumble


def turned_back(quats, vectors):
    real, imaginary = quats[:, :1], -quats[:, 1:]
    once = 2 * torch.linalg.cross(imaginary, vectors)
    return vectors + real * once + torch.linalg.cross(imaginary, once)


def test_angular_velocities_are_in_the_worlds_axes():
    """A box on its side, turned a quarter about x, spinning about the vertical: what it does is a yaw."""
    quats = [[math.cos(math.pi / 4), math.sin(math.pi / 4), 0.0, 0.0]]
    start = bodies([[0.0, 0.0, 1.0]], [0], gravity=0.0, quats=quats, angular_velocities=[[0.0, 0.0, 2.0]])
    after = rollout(start, simulator=PushEngine(), num_steps=10).frame(-1)
    half = 0.2
    turn = torch.tensor([math.cos(half), 0.0, 0.0, math.sin(half)]).double()
    w, x = start.quats[0, 0], start.quats[0, 1]
    wanted = torch.stack([turn[0] * w, turn[0] * x, turn[3] * x, turn[3] * w])
    assert float(rotation_error(after.quats[0], wanted)) < 0.01
    assert torch.allclose(after.angular_velocities, start.angular_velocities, atol=1e-6)


def test_a_frictionless_collision_keeps_momentum():
    start = bodies(
        [[0.0, 0.0, 0.05], [0.15, 0.02, 0.05], [0.3, 0.0, 0.05]],
        [0, 0, 1],
        masses=[1.0, 0.5, 0.2],
        frictions=0.0,
        velocities=[[1.0, 0.1, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.0, 0.0]],
    )
    path = rollout(start, simulator=PushEngine(), num_steps=50)
    momenta = (start.masses[:, None] * path["velocities"]).sum(1)[:, :2]
    assert torch.allclose(momenta, momenta[:1].expand_as(momenta), atol=3e-4)  # the engine's least friction is 1e-5
    assert (path["velocities"][-1, 1] - start.velocities[1]).norm() > 0.1  # they met


def test_a_pushed_ball_rolls_without_slipping():
    start = bodies([[0.0, 0.0, 0.05]], [1])
    forces = torch.tensor([[0.5, 0.0, 0.0]]).double().expand(50, 1, 3)
    after = rollout(start, forces, simulator=PushEngine()).frame(-1)
    assert float(after.velocities[0, 0]) == pytest.approx(0.5 / 1.4, rel=0.01)  # 2/5 of the mass turns with it
    assert float(after.angular_velocities[0, 1]) == pytest.approx(float(after.velocities[0, 0]) / 0.05, rel=0.01)


def test_quaternions_stay_unit_and_bodies_on_the_table(episode):
    assert (episode["quats"].norm(dim=-1) - 1).abs().max() < 1e-9
    assert episode["positions"][..., 2].min() > 0.02


def test_restarted_from_every_frame_the_engine_goes_on_as_it_did(episode):
    """Nothing but the first guess of its solver is lost: a step from each frame misses by micrometres at most."""
    engine = PushEngine()
    after = engine.step(episode.as_scenes(100), episode.actions.flatten(0, 1))
    misses = (after.positions - episode["positions"][1:].flatten(0, 1)).norm(dim=1)
    assert misses.median() < 1e-12
    assert misses.max() < 1e-4
    path = rollout(episode.initial, episode.actions, simulator=engine)
    assert (path["positions"] - episode["positions"]).norm(dim=-1).max() < 1e-3
    assert rotation_error(path["quats"], episode["quats"]).max() < 1.0


def test_the_contract(episode):
    check_simulator(PushEngine(), episode.frame(20), episode.actions[20:30], order_matters=True)


def test_episodes_are_functions_of_their_seed(episode):
    again, other = push_episode([7, 0, 1], num_steps=20), push_episode([7, 0, 2], num_steps=20)
    assert torch.equal(again["positions"], episode["positions"][:21])
    assert other["positions"].shape != again["positions"].shape or not torch.equal(other.actions, again.actions)
    assert {len(push_episode([7, 0, k], num_steps=0).initial) for k in range(30)} == {3, 4, 5, 6}
    assert len(push_episode([7, 0, 1], num_steps=0, num_bodies=8).initial) == 8


def test_pushes_move_turn_and_bring_bodies_together():
    paths = [push_episode([11, 0, k]) for k in range(10)]
    moved = torch.cat([(p["positions"][-1] - p["positions"][0]).norm(dim=1) for p in paths])
    assert moved.median() > 0.1
    turned = torch.cat([rotation_error(p["quats"][-1], p["quats"][0]) for p in paths])
    assert turned.median() > 10
    far = torch.cat([p["positions"][-1, :, :2].norm(dim=1) for p in paths])
    assert far.median() < 0.5


def test_interventions_are_answered_from_the_same_start_and_pushes(episode):
    softer = do(at=range(99), actions=scale(0.5))
    gone = push_episode([7, 0, 1], num_steps=20, interventions=[remove([0]), softer])
    assert torch.equal(gone["positions"][:, 0], episode["positions"][:1, 0].expand(21, 3))
    assert torch.equal(gone.actions, 0.5 * episode.actions[:20])
    with pytest.raises(ValueError, match="got entities .99."):
        push_episode([7, 0, 1], num_steps=2, interventions=[remove([99])])


def test_rotation_error_is_the_angle():
    angles = torch.tensor([0.0, 1e-6, 0.5, 3.0]).double()
    quats = torch.stack([(angles / 2).cos(), (angles / 2).sin(), 0 * angles, 0 * angles], 1)
    start = torch.tensor([1.0, 0.0, 0.0, 0.0]).double().expand(4, 4)
    assert torch.allclose(rotation_error(quats, start), angles.rad2deg(), rtol=1e-6)
    assert torch.allclose(rotation_error(-quats, start), angles.rad2deg(), rtol=1e-6)


def test_bad_input():
    engine = PushEngine()
    with pytest.raises(ValueError, match=r"Bodies 0 and 1 overlap by 0.07 m; move them apart"):
        engine.step(bodies([[0.0, 0.0, 0.05], [0.03, 0.0, 0.05]], [1, 1]))
    with pytest.raises(ValueError, match=r"Body 1 is below the table z = 0 by 0.06 m"):
        engine.step(bodies([[0.0, 0.0, 0.05], [0.3, 0.0, -0.01]], [0, 0]))
    with pytest.raises(ValueError, match="masses must be positive; row 0"):
        bodies([[0.0, 0.0, 0.05]], [0], masses=0.0)
    with pytest.raises(ValueError, match="quats must be of unit length"):
        bodies([[0.0, 0.0, 0.05]], [0], quats=[[1.0, 1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"takes forces \[1, 3\], a row per body; got \[1, 2\]"):
        engine.step(bodies([[0.0, 0.0, 0.05]], [0]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="0 .box. and 1 .ball."):
        engine.step(bodies([[0.0, 0.0, 0.05]], [2]))
    with pytest.raises(ValueError, match="whole multiple of time_step"):
        PushEngine(0.02, time_step=0.003)
    with pytest.raises(ValueError, match="1 or more bodies"):
        push_episode([0], num_bodies=0)
    with pytest.raises(ValueError, match="no room on the table"):
        push_episode([0], num_bodies=60)


def test_other_kinds_of_state_are_told_what_they_lack():
    bare = ObjectState(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3), masses=torch.ones(1))
    with pytest.raises(ValueError, match="needs quats, angular_velocities, half_extents"):
        PushEngine().step(bare)


def test_without_mujoco_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"needs mujoco; install it with: pip install 'simworld\[physics\]'"):
        PushEngine().step(bodies([[0.0, 0.0, 0.05]], [0]))


def test_the_first_episode_of_the_recipe_is_the_golden_one():
    recipe = read_recipe(FOLDER / "recipe.toml")
    path, _ = recipe.make("train", 0)
    found = {
        "masses": path.initial.masses.tolist(),
        "positions": path["positions"][[0, 10, 50]].tolist(),
        "quats": path["quats"][[0, 10, 50]].tolist(),
    }
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and is written; look at it and commit it")
    for name, wanted in json.loads(GOLDEN.read_text()).items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(wanted), atol=1e-3), name
