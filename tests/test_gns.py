from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import EVERY

from simworld import (
    GNS,
    ParticleState,
    Trajectory,
    do,
    load_checkpoint,
    one_step,
    pushforward,
    rollout,
    rollout_positions,
    rollout_relative_l2,
    save_checkpoint,
    unrolled,
)
from simworld.data import write_trajectories
from simworld.graph import particle_edges
from simworld.losses import LOSSES
from simworld.models import gns
from simworld.runs import read_run, start
from simworld.space import outside, shortest
from simworld.testing import check_locality, check_simulator

STATISTICS = {
    "velocity_mean": [0.1, -0.2],
    "velocity_std": [0.5, 0.7],
    "change_mean": [0.0, -0.02],
    "change_std": [0.05, 0.06],
}


def make(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    sizes = {"latent_size": 16, "num_message_passing_steps": 2, "num_velocities": 3, "connectivity_radius": 0.25}
    arguments = {"dt": 0.05, "statistics": STATISTICS, "num_particle_types": 7} | sizes | changes
    return GNS(**arguments).to(dtype)


def random_state(num=24, scenes=1, seed=0, d=2, past=2, size=1.0, **fields):
    generator = torch.Generator().manual_seed(seed)
    rows = {"generator": generator, "dtype": torch.float64}
    return ParticleState(
        positions=size * torch.rand(num, d, **rows),
        velocities=fields.pop("velocities", torch.randn(num, d, **rows) * 0.3),
        history=torch.randn(num, past, d, **rows) * 0.3,
        particle_types=torch.randint(5, 7, (num,), generator=generator),
        boundaries=torch.tensor([[[0.0] * d, [size] * d]], dtype=torch.float64).repeat(scenes, 1, 1),
        batch=torch.arange(num) * scenes // num,
        **fields,
    )


def test_it_has_as_many_parameters_as_the_published_network():
    model = make(latent_size=128, num_message_passing_steps=10, num_velocities=5, num_particle_types=9)
    assert sum(p.numel() for p in model.network.parameters()) == 1_591_682
    assert model.num_parameters == 1_591_682 + 9 * 16


@pytest.mark.parametrize("periodic", [None, [True, False], [True, True]])
@pytest.mark.parametrize("backend", EVERY)
def test_it_keeps_the_contract(periodic, backend):
    fields = {} if periodic is None else {"periodic": torch.tensor([periodic])}
    check_simulator(make(backend=backend), random_state(**fields), tolerance=1e-9)


@pytest.mark.parametrize("backend", EVERY)
def test_it_keeps_the_contract_where_passes_are_recorded(backend):
    model = make(backend=backend)
    model.network.capture = True
    check_simulator(model, random_state(), tolerance=1e-9)


def test_it_keeps_the_contract_in_three_dimensions_with_forces_and_materials():
    sizes = {"velocity_mean": 0.0, "velocity_std": 1.0, "change_mean": 0.0, "change_std": 0.1}
    statistics = {name: [value] * 3 for name, value in sizes.items()}
    statistics |= {"materials_rms": [1.0, 2.0], "gravity_rms": [1.0, 9.8, 1.0], "action_rms": [0.5] * 3}
    model = make(statistics=statistics, num_dimensions=3, actions="input", further_fields=("materials", "gravity"))
    generator = torch.Generator().manual_seed(1)
    state = random_state(
        d=3,
        materials=torch.rand(24, 2, generator=generator, dtype=torch.float64),
        gravity=torch.tensor([[0.0, -9.8, 0.0]], dtype=torch.float64),
    )
    actions = torch.randn(6, 24, 3, generator=generator, dtype=torch.float64)
    check_simulator(model, state, actions, tolerance=1e-9)
    pushed, plain = model(state, actions[0]), model(state)
    assert not torch.allclose(pushed, plain)
    lighter = do(gravity=torch.zeros(1, 3), at=0)(state, 0)
    assert not torch.allclose(model(lighter), plain)
    forces = torch.full((6, 1, 3), 2.0, dtype=torch.float64)
    everyone = rollout(state, forces.expand(6, 24, 3), simulator=model)
    assert torch.equal(rollout(state, forces, simulator=model)["positions"], everyone["positions"])


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_travels_farther_than_radius_times_rounds(steps):
    model = make(connectivity_radius=0.12, num_message_passing_steps=steps)
    state = random_state(num=60)
    corner = int(state.positions.sum(1).argmin())
    check_locality(model, state, entity=corner, reach=0.12 * steps)


def test_integrating_the_target_gives_the_next_state():
    model, state = make(), random_state(periodic=torch.tensor([[True, False]]))
    after = random_state(seed=4, periodic=torch.tensor([[True, False]]))
    made = model.integrate(state, model.target(state, after))
    assert torch.allclose(made.velocities, after.velocities, atol=1e-14)
    assert torch.equal(made.history[:, -1], state.velocities)


def test_translated_scenes_give_translated_futures():
    model, state = make(), random_state()
    way = torch.tensor([3.0, -2.0], dtype=torch.float64)
    moved = state.replace(positions=state.positions + way, boundaries=state.boundaries + way)
    assert torch.allclose(model.step(moved).positions, model.step(state).positions + way, atol=1e-12)


def test_periodic_scenes_have_no_place_of_their_own():
    model = make()
    state = random_state(periodic=torch.tensor([[True, True]]))
    shifted = state.replace(positions=(state.positions + torch.tensor([0.37, 0.61])) % 1.0)
    assert torch.allclose(model(shifted), model(state), atol=1e-9)
    walled = random_state()
    assert not torch.allclose(model(walled), model(state))


def test_relative_velocities_are_features_of_edges_that_do_not_change_with_a_common_velocity():
    model, state = make(relative_velocities=True), random_state()
    edges = particle_edges(state, 0.25)
    faster = state.replace(velocities=state.velocities + 3.0)
    stirred = state.replace(velocities=state.velocities * 2)
    features, shifted, doubled = (model._edge_features(s, edges) for s in (state, faster, stirred))
    assert features.shape[1] == 5
    assert torch.allclose(features, shifted, atol=1e-12)
    assert torch.allclose(doubled[:, 3:], 2 * features[:, 3:], atol=1e-12)
    between = (state.velocities[edges.senders] - state.velocities[edges.receivers]) / torch.tensor([0.05, 0.06])
    assert torch.allclose(features[:, 3:], between.double(), atol=1e-6)


def test_a_radius_whose_edges_do_not_fit_in_memory_is_refused(monkeypatch):
    monkeypatch.setattr(gns, "room", lambda device, edge_bytes: 10**6 // edge_bytes)
    make(connectivity_radius=0.1).step(random_state())
    with pytest.raises(ValueError, match="makes 552 edges"):
        make(connectivity_radius=2.0, latent_size=256).step(random_state())


def test_nothing_goes_through_a_solid_wall():
    state = random_state(velocities=torch.full((24, 2), 3.0, dtype=torch.float64))
    for periodic in (None, [True, False]):
        here = state if periodic is None else state.replace(periodic=torch.tensor([periodic]))
        for solid in (False, True):
            path = rollout(here, simulator=make(solid_walls=solid), num_steps=20)
            left = outside(here, path["positions"][-1])
            assert not left.any() if solid else left.any()
            moved = shortest(here, path["positions"][1:] - path["positions"][:-1])
            assert torch.allclose(path["velocities"][1:], moved / 0.05, atol=1e-9)


def test_walls_are_felt_within_the_radius_only():
    model = make()
    state = random_state(num=1).replace(positions=torch.full((1, 2), 0.5, dtype=torch.float64))
    wide = state.replace(boundaries=state.boundaries * 10 - 4)
    near = state.replace(positions=torch.tensor([[0.5, 0.1]], dtype=torch.float64))
    assert torch.equal(model(state), model(wide))
    assert not torch.allclose(model(state), model(near))


def test_kinematic_particles_go_on_and_are_felt():
    kinematic = torch.zeros(24, dtype=torch.bool)
    kinematic[3] = True
    model, state = make(), random_state(kinematic=kinematic)
    path = rollout(state, simulator=model, num_steps=4)
    drift = state.positions[3] + 4 * model.dt * state.velocities[3]
    assert torch.allclose(path["positions"][-1, 3], drift, atol=1e-14)
    elsewhere = do(entities=3, positions=torch.tensor([0.9, 0.9]))(state, 0)
    assert not torch.allclose(model(elsewhere), model(state))


def test_particles_enter_and_leave():
    model, state = make(), random_state()
    late = do(active=False, entities=[0, 1])(state, 0)
    path = rollout(late, simulator=model, num_steps=6, interventions=[do(active=True, entities=[0], at=3)])
    assert torch.equal(path["positions"][3, 0], state.positions[0])
    assert not torch.equal(path["positions"][4, 0], state.positions[0])
    assert torch.equal(path["positions"][-1, 1], state.positions[1])


def test_types_of_particles_matter():
    model, state = make(), random_state()
    others = state.replace(particle_types=11 - state.particle_types)
    assert not torch.allclose(model(others), model(state))


def test_a_checkpoint_gives_the_same_steps_under_every_backend(tmp_path):
    model, state = make(), random_state()
    save_checkpoint(model, tmp_path / "gns.safetensors")
    again = load_checkpoint(tmp_path / "gns.safetensors")
    assert torch.equal(again.step(state).positions, model.step(state).positions)
    for backend in ("torch", "warp"):
        again.network.backend = backend
        assert torch.allclose(again(state), model(state), atol=1e-12)


def recorded(num_steps=8, seed=0):
    """Two scenes that fall and turn, with their past."""
    state = random_state(scenes=2, seed=seed)
    times = torch.arange(-3, num_steps + 1, dtype=torch.float64)[:, None, None] * 0.05
    turned = state.velocities.flip(1) * torch.tensor([1.0, -1.0])
    positions = state.positions + state.velocities * times.sin() + turned * (1 - times.cos())
    velocities = positions.diff(dim=0) / 0.05
    first = state.replace(
        positions=positions[3], velocities=velocities[2], history=velocities[:2].transpose(0, 1).contiguous()
    )
    frames = {"positions": positions[3:], "velocities": velocities[2:]}
    active = first.active.expand(num_steps + 1, -1)
    return Trajectory(initial=first, frames=frames, active=active, dt=0.05)


def test_statistics_are_those_of_the_data():
    path = recorded()
    found = GNS.measure([path, recorded(seed=1)])
    velocities = torch.cat([p["velocities"].flatten(0, 1) for p in (path, recorded(seed=1))])
    change = torch.cat([p["velocities"].diff(dim=0).flatten(0, 1) for p in (path, recorded(seed=1))])
    assert found["velocity_mean"] == pytest.approx(velocities.mean(0).tolist())
    assert found["velocity_std"] == pytest.approx(velocities.std(0, correction=0).tolist())
    assert found["change_std"] == pytest.approx(change.std(0, correction=0).tolist())
    noisy = GNS.measure([path], noise_std=0.5)
    assert noisy["change_std"][0] > 0.5


def test_statistics_are_of_particles_while_they_are_there():
    path = recorded()
    there = torch.ones(9, 24, dtype=torch.bool)
    there[:4, :12], there[6:, 20:] = False, False
    gone = path["velocities"].clone()
    gone[~there] = 100.0
    late = replace(path, frames={**path.frames, "velocities": gone}, active=there)
    late = replace(late, initial=late.initial.replace(velocities=gone[0], active=there[0]))
    found = GNS.measure([late])
    assert found["velocity_mean"] == pytest.approx(path["velocities"][there].mean(0).tolist())
    both = there[1:] & there[:-1]
    change = path["velocities"].diff(dim=0)[both]
    assert found["change_std"] == pytest.approx(change.std(0, correction=0).tolist())


@pytest.mark.parametrize(
    "loss", [one_step(), unrolled(3), pushforward(3), rollout_positions(3), rollout_relative_l2(3)]
)
def test_losses_do_not_see_where_those_are_parked_who_are_not_there(loss):
    path = recorded(loss.num_steps)
    there = torch.ones(loss.num_steps + 1, 24, dtype=torch.bool)
    there[:-1, 3], there[-1:, 20] = False, False  # one appears at the last frame, one vanishes
    found = []
    for place in (0.0, 0.4):
        frames = {name: torch.where(there[..., None], values, place) for name, values in path.frames.items()}
        start = path.initial.replace(**{name: values[0] for name, values in frames.items()}, active=there[0])
        parked = replace(path, initial=start, frames=frames, active=there)
        found.append(loss.measure(make(), parked, torch.Generator().manual_seed(0)))
    assert found[0] > 0
    assert torch.allclose(*found, rtol=1e-12)


def test_noise_is_a_random_walk_that_the_target_takes_out():
    """A model that returns the target of noisy states has no error, and the last velocity has the noise asked for."""
    seen = []
    model = make()

    def cheat(state, action=None):
        seen.append(state)
        return model.target(state, path.frame(1), action)

    path = recorded()
    model.forward = cheat
    loss = one_step(noise_std=0.3)
    assert float(loss.measure(model, path.window(0, 2), torch.Generator().manual_seed(0))) == 0
    (noisy,) = seen
    clean = path.frame(0)
    walks = torch.cat([noisy.history - clean.history, (noisy.velocities - clean.velocities)[:, None]], 1)
    assert torch.allclose(noisy.positions - clean.positions, 0.05 * walks.sum(1), atol=1e-12)
    grown = walks.square().mean((0, 2)).sqrt()
    assert float(grown[-1]) == pytest.approx(0.3, rel=0.3)
    assert bool((grown.diff() > 0).all())
    free = noisy.free
    assert bool((walks[~free] == 0).all())


@pytest.mark.parametrize("loss", [one_step(noise_std=0.01), pushforward(3), unrolled(3)], ids=lambda loss: loss.name)
def test_every_loss_has_gradients(loss):
    assert loss.name in LOSSES
    model = make(num_message_passing_steps=1)
    value = loss.measure(model, recorded().window(0, loss.num_steps + 1), torch.Generator().manual_seed(0))
    value.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert float(value.detach()) > 0


def test_a_few_steps_of_training_make_the_error_small():
    path = recorded()
    model = make(statistics=GNS.measure([path]))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator, loss, values = torch.Generator().manual_seed(0), one_step(), []
    for step in range(120):
        optimizer.zero_grad()
        value = loss.measure(model, path.window(step % 8, step % 8 + 2), generator)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-8:]) < 0.1 * sum(values[:8])


