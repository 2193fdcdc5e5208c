from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simworld import rollout
from simworld.data.generate import GENERATORS, read_recipe
from simworld.kinds import ParticleState
from simworld.physics import particle_worlds
from simworld.physics.mpm import Goop, MPMEngine, Sand, Water, material_state
from simworld.testing import check_simulator

DATASETS = Path(__file__).parents[1] / "datasets"
RECIPES = ["water_drop", "water_drop_small", "sand_ramps", "water_ramps", "goop", "water_3d"]
KINDS = {"water": 5, "sand": 6, "goop": 7}
CELL = 0.05


def block(kind="water", *, lower=(0.0, 0.0), numbers=(8, 8), box=(-1.0, 1.0), gravity=0.0, seed=0, **fields):
    """A block of particles of 1000 kg/m^3, half a cell apart, a little uneven."""
    dim, spacing = len(lower), CELL / 2
    axes = [low + spacing * (0.5 + torch.arange(n)) for low, n in zip(lower, numbers, strict=True)]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dim)
    x = x + 0.2 * spacing * (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 0.5)
    down = torch.zeros(1, dim)
    down[:, 1] = -gravity
    return material_state(
        **{
            "positions": x,
            "velocities": torch.zeros_like(x),
            "particle_types": torch.full((len(x),), KINDS[kind]),
            "boundaries": torch.tensor([[[box[0]] * dim, [box[1]] * dim]]),
            "gravity": down,
            "masses": torch.full((len(x),), 1000 * spacing**dim),
            **fields,
        }
    )


def engine(dt=2e-3, num_sub_steps=10, **materials):
    return MPMEngine(dt=dt, cell_size=CELL, num_sub_steps=num_sub_steps, **materials)


def stirred(state, seed=1):
    """The state in rotation, in shear, and with velocities at random."""
    drawn = torch.Generator().manual_seed(seed)
    away = state.positions - state.positions.mean(0)
    turn = torch.zeros(away.shape[1], away.shape[1])
    turn[0, 1], turn[1, 0] = -3.0, 2.0
    affine = turn + 0.5 * torch.randn(len(state), *turn.shape, generator=drawn)
    noise = 0.1 * torch.randn(away.shape, generator=drawn)
    return state.replace(material_velocities=away @ turn.T + noise + 0.3, affine=affine)


def momentum(state):
    return (state.masses[:, None] * state.material_velocities).double().sum(0)


def angular_momentum(state):
    """About the origin, with what the affine velocities hold: the inertia of a quadratic spline is m dx^2 / 4."""
    x, v, c = state.positions.double(), state.material_velocities.double(), state.affine.double()
    orbit = x[:, :, None] * v[:, None, :]
    whole = orbit - orbit.mT + CELL**2 / 4 * (c.mT - c)
    return (state.masses[:, None, None].double() * whole).sum(0)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_momentum_and_angular_momentum_stay_far_from_walls(kind, dim):
    state = stirred(block(kind, lower=(0.0,) * dim, numbers=(6, 5, 4)[:dim]))
    after = rollout(state, simulator=engine(), num_steps=5).frame(-1)
    size = (state.masses[:, None] * state.material_velocities).abs().sum()
    assert (momentum(after) - momentum(state)).abs().max() < 1e-6 * size
    change = angular_momentum(after) - angular_momentum(state)
    assert change.abs().max() < 1e-5 * angular_momentum(state).abs().max()
    assert (after.material_velocities - state.material_velocities).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_free_fall_is_that_of_symplectic_euler(kind):
    dt, steps, subs = 2e-3, 20, 10
    state = block(kind, gravity=9.8)
    velocity = torch.tensor([0.5, 1.0]).expand(len(state), 2)
    path = rollout(state.replace(material_velocities=velocity), simulator=engine(dt, subs), num_steps=steps)
    n, h = steps * subs, dt / subs
    fall = torch.tensor([0.5, 1.0]) * n * h - torch.tensor([0, 9.8]) * h**2 * n * (n + 1) / 2
    assert torch.allclose(path["positions"][-1] - state.positions, fall.expand_as(velocity), atol=2e-6)
    gained = torch.tensor([0.5, 1.0 - 9.8 * n * h]).expand_as(velocity)
    assert torch.allclose(path["material_velocities"][-1], gained, atol=1e-4)


