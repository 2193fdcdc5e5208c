"""The first episodes of the small mesh recipes are those of their data cards."""

from __future__ import annotations

import importlib
import json
from inspect import signature
from pathlib import Path

import pytest
import torch

from simworld import MeshState, Trajectory
from simworld.bench.meshes import SEEDS, SMALL_CYLINDER, SMALL_FLAG, SMALL_PLATE
from simworld.data.generate import GENERATORS, Generator, read_recipe

DATASETS = Path(__file__).parents[1] / "datasets"
# World, what its benchmark generates, what makes a shorter episode, and the package it needs.
WORLDS = {
    "cylinder_flow_small": (SMALL_CYLINDER, {"num_steps": 2, "warm_up": 0.1}, "gmsh"),
    "deforming_plate_small": (SMALL_PLATE, {"num_steps": 2}, "scipy"),
    "flag_simple_small": (SMALL_FLAG, {"num_steps": 2, "warm_up": 0.1}, "newton"),
}


def test_episodes_begin_with_their_initial_states():
    def episode(seed):
        frames = torch.arange(3.0)[:, None] + torch.zeros(3, 2)
        start = MeshState(rest_positions=torch.eye(2), cells=torch.tensor([[0, 1]]), temperatures=frames[seed[0]])
        there = torch.ones(3, 2, dtype=torch.bool)
        return Trajectory(initial=start, frames={"temperatures": frames}, active=there, dt=1.0)

    assert len(Generator(episode=episode).make([[0]])) == 1
    with pytest.raises(ValueError, match="first frame must be its initial state; temperatures differ"):
        Generator(episode=episode).make([[2]])


@pytest.mark.parametrize("name", WORLDS)
def test_the_first_episode_of_the_recipe_is_the_golden_one(name):
    arguments, shorter, package = WORLDS[name]
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:
        pytest.skip(f"{package} does not load: {error}")
    plan = read_recipe(DATASETS / name / "recipe.toml")
    assert plan.seed == SEEDS[name]
    assert plan.episode == {"dt": signature(GENERATORS[name].episode).parameters["dt"].default, **arguments}
    (path,) = GENERATORS[plan.dataset].make([[plan.seed, 0, 0]], **{**plan.episode, **shorter})
    assert path.dt == plan.episode["dt"]
    found = {"num_nodes": [len(path.initial)], "num_cells": [len(path.initial.cells)]}
    found |= {field: path[field][:, :: len(path.initial) // 3].tolist() for field in sorted(path.frames)}
    golden = DATASETS / name / "first_episode.json"
    if not golden.is_file():
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{golden} was missing and is written; look at it and commit it")
    for key, wanted in json.loads(golden.read_text()).items():
        given, known = torch.tensor(found[key]).double(), torch.tensor(wanted).double()
        assert given.shape == known.shape, key
        assert torch.allclose(given, known, rtol=1e-4, atol=1e-4 * float(known.abs().max())), key
