"""The planar engine against closed forms, conservation and itself; balls in a box and the string."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from simworld import ObjectState, load_checkpoint, rollout
from simworld.data.generate import read_recipe
from simworld.physics import PlanarEngine, balls_engine, balls_episode, string_engine, string_episode
from simworld.physics.planar import run
from simworld.testing import check_simulator

DATASETS = Path(__file__).parents[1] / "datasets"


def discs(positions, velocities, **changes):
    positions, velocities = torch.tensor(positions).double(), torch.tensor(velocities).double()
    ones = torch.ones(len(positions)).double()
    given = {name: torch.tensor(v) if not isinstance(v, torch.Tensor) else v for name, v in changes.items()}
    values = {"masses": ones, "radii": 0.1 * ones, **given}
    values = {name: v.double() if v.is_floating_point() else v for name, v in values.items()}
    return ObjectState(positions=positions, velocities=velocities, **values)


def pendulum(angle, length=2.0):
    end = [length * math.sin(angle), -length * math.cos(angle)]
    return discs(
        [[0.0, 0.0], end],
        [[0.0, 0.0], [0.0, 0.0]],
        fixed=[True, False],
        springs=[[0, 1]],
        spring_lengths=[length],
        gravity=[[0.0, -9.81]],
    )


@pytest.mark.parametrize("angle", [0.1, 1.2])
def test_a_pendulum_swings_with_its_period(angle):
    """T = 4 K(sin(a / 2)) sqrt(l / g), K the complete elliptic integral, here by the arithmetic-geometric mean."""
    a, b = 1.0, math.cos(angle / 2)
    for _ in range(20):
        a, b = (a + b) / 2, math.sqrt(a * b)
    period = 2 * math.pi / a * math.sqrt(2.0 / 9.81)
    path = run(pendulum(angle), PlanarEngine(dt=1e-3), num_steps=math.ceil(1.2 * period / 1e-3))
    across = path["positions"][:, 1, 0]
    turns = ((across[:-1] < 0) & (across[1:] >= 0)).nonzero()[:, 0]
    assert float(turns[0]) * 1e-3 == pytest.approx(0.75 * period, rel=2e-3)
    assert (path["positions"][:, 1].norm(dim=1) - 2).abs().max() < 5e-3


def test_a_pendulum_converges_to_first_order():
    def end(sub_steps):
        return run(pendulum(1.0), PlanarEngine(dt=0.02, sub_steps=sub_steps), num_steps=40)["positions"][-1, 1]

    fine = end(256)
    errors = [float((end(k) - fine).norm()) for k in (4, 8, 16)]
    assert errors[0] < 0.05
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)


def test_a_spring_in_sub_steps_swings_with_its_period():
    """Masses 1 and 3 on a spring k = 100: the distance swings with frequency sqrt(k (1 / 1 + 1 / 3))."""
    state = discs(
        [[0.0, 0.0], [1.2, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        masses=[1.0, 3.0],
        springs=[[0, 1]],
        spring_lengths=[1.0],
        spring_stiffnesses=[100.0],
    )
    frequency, errors = math.sqrt(100 * 4 / 3), []
    for sub_steps in (5, 10, 20):
        path = run(state, PlanarEngine(dt=0.01, sub_steps=sub_steps), num_steps=99)
        found = (path["positions"][:, 1] - path["positions"][:, 0])[:, 0]
        wanted = 1 + 0.2 * torch.cos(frequency * 0.01 * torch.arange(1, 101).double())
        errors.append(float((found - wanted).abs().max()))
    assert errors[0] < 0.01
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.08)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("bounce", [(1.0, 1.0), (0.8, 0.5), (0.0, 1.0)])
def test_two_balls_collide_by_the_book(bounce):
    """Momentum stays, and they part with the product of their restitutions times the speed they met with."""
    masses = torch.tensor([1.0, 3.0]).double()
    start = discs([[0.0, 0.0], [0.5, 0.0]], [[2.0, 0.5], [-1.0, 0.5]], masses=masses, restitutions=list(bounce))
    path = run(start, balls_engine(), num_steps=40)
    before, after = path["velocities"][0], path["velocities"][-1]
    assert torch.allclose(masses @ after, masses @ before, atol=1e-9)
    parting, meeting = (v[1, 0] - v[0, 0] for v in (after, before))
    assert float(parting) == pytest.approx(-bounce[0] * bounce[1] * float(meeting), abs=1e-6)


def test_an_elastic_box_keeps_its_energy_and_its_balls():
    path = balls_episode([4, 0, 0], num_steps=0)
    start = path.initial.replace(restitutions=torch.ones(6).double())
    path = run(start, balls_engine(), num_steps=400)
    # Frames at which an overlap is being pushed apart show that push too: compare free flight, the least of ten.
    energy = 0.5 * (start.masses * path["velocities"].square().sum(2)).sum(1)[:400].view(-1, 10).median(1).values
    assert energy[-1] == pytest.approx(float(energy[0]), rel=0.1)
    assert ((path["positions"] > 0) & (path["positions"] < start.boundaries[0, 1])).all()


def test_inelastic_balls_lose_energy():
    path = balls_episode([4, 0, 1], num_steps=400)
    energy = (path.initial.masses * path["velocities"].square().sum(2)).sum(1)
    assert energy[-20:].mean() < 0.5 * energy[0]


def test_restarting_at_a_frame_goes_on_like_the_uninterrupted_run():
    """Exactly so in free flight and for springs; a contact in progress keeps what no frame shows."""
    for path, engine in (
        (balls_episode([4, 0, 2], num_steps=80), balls_engine()),
        (string_episode([4, 0, 2], num_steps=25), string_engine()),
    ):
        steps = path.num_steps
        after = engine.step(path.as_scenes(steps))
        errors = (after.positions - path["positions"][1:].flatten(0, 1)).square().view(steps, -1).mean(1)
        moves = path["positions"].diff(dim=0).square().mean((1, 2))
        assert errors.median() < 1e-18
        assert errors.mean() < 1e-3 * moves.mean()


@pytest.mark.parametrize("make", [balls_episode, string_episode])
def test_episodes_are_functions_of_their_seed(make):
    first, again, other = (make([9, 0, k], num_steps=20) for k in (1, 1, 2))
    assert torch.equal(first["positions"], again["positions"])
    assert not torch.equal(first["positions"], other["positions"])
    drift = first["positions"].diff(dim=0) - first.dt * first["velocities"][1:]
    assert drift.abs().max() < 1e-12


@pytest.mark.parametrize("num_balls", [3, 6, 9])
def test_boxes_are_as_promised(num_balls):
    for k in range(10):
        state = balls_episode([9, 0, k], num_steps=0, num_balls=num_balls).initial
        start = state.positions - 0.01 * state.velocities
        gaps = torch.cdist(start, start) - state.radii - state.radii[:, None] + 9 * torch.eye(num_balls)
        sides = state.boundaries[0, 1]
        assert gaps.min() > -1e-9
        assert ((start > state.radii[:, None] - 1e-9) & (start < sides - state.radii[:, None] + 1e-9)).all()
        assert ((sides >= 1) & (sides <= 3)).all()
        for name, low, high in (("radii", 0.1, 0.3), ("masses", 0.75, 1.25), ("restitutions", 0.4, 1.0)):
            assert ((state[name] >= low) & (state[name] <= high)).all()
        assert state.velocities.norm(dim=1).max() <= 5


@pytest.mark.parametrize(("num_masses", "num_pinned"), [(15, 1), (5, 1), (15, 0), (15, 2)])
def test_strings_hang_by_their_pinned_ends_and_stay_out_of_the_circle(num_masses, num_pinned):
    path = string_episode([9, 0, 3], num_steps=60, num_masses=num_masses, num_pinned=num_pinned)
    fixed = path.initial.fixed
    assert fixed.sum() == num_pinned + 1
    assert torch.equal(path["positions"][-1, fixed], path["positions"][0, fixed])
    gaps = (path["positions"][:, :num_masses] - path["positions"][:, -1:]).norm(dim=2)
    assert (gaps - path.initial.radii[-1] - 0.02).min() > -0.02
    assert path["positions"][-1, num_masses // 2, 1] < path["positions"][0, num_masses // 2, 1] - 0.1


def test_the_string_converges_in_its_sub_steps():
    paths = [string_episode([1, 0, 3], num_steps=30, sub_steps=k)["positions"] for k in (5, 10, 20, 40)]
    errors = [float((a - b).abs().max()) for a, b in pairwise(paths)]
    assert errors[1] < 0.02
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.15)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.15)


def test_the_contract():
    balls, string = balls_episode([4, 0, 5], num_steps=0).initial, string_episode([4, 0, 5], num_steps=2).initial
    balls = balls.replace(boundaries=torch.tensor([[[-0.5, -0.5], [9.0, 9.0]]]).double())  # room for what it moves
    check_simulator(balls_engine(), balls, order_matters=True)
    check_simulator(string_engine(sub_steps=2), string, order_matters=True)


def test_bad_starts_are_one_sentence():
    engine, still = PlanarEngine(dt=0.01), [[0.0, 0.0], [0.0, 0.0]]
    apart, touching = [[0.2, 0.2], [0.6, 0.2]], [[0.2, 0.2], [0.35, 0.2]]
    with pytest.raises(ValueError, match=r"Bodies 0 and 1 overlap: .* 0.15 apart, their radii 0.1 and 0.1. Move them"):
        run(discs(touching, still), engine, num_steps=1)
    rollout(discs(touching, still), simulator=engine, num_steps=1)  # as a running engine may have it
    inside = discs([[0.2, 0.2], [0.25, 0.2]], still, radii=[0.1, 0.3])
    with pytest.raises(ValueError, match="Bodies 0 and 1 overlap"):
        engine.step(inside)
    box = discs(apart, still, boundaries=[[[0.0, 0.0], [1.0, 0.25]]])
    with pytest.raises(ValueError, match=r"Body 0 of radius 0.1 at \[0.2.* is not inside the walls"):
        run(box, engine, num_steps=1)
    engine.step(box)
    with pytest.raises(ValueError, match="Body 0 .* is not inside the walls"):
        engine.step(box.replace(boundaries=torch.tensor([[[0.0, 0.0], [1.0, 0.1]]]).double()))
    with pytest.raises(ValueError, match="masses must be positive"):
        discs(apart, still, masses=[1.0, 0.0])
    bare = ObjectState(positions=torch.zeros(1, 2), velocities=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs masses"):
        engine.step(bare)
    with pytest.raises(ValueError, match="needs spring_lengths"):
        engine.step(discs(apart, still, springs=[[0, 1]]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="dt must be a positive"):
        PlanarEngine(dt=0)
    with pytest.raises(ValueError, match="1 or more sub_steps"):
        PlanarEngine(dt=0.1, sub_steps=0)
    with pytest.raises(ValueError, match="1 or more balls"):
        balls_episode([0], num_balls=0)
    with pytest.raises(ValueError, match="60 balls found no room"):
        balls_episode([0], num_balls=60)
    with pytest.raises(ValueError, match="0, 1 or 2 pinned ends"):
        string_episode([0], num_pinned=3)
    with pytest.raises(ValueError, match="num_steps >= 0"):
        balls_episode([0], num_steps=-1)


@pytest.mark.parametrize("name", ["balls_in", "string_in"])
def test_the_first_episode_of_the_recipe_is_the_golden_one(name):
    (path, _), *_ = read_recipe(DATASETS / name / "recipe.toml").make_all("train", range(1))
    frames = [0, 1, 20]  # before collisions make it a matter of the last bits
    found = {
        "positions": path["positions"][frames, 0].tolist(),
        "mean_velocity": path["velocities"][frames].mean(1).tolist(),
        "radii": path.initial.radii.tolist(),
        "masses": path.initial.masses.tolist(),
    }
    golden = DATASETS / name / "first_episode.json"
    if not golden.is_file():
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{golden} was missing and is written; look at it and commit it")
    for key, wanted in json.loads(golden.read_text()).items():
        assert torch.allclose(torch.tensor(found[key]), torch.tensor(wanted), atol=1e-3), key


def next_velocity_ratio(model, paths):
    """Mean squared error of the next velocity of free bodies, over that of constant velocity."""
    errors = torch.zeros(2).double()
    with torch.no_grad():
        for path in paths:
            state, wanted = path.as_scenes(path.num_steps), path["velocities"][1:].flatten(0, 1)
            free = model.free(state)
            for k, found in enumerate((model.step(state).velocities, state.velocities)):
                errors[k] += (found - wanted)[free].square().sum()
    return float(errors[0] / errors[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_balls", [3, 6, 9])
def test_shipped_balls_beat_the_paper_on_more_and_fewer(num_balls, seed):
    """Its ratios to constant velocity: 1/37 for 6; for others, transferred, 1/10 (3) and 1/21 (9)."""
    paths = [balls_episode([2028, 2, k], num_balls=num_balls, num_steps=99) for k in range(5)]
    model = load_checkpoint(f"balls_in_{seed}").double()
    assert next_velocity_ratio(model, paths) < {3: 1 / 10, 6: 1 / 37, 9: 1 / 21}[num_balls]


@pytest.mark.parametrize(("num_masses", "num_pinned"), [(15, 1), (5, 1), (30, 1), (15, 0), (15, 2)])
def test_shipped_strings_beat_the_paper_on_other_strings(num_masses, num_pinned):
    """Its ratio to constant velocity is 1/16 for 15 masses with one end pinned, 1/12 to 1/15 for the others."""
    arguments = {"num_masses": num_masses, "num_pinned": num_pinned, "num_steps": 99}
    paths = [string_episode([2029, 2, k], **arguments) for k in range(2)]
    models = [load_checkpoint(f"string_in_{seed}").double() for seed in range(3)]
    assert max(next_velocity_ratio(model, paths) for model in models) < 1 / 20


def test_shipped_models_keep_the_contract():
    balls, string = balls_episode([4, 0, 5], num_steps=0).initial, string_episode([4, 0, 5], num_steps=20)
    check_simulator(load_checkpoint("balls_in_0").double(), balls, tolerance=1e-9)
    check_simulator(load_checkpoint("string_in_0").double(), string.frame(20), tolerance=1e-9)