def test_the_grid_holds_the_mass_of_the_particles():
    from simworld.kernels.warp_start import filled, wp
    from simworld.physics import mpm, mpm_kernels

    state, method = block(), engine()
    still = mpm._Still.of(state, method)
    moving = {name: mpm._in_space(state[name]) for name in mpm._MOVING}
    moving["velocities"] = moving.pop("material_velocities")
    particles = filled(mpm_kernels.Particles, {**still.particles, **moving})
    scenes = filled(mpm_kernels.Scenes, still.scenes)
    nodes = still.size[0] * still.size[1]
    grid, drag = wp.zeros(nodes, dtype=wp.vec4), wp.zeros(nodes, dtype=wp.float32)
    setting = mpm._setting(method, still.size, 2)
    wp.launch(mpm_kernels.scatter, len(state), inputs=[setting, scenes, particles, grid, drag], device="cpu")
    assert grid.numpy()[:, 3].sum() == pytest.approx(float(state.masses.sum()), rel=1e-6)


def energy(path, gravity):
    """Kinetic and potential energy of a unit of mass, over the floor at -1."""
    return (path["material_velocities"].square().sum(-1) / 2 + gravity * (path["positions"][..., 1] + 1)).mean(1)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_column_of_water_settles_at_its_rest_density(dim):
    numbers = (8, 16, 8)[:dim]  # as wide as the box, which is then a column at rest but for its unevenness
    box = torch.tensor([[[0.0, -1.0, 0.0][:dim], [0.2, 1.0, 0.2][:dim]]])
    state = block(lower=(0.0, -1.0, 0.0)[:dim], numbers=numbers, gravity=9.8, boundaries=box)
    path = rollout(state, simulator=engine(), num_steps=300)
    total = energy(path, 9.8)
    assert (total[1:] < total[0] + 0.005 * 9.8 * 0.4).all()
    kinetic = path["material_velocities"][-1].square().sum(-1).mean() / 2
    assert kinetic < 0.02 * 9.8 * 0.4
    height = 2 * (path["positions"][-50:, :, 1].mean() + 1)
    assert height == pytest.approx(0.4, rel=0.05)


def test_a_splash_loses_energy_and_leaves_the_volume():
    state = block(lower=(-0.5, -0.6), numbers=(24, 24), box=(-1.0, 1.0), gravity=9.8)
    path = rollout(state, simulator=engine(), num_steps=1500)
    total = energy(path, 9.8)
    assert total.max() < total[0] + 1e-3
    assert total[-1] < 0.3 * total[0]
    height = path["positions"][-200:, :, 1] + 1  # where the water covers all of the floor
    second_layer = ((height > CELL) & (height < 2 * CELL)).sum(1).float().mean()
    assert second_layer * (CELL / 2) ** 2 == pytest.approx(2 * CELL, rel=0.06)
    assert (path["positions"].abs() <= 1).all()


def heap(angle):
    """Height of the heap that a column of sand leaves on a rough floor."""
    state = block("sand", lower=(-0.1, -1.0), numbers=(8, 16), gravity=9.8)
    path = rollout(state, simulator=engine(sand=Sand(density=1000, friction_angle=angle, friction=1.0)), num_steps=500)
    assert path["material_velocities"][-1].norm(dim=1).mean() < 0.02
    return float(path["positions"][-1, :, 1].max() + 1), float(path["positions"][-1, :, 0].std())


def test_shock_viscosity_damps_the_ringing_of_a_block_that_hits_the_floor_and_no_free_fall():
    state = block(lower=(-0.2, -0.97), gravity=9.8)
    state = state.replace(material_velocities=torch.tensor([0.0, -2.0]).expand(len(state), 2))
    ringing = {}
    for q in (0.0, 1.0):
        path = rollout(state, simulator=engine(water=Water(shock_viscosity=q)), num_steps=40)
        ringing[q] = path["material_velocities"][20:].diff(n=2, dim=0).square().mean()
    assert ringing[1.0] < 0.5 * ringing[0.0]


def test_a_heap_of_sand_is_steeper_with_more_friction():
    heights, widths = zip(*(heap(angle) for angle in (15, 25, 40)), strict=True)
    assert heights[0] < 0.9 * heights[1] < 0.81 * heights[2]
    assert widths[0] > 1.1 * widths[1] > 1.21 * widths[2]


def squeezed(yield_stress):
    """Heights, over that at the start, of a block of goop set out at a speed of contraction, over time."""
    state = block("goop", lower=(-0.2, -0.2), numbers=(16, 16))
    middle = state.positions.mean(0)
    state = state.replace(material_velocities=(state.positions - middle) * torch.tensor([2.0, -2.0]))
    path = rollout(state, simulator=engine(dt=1e-3, goop=Goop(yield_stress=yield_stress)), num_steps=400)
    spans = path["positions"][..., 1].std(1)
    return spans / spans[0]


