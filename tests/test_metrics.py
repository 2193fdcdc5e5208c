from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simworld import (
    ConstantVelocity,
    InteractionNetwork,
    MeshState,
    ObjectState,
    ParticleState,
    Static,
    Trajectory,
    evaluate,
    one_step_position_mse,
    position_mse,
    rollout,
)
from simworld.metrics import relative_l2
from simworld.particle_metrics import named_metrics
from simworld.prescriptions import script


@pytest.fixture
def path():
    """One body falls freely, one stays: errors of the naive simulators have closed forms."""
    t = torch.arange(31).double() * 0.1
    positions = torch.zeros(31, 2, 2).double()
    positions[:, 0, 1] = -0.5 * t * (t + 0.1)
    velocities = torch.zeros_like(positions)
    velocities[:, 0, 1] = -t
    initial = ObjectState(positions=positions[0], velocities=velocities[0])
    frames = {"positions": positions, "velocities": velocities}
    return Trajectory(initial=initial, frames=frames, active=torch.ones(31, 2, dtype=torch.bool), dt=0.1)


def test_errors_average_over_entities_and_coordinates(path):
    still = Trajectory(
        initial=path.initial,
        frames={k: v[:1].expand(31, 2, 2) for k, v in path.frames.items()},
        active=path.active,
        dt=0.1,
    )
    assert torch.allclose(position_mse(still, path), path["positions"][:, 0, 1].square() / 4)


def test_one_step_errors_of_naive_simulators(path):
    fall = 0.1**2  # the change of velocity per step, times dt
    assert one_step_position_mse(ConstantVelocity(dt=0.1), path) == pytest.approx(fall**2 / 4)
    steps = path["positions"][:, 0, 1].diff()
    assert one_step_position_mse(Static(dt=0.1), path) == pytest.approx(float(steps.square().mean() / 4))


def test_relative_errors_leave_out_frames_at_which_there_is_nothing_but_rounding(path):
    values = torch.tensor([[0.0, 0.0], [1e-14, 0.0], [1e-3, 0.0], [3.0, 4.0]], dtype=torch.float64)
    recorded, made = (
        Trajectory(
            initial=ObjectState(positions=v[0][None], velocities=v[0][None]),
            frames={"positions": v[:, None], "velocities": v[:, None]},
            active=torch.ones(4, 1, dtype=torch.bool),
            dt=1.0,
        )
        for v in (values, values + 1e-3)
    )
    found = relative_l2("positions")(made, recorded)
    assert found.isnan().tolist() == [True, True, False, False]
    assert found[2:].tolist() == pytest.approx([2**0.5, 2**0.5 * 1e-3 / 5])


@pytest.mark.parametrize("place", [None, 0.0, 40.0])
def test_who_appears_and_vanishes_does_so_as_recorded_and_counts_only_while_there(place):
    """Constant velocity is exact wherever absent particles are parked."""
    drawn = torch.Generator().manual_seed(0)
    speeds = torch.randn(6, 2, generator=drawn).double()
    positions = torch.randn(6, 2, generator=drawn).double() + torch.arange(12).double()[:, None, None] * 0.1 * speeds
    velocities = speeds.expand(12, 6, 2).clone()
    active = torch.ones(12, 6, dtype=torch.bool)
    active[:4, 3:5] = False
    active[7:, 0] = False
    for values in (positions, velocities):
        values[~active] = 1.5 if place is None else place
    history = velocities[0][:, None].expand(6, 2, 2)
    start = ParticleState(positions=positions[0], velocities=velocities[0], history=history, active=active[0])
    frames = {"positions": positions, "velocities": velocities}
    recorded = Trajectory(initial=start, frames=frames, active=active, dt=0.1)
    exact = {
        row.metric: row.value
        for row in evaluate({}, [recorded], dataset="x", horizons=(1, "all"))
        if row.model != "static"
    }
    assert exact.keys() == {"one_step_position_mse", "rollout_position_mse"}
    assert max(exact.values()) < 1e-25
    (presence,) = script(recorded)
    made = rollout(start, simulator=ConstantVelocity(dt=0.1), num_steps=11, interventions=presence)
    assert torch.equal(made.active, active)
    assert presence.to_json() == {"prescribe": ["active"], "entities": [0, 3, 4], "steps": 12}
    shifted = replace(made, frames={**made.frames, "positions": made["positions"] + active[..., None] * 3.0})
    assert torch.allclose(position_mse(shifted, recorded), torch.full((12,), 9.0).double())


def test_rows(path):
    rows = evaluate({}, [path, path], dataset="fall", horizons=(1, 5, "all"))
    found = {(r.model, r.metric, r.horizon): r for r in rows}
    assert len(found) == 6
    row = found["static", "rollout_position_mse", 5]
    assert row.value == pytest.approx(float(path["positions"][1:6, 0, 1].square().mean() / 4))
    assert (row.trajectories, row.unit, row.spread) == (2, "m^2", 0.0)
    assert "source" not in row.to_json()
    whole = found["constant_velocity", "rollout_position_mse", "all"].value
    assert whole == pytest.approx(float(path["positions"][1:, 0, 1].square().mean() / 4))


@pytest.mark.parametrize("horizon", [0, 31, "most", 2.5])
def test_horizons_that_cannot_be_measured(path, horizon):
    with pytest.raises(ValueError, match="'all' or a number of steps from 1 to 30"):
        evaluate({}, [path], dataset="fall", horizons=(horizon,))


def test_nothing_to_measure_and_another_dt(path):
    with pytest.raises(ValueError, match="no trajectories in fall"):
        evaluate({}, [], dataset="fall")
    with pytest.raises(ValueError, match=r"slow makes steps of 0\.2 s, the data has 0\.1 s"):
        evaluate({"slow": Static(dt=0.2)}, [path], dataset="fall")


def test_models_that_learned_in_another_unit_are_refused(path):
    model = InteractionNetwork(dt=0.1, statistics=InteractionNetwork.measure([path]), actions="none").double()
    for unit, suits in (("m", True), ("1", True), ("px", False)):
        model.provenance = {"units": {"positions": unit}}
        if suits:
            assert evaluate({"model": model}, [path], dataset="x", horizons=(1,))
            continue
        with pytest.raises(ValueError, match="model learned from positions in px, the data has m; use data in"):
            evaluate({"model": model}, [path], dataset="x", horizons=(1,))


def test_metrics_of_particles_refuse_flows():
    cells, rest = torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    start = MeshState(rest_positions=rest, cells=cells, velocities=torch.zeros(3, 2))
    active = torch.ones(3, 3, dtype=torch.bool)
    flow = Trajectory(initial=start, frames={"velocities": torch.zeros(3, 3, 2)}, active=active, dt=0.1)
    with pytest.raises(ValueError, match="this MeshState has velocities"):
        evaluate({}, [flow], dataset="x", horizons=(1,), metrics=named_metrics(["momentum_error"]))
