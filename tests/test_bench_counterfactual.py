"""The benchmark of counterfactuals: what the truth, a copy and deliberately wrong simulators must score."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from simworld import load_checkpoint
from simworld.bench.causal_exam import answer, asker, set_exam, told, told_truth, told_what_was
from simworld.bench.causal_worlds import WORLDS, answers
from simworld.bench.counterfactual import report, reports
from simworld.bench.other_meshes import seen_at
from simworld.cli import main
from simworld.kinds import OBSTACLE
from simworld.metrics import Static
from simworld.models import LearnedSimulator
from simworld.physics.force_worlds import SPRING_ENGINE
from simworld.simulate import Simulator

DOSES = {
    "mass": (1.0001, 0.25, 0.5, 8.0),
    "stiffness": (4.0,),
    "scale impulses": (0.25, 2.0, 3.0),
    "remove cylinders": (1.0, 2.0),
}
SHARED = {"num_steps": 8, "sizes": {}}
FLOW, MOVED = WORLDS["flow"], "move the cylinder"


@pytest.fixture(scope="module", autouse=True)
def small_worlds():
    """The springs and ropes of the benchmark, of fewer steps and doses, in place of all its worlds."""
    worlds = {}
    for name in ("springs", "rope"):
        kinds = [replace(kind, doses=DOSES.get(kind.name, kind.doses[:1])) for kind in WORLDS[name].kinds]
        worlds[name] = replace(WORLDS[name], **SHARED, kinds=tuple(kinds))
    coarse = replace(SPRING_ENGINE, num_sub_steps=10)
    sizes = {"3 bodies": {"num_bodies": 3}}
    worlds["springs"] = replace(worlds["springs"], engine=coarse, episode={"num_frames": 9}, sizes=sizes)
    with pytest.MonkeyPatch.context() as patched:
        for module in ("causal_worlds", "counterfactual"):
            patched.setattr(importlib.import_module(f"simworld.bench.{module}"), "WORLDS", worlds)
        yield worlds


@dataclass(frozen=True)
class Changed:
    """An engine with a fault: `fault` is "deaf" to masses, or "breaks" down where a body is heavy."""

    engine: Simulator
    fault: str

    @property
    def dt(self):
        return self.engine.dt

    def step(self, state, action=None):
        if self.fault == "deaf":
            made = self.engine.step(state.replace(masses=torch.ones_like(state.masses)), action)
            return made.replace(masses=state.masses)
        made = self.engine.step(state, action)
        heavy = (state.masses > 3)[:, None]
        return made.replace(positions=torch.where(heavy, torch.nan, made.positions))


class Leaking(LearnedSimulator):
    """Adds to everybody's place what it finds of the first body's mass: nobody's neighbour tells it that."""

    def __init__(self, dt):
        super().__init__(dt, {"num_message_passing_steps": 1})
        self.weight = torch.nn.Parameter(torch.tensor(1e-3, dtype=torch.float64))

    @staticmethod
    def measure(trajectories, *, noise_std=0.0, actions="none"):
        return {}

    def check(self, state, action):
        pass

    def forward(self, state, action=None):
        first = torch.searchsorted(state.batch, state.batch)
        return self.weight * state.masses[first][:, None].expand_as(state.positions)

    def integrate(self, state, change, action=None):
        return state.replace(positions=state.positions + change)

    def free(self, state):
        return state.free

    def target(self, state, next_state, action=None):
        return next_state.positions - state.positions


@pytest.fixture(scope="module")
def springs(small_worlds):
    return set_exam("springs", count=2)


@pytest.fixture(scope="module")
def found(springs):
    engine = springs.world.engine
    models = {"engine": engine, "deaf": Changed(engine, "deaf"), "breaks": Changed(engine, "breaks")}
    return report(springs, models, count=2)


def values(found, model, metric):
    return values_of(found, model, metric, SHARED["num_steps"])


def values_of(found, model, metric, num_steps=3):
    rows = [row for row in found.rows if (row.model, row.metric) == (model, metric)]
    return {row.dataset.removeprefix(found.world): row.value for row in rows if row.horizon == num_steps}