def test_goop_springs_back_below_its_yield_stress_and_stays_deformed_beyond():
    elastic, plastic = squeezed(1e9), squeezed(100.0)
    assert elastic.min() < 0.98
    assert abs(elastic[-100:].mean() - 1) < 0.2 * (1 - elastic.min())
    assert plastic[-100:].mean() < 1 - 2 * (1 - elastic.min())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 3])
def test_nothing_leaves_the_box(kind, dim):
    state = block(kind, lower=(0.1,) * dim, numbers=(6,) * dim, box=(0.0, 0.5), gravity=9.8)
    fast = torch.tensor([8.0, -5.0, 3.0])[:dim].expand(len(state), dim)
    path = rollout(state.replace(material_velocities=fast), simulator=engine(num_sub_steps=20), num_steps=100)
    assert torch.isfinite(path["positions"]).all()
    assert ((path["positions"] >= 0) & (path["positions"] <= 0.5)).all()


def on_a_ramp(kind="sand", speed=0.0, friction=0.5):
    """Grains that fall on a row of kinematic particles between (-0.5, -0.2) and (0.5, 0.2)."""
    some = block(kind, lower=(-0.1, 0.2), numbers=(8, 8), gravity=9.8)
    row = torch.stack([torch.linspace(-0.5, 0.5, 41), torch.linspace(-0.2, 0.2, 41)], 1)
    x = torch.cat([some.positions, row])
    first, last = len(some), len(x) - 1
    moving = torch.zeros_like(x)
    moving[first:, 0] = speed
    return material_state(
        positions=x,
        velocities=moving,
        particle_types=torch.cat([some.particle_types, torch.full((41,), 3)]),
        kinematic=torch.arange(len(x)) >= first,
        boundaries=some.boundaries,
        gravity=some.gravity,
        masses=torch.full((len(x),), float(some.masses[0])),
        obstacles=torch.tensor([[first, last]]),
        obstacle_radii=torch.tensor([CELL / 2]),
    ), engine(sand=Sand(density=1000, friction=friction))


def test_sand_does_not_pass_a_ramp_and_slides_by_its_friction():
    slid = []
    for friction in (0.0, 5.0):
        state, method = on_a_ramp(friction=friction)
        path = rollout(state, simulator=method, num_steps=220)
        x = path["positions"][:, : int(state.obstacles[0, 0])]
        above = x[..., 1] - 0.4 * x[..., 0]
        over = x[..., 0].abs() < 0.5
        assert (above[over] > 0.9 * CELL / 2).all()
        slid.append(float(x[-1, :, 0].mean()))
    assert slid[0] < -0.2
    assert slid[1] > slid[0] + 0.1


def test_a_moving_ramp_keeps_its_velocity_and_carries_what_lies_on_it():
    state, method = on_a_ramp(speed=0.5, friction=5.0)
    path = rollout(state, simulator=method, num_steps=200)
    first = int(state.obstacles[0, 0])
    assert torch.equal(path["velocities"][-1, first:], state.velocities[first:])
    assert torch.allclose(path["positions"][-1, first:, 0] - state.positions[first:, 0], torch.tensor(0.2), atol=1e-4)
    still, _ = on_a_ramp(friction=5.0)
    there = rollout(still, simulator=method, num_steps=200)["positions"][-1, :first, 0]
    assert path["positions"][-1, :first, 0].mean() > there.mean() + 0.04


def test_a_step_repeats_bit_for_bit_and_velocities_are_those_of_the_interval():
    state, method = stirred(block(gravity=9.8)), engine()
    first, second = method.step(state), method.step(state)
    assert first.identical(second)
    assert torch.equal(first.velocities, (first.positions - state.positions) / method.dt)


def test_no_gradient_passes_through_a_step():
    """Rather than a wrong one; and none is left behind in what it was given."""
    state = block()
    state = state.replace(**{name: state[name].clone().requires_grad_() for name in ("masses", "material_velocities")})
    assert not any(value.requires_grad for value in map(engine().step(state).__getitem__, state.dynamic_fields))
    assert state.masses.grad is None


