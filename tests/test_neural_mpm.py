from __future__ import annotations

import pytest
import torch
from test_gns import STATISTICS, random_state

from simworld import (
    NeuralMPM,
    ParticleState,
    Trajectory,
    do,
    load_checkpoint,
    one_step,
    rollout,
    save_checkpoint,
    unrolled,
)
from simworld.testing import check_locality, check_simulator

G = torch.tensor([[0.0, -9.8]], dtype=torch.float64)
KNOWN = STATISTICS | {"beyond_gravity_rms": [0.05, 0.06]}


def make(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    sizes = {"feature_size": 4, "latent_size": 8, "widths": (8, 8), "num_velocities": 3, "cell_size": 0.13}
    arguments = {"dt": 0.05, "statistics": KNOWN, "num_particle_types": 7} | sizes | changes
    return NeuralMPM(**arguments).to(dtype)


@pytest.mark.parametrize("changes", [{}, {"known_gravity": True, "solid_walls": True}])
def test_it_keeps_the_contract(changes):
    check_simulator(make(**changes), random_state(gravity=G), tolerance=1e-9)


def test_it_keeps_the_contract_in_three_dimensions_with_forces_and_materials():
    sizes = {"velocity_mean": 0.0, "velocity_std": 1.0, "change_mean": 0.0, "change_std": 0.1}
    statistics = {name: [value] * 3 for name, value in sizes.items()}
    statistics |= {"materials_rms": [1.0, 2.0], "action_rms": [0.5] * 3}
    model = make(statistics=statistics, num_dimensions=3, actions="input", further_fields=("materials",))
    generator = torch.Generator().manual_seed(1)
    state = random_state(d=3, materials=torch.rand(24, 2, generator=generator, dtype=torch.float64))
    actions = torch.randn(6, 24, 3, generator=generator, dtype=torch.float64)
    check_simulator(model, state, actions, tolerance=1e-9)
    assert not torch.allclose(model(state, actions[0]), model(state))


def test_scenes_in_boxes_of_different_sizes_go_as_they_go_alone():
    model = make()
    states = [random_state(size=size, seed=seed) for seed, size in enumerate((1.0, 1.7, 1.0))]
    together = model.step(ParticleState.cat(states)).velocities
    alone = torch.cat([model.step(state).velocities for state in states])
    assert torch.allclose(together, alone, atol=1e-12)
    assert not torch.allclose(alone[:24], alone[48:])


@pytest.mark.parametrize("widths", [(8,), (8, 8)])
def test_nothing_travels_farther_than_it_says(widths):
    model, state = make(widths=widths, cell_size=0.02 / len(widths)), random_state(num=200)
    corner = int(state.positions.sum(1).argmin())
    assert 0.1 < model.reach < 1.0
    check_locality(model, state, entity=corner, reach=model.reach)


def test_translated_scenes_give_translated_futures():
    model, state = make(), random_state()
    way = torch.tensor([3.0, -2.0], dtype=torch.float64)
    moved = state.replace(positions=state.positions + way, boundaries=state.boundaries + way)
    assert torch.allclose(model.step(moved).positions, model.step(state).positions + way, atol=1e-11)


def test_what_lies_far_outside_acts_on_nobody_and_what_lies_a_little_outside_does():
    model = make()
    for far, felt in ((0.2, True), (5.0, False)):
        place = torch.tensor([0.5, 1.0 + far], dtype=torch.float64)
        state = do(entities=7, positions=place)(random_state(), 0)
        gone = state.replace(active=torch.arange(24) != 7)
        others = torch.arange(24) != 7
        assert bool(torch.equal(model(state)[others], model(gone)[others])) is not felt
        assert model(state).isfinite().all()


def test_integrating_the_target_gives_the_next_state():
    model, state = make(), random_state()
    after = random_state(seed=4)
    made = model.integrate(state, model.target(state, after))
    assert torch.allclose(made.velocities, after.velocities, atol=1e-14)


def test_slopes_through_a_rollout_are_those_of_small_differences():
    model, state = make(), random_state(gravity=G)
    places = state.positions.clone().requires_grad_()
    path = rollout(state.replace(positions=places), simulator=model, num_steps=3)
    (slope,) = torch.autograd.grad(path["positions"][-1].square().sum(), places)
    step = torch.zeros_like(places)
    step[5, 1] = 1e-6
    ends = [
        rollout(state.replace(positions=state.positions + way), simulator=model, num_steps=3)["positions"][-1]
        for way in (step, -step)
    ]
    wanted = (ends[0].square().sum() - ends[1].square().sum()) / 2e-6
    assert torch.allclose(slope[5, 1], wanted, rtol=1e-5)


@pytest.mark.parametrize("loss", [one_step(noise_std=0.01), unrolled(3)], ids=lambda loss: loss.name)
def test_every_weight_learns(loss):
    model, state = make(), random_state(num=40)
    frames = {name: state[name].expand(5, *state[name].shape).clone() for name in ("positions", "velocities")}
    frames["velocities"] += torch.randn(5, 40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    path = Trajectory(initial=state, frames=frames, active=state.active.expand(5, -1), dt=0.05)
    loss.measure(model, path.window(0, loss.num_steps + 1), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_checkpoint_gives_the_same_model(tmp_path):
    model, state = make(dtype=torch.float32), random_state().to(torch.float32)
    save_checkpoint(model, tmp_path / "grid.safetensors")
    again = load_checkpoint(tmp_path / "grid.safetensors")
    assert isinstance(again, NeuralMPM)
    assert torch.equal(again.step(state).positions, model.step(state).positions)


def test_what_it_cannot_step_is_refused():
    state = random_state()
    with pytest.raises(ValueError, match="lays its grid in a box; give the state boundaries"):
        make().step(ParticleState(**{k: state[k] for k in ("positions", "velocities", "history", "particle_types")}))
    with pytest.raises(ValueError, match="this state has periodic axes; use a GNS"):
        make().step(random_state(periodic=torch.tensor([[True, False]])))
    with pytest.raises(ValueError, match="cell_size must be a positive distance; got 0"):
        make(cell_size=0)
    with pytest.raises(ValueError, match="widths must be whole numbers, 1 or more"):
        make(widths=(8, 0))
    with pytest.raises(ValueError, match="feature_size must be a whole number"):
        make(feature_size=0)


def test_a_grid_too_large_for_memory_is_refused_before_it_is_made():
    wide = random_state().boundaries * 1e7
    with pytest.raises(ValueError, match=r"have 5.92e\+15 nodes, which take about .* GiB; take wider cells"):
        make().step(random_state().replace(boundaries=wide))
