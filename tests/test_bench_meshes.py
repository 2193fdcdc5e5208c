from __future__ import annotations

import math

import pytest
import torch

from simworld import MeshGraphNet, MeshState, Trajectory, bench, rollout, save_checkpoint, write_trajectories
from simworld.bench.meshes import _root, shedding_frequency
from simworld.metrics import Row


def test_shedding_frequency_is_that_of_the_lift():
    times = torch.arange(400) * 0.01
    lift = 2 + 0.3 * torch.sin(2 * math.pi * 3.7 * times + 1.0)
    forces = torch.stack([torch.ones(400), lift], 1).double()
    assert shedding_frequency(forces, 0.01) == pytest.approx(3.7, rel=1e-3)
    assert math.isnan(shedding_frequency(torch.ones(50, 2), 0.01))


def test_root_mean_square_errors_are_roots_of_means():
    row = Row(
        model="m",
        dataset="d",
        metric="velocities_mse",
        horizon=50,
        value=0.09,
        unit="(m/s)^2",
        trajectories=3,
        spread=1.0,
    )
    assert _root(row) == Row(
        model="m", dataset="d", metric="velocities_rmse", horizon=50, value=0.3, unit="m/s", trajectories=3
    )


@pytest.mark.parametrize("world", ["couette", "beam"])
def test_recorded_tables_need_data_and_a_model(world, tmp_path):
    with pytest.raises(ValueError, match=rf"licence forbids .* runs/{world}"):
        bench.BENCHMARKS[world](None)
    start = MeshState(
        rest_positions=torch.rand(4, 2), cells=torch.tensor([[0, 1], [1, 2], [2, 3]]), temperatures=torch.ones(4)
    )
    values = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    there = torch.ones(6, 4, dtype=torch.bool)
    path = Trajectory(
        initial=start.replace(temperatures=values[0]), frames={"temperatures": values}, active=there, dt=0.1
    )
    write_trajectories(tmp_path / "valid.h5", [path, path], dataset=world)
    sizes = {"num_dimensions": 0, "latent_size": 8, "num_message_passing_steps": 2}
    heat = {"outputs": {"temperatures": 1}, "inputs": ["temperatures"]}
    model = MeshGraphNet(dt=0.1, statistics=MeshGraphNet.measure([path]), **heat, **sizes)
    save_checkpoint(model, tmp_path / "model.safetensors")
    rows = bench.BENCHMARKS[world](tmp_path / "valid.h5", checkpoints=[tmp_path / "model.safetensors"])
    with torch.no_grad():
        made = rollout(path.initial, simulator=model, num_steps=5)["temperatures"].double()
    wanted = ((made - values).square().sum(1) / values.double().square().sum(1)).sqrt()[1:]
    found = {(row.model, row.horizon): row.value for row in rows if row.metric == "temperatures_relative_l2"}
    assert found["simworld", "all"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert found["simworld", 1] == pytest.approx(float(wanted[0]), rel=1e-5)
    assert ("static", "all") in found
    assert any(row.model == "published:ThermodynamicsGNN" for row in rows)