def num_cases(found, model):
    rows = [row for row in found.rows if (row.model, row.dataset, row.metric) == (model, found.world, "cf_gain")]
    return rows[0].trajectories


def test_the_truth_gains_1_and_a_copy_0_in_every_group(found):
    groups = {"", ": mass", ": remove", ": stiffness", ", doses not seen", ", small effects", ", large effects"}
    for model, gain in (("engine, true parameters", 1.0), ("copy of the factual", 0.0)):
        for metric in ("cf_gain", "cf_gain_median"):
            assert values(found, model, metric) == dict.fromkeys(groups, gain)
    wrong = values(found, "engine, wrong parameters", "cf_gain")
    assert set(wrong) == groups
    assert max(wrong.values()) < 0.99


def test_the_engine_passes_for_a_model_that_makes_no_mistake(found):
    gains = values(found, "engine", "cf_gain")
    assert gains == pytest.approx(dict.fromkeys(gains, 1.0), abs=1e-9)
    assert ", 3 bodies" in gains
    assert values(found, "engine", "placebo") == {"": 0.0}
    assert values(found, "engine", "composition") == {"": 0.0}
    assert values(found, "engine", "effect_error_relative")[""] < 1e-9
    assert values(found, "engine", "direction_cosine")[""] == pytest.approx(1.0)
    assert values(found, "engine", "dose_slope")[": mass"] == pytest.approx(1.0)
    assert values(found, "engine", "affected_auroc")[": mass"] == 1.0


def test_who_ignores_an_intervention_scores_like_what_was(found):
    gains = values(found, "deaf", "cf_gain")
    assert gains[": mass"] == pytest.approx(0.0, abs=1e-9)
    assert gains[": remove"] == pytest.approx(1.0, abs=1e-9)
    assert values(found, "deaf", "effect_error_relative")[": mass"] == pytest.approx(1.0)
    assert values(found, "deaf", "direction_cosine")[": mass"] == 0.0


def test_what_breaks_down_is_infinitely_far_and_stops_nothing(found):
    gains, medians = values(found, "breaks", "cf_gain"), values(found, "breaks", "cf_gain_median")
    assert gains[": mass"] == -math.inf
    assert gains[""] == -math.inf
    assert medians[": mass"] == pytest.approx(1.0)
    assert gains[": remove"] == pytest.approx(1.0)
    assert values(found, "breaks", "cf_rmse")[": mass"] == math.inf
    assert num_cases(found, "breaks") == num_cases(found, "engine")


def test_intervals_hold_the_mean(found):
    gains = [row for row in found.rows if row.metric == "cf_gain" and math.isfinite(row.value)]
    assert gains
    assert all(row.low - 1e-12 <= row.value <= row.high + 1e-12 for row in gains)
    assert any(row.low < row.high for row in gains)


def test_small_and_fickle_cases_are_dropped_and_counted(springs, found):
    total = sum(len(one.episodes) for one in springs.asked)
    small = sum(len(one.episodes) for one in springs.asked if one.dose == 1.0001)
    assert small == 2
    assert values(found, "truth", "too_small_share")[""] >= small / total
    assert values(found, "truth", "sieved_share") == {"": 0.0}
    assert ": mass" in values(found, "copy of the factual", "cf_gain")
    fickle = [replace(one, flipped=[one.kind.name == "remove"] * len(one.episodes)) for one in springs.asked]
    sieved = report(replace(springs, asked=fickle), {})
    assert ": remove" not in values(sieved, "copy of the factual", "cf_gain")
    kept, all_kept = (num_cases(one, "copy of the factual") for one in (sieved, found))
    assert 0 < kept < all_kept < total
    assert values(sieved, "truth", "sieved_share")[""] == pytest.approx((all_kept - kept) / all_kept)


