from __future__ import annotations

from itertools import product

import pytest
import torch

from simworld import GNS, ParticleState, Trajectory, load_checkpoint, save_checkpoint
from simworld.data import write_trajectories
from simworld.models.smoothed_terms import AHEAD, KINDS, MOST, fitted_gains, in_units, num_terms, smoothed_terms
from simworld.runs import read_run, start
from simworld.testing import check_locality, check_simulator

RADIUS, DT, KERNELS = 0.3, 0.05, 4


def particles(num=30, d=2, seed=0, **fields):
    rows = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    return ParticleState(
        positions=torch.rand(num, d, **rows),
        velocities=torch.randn(num, d, **rows) * 0.3,
        boundaries=torch.tensor([[[0.0] * d, [1.0] * d]], dtype=torch.float64),
        **fields,
    )


def spline(x):
    x = abs(x)
    return 0.75 - x * x if x < 0.5 else 0.5 * (1.5 - x) ** 2 if x < 1.5 else 0.0


def by_hand(state, radius, dt, kernels):
    """Define the terms: loops over pairs, as the docstring says."""
    n, d = state.positions.shape
    size = (state.boundaries[0, 1] - state.boundaries[0, 0]).tolist()
    periodic = state.periodic[0].tolist() if "periodic" in state else [False] * d
    found = torch.zeros(n, len(AHEAD) * KINDS * kernels, d, dtype=torch.float64)
    ways = {}
    for i, j in product(range(n), range(n)):
        way = state.positions[j] - state.positions[i]
        way = torch.stack([w - s * torch.round(w / s) if p else w for w, s, p in zip(way, size, periodic, strict=True)])
        if i != j and way.norm() <= radius and state.free[i] and state.active[j]:
            ways[i, j] = way
    for a, steps in enumerate(AHEAD):
        rho, nearer = torch.zeros(n).double(), torch.zeros(n).double()
        pairs = {}
        for (i, j), way in ways.items():
            u = state.velocities[j] - state.velocities[i]
            later = way + dt * steps * u
            length = later.norm()
            e = later / length
            wide = max(0.0, 1 - float(length / radius) ** 2) ** 2
            rho[i] += wide
            nearer[i] += wide * (u @ e)
            pairs[i, j] = u, e, float(length)
        for (i, j), (u, e, length) in pairs.items():
            for k in range(kernels):
                w = spline(length * (kernels + 1) / radius - k - 0.5)
                terms = torch.stack([e, (u @ e) * e, rho[j] * e, nearer[j] * e, u, rho[i] * e, nearer[i] * e])
                first = (a * kernels + k) * KINDS
                found[i, first : first + KINDS] += w * terms
    return found


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("periodic", [False, True])
def test_terms_are_the_sums_that_are_said(d, periodic):
    fields = {"periodic": torch.tensor([[True, *[False] * (d - 1)]])} if periodic else {}
    kinematic = torch.arange(30) % 7 == 0
    state = particles(d=d, kinematic=kinematic, active=torch.arange(30) % 11 != 3, **fields)
    found = smoothed_terms(state, RADIUS, DT, KERNELS)
    assert found.shape == (30, num_terms(KERNELS), d)
    torch.testing.assert_close(found, by_hand(state, RADIUS, DT, KERNELS), rtol=1e-7, atol=1e-7)
    assert bool((found[kinematic] == 0).all())
    assert bool((found[~kinematic] != 0).any())


def test_terms_turn_with_the_scene_and_do_not_see_a_common_velocity():
    state = particles(d=3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = state.replace(positions=state.positions @ turn, velocities=state.velocities @ turn + 0.7)
    torch.testing.assert_close(
        smoothed_terms(turned, RADIUS, DT, KERNELS), smoothed_terms(state, RADIUS, DT, KERNELS) @ turn
    )


def test_terms_end_at_the_radius_without_a_jump():
    pair = torch.tensor([[0.2, 0.5], [0.2 + RADIUS * (1 - 1e-4), 0.5]], dtype=torch.float64)
    state = particles(num=2).replace(positions=pair, velocities=torch.zeros(2, 2, dtype=torch.float64))
    assert float(smoothed_terms(state, RADIUS, DT, KERNELS).abs().max()) < 1e-6
    nearer = state.replace(positions=pair * torch.tensor([0.9, 1.0]))
    assert float(smoothed_terms(nearer, RADIUS, DT, KERNELS).abs().max()) > 1e-3


def test_coincident_particles_have_finite_terms_and_gradients():
    state = particles(num=4)
    positions = torch.zeros(4, 2, dtype=torch.float64).add(0.5).requires_grad_()
    terms = smoothed_terms(state.replace(positions=positions), RADIUS, DT, KERNELS)
    (gradient,) = torch.autograd.grad(terms.square().sum(), positions)
    assert bool(torch.isfinite(terms).all())
    assert bool(torch.isfinite(gradient).all())


def test_gradients_are_those_of_finite_differences():
    state = particles(num=8)

    def terms(positions, velocities):
        return smoothed_terms(state.replace(positions=positions, velocities=velocities), 0.45, DT, 2)

    inputs = [one.clone().requires_grad_() for one in (state.positions, state.velocities)]
    assert torch.autograd.gradcheck(terms, inputs)


def moved_by(gain_of, num_steps=6, seed=0):
    """Return a path whose changes of velocity are shares of its terms, as `gain_of` [t] has them, and a constant."""
    state, frames = particles(num=60, seed=seed), {"positions": [], "velocities": []}
    for _ in range(num_steps + 1):
        for name, values in frames.items():
            values.append(state[name])
        change = torch.einsum("ntd,t->nd", smoothed_terms(state, RADIUS, DT, KERNELS), gain_of) + 0.01
        velocities = state.velocities + change
        state = state.replace(positions=state.positions + DT * velocities, velocities=velocities)
    frames = {name: torch.stack(values) for name, values in frames.items()}
    there = torch.ones(num_steps + 1, 60, dtype=torch.bool)
    return Trajectory(initial=particles(num=60, seed=seed), frames=frames, active=there, dt=DT)


def test_gains_are_found_where_changes_are_made_of_terms():
    gains = torch.zeros(num_terms(KERNELS), dtype=torch.float64)
    gains[8], gains[2 * KINDS + 4] = 0.03, 0.02
    paths = [moved_by(gains, seed=seed) for seed in range(3)]
    found = fitted_gains(paths, RADIUS, KERNELS)
    rms, share = (torch.tensor(found[name], dtype=torch.float64) for name in ("term_rms", "term_gain"))
    other = moved_by(gains, num_steps=1, seed=9)
    terms = smoothed_terms(other.frame(0), RADIUS, DT, KERNELS)
    told, true = (torch.einsum("ntd,t->nd", terms, each) for each in (share / rms, gains))
    assert float((told - true).square().mean() / true.square().mean()) < 1e-3


def network(paths, dtype=torch.float64, **changes):
    how = {"connectivity_radius": RADIUS, "num_kernels": KERNELS}
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "num_message_passing_steps": 1, "num_velocities": 1, "num_particle_types": 1}
    model = GNS(dt=DT, statistics=GNS.measure(paths, **how), **how, **sizes, **changes)
    return model.to(dtype)


