from __future__ import annotations

import math

import pytest
import torch

from simworld import Field, MeshGraphNet, MeshState, Trajectory, bench, rollout, save_checkpoint, write_trajectories
from simworld.bench.meshes import RECORDED, _root, shedding_frequency
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
    fields = RECORDED[world]
    generator = torch.Generator().manual_seed(0)
    frames = {name: torch.rand(6, 4, 2, generator=generator) for name in fields}
    kind = MeshState.with_fields(energies=Field(unit="1", shape=("k",)))
    start = kind(
        rest_positions=torch.rand(4, 2),
        cells=torch.tensor([[0, 1], [1, 2], [2, 3]]),
        **{name: value[0] for name, value in frames.items()},
    )
    there = torch.ones(6, 4, dtype=torch.bool)
    path = Trajectory(initial=start, frames=frames, active=there, dt=0.1)
    write_trajectories(tmp_path / "valid.h5", [path, path], dataset=world)
    how = {"outputs": {"stresses": 1}, "inputs": ["stresses"], "latent_size": 8, "num_message_passing_steps": 2}
    model = MeshGraphNet(dt=0.1, statistics=MeshGraphNet.measure([path]), **how)
    save_checkpoint(model, tmp_path / "model.safetensors")
    rows = bench.BENCHMARKS[world](tmp_path / "valid.h5", checkpoints=[tmp_path / "model.safetensors"])
    with torch.no_grad():
        made = rollout(path.initial, simulator=model, num_steps=5)["stresses"].double()
    misses = (made - frames["stresses"]).square().sum((1, 2))[1:]
    wanted = (misses / frames["stresses"].double().square().sum((1, 2))[1:]).sqrt()
    found = {(row.model, row.metric, row.horizon): row.value for row in rows}
    assert found["simworld", "stresses_relative_l2", "all"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert found["simworld", "stresses_relative_l2", 1] == pytest.approx(float(wanted[0]), rel=1e-5)
    assert found["simworld", "stresses_rmse", "all"] == pytest.approx(float((misses / 8).mean().sqrt()), rel=1e-5)
    assert found["simworld", "time_per_step", 1] > 0
    assert ("static", "stresses_rmse", "all") in found
    assert any(row.model == "published:ThermodynamicsGNN" for row in rows)
    other = "beam" if world == "couette" else "couette"
    with pytest.raises(ValueError, match=f"table {other} is of recordings of .* holds"):
        bench.BENCHMARKS[other](tmp_path / "valid.h5", checkpoints=[tmp_path / "model.safetensors"])