def test_losses_through_rollouts_move_kinematic_particles_as_recorded():
    """A network that is right about all others has no loss, though it knows nothing of the scripted one."""
    kinematic = torch.zeros(24, dtype=torch.bool)
    kinematic[5] = True
    path = recorded()
    path = replace(path, initial=path.initial.replace(kinematic=kinematic))
    model, step = make(), {}

    def cheat(state, action=None):
        assert torch.allclose(state.positions[5], path["positions"][step["now"], 5])
        step["now"] += 1
        return model.target(state, path.frame(step["now"]), action)

    model.forward = cheat
    for loss in (unrolled(4), pushforward(4), rollout_positions(4)):
        step["now"] = 0
        window = path.window(0, 5)
        assert float(loss.measure(model, window, torch.Generator().manual_seed(0))) < 1e-20, loss.name
        assert step["now"] == 4


def test_rollout_positions_counts_shortest_ways_along_periodic_axes():
    path = recorded()
    path = replace(path, initial=path.initial.replace(periodic=torch.ones(2, 2, dtype=torch.bool)))
    losses = []
    for shift in (0.0, 0.4):
        places = (path["positions"] + shift) % 1.0
        moved = replace(
            path, initial=path.initial.replace(positions=places[0]), frames={**path.frames, "positions": places}
        )
        loss = rollout_positions(4).measure(make(), moved.window(0, 5), torch.Generator().manual_seed(0))
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


