from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simworld import load_scene, rollout

SCENES = sorted((Path(__file__).parents[1] / "scenes").glob("*.toml"))


@pytest.mark.parametrize("path", SCENES, ids=lambda p: p.stem)
def test_every_scene_rolls_forward(path):
    state = load_scene(path)
    with torch.no_grad():
        path = rollout(state, torch.ones(20, len(state), 2))
    assert torch.isfinite(path["positions"]).all()
    free = ~state.fixed
    assert (path["positions"][-1, free] - path["positions"][0, free]).abs().max() > 1
    assert torch.equal(path["positions"][-1, ~free], path["positions"][0, ~free])


def test_the_learned_rope_falls_as_the_engine_says():
    """A scene unlike the training data, ten balls instead of fifteen, against the engine."""
    from simworld import ConstantVelocity, position_mse
    from simworld.physics import PlanarEngine

    state = load_scene(SCENES[0])
    actions = torch.tensor([0.0, 8.0]).expand(40, len(state), 2) * (~state.fixed)[:, None]
    with torch.no_grad():
        learned = rollout(state, actions)
    truth = rollout(state.to(torch.float64), actions.double(), simulator=PlanarEngine(dt=1 / 50))
    naive = rollout(state, actions, simulator=ConstantVelocity(dt=1 / 50))
    assert position_mse(learned, truth)[1:].mean() < position_mse(naive, truth)[1:].mean() / 100


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("masses = 1.0", "mases = 1.0", r"\[fields\] has an unknown key 'mases'; the known ones are positions"),
        ("masses = 1.0", "masses = [1.0]", r"rope.toml: masses must have shape \[12\]"),
        (
            '"ObjectState"',
            '"Objects"',
            "state must be one of ObjectState, ParticleState, MeshState, SplatState, SlotState; got 'Objects'",
        ),
        ("checkpoint", "model", "unknown key 'model'"),
        ("[units]", "[units", "not valid TOML"),
        ('positions = "px"', "positions = 3", r"\[units\]: positions must be a string; got 3"),
        ('checkpoint = "rope"', "checkpoint = 3", "checkpoint must be a string; got 3"),
    ],
)
def test_scenes_that_say_something_else(tmp_path, old, new, says):
    path = tmp_path / "rope.toml"
    path.write_text(SCENES[0].read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=says):
        load_scene(path)


def test_units_that_are_no_table(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text('state = "ObjectState"\nunits = 3\n[fields]\npositions = [[0.0, 0.0]]\nvelocities = [[0.0, 0.0]]\n')
    with pytest.raises(ValueError, match=r"\[units\] must be a table of keys; got 3"):
        load_scene(path)