def test_history_is_pushed_on():
    state = block(gravity=9.8)
    state = state.replace(history=torch.zeros(len(state), 2, 2))
    path = rollout(state, simulator=engine(), num_steps=4)
    assert torch.equal(path.frame(-1).history, path["velocities"][2:4].transpose(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_of_simulators(kind):
    state, method = on_a_ramp(kind)
    roomy = state.replace(boundaries=3 * state.boundaries)  # the contract moves particles by 1 m
    check_simulator(method, stirred(roomy), tolerance=1e-3)


def test_states_the_engine_refuses():
    state, method = block(), engine()
    unstarted = ParticleState(**{name: state[name] for name in state if name in ParticleState.fields})
    for wrong, says in (
        (state.replace(obstacles=torch.tensor([[0, 1]]), obstacle_radii=torch.ones(1)), "between kinematic particles"),
        (unstarted, "needs material_velocities, affine, strains, log_volumes of the state"),
        (state.replace(particle_types=state.particle_types - 1), "particle 0 is of type 4"),
        (state.replace(periodic=torch.tensor([[True, False]])), "no periodic axes"),
        (state.replace(boundaries=-state.boundaries), "a box of sides"),
        (state.replace(boundaries=1e5 * state.boundaries), "make cell_size=0.05 larger"),
    ):
        with pytest.raises(ValueError, match=says):
            method.step(wrong)
    with pytest.raises(ValueError, match="takes no actions"):
        method.step(state, torch.zeros(1))
    with pytest.raises(ValueError, match="Sound in water crosses 2 cells"):
        engine(water=Water(sound_speed=500)).step(state)
    with pytest.raises(ValueError, match="positive dt"):
        engine(dt=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_agrees_with_the_cpu(kind):
    state, method = on_a_ramp(kind)
    here = rollout(state, simulator=method, num_steps=20)
    there = rollout(state.to("cuda"), simulator=method, num_steps=20).to("cpu")
    assert torch.allclose(here["positions"], there["positions"], atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_episode_of_the_recipe_is_the_golden_one(name):
    plan = read_recipe(DATASETS / name / "recipe.toml")
    (path,) = GENERATORS[plan.dataset].make([[plan.seed, 0, 0]], **{**plan.episode, "num_steps": 20})
    assert type(path.initial) is ParticleState
    assert path.initial.history.shape[1] == 5
    found = {
        "num_particles": [len(path.initial)],
        "num_kinematic": [int(path.initial.kinematic.sum())],
        "positions": path["positions"][[0, 20], :3].tolist(),
        "mean_velocity": path["velocities"][[0, 20]].mean(1).tolist(),
        "history": path.initial.history[0].tolist(),
    }
    golden = DATASETS / name / "first_episode.json"
    if not golden.is_file():
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{golden} was missing and is written; look at it and commit it")
    for key, wanted in json.loads(golden.read_text()).items():
        assert torch.allclose(torch.tensor(found[key]).double(), torch.tensor(wanted).double(), atol=1e-3), key


def test_episodes_do_not_depend_on_those_made_beside_them():
    given = {"num_steps": 10, "num_cells": 28, "min_particles": 100, "max_particles": 150}
    seeds = [[3, 0, k] for k in range(12)]  # more than are stepped at once
    together = particle_worlds.water_drop(seeds, **given)
    for k in (0, 11):
        (alone,) = particle_worlds.water_drop([seeds[k]], **given)
        assert torch.equal(alone["positions"], together[k]["positions"])
    assert not torch.equal(together[0]["positions"][0, :100], together[1]["positions"][0, :100])


def test_the_past_of_an_episode_is_its_own():
    (path,) = particle_worlds.goop([[5]], num_steps=3)
    x, v, past = path["positions"], path["velocities"], path.initial.history
    assert torch.allclose(v[1:], (x[1:] - x[:-1]) / path.dt, atol=1e-6)
    falls = torch.cat([past, v[:1].transpose(0, 1)], 1).diff(dim=1)
    assert torch.allclose(falls[..., 1], torch.tensor(-9.8 * path.dt), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_cells": 4}, "num_cells must be 8 or more"),
        ({"min_particles": 400, "max_particles": 300}, "min_particles <= max_particles"),
        ({"num_cells": 8, "min_particles": 10**4, "max_particles": 10**4}, "found no room"),
        ({"num_steps": 0}, "num_steps >= 1"),
    ],
)
def test_worlds_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        particle_worlds.goop([[0]], **changes)


def test_sand_without_ramps_is_another_world():
    with pytest.raises(ValueError, match="max_ramps of 1 or more"):
        particle_worlds.sand_ramps([[0]], max_ramps=0)


def test_particles_outside_the_box_are_refused():
    state = block()
    far = state.replace(positions=state.positions + 0.9)
    with pytest.raises(ValueError, match="particle .* is outside it"):
        engine().step(far)
