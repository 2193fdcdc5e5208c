from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simworld import GNS, NeuralMPM, one_step_position_mse, save_checkpoint
from simworld.bench import particles
from simworld.bench.rows import episodes_of
from simworld.data import from_arrays, write_trajectories
from simworld.data.generate import GENERATORS, read_recipe

ROOT = Path(__file__).parents[1]


def falling(seed=0, frames=40, num=12, d=3):
    """Particles that fall freely from a height at random."""
    generator = torch.Generator().manual_seed(seed)
    start, speed = torch.rand(num, d, generator=generator), 0.1 * torch.randn(num, d, generator=generator)
    times = torch.arange(frames)[:, None, None] / 60
    positions = start + speed * times
    positions[..., 1] += 3 - 4.9 * times[..., 0] ** 2
    return from_arrays(positions=positions.numpy(), dt=1 / 60, history=4)


@pytest.mark.parametrize(
    ("world", "seed", "arguments"),
    [
        ("water_drop_small", particles.WATER_SEED, particles.SMALL_WATER),
        ("sand_ramps", particles.SAND_SEED, {}),
        ("water_ramps", particles.RAMPS_SEED, particles.TILTED),
    ],
)
def test_tables_are_of_the_worlds_in_the_recipes(world, seed, arguments):
    recipe = read_recipe(ROOT / f"datasets/{world}/recipe.toml")
    assert recipe.seed == seed
    (made,) = episodes_of(world, seed, 1, **{**arguments, "num_steps": 3})
    (wanted,) = GENERATORS[world].make([[seed, 2, 0]], **{**recipe.episode, "num_steps": 3})
    assert torch.equal(made["positions"].float(), wanted["positions"])


def test_turned_copies_fall_alike():
    path = falling()
    copies = list(particles._turns(path))
    assert len(copies) == particles.TURNS
    distances = torch.cdist(path["positions"], path["positions"])
    for number, copy in enumerate(copies):
        assert torch.allclose(torch.cdist(copy["positions"], copy["positions"]), distances, atol=1e-4)
        assert torch.allclose(copy["positions"][..., 1], path["positions"][..., 1])
        assert torch.allclose(copy.frame(3).history[..., 1], path.frame(3).history[..., 1])
        moved = copy["positions"].diff(dim=0) / path.dt
        assert torch.allclose(moved, copy["velocities"][1:], atol=1e-3)
        assert number == 0 or not torch.allclose(copy["positions"], path["positions"])


def test_a_network_is_trained_for_a_table(tmp_path):
    path = particles._on_a_floor(falling())
    how = replace(particles.FLUID_FALL, arguments={**particles.FLUID_FALL.arguments, "latent_size": 8})
    short = {"num_steps": 40, "evaluate_every": 40}
    how = replace(how, stages=tuple((loss, replace(fit, **short)) for loss, fit in how.stages))
    model = particles._trained(how, [path], tmp_path)
    again = particles._trained(how, [path], tmp_path)
    with torch.no_grad():
        assert one_step_position_mse(model, path) == one_step_position_mse(again, path)
    assert all(p.requires_grad for p in model.parameters())


def test_what_a_recording_repeats_is_left_out():
    """Of frames that come twice, velocities are none and then twice what they are."""
    path = falling(frames=40)
    positions = torch.cat([path["positions"][:12].repeat_interleave(2, 0), path["positions"][12:]])
    twice = from_arrays(positions=positions.numpy(), dt=path.dt, history=4)
    kept = particles._from_motion(twice)
    moved = torch.cat([kept.initial.history.transpose(0, 1), kept["velocities"]])
    wanted = path["positions"].diff(dim=0)[11:] / path.dt
    assert torch.allclose(moved, wanted[-len(moved) :], atol=1e-4)
    assert len(moved) == len(wanted)
    assert particles._from_motion(path) is path