def test_a_gns_with_kernels_keeps_the_contract():
    gains = torch.full((num_terms(KERNELS),), 1e-3, dtype=torch.float64)
    model = network([moved_by(gains)])
    check_simulator(model, particles(), tolerance=1e-9)
    state = particles(num=60)
    corner = int(state.positions.sum(1).argmin())
    check_locality(model, state, entity=corner, reach=3 * RADIUS)
    with pytest.raises(AssertionError, match="travelled farther"):
        check_locality(model, state, entity=corner, reach=1.5 * RADIUS)


def test_a_gns_with_kernels_begins_with_what_was_fitted():
    gains = torch.zeros(num_terms(KERNELS), dtype=torch.float64)
    gains[8] = 0.03
    path = moved_by(gains)
    model, plain = network([path]), GNS.measure([path])
    for each in model.network.decoder.parameters():
        torch.nn.init.zeros_(each)
    state, after = path.frame(0), path.frame(1)
    missed = (model(state).detach() - model.target(state, after)).square().mean()
    assert float(missed) < 0.01 * float(model.target(state, after).square().mean())
    assert "term_gain" not in plain


def test_checkpoints_and_runs_keep_kernels(tmp_path):
    path = moved_by(torch.full((num_terms(KERNELS),), 1e-3, dtype=torch.float64))
    model = network([path], dtype=torch.float32)
    save_checkpoint(model, tmp_path / "m.safetensors")
    state = path.frame(0).to(torch.float32)
    assert torch.equal(load_checkpoint(tmp_path / "m.safetensors").step(state).positions, model.step(state).positions)

    write_trajectories(tmp_path / "train.h5", [path.to(torch.float32)], dataset="smoothed")
    (tmp_path / "run.toml").write_text(
        f'model = "GNS"\ndata = "{tmp_path}"\nout = "{tmp_path}/out"\n[arguments]\nconnectivity_radius = {RADIUS}\n'
        f"num_kernels = {KERNELS}\nnum_velocities = 1\nnum_particle_types = 1\nlatent_size = 8\n"
        'num_message_passing_steps = 1\n[loss]\nname = "one_step"\n[fit]\nnum_steps = 2\nbatch_size = 1\n'
        'num_valid = 0\naccelerator = "cpu"\n'
    )
    trained = start(read_run(tmp_path / "run.toml"))
    assert len(trained.arguments["statistics"]["term_gain"]) == num_terms(KERNELS)


def test_kernels_without_a_radius_are_refused():
    with pytest.raises(ValueError, match="need a radius"):
        GNS.measure([moved_by(torch.zeros(num_terms(KERNELS), dtype=torch.float64))], num_kernels=KERNELS)


def test_long_terms_are_shortened_and_keep_their_direction():
    terms = torch.tensor([[[0.3, -0.4], [3e4, 4e4]]], dtype=torch.float64)
    short, long = in_units(terms, torch.tensor([1.0, 2.0]))[0]
    torch.testing.assert_close(short, terms[0, 0], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(long, MOST * torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=1e-5, atol=0.0)


def test_gravity_is_no_share_of_terms():
    """Clouds that fall freely, each under its own gravity, leave nothing to their neighbours."""
    paths = []
    for seed in range(4):
        pull = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = particles(num=40, seed=seed, gravity=pull[None])
        speeds = start.velocities + DT * pull * torch.arange(6, dtype=torch.float64)[:, None, None]
        places = start.positions + DT * torch.cat([torch.zeros_like(speeds[:1]), speeds[1:].cumsum(0)])
        there = torch.ones(6, 40, dtype=torch.bool)
        paths.append(Trajectory(initial=start, frames={"positions": places, "velocities": speeds}, active=there, dt=DT))
    gains = torch.tensor(fitted_gains(paths, RADIUS, KERNELS)["term_gain"])
    assert float(gains.abs().max()) < 1e-9
    path = moved_by(torch.full((num_terms(KERNELS),), 1e-3, dtype=torch.float64))
    assert max(map(abs, fitted_gains([path], RADIUS, KERNELS)["term_gain"])) > 1e-4
