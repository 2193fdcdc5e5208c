"""Every shipped model of a generated world steps unseen episodes of its world far better than going on as it went."""

from __future__ import annotations

import pytest
import torch

from simworld import ConstantVelocity, Trajectory, evaluate, load_checkpoint, one_step_position_mse, rollout
from simworld.bench.meshes import SMALL_CYLINDER, SMALL_FLAG, SMALL_PLATE
from simworld.bench.particles import SMALL_VORTEX, SMALL_WATER
from simworld.data.generate import GENERATORS
from simworld.models.checkpoint import holds_encoder, shipped
from simworld.render.filmed import filmed
from simworld.render.filming import film, square_camera
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
    "water_drop_small_grid": ("water_drop_small", [1, 0, 0], {**SMALL_WATER, "num_steps": 100}, 2),
    "sand_ramps": ("sand_ramps", [1, 0, 0], {"num_steps": 100}, 2),
    "water_ramps": ("water_ramps", [1, 0, 0], {"num_steps": 100, "max_tilt": 30.0}, 2),
    "water_ramps_grid": ("water_ramps", [1, 0, 0], {"num_steps": 100, "max_tilt": 30.0}, 2),
    "in_billiards": ("video_billiards", [1, 0, 0], {}, 3),
    "in_springs": ("video_springs", [1, 0, 0], {}, 3),
    "tgv_2d_small": ("tgv_2d_small", [1, 0, 0], {**SMALL_VORTEX, "num_steps": 20}, 3),
}
# Of meshes: seed, arguments, the field whose relative error counts, after how many steps, and the share of static's.
MESHES = {
    "cylinder_flow_small": ([1, 0, 0], {**SMALL_CYLINDER, "num_steps": 20}, "velocities", 20, 0.15),
    "cylinder_flow_messages": ([1, 0, 0], {**SMALL_CYLINDER, "num_steps": 20}, "velocities", 20, 0.3),
    "deforming_plate_small": ([1, 0, 0], SMALL_PLATE, "positions", 40, 0.6),
    "flag_simple_small": ([1, 0, 0], {**SMALL_FLAG, "num_steps": 20}, "positions", 1, 0.5),
}
# Of films: world, number of objects, and for each kind the most that its distance after eight steps may be, as a
# share of static's. LSTM and MLP of six discs are hardly better than standing still at the true place.
FILMS = {
    ("billiards", 3): {"vin": 0.35, "alone": 0.45, "lstm": 0.7, "mlp": 0.7, "state": 0.25},
    ("billiards", 6): {"vin": 0.85, "alone": 0.92, "lstm": 1.05, "mlp": 1.08, "state": 0.62},
    ("springs", 3): {"vin": 0.6, "alone": 0.65, "lstm": 0.8, "mlp": 0.8, "state": 0.35},
    ("springs", 6): {"vin": 0.82, "alone": 0.93, "lstm": 1.05, "mlp": 1.08, "state": 0.45},
    ("gravity", 3): {"vin": 0.6, "alone": 0.7, "lstm": 0.95, "mlp": 0.85, "state": 0.2},
    ("drift", 3): {"vin": 0.4, "alone": 0.5, "lstm": 0.8, "mlp": 0.8, "state": 0.3},
}
FILMED = {f"vin_{world}_{size}_{kind}" for (world, size), kinds in FILMS.items() for kind in kinds}
SEEING = [name for name, path in shipped(".safetensors").items() if holds_encoder(path)]
# Models of slots are held to the same in tests/test_shipped_slots.py, encoders in tests/test_shipped_encoders.py.
OTHERS = ("rope", *SEEING)
SHIPPED = [name for name in shipped(".safetensors") if name not in OTHERS and not name.startswith("jepa_")]
NAMES = [name for name in SHIPPED if name.rpartition("_")[0] not in {*MESHES, *FILMED}]


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
    check_simulator(load_checkpoint(name).double(), _seen(path.frame(begin)), actions, tolerance=1e-5)


def _seen(state):
    """Return a state without what only an engine tells and no simulator moves: who acted on whom."""
    values = {name: state[name] for name in state if name != "influences"}
    return type(state)(batch=state.batch, active=state.active, **values)


@pytest.mark.parametrize("name", MESHES)
def test_rollouts_of_meshes_are_better_than_standing_still_and_keep_the_contract(name):
    seed, arguments, field, horizon, share = MESHES[name]
    model = load_checkpoint(f"{name}_0").double()
    world = model.provenance["dataset"]
    (path,) = GENERATORS[world].make([seed], **arguments)
    path = path.to(torch.float64)
    with torch.no_grad():
        rows = evaluate({"model": model}, [path], dataset=world, horizons=(horizon,))
    found = {row.model: row.value for row in rows if row.metric == f"{field}_relative_l2"}
    assert found["model"] < share * found["static"]
    check_simulator(model, path.frame(path.num_steps // 2), None, tolerance=1e-5)


@pytest.mark.parametrize(("world", "size"), FILMS)
def test_what_films_show_is_predicted_as_near_as_the_table_says(world, size):
    paths = GENERATORS[f"video_{world}"].make(
        [[11, 0, k] for k in range(12)], num_bodies=size, num_steps=14, fixed_colors=True
    )
    firsts = [path.window(0, 6) for path in paths]
    seen = Trajectory.cat([filmed(path, film(path, square_camera(32))) for path in firsts])
    wanted = Trajectory.cat(paths)["positions"][13]
    still = (seen["positions"][5] - wanted).norm(dim=1).mean()
    for kind, share in FILMS[world, size].items():
        model = load_checkpoint(f"vin_{world}_{size}_{kind}_0")
        with torch.no_grad():
            codes = rollout(model.encode(seen).frame(0), num_steps=8).frame(8)
            away = (model.decode(codes)[0] - wanted).norm(dim=1).mean()
        assert away < share * still, kind
        if (world, size) == ("billiards", 3):
            state = model.double().encode(seen).frame(0).to(torch.float64)
            check_simulator(model, state, tolerance=1e-9, order_matters=kind in ("lstm", "mlp"))


def test_every_world_ships_a_model_with_its_provenance():
    assert {name.rpartition("_")[0] for name in SHIPPED} == {*UNSEEN, *MESHES, *FILMED}
    for name in SHIPPED:
        assert load_checkpoint(name).provenance["dataset"]


@pytest.mark.parametrize("world", ["springs", "billiards", "gravity", "drift"])
def test_models_of_filmed_worlds_learned_in_the_units_in_which_these_are_made(world):
    (path,) = GENERATORS[f"video_{world}"].make([[1, 0, 0]], num_steps=2)
    made = {name: path.initial.fields[name].unit for name in path.initial}
    assert (made["positions"], made["velocities"], made["masses"]) == ("frame widths", "frame widths/s", "1")
    assert "m" not in made.values()
    learned = {}
    for name in shipped(".safetensors"):
        provenance = {} if holds_encoder(name) else load_checkpoint(name).provenance
        if provenance.get("dataset") == f"video_{world}" and "films" not in name:
            learned[name] = {key: made[key] for key in provenance["units"]} == provenance["units"]
    assert all(learned.values()), learned
    assert len(learned) >= 5


def test_the_law_of_gravity_was_found():
    model = load_checkpoint("solar_system_0")
    assert model.strength(1.0) / model.strength(10.0) == pytest.approx(1, abs=1e-3)
    jupiter, saturn = model.masses_found[6:8].tolist()
    assert jupiter == pytest.approx(1 / 1047.3486, rel=0.01)
    assert saturn == pytest.approx(1 / 3497.898, rel=0.01)
