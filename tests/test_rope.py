"""The rope engine against closed forms, conservation, its own episodes and the recorded file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simworld import ObjectState, evaluate, one_step_position_mse, rollout
from simworld.data import read_propnet_rope
from simworld.intervene import do, remove, scale
from simworld.physics import PlanarEngine, rope_episode
from simworld.testing import check_simulator

GOLDEN = Path(__file__).parents[1] / "datasets/rope/first_episode.json"


def discs(positions, velocities, springs=(), **changes):
    positions, velocities = torch.tensor(positions).double(), torch.tensor(velocities).double()
    count, rows = len(positions), len(springs)
    values = {
        "masses": torch.ones(count).double(),
        "radii": torch.ones(count).double(),
        "fixed": torch.zeros(count, dtype=torch.bool),
        "springs": torch.tensor(springs, dtype=torch.long).view(-1, 2),
        "spring_lengths": torch.full((rows,), 10.0).double(),
        "spring_stiffnesses": torch.full((rows,), 100.0).double(),
        "spring_dampings": torch.zeros(rows).double(),
        **changes,
    }
    return ObjectState(positions=positions, velocities=velocities, **values)


def test_a_free_disc_moves_by_its_impulses():
    state = discs([[0.0, 0.0]], [[1.0, 2.0]], masses=torch.tensor([2.0]).double())
    actions = torch.randn(20, 1, 2).double()
    path = rollout(state, actions, simulator=PlanarEngine(dt=1 / 50))
    wanted = state.velocities + actions.cumsum(0) / 2.0
    assert torch.allclose(path["velocities"][1:], wanted, atol=1e-10)
    assert torch.allclose(path["positions"][-1], state.positions + wanted.sum(0) / 50, atol=1e-10)


def test_a_spring_swings_with_its_period_to_first_order():
    """Two unit masses on a spring k: the distance swings with frequency sqrt(2 k); halving dt halves the error."""
    errors = []
    for refined in (1, 2, 4):
        dt = 0.004 / refined
        state = discs([[0.0, 0.0], [12.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], springs=[(0, 1)])
        path = rollout(state, simulator=PlanarEngine(dt=dt), num_steps=50 * refined)
        distance = (path["positions"][-1, 1] - path["positions"][-1, 0]).norm()
        errors.append(float((distance - (10 + 2 * torch.cos(torch.tensor(200.0).sqrt() * 0.2))).abs()))
    assert errors[0] < 0.2
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.08)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.08)


def test_springs_and_contacts_conserve_momentum():
    state = discs(
        [[0.0, 0.0], [9.0, 0.0], [18.0, 1.0], [19.9, 1.0]],
        [[5.0, 0.0], [0.0, 3.0], [1.0, -2.0], [-4.0, 0.0]],
        springs=[(0, 1), (1, 2)],
        masses=torch.tensor([1.0, 2.0, 3.0, 4.0]).double(),
        spring_dampings=torch.tensor([50.0, 50.0]).double(),
    )
    path = rollout(state, simulator=PlanarEngine(dt=1 / 50), num_steps=50)
    momentum = (path["velocities"] * state.masses[:, None]).sum(1)
    assert torch.allclose(momentum[2:], momentum[1].expand(49, 2), atol=1e-3)
    assert (path["velocities"][-1] - path["velocities"][0]).abs().max() > 1


def test_damping_only_takes_energy():
    state = discs([[0.0, 0.0], [14.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], springs=[(0, 1)])
    state = state.replace(spring_dampings=torch.tensor([5.0]).double())
    path = rollout(state, simulator=PlanarEngine(dt=1 / 50), num_steps=200)
    stretch = ((path["positions"][:, 1] - path["positions"][:, 0]).norm(dim=1) - 10).abs()
    assert stretch[150:].max() < 0.01 < stretch[0]


def test_bodies_do_not_enter_cylinders():
    path = rope_episode([3, 0, 0], num_steps=99)
    gaps = torch.cdist(path["positions"][:, :15], path["positions"][:, 15:]) - path.initial.radii[15:] - 5
    assert gaps.min() > -5  # contacts are soft, but no centre enters


def test_episodes_keep_what_the_recipe_promises():
    for k in range(20):
        state = rope_episode([11, 0, k], num_steps=0, warm_up_steps=1).initial
        centres, radii = state.positions[15:], state.radii[15:]
        assert ((radii >= 30) & (radii <= 60)).all()
        assert (centres[0] - centres[1]).norm() - radii.sum() > 3 - 1e-9
        assert ((centres >= 150) & (centres <= 450)).all()
        assert ((state.positions[0] - 300).abs() <= 25).all()
        assert state.fixed.tolist() == [True] + [False] * 14 + [True, True]


def test_the_contract(episode):
    check_simulator(PlanarEngine(dt=1 / 50), episode.initial, episode.actions, order_matters=True)


def test_episodes_are_functions_of_their_seed(episode):
    again, other = rope_episode([7, 0, 1], num_steps=30), rope_episode([7, 0, 2], num_steps=30)
    assert torch.equal(again["positions"], episode["positions"])
    assert not torch.equal(other["positions"], episode["positions"])


def test_interventions_are_answered_from_the_same_start(episode):
    gone = rope_episode([7, 0, 1], num_steps=30, interventions=[remove([14]), do(at=range(99), actions=scale(2.0))])
    assert torch.equal(gone["positions"][0], episode["positions"][0])
    assert torch.equal(gone["positions"][:, 14], episode["positions"][:1, 14].expand(31, 2))
    assert torch.equal(gone.actions, 2 * episode.actions)
    with pytest.raises(ValueError, match="rows 0 to 16"):
        rope_episode([7, 0, 1], interventions=[remove([17])])


def test_bad_arguments(state):
    with pytest.raises(ValueError, match="2 or more balls"):
        rope_episode([0], num_balls=1)
    with pytest.raises(ValueError, match=r"takes impulses \[17, 2\]; got \[3, 2\]"):
        PlanarEngine(dt=1 / 50).step(state, torch.zeros(3, 2))
    solid = ObjectState(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="plane"):
        PlanarEngine(dt=1 / 50).step(solid)


def test_restarted_from_each_frame_the_engine_misses_only_cached_contacts():
    """Restarted where it arrives, not where it left, the engine repeats most of its own steps exactly."""
    paths = [rope_episode([5, 0, k]) for k in range(5)]
    errors = torch.cat([_one_step_errors(path) for path in paths])
    assert errors.median() < 1e-6
    assert errors.mean() < 2e-3


def test_it_is_the_engine_of_the_recorded_file(recorded):
    paths = read_propnet_rope(recorded)
    errors = torch.cat([_one_step_errors(path) for path in paths])
    assert errors.median() < 1e-6
    assert errors.mean() < 1e-3
    started = [path.window(1, 100) for path in paths]
    rows = {
        row.horizon: row.value for row in evaluate({"e": PlanarEngine(dt=1 / 50)}, started, dataset="", baselines=False)
    }
    assert rows["all"] < 10


def test_our_episodes_have_the_statistics_of_the_recorded_ones(recorded):
    theirs = read_propnet_rope(recorded)
    ours = [rope_episode([2, 0, k]) for k in range(40)]
    for measure in (
        lambda t: t["velocities"][:, 1:15].square().mean().sqrt(),
        lambda t: (t["positions"][:, 1:15] - t["positions"][:, :14]).norm(dim=2).mean(),
        lambda t: t.actions[:, 14].std(),
        lambda t: t.initial.radii[15:].mean(),
    ):
        a, b = torch.stack([measure(t) for t in theirs]), torch.stack([measure(t) for t in ours])
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert (a.mean() - b.mean()).abs() < 3.5 * error


def _one_step_errors(path):
    after = PlanarEngine(dt=1 / 50).step(path.as_scenes(path.num_steps), path.actions.flatten(0, 1))
    return (after.positions - path["positions"][1:].flatten(0, 1)).square().view(path.num_steps, -1).mean(1)


def test_one_step_error_is_the_mean_of_those():
    path = rope_episode([5, 0, 0], num_steps=20)
    assert one_step_position_mse(PlanarEngine(dt=1 / 50), path) == pytest.approx(float(_one_step_errors(path).mean()))


def test_the_first_episode_of_the_recipe_is_the_golden_one():
    path = rope_episode([2026, 0, 0])
    found = {
        "mean_position": path["positions"].mean((1, 2))[[0, 1, 50, 99]].tolist(),
        "last_ball": path["positions"][[0, 1, 50, 99], 14].tolist(),
        "radii": path.initial.radii[15:].tolist(),
    }
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and is written; look at it and commit it")
    for name, wanted in json.loads(GOLDEN.read_text()).items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(wanted), atol=1e-3), name