def test_twins_of_an_engine_part_as_far_as_they_were_put_off(monkeypatch):
    """In free flight what begins elsewhere stays elsewhere, by as much; what does not is the episode itself."""
    how = {"num_steps": 20, "num_cells": 8, "min_particles": 10, "max_particles": 30, "max_ramps": 1}
    paths = episodes_of("water_ramps", particles.RAMPS_SEED, 2, **how)
    monkeypatch.setattr(particles, "OFF", (0.0, 1e-4))
    same, same_all, off, off_all = particles.twin_rows("water_ramps", particles.RAMPS_SEED, paths, **how)
    assert (same.value, same_all.value) == (0, 0)
    free = torch.cat([path.initial.free for path in paths]).double().mean()
    assert off.value == pytest.approx(float(free) * (0.8 * 1e-4) ** 2, rel=0.5)
    assert (off.horizon, off_all.horizon, off.trajectories) == (20, "all", 2)
    assert off.value == off_all.value
    twin = particles._put_off(1e-4)(paths[0].initial, 0)
    held = ~paths[0].initial.free
    assert torch.equal(twin.positions[held], paths[0].initial.positions[held])
    assert particles._put_off(1e-4)(twin, 1) is twin


def test_rows_say_who_left_the_box(tmp_path):
    """A network that only ever drives particles to the right loses them all."""
    state = falling(d=2).initial
    box = torch.tensor([[[-1.0, -1.0], [2.0, 5.0]]])
    path = replace(falling(d=2), initial=state.replace(boundaries=box))
    statistics = {
        "velocity_mean": [0.0] * 2,
        "velocity_std": [1.0] * 2,
        "change_mean": [1.0, 0.0],
        "change_std": [1e-3] * 2,
    }
    torch.manual_seed(0)
    model = GNS(
        dt=path.dt,
        statistics=statistics,
        connectivity_radius=0.2,
        num_particle_types=1,
        latent_size=8,
        num_message_passing_steps=1,
    )
    save_checkpoint(model, tmp_path / "gns.safetensors")
    write_trajectories(tmp_path / "test.h5", [path], dataset="falling")
    rows = particles.water_drop_small(tmp_path / "test.h5", checkpoints=[tmp_path / "gns.safetensors"])
    found = {(row.model, row.metric, row.horizon): row.value for row in rows}
    assert found["simworld", "share_outside_the_box", "3 x the length"] == 1.0
    assert found["simworld", "largest_kinetic_energy_over_recorded", "3 x the length"] > 100
    assert ("constant_velocity", "rollout_position_mse", "all") in found


@pytest.mark.parametrize("table", [particles.fluid_fall, particles.lj3])
def test_tables_of_recorded_data_ask_for_it(table):
    with pytest.raises(ValueError, match="--data"):
        table()


def test_published_figures_name_their_source():
    text = (ROOT / "simworld/assets/published.toml").read_text()
    assert "DPI-Net" in tomllib.loads(text)["fluid-fall"][0]["source"]


def test_rows_of_several_kinds_of_models_say_which(tmp_path):
    made = GENERATORS["water_drop_small"].make([[0, 2, 0]], num_steps=20, num_cells=8, min_particles=5, max_particles=9)
    (path,) = made
    write_trajectories(tmp_path / "test.h5", [path], dataset="falling")
    arguments = {"dt": path.dt, "num_particle_types": 1, "num_velocities": 1}
    for number, kind in enumerate((GNS, NeuralMPM, GNS)):
        size = {"cell_size": 0.1} if kind is NeuralMPM else {"connectivity_radius": 0.1, "latent_size": 8}
        torch.manual_seed(number)
        save_checkpoint(kind(statistics=kind.measure([path]), **arguments, **size), tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    rows = particles.water_drop_small(tmp_path / "test.h5", checkpoints=files)
    last = {row.model: row for row in rows if row.metric == "share_outside_the_box"}
    first = {row.model: row for row in rows if row.metric == "one_step_position_mse"}
    assert list(last) == ["simworld: GNS", "simworld: NeuralMPM"]
    assert list(first) == ["simworld: GNS", "simworld: NeuralMPM", "static", "constant_velocity"]
    assert (first["simworld: GNS"].seeds, first["simworld: NeuralMPM"].seeds) == (2, None)
    alone = particles.water_drop_small(tmp_path / "test.h5", checkpoints=files[1:2])
    again = next(row for row in alone if row.model == "simworld" and row.metric == "one_step_position_mse")
    assert again.value == first["simworld: NeuralMPM"].value
