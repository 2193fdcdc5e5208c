"""Every shipped model of a generated world steps unseen episodes of its world far better than going on as it went."""

from __future__ import annotations

import pytest
import torch

from simworld import ConstantVelocity, evaluate, load_checkpoint, one_step_position_mse
from simworld.bench.meshes import SMALL_CYLINDER, SMALL_FLAG, SMALL_PLATE
from simworld.bench.particles import SMALL_VORTEX, SMALL_WATER
from simworld.data.generate import GENERATORS
from simworld.models.checkpoint import holds_encoder, shipped
from simworld.testing import check_simulator

# World, seed of an episode that no model was trained on, its arguments, and how much better a step must be.
UNSEEN = {
    "springs_nri": ("springs_nri", [42, 0, 9000], {}, 1e8),
    "charged_nri": ("charged_nri", [42, 0, 9000], {}, 1e5),
    "nbody_egnn": ("nbody_egnn", [43, 0, 9000], {"first_frame": 20, "every": 10, "num_frames": 2}, 30),
    "nbody_egnn_whole": ("nbody_egnn", [43, 0, 9000], {}, 1e5),
    "nbody_in": ("nbody_in", [1, 0, 0], {"num_steps": 200}, 300),
    "balls_in": ("balls_in", [1, 0, 0], {"num_steps": 150}, 30),
    "balls_varied": ("balls_in", [1, 0, 0], {"num_steps": 150}, 100),
    "string_in": ("string_in", [1, 0, 0], {"num_steps": 150}, 30),
    "cradle": ("cradle", [1, 0, 0], {"num_steps": 500}, 1e4),
    "push_3d": ("push_3d", [1, 0, 0], {"num_steps": 60}, 3),
    "solar_system": ("solar_system", [0, 2, 3], {"num_steps": 60}, 1e6),
    "water_drop_small": ("water_drop_small", [1, 0, 0], {**SMALL_WATER, "num_steps": 100}, 2),
    "sand_ramps": ("sand_ramps", [1, 0, 0], {"num_steps": 100}, 2),
    "water_ramps": ("water_ramps", [1, 0, 0], {"num_steps": 100, "max_tilt": 30.0}, 2),
    "tgv_2d_small": ("tgv_2d_small", [1, 0, 0], {**SMALL_VORTEX, "num_steps": 20}, 3),
}
# Of meshes: seed, arguments, the field whose relative error counts, after how many steps, and the share of static's.
MESHES = {
    "cylinder_flow_small": ([1, 0, 0], {**SMALL_CYLINDER, "num_steps": 20}, "velocities", 20, 0.3),
    "deforming_plate_small": ([1, 0, 0], SMALL_PLATE, "positions", 40, 0.6),
    "flag_simple_small": ([1, 0, 0], {**SMALL_FLAG, "num_steps": 20}, "positions", 1, 0.5),
}
SEEING = [name for name, path in shipped(".safetensors").items() if holds_encoder(path)]
SHIPPED = [name for name in shipped(".safetensors") if name not in ("rope", *SEEING)]
NAMES = [name for name in SHIPPED if name.rpartition("_")[0] not in MESHES]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_far_better_than_going_on(name):
    world, seed, arguments, factor = UNSEEN[name.rpartition("_")[0]]
    (path,) = GENERATORS[world].make([seed], **arguments)
    path, model = path.to(torch.float64), load_checkpoint(name).double()
    with torch.no_grad():
        ours, naive = (one_step_position_mse(m, path) for m in (model, ConstantVelocity(dt=path.dt)))
    assert ours < naive / factor


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_0")])
def test_shipped_models_keep_the_contract(name):
    world, seed, arguments, _ = UNSEEN[name.rpartition("_")[0]]
    (path,) = GENERATORS[world].make([seed], **{**arguments, "num_frames": 8} if "nri" in name else arguments)
    path = path.to(torch.float64)
    begin = path.num_steps // 3  # where things move
    actions = None if path.actions is None else path.actions[begin:]
    check_simulator(load_checkpoint(name).double(), path.frame(begin), actions, tolerance=1e-5)


@pytest.mark.parametrize("world", MESHES)
def test_rollouts_of_meshes_are_better_than_standing_still_and_keep_the_contract(world):
    seed, arguments, field, horizon, share = MESHES[world]
    (path,) = GENERATORS[world].make([seed], **arguments)
    path, model = path.to(torch.float64), load_checkpoint(f"{world}_0").double()
    with torch.no_grad():
        rows = evaluate({"model": model}, [path], dataset=world, horizons=(horizon,))
    found = {row.model: row.value for row in rows if row.metric == f"{field}_relative_l2"}
    assert found["model"] < share * found["static"]
    check_simulator(model, path.frame(path.num_steps // 2), None, tolerance=1e-5)


def test_every_world_ships_a_model_with_its_provenance():
    assert {name.rpartition("_")[0] for name in SHIPPED} == {*UNSEEN, *MESHES}
    for name in SHIPPED:
        assert load_checkpoint(name).provenance["dataset"]


def test_the_law_of_gravity_was_found():
    model = load_checkpoint("solar_system_0")
    assert model.strength(1.0) / model.strength(10.0) == pytest.approx(1, abs=1e-3)
    jupiter, saturn = model.masses_found[6:8].tolist()
    assert jupiter == pytest.approx(1 / 1047.3486, rel=0.01)
    assert saturn == pytest.approx(1 / 3497.898, rel=0.01)