def test_answers_do_not_hang_on_how_many_are_told_at_once(springs):
    asked = [(), *(one.edits for one in springs.asked[1:4])]
    model = load_checkpoint(springs.world.checkpoints()[0]).double()
    for simulator in (springs.world.engine, model):
        told = [answers(simulator, springs.episodes, asked, num_steps=8, max_scenes=size) for size in (3, 256)]
        for one, other in zip(*([path for paths in some for path in paths] for some in told), strict=True):
            torch.testing.assert_close(one["positions"], other["positions"], rtol=0, atol=1e-9)
            assert torch.equal(one.active, other.active)


@pytest.mark.parametrize("size", [1, 3])
def test_one_that_breaks_down_does_not_take_others_along(springs, size):
    asked = [(), *(one.edits for one in springs.asked if one.kind.name == "mass")]
    breaking = Changed(springs.world.engine, "breaks")
    told = answers(breaking, springs.episodes, asked, num_steps=8, max_scenes=size)
    whole = [[bool(path["positions"].isfinite().all()) for path in paths] for paths in told]
    assert whole == [[True, True]] * 4 + [[False, False]]


def test_leaks(springs):
    shipped = load_checkpoint(springs.world.checkpoints()[0])
    assert leaks(springs, shipped) == 0.0
    edges = replace(springs.world, edges=lambda state, simulator: state.springs.T)
    assert leaks(replace(springs, world=edges), Leaking(springs.dt)) > 0.0


def leaks(exam, model):
    with torch.no_grad():
        found = [one.leak for one in answer(exam, told(exam, asker(exam, model)), model)]
    known = [leak for leak in found if not math.isnan(leak)]
    assert known
    return max(known)


def test_of_models_without_rounds_of_messages_no_leaks_are_told(springs):
    model = Leaking(springs.dt)
    model.arguments.pop("num_message_passing_steps", None)
    with torch.no_grad():
        found = answer(springs, told(springs, asker(springs, model)), model)
    assert found
    assert all(math.isnan(one.leak) for one in found)