GRAVITY = [[0.0, -9.8], [3.0, -4.0], [0.0, 0.0]]


def falling(**changes):
    """A model that knows gravity, and three scenes under a gravity of their own, each with a kinematic particle."""
    statistics = {**STATISTICS, "beyond_gravity_rms": [0.3, 0.4], "gravity_rms": [1.0, 9.8]}
    model = make(statistics=statistics, known_gravity=True, **changes)
    kinematic = torch.arange(24) % 8 == 0
    return model, random_state(scenes=3, kinematic=kinematic, gravity=torch.tensor(GRAVITY, dtype=torch.float64))


def silenced(model):
    """Let the network answer nothing."""
    with torch.no_grad():
        for parameter in model.network.decoder.parameters():
            parameter.zero_()
    return model


def test_with_known_gravity_no_answer_is_a_free_fall():
    model, state = falling()
    path = rollout(state, simulator=silenced(model), num_steps=6)
    steps = torch.arange(7, dtype=torch.float64)[:, None, None]
    pull = torch.where(state.kinematic[:, None], 0.0, state.gravity[state.batch]) * model.dt
    assert torch.allclose(path["velocities"], state.velocities + steps * pull, atol=1e-14)
    fallen = model.dt * (steps * state.velocities + steps * (steps + 1) / 2 * pull)
    assert torch.allclose(path["positions"], state.positions + fallen, atol=1e-14)
    assert bool(pull[1:8].any())


