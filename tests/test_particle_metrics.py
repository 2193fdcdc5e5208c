from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from simworld import (
    GNS,
    ConstantVelocity,
    ParticleState,
    Static,
    Trajectory,
    evaluate,
    one_step_position_mse,
    prescribe,
    rollout,
    save_checkpoint,
    write_trajectories,
)
from simworld.cli import main
from simworld.particle_metrics import (
    PARTICLE_METRICS,
    blocks,
    density_error,
    kinetic_energy,
    kinetic_energy_mse,
    lagrangebench_metrics,
    maximum_mean_discrepancy,
    momentum_error,
    mse_n,
    named_metrics,
    sinkhorn_divergence,
)

SETS = (
    sinkhorn_divergence,
    lambda p, t: sinkhorn_divergence(p, t, definition="pot"),
    maximum_mean_discrepancy,
    density_error,
)


def path_of(positions, dt=0.1, active=None, **fields) -> Trajectory:
    """Positions [T, n, d] as a trajectory, velocities from their differences."""
    positions = torch.as_tensor(positions, dtype=torch.float64)
    velocities = torch.cat([torch.zeros_like(positions[:1]), positions.diff(dim=0) / dt])
    initial = ParticleState(positions=positions[0], velocities=velocities[0], **fields)
    frames = {"positions": positions, "velocities": velocities}
    if active is None:
        active = torch.ones(positions.shape[:2], dtype=torch.bool)
    return Trajectory(initial=initial, frames=frames, active=active, dt=dt)


def box(periodic, scenes=1):
    return {
        "boundaries": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64).repeat(scenes, 1, 1),
        "periodic": torch.tensor([periodic]).repeat(scenes, 1),
    }