def test_a_broken_model_has_no_leaks_to_tell_of(springs):
    model = Leaking(springs.dt)
    model.weight.data.fill_(torch.inf)
    told = report(replace(springs, world=replace(springs.world, sizes={})), {"broken": model})
    assert values(told, "broken", "leakage") == {}
    assert values(told, "broken", "cf_gain")[""] == -math.inf
    assert values(told, "broken", "placebo")[""] == math.inf


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line and return its exit code and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["simworld", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capfd.readouterr()
        return end.value.code or 0, out, " ".join(error.split())

    return run


def test_the_command_on_ropes(call, tmp_path):
    where = tmp_path / "found.json"
    code, _, said = call(
        "counterfactual", "--world", "rope", "--count", 2, "--plots", tmp_path / "plots", "--json", where
    )
    assert code == 0, said
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"rope_gain.png", "rope_dose.png"}
    rows = json.loads(where.read_text())["rows"]
    found = {(row["model"], row["dataset"], row["metric"]): row for row in rows}
    assert found["simworld", "rope", "leakage"]["value"] == 0.0
    assert found["simworld", "rope", "placebo"]["value"] == 0.0
    assert found["simworld", "rope", "event_f1"]["value"] > 0.5
    for group in (
        ": remove cylinders",
        ": scale impulses",
        ": pin the end",
        ", doses seen in training",
        ", doses not seen",
    ):
        row = found["simworld", f"rope{group}", "cf_gain"]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["value"] > 0.5
        assert found["engine, true parameters", f"rope{group}", "cf_gain"]["value"] == 1.0
    strata = {row["dataset"] for row in rows if row["metric"] == "cf_gain"}
    assert {"rope, with contacts", "rope, without contacts", "rope, small effects", "rope, large effects"} <= strata


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("counterfactual", "--world", "moon"), "There is no world 'moon' to ask about; the known ones are springs"),
        (("counterfactual", "--world", "rope", "--data", __file__), "leave --data out"),
        (
            ("rope", "--world", "rope"),
            "--world, --count and --plots are of the benchmarks counterfactual, slots, vin, not of rope",
        ),
        (("counterfactual", "--world", "rope", "--count", "1"), "--count"),
        (("counterfactual", "--world", "rope", "--checkpoint", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_sentence(call, words, says):
    code, _, said = call(*words)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_there_is_something_to_ask_about():
    with pytest.raises(ValueError, match="count must be 1 or more"):
        set_exam("springs", count=0)


def test_checkpoints_of_other_worlds_are_refused():
    with pytest.raises(ValueError, match=r"about springs_nri; checkpoint .* was trained on charged_nri"):
        reports(["springs"], checkpoints=["charged_nri_0"], count=1)


@pytest.fixture(scope="module")
def flows():
    """An exam of two small flows: what if the inflow were faster, or the cylinder elsewhere."""
    pytest.importorskip("skfem")
    pytest.importorskip("gmsh")
    small = {"num_steps": 3, "size": 0.12, "obstacle_size": 0.04, "warm_up": 0.4, "length": 1.0}
    kinds = [replace(kind, doses=kind.doses[1:]) for kind in FLOW.kinds if kind.name in ("inflow speed", MOVED)]
    world = replace(FLOW, episode=small, num_steps=3, kinds=tuple(kinds))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("simworld.bench.causal_worlds"), "WORLDS", {"flow": world})
        yield set_exam("flow", count=2)


def test_worlds_on_other_meshes_are_asked_about_beside_those_on_their_own(flows):
    (moved,) = [asked for asked in flows.asked if asked.kind.name == MOVED]
    for path, was in zip(moved.truth, flows.factual, strict=True):
        places = [one.initial.rest_positions[one.initial.node_types == OBSTACLE] for one in (path, was)]
        ways = [rows.amax(0) + rows.amin(0) for rows in places]
        assert ((ways[0] - ways[1]) / 2).tolist() == pytest.approx([0.0, 0.03], abs=5e-3)
    groups = {f": {kind.name}" for kind in flows.world.kinds} | {""}
    found = report(flows, {"static": Static(dt=flows.dt)})
    for model, wanted in (("engine, true parameters", 1.0), ("copy of the factual", 0.0)):
        gains = values_of(found, model, "cf_gain")
        assert {group: gains[group] for group in groups} == dict.fromkeys(groups, wanted)
    gains = values_of(found, "static", "cf_gain")
    # Who stands still begins from the true flow round the cylinder where it now is.
    assert gains[f": {MOVED}"] > 0.5 > gains[": inflow speed"]
    for one in answer(flows, told_what_was(flows)):
        assert torch.equal(one.case.predicted, one.case.factual)
        assert one.case.predicted.shape == one.case.counterfactual.shape
    assert all(float(one.case.predicted_effect.norm()) > 0 for one in answer(flows, told_truth(flows)))
    seen = {one.episode: one.seen for one in answer(flows, told_truth(flows)) if one.kind == MOVED}
    for number, path in zip(moved.episodes, moved.truth, strict=True):
        hole = path.initial.rest_positions[path.initial.node_types == OBSTACLE]
        assert seen[number] == (abs(float(hole[:, 1].amax() + hole[:, 1].amin()) / 2 - 0.205) < 0.041)


def test_what_was_is_seen_from_the_nodes_of_another_mesh(flows):
    path, (moved,) = flows.factual[0], [asked for asked in flows.asked if asked.kind.name == MOVED]
    other = moved.truth[0].initial
    assert seen_at(path, path.initial, "velocities") is path["velocities"]
    slope = torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    linear = replace(path, frames={"velocities": (path.initial.rest_positions @ slope).expand(4, -1, -1)})
    seen, wanted = seen_at(linear, other, "velocities"), other.rest_positions @ slope
    hole = path.initial.rest_positions[path.initial.node_types == OBSTACLE]
    middle, radius = (hole.amax(0) + hole.amin(0)) / 2, (hole.amax(0) - hole.amin(0)).max() / 2
    away = (other.rest_positions - middle).norm(dim=1)
    outside, inside = away > 1.001 * radius, away < 0.8 * radius
    assert int(inside.sum()) > 0
    assert torch.allclose(seen[:, outside], wanted[outside].expand(4, -1, -1), atol=1e-9)
    assert (seen[:, inside] == 0).all()
