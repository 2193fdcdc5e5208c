"""Every shipped model of slots steps unseen episodes of its world better than naive simulators of slots."""

from __future__ import annotations

import pytest
import torch

from simworld import Static, Trajectory, load_checkpoint
from simworld.bench.slots import SlotsAsBefore, encoder_of
from simworld.data.generate import GENERATORS
from simworld.models import CausalJEPA
from simworld.models.checkpoint import shipped
from simworld.render.filming import film, square_camera
from simworld.testing import check_simulator

ALL = [name for name in shipped(".safetensors") if name.startswith("jepa_")]
NAMES, FILMED = ([name for name in ALL if ("_films_" in name) is filmed] for filmed in (False, True))
UNSEEN = [[1, 0, number] for number in range(4)]


@pytest.fixture(scope="module")
def episodes():
    return {world: GENERATORS[world].make(UNSEEN) for world in {world_of(name) for name in NAMES}}


def world_of(name):
    """Return the data that a shipped model says by its name that it was trained on."""
    return "push_t" if name.startswith("jepa_push_t_") else f"video_{name.split('_')[1]}"


def squared_error(simulator, path):
    """Return the squared error of slots over single steps from all frames."""
    action = None if path.actions is None else path.actions[:, 0]
    with torch.no_grad():
        after = simulator.step(path.window(0, len(path) - 1).as_scenes(), action)
    return float((after.slots - path["slots"][1:].flatten(0, 1)).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_better_than_naive_ones(name, episodes):
    """Those that never had objects masked beat slots that go on as they went; others slots that stay."""
    model = load_checkpoint(name).double()
    assert isinstance(model, CausalJEPA)
    assert model.provenance["dataset"] == world_of(name)
    encoded = [encoder_of(model).encode(path) for path in episodes[world_of(name)]]
    ours, static, before = (
        sum(squared_error(one, path) for path in encoded)
        for one in (model, Static(dt=model.dt), SlotsAsBefore(dt=model.dt))
    )
    if "_code_slots_" not in name:  # which reads slots out whole and, so shortly trained, is not
        assert ours < static / 3
    if "_m0_" in name or "_alone_" in name:
        assert ours < before


@pytest.fixture(scope="module")
def filmed(episodes):
    worlds = {world_of(name) for name in FILMED}
    paths = {world: [path.window(0, 25) for path in episodes[world][:2]] for world in worlds}
    return {world: [film(path, square_camera(64)) for path in some] for world, some in paths.items()}


@pytest.mark.parametrize("name", FILMED)
def test_a_step_of_slots_of_films_is_better_than_naive_ones(name, filmed):
    model = load_checkpoint(name)
    views, encoder = filmed[world_of(name)], encoder_of(model)
    encoded = [encoder.encode(view.rgb, history=model.history_length - 1) for view in views]
    ours, static, before = (
        sum(squared_error(one, path) for path in encoded)
        for one in (model, Static(dt=model.dt), SlotsAsBefore(dt=model.dt))
    )
    assert ours < static
    assert ours < before
    check_simulator(model, encoded[0].frame(5), tolerance=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_0")])
def test_shipped_models_keep_the_contract(name, episodes):
    model = load_checkpoint(name).double()
    path: Trajectory = encoder_of(model).encode(episodes[world_of(name)][0])
    action = None if path.actions is None else path.actions[len(path) // 2 :]
    check_simulator(model, path.frame(len(path) // 2), action, tolerance=1e-5)