def cloud(num=20, frames=1, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(frames, num, 2, generator=generator, dtype=torch.float64)


def lattice(side, spacing):
    numbers = torch.arange(side).double() * spacing
    return torch.cartesian_prod(numbers, numbers)[None]


def wandering(num=12, frames=25, seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    steps = size * torch.randn(frames, num, 2, generator=generator, dtype=torch.float64)
    return cloud(num, seed=seed) + steps.cumsum(0)


def nearest(ways):
    """Ways across the unit torus, in numpy."""
    return ways - np.round(ways)


# Sinkhorn divergence


@pytest.mark.parametrize("definition", ["ott", "pot"])
@pytest.mark.parametrize("epsilon", [2e-3, 2e-4])
def test_moving_all_particles_alike_costs_the_square_of_the_way(definition, epsilon):
    x, shift = lattice(4, 0.25), torch.tensor([0.03, -0.04], dtype=torch.float64)
    found = sinkhorn_divergence(path_of(x + shift), path_of(x), definition=definition, epsilon=epsilon)
    assert float(found) == pytest.approx(0.03**2 + 0.04**2, rel=0.02)


def test_across_a_periodic_side_the_way_is_short():
    x = torch.tensor([[[0.01, 0.2], [0.02, 0.6]]], dtype=torch.float64)
    y = torch.tensor([[[0.99, 0.2], [0.0, 0.6]]], dtype=torch.float64)
    near = sinkhorn_divergence(path_of(x, **box([True, False])), path_of(y, **box([True, False])), epsilon=1e-4)
    far = sinkhorn_divergence(path_of(x, **box([False, True])), path_of(y, **box([False, True])), epsilon=1e-4)
    assert float(near) == pytest.approx(0.02**2, rel=1e-6)
    assert float(far) == pytest.approx((0.98**2 + 0.02**2) / 2, rel=1e-6)


def dual(cost, epsilon, rounds=3000):
    """The entropic cost by plain alternating updates of potentials."""
    f, g = np.zeros(len(cost)), np.zeros(cost.shape[1])
    for _ in range(rounds):
        f = -epsilon * np.log(np.mean(np.exp((g - cost) / epsilon), axis=1))
        g = -epsilon * np.log(np.mean(np.exp((f[:, None] - cost) / epsilon), axis=0))
    plan = np.exp((f[:, None] + g - cost) / epsilon) / cost.size
    return f.mean() + g.mean(), (plan * cost).sum()


@pytest.mark.parametrize("definition", ["ott", "pot"])
def test_both_definitions_agree_with_plain_updates(definition):
    x, y = cloud(9, seed=1), cloud(9, seed=2)
    costs = [np.square(nearest((a[0, :, None] - b[0]).numpy())).sum(2) for a, b in ((x, y), (x, x), (y, y))]
    epsilon = 0.05 * costs[0].mean() if definition == "ott" else 0.1
    across, own, others = (dual(cost, epsilon)[definition == "pot"] for cost in costs)
    sides = box([True, True])
    found = sinkhorn_divergence(path_of(x, **sides), path_of(y, **sides), definition=definition)
    # POT stops at marginals that hold to 1e-5.
    assert float(found) == pytest.approx(across - (own + others) / 2, rel=1e-6 if definition == "ott" else 1e-3)


def test_logarithms_lead_to_the_same_value(monkeypatch):
    x, y = path_of(cloud(40, seed=3)), path_of(cloud(40, seed=4))
    plain = float(sinkhorn_divergence(x, y))
    monkeypatch.setattr("simworld.particle_metrics.LARGEST_EXPONENT", 0.0)
    assert float(sinkhorn_divergence(x, y)) == pytest.approx(plain, rel=1e-6)


def test_the_divergence_of_particles_in_one_place_is_zero():
    one = path_of(torch.full((1, 4, 2), 0.5))
    assert float(sinkhorn_divergence(one, one)) == 0


def test_what_does_not_settle_is_said(monkeypatch):
    monkeypatch.setattr("simworld.particle_metrics.MOST_ITERATIONS", 20)
    x, y = cloud(8, seed=3), cloud(8, seed=4)
    with pytest.raises(ValueError, match=r"did not settle in 20 iterations with epsilon=1e-06; give a larger"):
        sinkhorn_divergence(path_of(x), path_of(y), epsilon=1e-6)


def test_without_pot_the_extra_is_named(monkeypatch):
    for name in ("ot", "ot.bregman"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs POT; install it with: pip install 'simworld\[metrics\]'"):
        sinkhorn_divergence(path_of(cloud()), path_of(cloud(seed=1)))


# Maximum mean discrepancy


def test_two_particles_have_a_closed_form():
    x, y = torch.zeros(1, 1, 2), torch.tensor([[[0.06, 0.08]]])
    found = maximum_mean_discrepancy(path_of(x), path_of(y), bandwidth=0.2)
    assert float(found) == pytest.approx(2 - 2 * math.exp(-(0.1**2) / (2 * 0.2**2)))


@pytest.mark.parametrize("at_once", [2**22, 7])
def test_the_discrepancy_agrees_with_numpy_however_it_is_blocked(monkeypatch, at_once):
    monkeypatch.setattr("simworld.particle_metrics.PAIRS_AT_ONCE", at_once)
    x, y, sides = cloud(11, frames=2, seed=1), cloud(11, frames=2, seed=2), box([True, True])

    def mean(a, b):
        return np.exp(-np.square(nearest(a[:, None] - b)).sum(2) / (2 * 0.1**2)).mean()

    wanted = [mean(a, a) + mean(b, b) - 2 * mean(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    found = maximum_mean_discrepancy(path_of(x, **sides), path_of(y, **sides))
    assert found.numpy() == pytest.approx(np.array(wanted), rel=1e-12)


# All of sets


@pytest.mark.parametrize("metric", SETS)
def test_which_particle_is_which_does_not_matter_to_sets(metric):
    x, y, sides = cloud(15, seed=1), cloud(15, seed=2), box([True, False])
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    same = metric(path_of(x[:, order], **sides), path_of(x, **sides))
    assert same.dtype == torch.float64
    assert abs(float(same)) < 1e-9
    found, swapped = (metric(path_of(a, **sides), path_of(y, **sides)) for a in (x, x[:, order]))
    assert float(found) > 1e-3
    assert torch.allclose(found, swapped, rtol=1e-9)


@pytest.mark.parametrize("metric", SETS[:3])
def test_scenes_are_compared_apart_and_averaged(metric):
    x, y, batch = cloud(12, seed=1), cloud(12, seed=2), torch.arange(12) // 6
    apart = [metric(path_of(x[:, k : k + 6]), path_of(y[:, k : k + 6])) for k in (0, 6)]
    assert torch.allclose(metric(path_of(x, batch=batch), path_of(y, batch=batch)), (apart[0] + apart[1]) / 2)


@pytest.mark.parametrize("metric", SETS)
def test_particles_that_are_not_there_are_in_no_set(metric):
    x, y = cloud(10, seed=1), cloud(10, seed=2)
    there = torch.ones(1, 10, dtype=torch.bool)
    there[0, 7:] = False
    cell = {"cell": 0.2} if metric is density_error else {}
    some = metric(path_of(x, active=there), path_of(y), **cell)
    strewn = torch.where(there[..., None], x, torch.tensor(0.9, dtype=torch.float64))
    assert torch.equal(some, metric(path_of(strewn, active=there), path_of(y), **cell))
    assert float(some) != float(metric(path_of(x), path_of(y), **cell))


def test_a_scene_without_particles_is_no_set():
    gone = torch.zeros(1, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match="Frame 0 has a scene without active particles"):
        maximum_mean_discrepancy(path_of(cloud(10), active=gone), path_of(cloud(10)))


def test_strides_leave_frames_out():
    x, y = wandering(8, 9, seed=1), wandering(8, 9, seed=2)
    every, some = (maximum_mean_discrepancy(path_of(x), path_of(y), stride=k) for k in (1, 3))
    assert (~some.isnan()).nonzero()[:, 0].tolist() == [0, 1, 4, 7]
    assert torch.equal(some[[0, 1, 4, 7]], every[[0, 1, 4, 7]])
    assert not every.isnan().any()


# Density


def test_density_counts_cells():
    target = path_of([[[0.05, 0.05], [0.15, 0.05], [0.15, 0.06], [0.95, 0.95]]])
    moved = path_of([[[0.05, 0.05], [0.15, 0.05], [0.25, 0.06], [0.95, 1.35]]])
    # Counts 1, 2, 1 are met by 1, 1, 0, and there are two cells with one too many.
    assert float(density_error(moved, target, cell=0.1)) == pytest.approx(math.sqrt((1 + 1 + 1 + 1) / 6))


def test_density_goes_round_periodic_sides_in_whole_cells():
    x = torch.tensor([[[0.05, 0.5], [0.5, 0.5]]])
    for sides, wanted in ((box([True, False]), 0.0), (box([False, True]), 1.0)):
        found = density_error(
            path_of(x + torch.tensor([1.0, 0.0]) * torch.tensor([[1.0], [0.0]]), **sides), path_of(x, **sides), cell=0.3
        )
        assert float(found) == pytest.approx(wanted)
    # A cell of 0.3 would leave a narrow one at the end: a third is used.
    ends = path_of([[[0.95, 0.5]]], **box([True, False])), path_of([[[0.7, 0.5]]], **box([True, False]))
    assert float(density_error(*ends, cell=0.3)) == 0


def test_cells_default_to_three_spacings():
    x, y = (path_of(lattice(6, 0.1) + start) for start in (0.01, 0.11))
    assert float(density_error(y, x)) == float(density_error(y, x, cell=0.3000001)) > 0


# Energy and momentum


@pytest.mark.parametrize("stride", [1, 10])
def test_lagrangebench_figures_agree_with_numpy(stride):
    """The formulas of its evaluate/metrics.py on arrays without the frame that rollouts start from."""
    start, spacing, dt, sides = cloud(60, seed=5), 0.05, 0.1, box([True, True])
    x, y = (torch.cat([start, (start + wandering(60, 24, seed=k) - wandering(60, 1, seed=k)) % 1]) for k in (1, 2))
    found = lagrangebench_metrics(path_of(x, dt, **sides), path_of(y, dt, **sides), spacing=spacing, stride=stride)
    p, t = x[1:].numpy(), y[1:].numpy()
    mse = np.square(nearest(p - t)).mean((1, 2))
    ours, theirs = (spacing**2 * np.square(nearest(a[1::stride] - a[0:-1:stride]) / dt).sum((1, 2)) for a in (p, t))
    sets = [
        float(sinkhorn_divergence(path_of(p[k : k + 1], **sides), path_of(t[k : k + 1], **sides)))
        for k in range(0, 23, stride)
    ]
    wanted = {f"mse{n}": mse[:n].mean() for n in (1, 5, 10, 20)}
    wanted |= {"loss": mse.mean(), "e_kin": np.square(ours - theirs).mean(), "sinkhorn": np.mean(sets)}
    assert found == pytest.approx(wanted, rel=1e-10)


def test_energy_is_of_masses_where_no_spacing_is_given():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.3, 0.4], [1.0, 0.0]], [[0.3, 0.4], [1.0, 0.2]]])
    heavy = path_of(x, masses=torch.tensor([2.0, 3.0]).double())
    assert kinetic_energy(heavy).tolist() == pytest.approx([0.0, 2 * 25, 3 * 4])
    assert kinetic_energy(path_of(x)).tolist() == pytest.approx([0.0, 25, 4])
    assert kinetic_energy(heavy, spacing=0.1).tolist() == pytest.approx([0.0, 0.25, 0.04])
    still = path_of(x[:1].expand(3, 2, 2), masses=torch.tensor([2.0, 3.0]).double())
    assert kinetic_energy_mse(still, heavy).tolist() == pytest.approx([0.0, 50**2, 12**2])


def test_who_appears_does_not_come_from_afar():
    there = torch.tensor([[False], [True], [True]])
    x = path_of([[[0.0, 0.0]], [[5.0, 0.0]], [[5.1, 0.0]]], active=there)
    assert kinetic_energy(x).tolist() == pytest.approx([0, 0, 1])


def test_momentum():
    masses = torch.tensor([1.0, 3.0]).double()
    y = path_of([[[0.0, 0.0], [0.5, 0.0]], [[0.1, 0.0], [0.5, -0.2]]], masses=masses)
    x = path_of([[[0.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, -0.2]]], masses=masses)
    first, second = momentum_error(x, y).tolist()
    assert math.isnan(first)  # at rest
    assert second == pytest.approx(1 / (1 + 3 * 2))
    swapped = path_of(y["positions"].flip(1), masses=masses.flip(0))
    assert momentum_error(swapped, y)[1] == pytest.approx(0, abs=1e-12)


# Windows


def test_blocks_are_those_of_lagrangebench():
    """126 recorded frames make 4 blocks of 6 + 20; ours begin at the sixth."""
    recorded = torch.arange(126).double()
    path = path_of(recorded[5:, None, None].expand(121, 1, 2))
    found = blocks(path, 20)
    assert [float(b["positions"][0, 0, 0]) for b in found] == [26 * k + 5 for k in range(4)]
    assert {len(b) for b in found} == {21}
    assert [float(b["positions"][-1, 0, 0]) for b in found] == [26 * k + 25 for k in range(4)]
    assert len(blocks(path_of(recorded[5:25, None, None].expand(20, 1, 2)), 19)) == 1
    with pytest.raises(ValueError, match="needs 21 frames; got 20"):
        blocks(path_of(recorded[:20, None, None].expand(20, 1, 2)), 20)
    with pytest.raises(ValueError, match="1 or more; got 0 and 6"):
        blocks(path, 0)


def test_mse_n_begins_after_the_first_frame():
    errors = torch.tensor([100.0, 1.0, 2.0, 6.0]).double()
    assert [float(mse_n(errors, n)) for n in (1, 2, 3)] == [1, 1.5, 3]
    for n in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3"):
            mse_n(errors, n)


# Prescribed particles


@pytest.fixture
def ramp():
    """Three particles; the last is kinematic and swings to and fro, which no constant velocity tells."""
    t = torch.arange(13).double() * 0.1
    positions = cloud(3, seed=1).repeat(13, 1, 1)
    positions[:, 0, 0] += 0.2 * t
    positions[:, 2, 1] += torch.sin(5 * t)
    return path_of(positions, kinematic=torch.tensor([False, False, True]))


def test_prescribed_particles_follow_and_others_do_not(ramp):
    script = prescribe(ramp, ramp.initial.kinematic)
    found = rollout(ramp.initial, simulator=Static(dt=0.1), num_steps=14, interventions=[script])
    assert torch.equal(found["positions"][:13, 2], ramp["positions"][:, 2])
    assert torch.equal(found["velocities"][:13, 2], ramp["velocities"][:, 2])
    assert torch.equal(found["positions"][13:, 2], ramp["positions"][-1:, 2].expand(2, 2))
    assert torch.equal(found["positions"][:, :2], ramp.initial.positions[:2].expand(15, 2, 2))
    only = rollout(
        ramp.initial, simulator=Static(dt=0.1), num_steps=3, interventions=[prescribe(ramp, [2], "positions")]
    )
    assert torch.equal(only["positions"][:, 2], ramp["positions"][:4, 2])
    assert torch.equal(only["velocities"][:, 2], ramp.initial.velocities[2].expand(4, 2))


def test_prescribing_leaves_the_state_itself_after_the_end_and_for_nobody(ramp):
    state = ramp.initial
    assert prescribe(ramp, [2])(state, 13) is state
    assert prescribe(ramp, [])(state, 0) is state
    assert prescribe(ramp, [2])(state, 12).to(torch.float32).positions.dtype == torch.float32
    single = prescribe(ramp, 2)(state.to(torch.float32), 4)
    assert torch.equal(single.positions[2], ramp["positions"][4, 2].float())


def test_prescribing_the_truth_changes_nothing(ramp):
    path = rollout(ramp.initial, simulator=ConstantVelocity(dt=0.1), num_steps=5)
    again = prescribe(path, [0, 1, 2])
    found = rollout(ramp.initial, simulator=ConstantVelocity(dt=0.1), num_steps=5, interventions=[again])
    assert all(torch.equal(found[name], path[name]) for name in path.frames)


def test_what_cannot_be_prescribed(ramp):
    with pytest.raises(ValueError, match=r"active, positions, velocities; got \['masses'\]"):
        prescribe(ramp, [0], "masses")
    with pytest.raises(ValueError, match=r"prescribe\(\) got entities \[3\]; there are 0 to 2"):
        prescribe(ramp, [3])
    with pytest.raises(ValueError, match=r"prescribe\(\) takes entity numbers or a mask"):
        prescribe(ramp, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="a trajectory of 3 entities; the state has 6"):
        prescribe(ramp, [0])(ramp.initial.repeat(2), 0)


def test_presence_can_be_prescribed(ramp):
    there = ramp.active.clone()
    there[4:, 1] = False
    target = path_of(ramp["positions"], active=there)
    found = rollout(
        target.initial, simulator=Static(dt=0.1), num_steps=6, interventions=[prescribe(target, [1], "active")]
    )
    assert torch.equal(found.active, there[:7])


# Evaluation


def test_nobody_is_charged_for_kinematic_particles(ramp):
    rows = evaluate({}, [ramp], dataset="ramp", horizons=(1, 5))
    found = {(row.model, row.horizon): row.value for row in rows}
    # Only the first particle moves: what is charged is its way, over three particles and two coordinates.
    assert found["static", 1] == pytest.approx(0.02**2 / 6)
    assert found["static", 5] == pytest.approx(sum((0.02 * k) ** 2 for k in range(1, 6)) / 5 / 6)
    assert one_step_position_mse(ConstantVelocity(dt=0.1), ramp) == pytest.approx(0.02**2 / 6 / 12)
    free = Trajectory(
        initial=ramp.initial.replace(kinematic=torch.zeros(3, dtype=torch.bool)),
        frames=ramp.frames,
        active=ramp.active,
        dt=ramp.dt,
    )
    assert evaluate({}, [free], dataset="ramp", horizons=(5,))[0].value > 10 * found["static", 5]


class Flees:
    """A simulator in which the first particle flees the third as it is at the time."""

    dt = 0.1

    def step(self, state, action=None):
        velocities = state.velocities.clone()
        velocities[0::3] = state.positions[0::3] - state.positions[2::3]
        return state.advanced(positions=state.positions + self.dt * velocities, velocities=velocities)


def test_simulators_see_the_kinematic_particles_where_they_were(ramp):
    start = ramp.initial
    path = rollout(start, simulator=Flees(), num_steps=12, interventions=[prescribe(ramp, start.kinematic)])
    rows = evaluate({"flees": Flees()}, [path], dataset="ramp", horizons=(1, "all"))
    values = {(row.model, row.horizon): row.value for row in rows}
    assert values["flees", 1] < 1e-30
    assert values["flees", "all"] == 0
    assert values["static", "all"] > 1e-4


def test_metrics_stand_beside_naive_simulators(ramp):
    rows = evaluate({}, [ramp, ramp], dataset="ramp", horizons=(1, 5, "all"), metrics=PARTICLE_METRICS)
    found = {(row.model, row.metric, row.horizon): row for row in rows}
    plain = evaluate({}, [ramp, ramp], dataset="ramp", horizons=(1, 5, "all"))
    assert [row for row in rows if row.metric.endswith("position_mse")] == plain
    for model in ("static", "constant_velocity"):
        for metric in PARTICLE_METRICS:
            assert {h for m, k, h in found if (m, k) == (model, metric)} == {1, 5, "all"}
    still = rollout(ramp.initial, simulator=Static(dt=0.1), num_steps=12, interventions=[prescribe(ramp, [2])])
    row = found["static", "kinetic_energy_mse", 5]
    assert row.value == pytest.approx(float(kinetic_energy_mse(still, ramp)[1:6].mean()))
    assert (row.unit, row.trajectories) == ("(kg (m/s)^2)^2", 2)
    sets = maximum_mean_discrepancy(still, ramp)
    assert found["static", "maximum_mean_discrepancy", "all"].value == pytest.approx(float(sets[[1, 11]].mean()))
    assert found["static", "sinkhorn_divergence", 1].unit == "m^2"


def test_figures_that_are_nowhere_measured_have_no_row():
    rest = path_of(cloud(4).repeat(3, 1, 1))
    rows = evaluate({}, [rest], dataset="rest", horizons=("all",), metrics=named_metrics(["momentum_error"]))
    assert {row.metric for row in rows} == {"rollout_position_mse"}


def test_naming_metrics():
    assert list(named_metrics([])) == []
    assert list(named_metrics(["all"])) == list(PARTICLE_METRICS)
    with pytest.raises(ValueError, match=r"no metric 'mmd'; the known ones are kinetic_energy_mse, .* and all"):
        named_metrics(["momentum_error", "mmd"])


def test_the_command_line_prints_them(monkeypatch, tmp_path, ramp):
    torch.manual_seed(0)
    sizes = {"num_velocities": 1, "num_particle_types": 1, "latent_size": 8, "num_message_passing_steps": 1}
    ramp = path_of(
        ramp["positions"], kinematic=ramp.initial.kinematic, particle_types=torch.zeros(3, dtype=torch.int64)
    )
    model = GNS(dt=0.1, statistics=GNS.measure([ramp]), connectivity_radius=0.2, **sizes)
    save_checkpoint(model, tmp_path / "model.safetensors")
    write_trajectories(tmp_path / "test.h5", [ramp], dataset="ramp", seed=0)
    words = ["simworld", "evaluate", f"{tmp_path}/model.safetensors", f"{tmp_path}/test.h5", "--horizons", "5"]
    monkeypatch.setattr(sys, "argv", [*words, "--metrics", "all", "--json", f"{tmp_path}/found.json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == {"rollout_position_mse", *PARTICLE_METRICS}
    assert len(rows) == 3 * 6


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda p, t: sinkhorn_divergence(p, t, definition="geomloss"), "'ott' or 'pot'"),
        (lambda p, t: sinkhorn_divergence(p, t, epsilon=0), "epsilon must be positive"),
        (lambda p, t: maximum_mean_discrepancy(p, t, bandwidth=-1.0), "bandwidth must be a positive length"),
        (lambda p, t: maximum_mean_discrepancy(p, t, stride=0), "stride must be 1 or more"),
        (lambda p, t: density_error(p, t, cell=0.0), "cell must be a positive length"),
        (lambda p, t: momentum_error(p.window(0, 1), t), "positions of one shape"),
        (lambda p, t: density_error(path_of(cloud(1)), path_of(cloud(1))), "fewer than two particles"),
        (lambda p, t: density_error(path_of(torch.ones(1, 2, 2)), path_of(torch.ones(1, 2, 2))), "may coincide"),
    ],
)
def test_bad_arguments(metric, says):
    with pytest.raises(ValueError, match=says):
        metric(path_of(wandering(5, 3)), path_of(wandering(5, 3, seed=1)))
