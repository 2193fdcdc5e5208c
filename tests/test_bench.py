from __future__ import annotations

import pytest
import torch

from simworld import Row
from simworld.bench import BENCHMARKS, OBJECTS
from simworld.bench.forces import _mse, _normalized_errors
from simworld.bench.rows import over_seeds, published, with_ratios
from simworld.data.generate import GENERATORS
from simworld.metrics import Static, one_step_velocity_mse
from simworld.trajectory import Trajectory


def row(model="simworld", value=1.0, **said):
    given = {"dataset": "d", "metric": "one_step_velocity_mse", "horizon": 1, "unit": "1", "trajectories": 3, **said}
    return Row(model=model, value=value, **given)


def test_seeds_become_median_and_range():
    tables = [[row(value=v)] for v in (3.0, 1.0, 2.0)]
    (ours,) = over_seeds(tables)
    assert (ours.value, ours.low, ours.high, ours.seeds) == (2.0, 1.0, 3.0, 3)
    assert over_seeds(tables[:1]) == tables[0]


def test_ratios_are_to_constant_velocity_on_the_same_data():
    rows = with_ratios([row("constant_velocity", 4.0), row(value=1.0), row("constant_velocity", 9.0, dataset="e")])
    ratios = {(r.model, r.dataset): r.value for r in rows if r.metric == "velocity_mse_over_constant"}
    assert ratios == {("constant_velocity", "d"): 1.0, ("simworld", "d"): 0.25, ("constant_velocity", "e"): 1.0}


@pytest.mark.parametrize(
    "table", ["rope", "springs", "charged", "nbody-egnn", "nbody-in", "balls-in", "string-in", "cradle"]
)
def test_published_rows_say_where_they_come_from(table):
    rows = published(table)
    assert rows
    for r in rows:
        assert r.model.startswith("published:")
        assert len(r.source) > 20
        assert r.value > 0


def test_published_ratios_are_those_of_the_paper():
    ratios = {
        (r.model, r.dataset): r.value
        for table in ("nbody-in", "balls-in", "string-in")
        for r in with_ratios(published(table))
        if r.metric == "velocity_mse_over_constant"
    }
    name = "published:Interaction Network"
    found = [1 / ratios[name, data] for data in ("6 bodies", "6 balls", "15 masses, 1 pinned")]
    assert found == pytest.approx([328, 37, 16.4], rel=0.01)


def test_every_benchmark_says_what_it_is():
    for name, function in BENCHMARKS.items():
        assert len((function.__doc__ or "").splitlines()[0]) > 20, name
    particles = {"water-drop-small", "sand", "water-ramps", "tgv-2d", "fluid-fall", "lj3"}
    meshes = {"couette", "beam", "cylinder-flow-small", "plate-small", "flag-small"}
    others = {"rope", "photos", "counterfactual", "slots", "vin"}
    assert set(OBJECTS) == set(BENCHMARKS) - particles - meshes - others


def test_the_static_rows_of_the_published_table_are_met():
    """In the paper's units, on its own test simulations: here on 300 of 10,000, so to the spread of a mean of 300."""
    made = GENERATORS["springs_nri"].make([[42, 2, k] for k in range(300)], num_frames=70)
    path = Trajectory.cat(made).window(49, 70)
    still = Trajectory(
        initial=path.initial,
        frames={k: v[:1].expand_as(v) for k, v in path.frames.items()},
        active=path.active,
        dt=path.dt,
    )
    errors = _normalized_errors("springs_nri", still, path)
    known = {r.horizon: r.value for r in published("springs") if r.model == "published:Static"}
    for horizon, value in known.items():
        assert float(errors[horizon]) == pytest.approx(value, rel=0.08)


def test_the_linear_row_of_the_nbody_table_is_met():
    path = Trajectory.cat(
        GENERATORS["nbody_egnn"].make([[43, 0, k] for k in range(400)], first_frame=30, num_frames=2, every=10)
    )
    moved, speeds = path["positions"].diff(dim=0)[0], path["velocities"][0]
    share = float((moved * speeds).sum() / speeds.square().sum())
    known = next(r.value for r in published("nbody-egnn") if r.model == "published:Linear")
    assert _mse(path["positions"][0] + share * speeds, path) == pytest.approx(known, rel=0.25)


def test_velocity_errors_count_free_bodies_of_every_frame():
    (path,) = GENERATORS["nbody_in"].make([[1, 0, 0]], num_steps=4, num_bodies=3)
    wanted = float(path["velocities"].diff(dim=0).square().mean())
    assert one_step_velocity_mse(Static(dt=path.dt), path) == pytest.approx(wanted)
    held = path.initial.replace(fixed=torch.tensor([True, False, False]))
    other = Trajectory(initial=held, frames=path.frames, active=path.active, dt=path.dt)
    wanted = float(path["velocities"][:, 1:].diff(dim=0).square().mean())
    assert one_step_velocity_mse(Static(dt=path.dt), other) == pytest.approx(wanted)