def test_with_known_gravity_the_target_is_what_gravity_leaves():
    model, state = falling()
    after = random_state(seed=4, scenes=3)
    wanted = model.target(state, after)
    made = model.integrate(state, wanted)
    assert torch.allclose(made.velocities[state.free], after.velocities[state.free], atol=1e-14)
    assert bool((wanted[~state.free] == 0).all())
    fallen = after.replace(velocities=state.velocities + model.dt * state.gravity[state.batch])
    assert torch.allclose(model.target(state, fallen), torch.zeros_like(wanted), atol=1e-13)


def test_a_known_gravity_that_is_changed_acts_at_once():
    model, state = falling()
    silenced(model)
    lighter = rollout(state, simulator=model, num_steps=1, interventions=[do(gravity=torch.zeros(2), at=0)])
    assert torch.equal(lighter["velocities"][1], state.velocities)
    told, _ = falling(further_fields=("gravity",))
    check_simulator(told, state, tolerance=1e-9)


def test_statistics_beyond_gravity_are_of_what_it_leaves():
    path, pull = recorded(), torch.tensor([[0.0, -9.8], [3.0, -4.0]], dtype=torch.float64)
    path = replace(path, initial=path.initial.replace(gravity=pull))
    rest = path["velocities"].diff(dim=0) - 0.05 * pull[path.initial.batch]
    wanted = rest.square().mean((0, 1))
    assert GNS.measure([path])["beyond_gravity_rms"] == pytest.approx(wanted.sqrt().tolist())
    noisy = GNS.measure([path], noise_std=0.5)["beyond_gravity_rms"]
    assert noisy == pytest.approx((wanted + 0.25).sqrt().tolist())
    assert "beyond_gravity_rms" not in GNS.measure([recorded()])


