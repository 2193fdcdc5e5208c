"""Bodies that act at a distance: orders of convergence, conserved quantities, closed forms, published programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld import ObjectState, rollout
from simworld.data.generate import GENERATORS, read_recipe
from simworld.physics.force_worlds import CHARGE_ENGINE, PLANET_ENGINE, SPRING_ENGINE
from simworld.physics.forces import ForceEngine, charges, gravity, pairs, springs
from simworld.testing import check_simulator


def kepler() -> ObjectState:
    """A body on an ellipse of eccentricity 0.5 round a heavy one, from its farthest point; period 2 pi."""
    return ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.5, 0.0]], dtype=torch.float64),
        velocities=torch.tensor([[0.0, 0.0], [0.0, (1 / 3) ** 0.5]], dtype=torch.float64),
        masses=torch.tensor([1.0, 1e-12], dtype=torch.float64),
    )


def crowd(num: int = 6, scenes: int = 2, dimensions: int = 3) -> ObjectState:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    total = num * scenes
    return ObjectState(
        positions=2 * torch.randn(total, dimensions, **draw),
        velocities=0.3 * torch.randn(total, dimensions, **draw),
        masses=0.5 + torch.rand(total, **draw),
        charges=torch.randint(0, 2, (total,), generator=generator).double() * 2 - 1,
        batch=torch.arange(scenes).repeat_interleave(num),
    )


@pytest.mark.parametrize(("rule", "order"), [("symplectic_euler", 1), ("velocity_verlet", 2), ("fourth_order", 4)])
def test_order_of_convergence_on_a_kepler_orbit(rule, order):
    anomaly = np.pi + 2.0
    for _ in range(50):  # Kepler's equation, M = E - e sin E
        anomaly -= (anomaly - 0.5 * np.sin(anomaly) - np.pi - 2.0) / (1 - 0.5 * np.cos(anomaly))
    wanted = -torch.tensor([np.cos(anomaly) - 0.5, 0.75**0.5 * np.sin(anomaly)])

    def miss(steps):
        engine = ForceEngine(dt=2.0, law=gravity(constant=1.0), num_sub_steps=steps, rule=rule)
        return float((engine.step(kepler()).positions[1] - wanted).norm())

    errors = [miss(steps) for steps in ((50, 100, 200) if order == 4 else (2000, 4000, 8000))]
    slopes = [np.log2(errors[k] / errors[k + 1]) for k in range(2)]
    assert slopes == pytest.approx([order, order], abs=0.15)
    assert errors[-1] < 1e-3


def test_energy_and_momentum_are_kept():
    state = crowd()
    engine = ForceEngine(dt=1.0, law=gravity(constant=0.1), num_sub_steps=2000, rule="velocity_verlet")

    def energy(s):
        among = pairs(s)
        lengths = among.separations(s.positions).norm(dim=1)
        potential = -0.1 * s.masses[among.first] * s.masses[among.second] / lengths
        kinetic = 0.5 * s.masses * s.velocities.square().sum(1)
        return kinetic.new_zeros(2).index_add(0, s.batch, kinetic).index_add(0, s.batch[among.first], potential)

    def momentum(s):
        return (s.masses[:, None] * s.velocities).view(2, 6, 3).sum(1)

    after = engine.step(state)
    assert torch.allclose(momentum(after), momentum(state), atol=1e-13)
    assert torch.allclose(energy(after), energy(state), rtol=1e-5)
    assert not torch.allclose(after.velocities, state.velocities, atol=1e-2)


def test_a_spring_swings_as_the_closed_form_says():
    stiffness, mass, rest = 3.0, 2.0, 1.0
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.4, 0.0]], dtype=torch.float64),
        velocities=torch.zeros(2, 2, dtype=torch.float64),
        masses=torch.full((2,), mass, dtype=torch.float64),
        springs=torch.tensor([[0, 1]]),
        spring_lengths=torch.tensor([rest], dtype=torch.float64),
        spring_stiffnesses=torch.tensor([stiffness], dtype=torch.float64),
    )
    engine = ForceEngine(dt=0.9, law=springs, graph="springs", num_sub_steps=1000, rule="velocity_verlet")
    after = engine.step(state)
    frequency = (2 * stiffness / mass) ** 0.5
    wanted = rest + 0.4 * np.cos(frequency * 0.9)
    assert float(after.positions[1, 0] - after.positions[0, 0]) == pytest.approx(wanted, abs=1e-7)


def test_like_charges_repel_and_fall_off_with_the_square():
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64),
        velocities=torch.zeros(2, 2, dtype=torch.float64),
        charges=torch.tensor([1.0, -1.0], dtype=torch.float64),
    )
    among = pairs(state)
    force = charges(strength=3.0)(state, among)(among.separations(state.positions))
    assert torch.allclose(force, torch.tensor([[0.75, 0.0]], dtype=torch.float64))
    like = charges(strength=3.0)(state.replace(charges=torch.ones(2, dtype=torch.float64)), among)
    assert torch.allclose(like(among.separations(state.positions)), -force)


def test_walls_reflect_and_outside_is_refused():
    state = ObjectState(
        positions=torch.tensor([[0.9, 0.0]], dtype=torch.float64),
        velocities=torch.tensor([[0.3, 0.1]], dtype=torch.float64),
        charges=torch.ones(1, dtype=torch.float64),
        boundaries=torch.tensor([[[-1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64),
    )
    after = ForceEngine(dt=1.0, law=charges(), num_sub_steps=10).step(state)
    assert torch.allclose(after.positions, torch.tensor([[0.8, 0.1]], dtype=torch.float64))
    assert torch.allclose(after.velocities, torch.tensor([[-0.3, 0.1]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inside the walls.*body 0 is at \[1.5"):
        ForceEngine(dt=1.0, law=charges()).step(state.replace(positions=state.positions + 0.6))


def test_forces_are_cut_off_and_actions_push():
    state = crowd(2, 1).replace(positions=torch.tensor([[0.0, 0, 0], [1e-3, 0, 0]], dtype=torch.float64))
    state = state.replace(velocities=torch.zeros_like(state.velocities), masses=torch.ones(2, dtype=torch.float64))
    engine = ForceEngine(dt=0.1, law=gravity(constant=1.0), max_force=7.0)
    assert torch.allclose(engine.step(state).velocities[:, 0], torch.tensor([0.7, -0.7], dtype=torch.float64))
    push = torch.zeros(2, 3, dtype=torch.float64)
    push[1, 2] = 5.0
    assert float(engine.step(state, push).velocities[1, 2]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"takes forces \[2, 3\]"):
        engine.step(state, push[:1])
    with pytest.raises(ValueError, match="num_sub_steps >= 1"):
        ForceEngine(dt=0.1, law=charges(), num_sub_steps=0)


@pytest.mark.parametrize("engine", [PLANET_ENGINE, CHARGE_ENGINE])
def test_engines_keep_the_contract(engine):
    check_simulator(engine, crowd(4, 1, 2), tolerance=1e-6)


def test_springs_of_a_removed_body_do_not_act():
    state = GENERATORS["springs_nri"].make([[42, 0, 0]], num_frames=1)[0].initial
    check_simulator(SPRING_ENGINE, state, tolerance=1e-6)
    removed = int(state.springs[0, 0])
    gone = state.replace(active=torch.arange(5) != removed)
    kept = (state.springs != removed).all(1)
    bare = type(state)(**{k: state[k] for k in ("positions", "velocities", "boundaries")}, active=gone.active,
                       springs=state.springs[kept], spring_stiffnesses=state.spring_stiffnesses[kept])  # fmt: skip
    assert torch.equal(SPRING_ENGINE.step(gone).positions, SPRING_ENGINE.step(bare).positions)
    assert len(state.springs) > kept.sum() > 0


def test_springs_act_along_springs_whatever_their_order():
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64),
        velocities=torch.zeros(3, 2, dtype=torch.float64),
        springs=torch.tensor([[1, 2], [0, 1], [0, 2]]),
        spring_stiffnesses=torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64),
    )
    after = ForceEngine(dt=0.1, law=springs, graph="springs").step(state)
    wanted = 0.1 * torch.tensor([[1.0, 4.0], [-6.0, 10.0], [5.0, -14.0]], dtype=torch.float64)
    assert torch.allclose(after.velocities, wanted)
    with pytest.raises(ValueError, match="make the engine with graph='springs'"):
        ForceEngine(dt=0.1, law=springs).step(state)


def test_bodies_at_one_place_are_refused():
    state = crowd(3, 1, 2).replace(positions=torch.zeros(3, 2, dtype=torch.float64))
    for law in (charges(), gravity(constant=1.0)):
        with pytest.raises(ValueError, match="Bodies 0 and 1 are at the same place"):
            ForceEngine(dt=0.1, law=law).step(state)
    place = state.positions.clone().requires_grad_()
    after = ForceEngine(dt=0.1, law=gravity(min_distance=1.0)).step(state.replace(positions=place))
    (slope,) = torch.autograd.grad(after.positions.sum(), place)
    assert torch.isfinite(slope).all()


def test_nobody_leaves_the_box():
    state = ObjectState(
        positions=torch.zeros(1, 2, dtype=torch.float64),
        velocities=torch.tensor([[500.0, -70.0]], dtype=torch.float64),
        charges=torch.ones(1, dtype=torch.float64),
        boundaries=torch.tensor([[[-1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64),
    )
    path = rollout(state, simulator=ForceEngine(dt=0.1, law=charges()), num_steps=5)
    assert float(path["positions"].abs().max()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "foo"}, "a graph out of full, springs"),
        ({"rule": "rk4"}, "a rule out of symplectic_euler, velocity_verlet"),
        ({"max_force": -1.0}, "max_force > 0; got -1.0"),
        ({"dt": float("inf")}, "dt > 0"),
        ({"num_sub_steps": 2.5}, "whole num_sub_steps"),
        ({"law": None}, "needs a law"),
    ],
)
def test_engines_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        ForceEngine(**{"dt": 0.1, "law": charges(), **changes})


def test_seeds_that_no_program_has():
    for seeds in ([[42, 3, 0]], [[42, 0, -1], [42, 0, 1]], [[42, 0]]):
        with pytest.raises(ValueError, match=r"A seed here is \(seed, split, number\)"):
            GENERATORS["springs_nri"].make(seeds)
    twice = GENERATORS["springs_nri"].make([[42, 0, 1], [42, 0, 1]], num_frames=1)
    assert torch.equal(twice[0]["positions"], twice[1]["positions"])


def by_the_book(kind: str, number: int, seed: int, steps: int):
    """One published simulation, drawn and stepped body by body, coordinate by coordinate."""
    np.random.seed(seed)
    for k in range(number + 1):
        if kind == "springs":
            drawn = np.random.choice([0.0, 0.5, 1.0], size=(5, 5), p=[0.5, 0, 0.5])
        else:
            drawn = np.random.choice([-1.0, 0.0, 1.0], size=(5, 1), p=[0.5, 0, 0.5])
        x = np.random.randn(2, 5) * (0.5 if kind == "springs" else 1.0)
        v = np.random.randn(2, 5)
        v = v * 0.5 / np.sqrt((v**2).sum(0))
        if k < number:
            np.random.randn(49, 2, 5), np.random.randn(49, 2, 5)
    x, v = x.T.copy(), v.T.copy()
    for _ in range(steps):
        force = np.zeros((5, 2))
        for i in range(5):
            for j in range(5):
                if i == j:
                    continue
                r = x[i] - x[j]
                if kind == "springs":
                    force[i] += -0.1 * (drawn[max(i, j), min(i, j)] > 0) * r
                else:
                    force[i] += drawn[i, 0] * drawn[j, 0] * r / np.sqrt((r**2).sum()) ** 3
        v += 0.001 * np.clip(force, -100, 100)
        x += 0.001 * v
        over, under = x > 5, x < -5
        x[over], x[under] = 10 - x[over], -10 - x[under]
        v[over], v[under] = -np.abs(v[over]), np.abs(v[under])
    return x, v


@pytest.mark.parametrize(("world", "kind"), [("springs_nri", "springs"), ("charged_nri", "charged")])
def test_simulations_are_those_of_the_published_program(world, kind):
    (made,) = GENERATORS[world].make([[42, 0, 2]], num_frames=2)
    x, v = by_the_book(kind, 2, 42, 200)
    assert np.allclose(made["positions"][1].numpy(), x, atol=1e-9)
    assert np.allclose(made["velocities"][1].numpy(), v, atol=1e-9)


def test_splits_go_on_in_one_stream_and_end():
    from simworld.physics.force_worlds import _Draws

    small = _Draws(2, 2, 4, (3, 2, 2), (2, 2, 3))
    stream = np.random.RandomState(0)
    for _ in range(3):
        stream.random_sample(4), stream.standard_normal((2, 2, 2)), stream.standard_normal((2, 2, 2, 2))
    stream.random_sample(4), stream.standard_normal((2, 2, 2)), stream.standard_normal((2, 2, 2, 2))
    stream.random_sample(4)
    assert np.array_equal(small.of(0, 1, [1])[0].locations, stream.standard_normal((2, 2, 2))[0])
    with pytest.raises(ValueError, match="got number 2 of split 1"):
        small.of(0, 1, [2])


def test_planets_set_out_on_circles():
    made = GENERATORS["nbody_in"].make([[5, 0, k] for k in range(12)], num_steps=50)
    stars = [path for path in made if float(path.initial.masses[0]) == 100.0]
    assert 2 <= len(stars) <= 10
    for path in stars:
        x, m = path["positions"], path.initial.masses
        if (
            float(m[1:].max()) > 9
            or float((x[0, 1:, None] - x[0, None, 1:]).norm(dim=-1).add(torch.eye(5) * 99).min()) < 15
        ):
            continue
        assert float(x[0, 0].norm()) == 0.0
        speeds = path["velocities"][0, 1:].norm(dim=1)
        assert torch.allclose(speeds, (1e7 / x[0, 1:].norm(dim=1)).sqrt())


def test_a_whole_rollout_is_differentiable():
    state = crowd(3, 1).replace(positions=crowd(3, 1).positions.requires_grad_())
    end = rollout(state, simulator=ForceEngine(dt=0.1, law=gravity(constant=1.0)), num_steps=3)["positions"][-1]
    (slope,) = torch.autograd.grad(end.sum(), state.positions)
    assert torch.allclose(slope.sum(0), torch.full((3,), 3.0, dtype=torch.float64))  # all moved alike: momentum


@pytest.mark.parametrize("world", ["springs_nri", "charged_nri", "nbody_egnn", "nbody_in", "solar_system"])
def test_first_episodes_are_those_of_the_data_cards(world):
    folder = Path(__file__).parents[1] / "datasets" / world
    known = json.loads((folder / "first_episode.json").read_text())
    path, _ = read_recipe(folder / "recipe.toml").make("train", 0)
    assert path["positions"].mean((0, 1)).tolist() == pytest.approx(known["mean_position"], rel=1e-6, abs=1e-9)
    assert path["positions"][-1, -1].tolist() == pytest.approx(known["last_body_at_the_end"], rel=1e-6)
    assert len(path) == known["frames"]