def test_known_gravity_is_kept_in_checkpoints_and_is_off_in_older_ones(tmp_path):
    model, state = falling()
    save_checkpoint(model, tmp_path / "gns.safetensors")
    again = load_checkpoint(tmp_path / "gns.safetensors")
    assert again.motion.known_gravity
    assert torch.equal(again.step(state).positions, model.step(state).positions)
    older = {k: v for k, v in make().arguments.items() if k != "known_gravity"}
    assert not GNS(**older).motion.known_gravity
    assert torch.equal(make().step(state).velocities, make().step(without(state, "gravity")).velocities)


def test_a_run_goes_on_from_a_model_that_did_not_know_gravity(tmp_path):
    """What the older checkpoint did not measure is measured, what its weights were trained with stays."""
    pull = torch.tensor([[0.0, -9.8]])
    path = recorded().to(torch.float32).scenes()[0]
    path = replace(path, initial=path.initial.replace(gravity=pull))
    write_trajectories(tmp_path / "train.h5", [path], dataset="falling")
    save_checkpoint(make(dtype=torch.float32), tmp_path / "older.safetensors")
    (tmp_path / "run.toml").write_text(
        f'''
model = "GNS"
data = "{tmp_path}"
out = "{tmp_path}/out"
initial = "{tmp_path}/older.safetensors"
arguments = {{ known_gravity = true }}
fit = {{ num_steps = 1, batch_size = 1, num_valid = 0, accelerator = "cpu" }}
'''
    )
    model = start(read_run(tmp_path / "run.toml"))
    assert model.motion.known_gravity
    statistics = model.arguments["statistics"]
    assert statistics["change_std"] == STATISTICS["change_std"]
    assert statistics["beyond_gravity_rms"] == pytest.approx(GNS.measure([path])["beyond_gravity_rms"])


def test_known_gravity_must_be_told():
    model, state = falling()
    with pytest.raises(ValueError, match=r"give it gravity \[b, 2\]"):
        model.step(without(state, "gravity"))
    with pytest.raises(ValueError, match="beyond_gravity_rms"):
        make(known_gravity=True)


def without(state, name):
    fields = {k: state[k] for k in state if k != name}
    return ParticleState(batch=state.batch, **fields)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda s: without(s, "history"), "needs history"),
        (lambda s: s.replace(history=s.history[:, :1]), "needs history"),
        (lambda s: without(s, "particle_types"), "particle_types"),
        (lambda s: s.replace(particle_types=s.particle_types + 2), "0 to 6"),
        (lambda s: s.to(torch.float32), "float64"),
    ],
)
def test_states_it_cannot_step_are_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        make().step(broken(random_state()))


def test_further_fields_of_another_size_are_refused():
    model = make(further_fields=("materials",), statistics={**STATISTICS, "materials_rms": [1.0, 1.0]})
    with pytest.raises(ValueError, match="materials of 2 numbers"):
        model.step(random_state(materials=torch.ones(24, 1, dtype=torch.float64)))


def test_actions_it_does_not_know_are_refused():
    with pytest.raises(ValueError, match="without actions"):
        make().step(random_state(), torch.zeros(24, 2, dtype=torch.float64))
    model = make(actions="input", statistics={**STATISTICS, "action_rms": [1.0, 1.0]})
    with pytest.raises(ValueError, match="2 numbers"):
        model.step(random_state(), torch.zeros(24, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connectivity_radius": 0.0}, "connectivity_radius"),
        ({"num_dimensions": 4}, "num_dimensions"),
        ({"latent_size": 0}, "latent_size"),
        ({"actions": "impulse"}, "actions"),
        ({"further_fields": ("materials",)}, "materials_rms"),
        ({"statistics": {k: v for k, v in STATISTICS.items() if k != "change_std"}}, "change_std"),
        ({"statistics": {**STATISTICS, "change_std": [1.0]}}, "each of 2 axes"),
        ({"kernel_radius": 0.0}, "kernel_radius must be a positive distance"),
        ({"num_kernels": -1}, "num_kernels must be a whole number"),
        ({"num_kernels": 3}, "need 63 numbers term_rms in statistics, which have 0"),
    ],
)
def test_arguments_that_make_no_network_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_rollouts_stop_where_numbers_end():
    model = make()
    with torch.no_grad():
        model.network.decoder.layers[-1].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="Step 1 made positions of entity 0 NaN"):
        rollout(random_state(), simulator=model, num_steps=3)
