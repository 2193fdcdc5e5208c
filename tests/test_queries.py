"""Queries by file: each shipped one, every kind of question, and what a wrong file is told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import simworld
from simworld.cli import main
from simworld.query import explore, read_query

FOLDER = Path(__file__).parents[1] / "scenes/queries"
NEEDS = {
    "balls_heavier": ("pymunk",),
    "balls_one_gone": ("pymunk",),
    "box_pushed_harder": ("mujoco",),
    "flow_faster": ("skfem", "gmsh"),
    "jupiter_inferred": ("jplephem",),
    "jupiter_twice_as_heavy": ("jplephem",),
    "moon_gone": ("jplephem",),
    "plate_left_alone": ("skfem", "gmsh"),
    "ramp_gone": ("warp",),
    "rope_cylinder_gone": ("pymunk",),
    "rope_smallest_push": ("pymunk",),
}
SLOW_TRUTH = ("flow_faster", "plate_left_alone", "ramp_gone", "box_pushed_harder", "rope_smallest_push")

BALLS = """
simulator = {engine = "springs"}
horizon = 6
data = "springs.h5"
[names]
A = 0
B = [1]
near = "positions.x < 2"
[[interventions]]
at = 2
entities = "A"
scale = {velocities = 3.0}
"""


def asked(name, **changes):
    """Return what is explored of a shipped query, shortened."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"{package} is not here; it comes with simworld[all]")
    query = read_query(FOLDER / f"{name}.toml")
    dropped = {"truth": False} if name in SLOW_TRUTH else {}
    return explore(replace(query, said={**query.said, **dropped, **changes}))


def found(exploration, kind, number=0):
    return [answer for answer in exploration.answers if answer.kind == kind][number]


@pytest.fixture(scope="module")
def springs(tmp_path_factory):
    """Return a folder with four bodies: 0 and 1 on a spring, 2 and 3 far away on another, recorded by the engine."""
    folder = tmp_path_factory.mktemp("queries")
    state = simworld.ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [6.0, 0.0]], dtype=torch.float64),
        velocities=torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.3, 0.0], [0.0, 0.0]], dtype=torch.float64),
        masses=torch.ones(4, dtype=torch.float64),
        springs=torch.tensor([[0, 1], [2, 3]]),
        spring_stiffnesses=torch.ones(2, dtype=torch.float64),
    )
    from simworld.tellers import springs_engine

    path = simworld.rollout(state, torch.zeros(8, 4, 2, dtype=torch.float64), simulator=springs_engine())
    simworld.write_trajectories(folder / "springs.h5", [path], dataset="own")
    return folder


@pytest.fixture
def ask(springs):
    """Ask questions of the four bodies."""

    def run(questions, head=BALLS):
        (springs / "query.toml").write_text(head + questions)
        return explore(read_query(springs / "query.toml"))

    return run


def test_there_are_ten():
    assert len(list(FOLDER.glob("*.toml"))) >= 10
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*NEEDS, "charge_flipped"}


def test_a_cylinder_out_of_reach_does_not_matter_and_one_in_the_way_does():
    near = asked("rope_cylinder_gone", horizon=5, truth=False)
    assert found(near, "effect").answer.values["size"] == 0
    assert found(near, "affected").answer.values["entities"] == []
    far = asked("rope_cylinder_gone")
    effect, true = found(far, "effect").answer.values, found(far, "effect").truth.values
    assert effect["size"] == pytest.approx(true["size"], rel=0.1)
    assert found(far, "effect").naive.values["size"] == 0
    state = simworld.load_scene(FOLDER.parent / "rope.toml")
    actions = torch.zeros(60, 12, 2)
    actions[:, 9] = torch.tensor([-14.0, -10.0])
    with torch.no_grad():
        gone = simworld.rollout(state, actions, interventions=[simworld.remove([10])])
    assert torch.equal(far.worlds["counterfactual"]["positions"], gone["positions"])


def test_the_smallest_push():
    said = asked("rope_smallest_push", horizon=25)
    dose = found(said, "dose").answer.values
    assert 1.5 < dose["unchanged_at"] < dose["dose"] < 2.5
    assert found(said, "dose").naive.values["dose"] is None
    ranking = found(said, "causes").answer.values["ranking"]
    assert ranking[-1] == {"cause": "first_cylinder", "entities": [15], "effect": pytest.approx(0, abs=1e-3)}


def test_balls_collide_earlier_without_the_third():
    event = found(asked("balls_one_gone"), "event")
    assert event.answer.values["counterfactual"] < event.answer.values["factual"]
    assert event.truth.values["counterfactual"] < event.truth.values["factual"]
    assert event.naive.values["counterfactual"] == event.naive.values["factual"]


def test_a_heavy_ball_keeps_others_apart():
    said = asked("balls_heavier")
    event = found(said, "event")
    assert event.answer.values["counterfactual"] is event.truth.values["counterfactual"] is None
    assert found(said, "dose").answer.values["dose"] == pytest.approx(found(said, "dose").truth.values["dose"], abs=0.1)


def test_jupiter_by_a_learned_model_and_by_newton():
    said = asked("jupiter_twice_as_heavy", horizon="20 d")
    mars = found(said, "effect")
    assert mars.answer.values["size"] == pytest.approx(mars.truth.values["size"], rel=0.01)
    start = said.worlds["factual"].initial.masses, said.worlds["counterfactual"].initial.masses
    assert (start[1] / start[0]).tolist() == [2.0 if k == 6 else 1.0 for k in range(11)]
    plain = simworld.rollout(
        read_start(said), simulator=simworld.load_checkpoint("solar_system_0").double(), num_steps=20
    )
    assert torch.allclose(said.worlds["factual"]["positions"], plain["positions"].detach(), rtol=0, atol=1e-12)


def test_masses_are_inferred_before_jupiter_is_twice_as_heavy():
    infer = read_query(FOLDER / "jupiter_inferred.toml").said["infer"]
    said = asked("jupiter_inferred", horizon=20, infer={**infer, "num_windows": 2})
    masses = found(said, "inferred")
    assert masses.answer.values["entities"] == list(range(1, 11))
    assert masses.answer.values["values"][5:9] == pytest.approx(masses.truth.values["values"][5:9], rel=0.01)
    assert masses.answer.values["values"] == said.worlds["factual"].initial.masses[1:].tolist()
    stds, values = (torch.tensor(masses.answer.values[name])[5:9] for name in ("stds", "values"))
    assert bool(((stds > 0) & (stds < 0.01 * values)).all())
    assert masses.naive.values["values"] == [1e-6] * 10
    assert "jupiter: 0.0009548 ±" in masses.answer.text
    mars = found(said, "effect")
    assert mars.answer.values["size"] == pytest.approx(mars.truth.values["size"], rel=0.01)


def read_start(said):
    """Return the first state without the masses that the query gave it."""
    state = said.worlds["factual"].initial
    return type(state)(**{name: state[name] for name in state if name != "masses"})


def test_the_moon_matters_most_to_the_earth():
    said = asked("moon_gone", horizon=20)
    assert found(said, "causes").answer.values["ranking"][0]["cause"] == "moon"
    assert found(said, "effect").answer.values["size"] > 100 * found(said, "effect", 1).answer.values["size"] > 0


def test_a_flipped_charge():
    said = asked("charge_flipped", horizon=4)
    effect = found(said, "effect")
    assert effect.answer.values["size"] == pytest.approx(effect.truth.values["size"], rel=0.05)
    assert {one["cause"] for one in found(said, "causes").answer.values["ranking"]} == {"1", "2", "3", "4"}


def test_sand_in_the_air_does_not_know_of_the_ramp():
    said = asked("ramp_gone", horizon=10)
    assert found(said, "effect").answer.values["size"] == 0
    assert len(found(said, "effect").answer.values["entities"]) > 200


def test_a_push_acts_on_who_is_pushed():
    said = asked("box_pushed_harder", horizon=12)
    actions = said.worlds["factual"].actions, said.worlds["counterfactual"].actions
    assert torch.equal(actions[1], 1.5 * actions[0])
    assert found(said, "effect").answer.values["size"] > 0


@pytest.mark.parametrize("name", ["flow_faster", "plate_left_alone"])
def test_meshes(name):
    said = asked(name, horizon=3)
    effect = found(said, "effect").answer.values
    change = (said.worlds["counterfactual"], said.worlds["factual"])
    field = "velocities" if name == "flow_faster" else "positions"
    rows = effect["entities"]
    wanted = (change[0][field] - change[1][field])[-1, rows].norm(dim=1).mean()
    assert effect["size"] == pytest.approx(float(wanted))
    if name == "flow_faster":
        still = said.worlds["counterfactual"]["velocities"][:, said.worlds["factual"].initial.node_types == 4]
        assert torch.equal(still[0], still[-1])


def test_a_dose_is_told_as_finely_as_numbers_go(ask):
    one = ask('[[questions]]\nkind = "value"\nof = "speed[A]"\nat = 2')
    speed = one.answers[0].answer.values["factual"]
    said = ask(
        f"""
[[questions]]
kind = "dose"
event = "speed[A] > {1e5 * speed + speed / 2}"
vary = {{intervention = 0, scale = "velocities"}}
range = [100000.0, 100001.0]
digits = 12
"""
    )
    dose = said.answers[0].answer.values
    assert dose["dose"] - dose["unchanged_at"] == pytest.approx(1.5e-11, rel=0.1)


def test_every_kind_of_question(ask):
    said = ask(
        """
[[questions]]
kind = "effect"
entities = "A"
field = "velocities"
at = 2
[[questions]]
kind = "event"
of = "positions.y[A] > 0.4"
[[questions]]
kind = "value"
of = "speed[A]"
at = "max"
[[questions]]
kind = "affected"
eps = 1e-9
[[questions]]
kind = "dose"
event = "positions.y[A] > 0.5"
vary = {intervention = 0, scale = "velocities"}
range = [1, 9]
digits = 4
[[questions]]
kind = "dose"
event = "positions.y[2] > 0.5"
vary = {scale = "velocities"}
doses = [1.0, 2.0]
[[questions]]
kind = "causes"
candidates = "near"
entities = "A"
[[questions]]
kind = "causes"
candidates = ["A", 2, [2, 3]]
of = "positions.x[B]"
"""
    )
    effect, event, value, affected, dose, none, causes, number = (a.answer.values for a in said.answers)
    assert effect["size"] == pytest.approx(2 * float(said.worlds["factual"]["velocities"][2, 0].norm()))
    assert event == {"factual": None, "counterfactual": 5}
    assert value["difference"] > 0
    assert affected["entities"] == [0, 1]
    assert 1 < dose["unchanged_at"] < dose["dose"] <= dose["unchanged_at"] + 8e-4
    assert none["dose"] is None
    assert [one["cause"] for one in causes["ranking"]] == ["B", "A"]
    assert [one["effect"] for one in number["ranking"]] == [number["ranking"][0]["effect"], 0, 0]
    assert number["ranking"][0]["cause"] == "A"
    assert said.interventions == ({"at": 2, "entities": "A", "scale": {"velocities": 3.0}},)


def test_answers_are_those_of_the_python_interface(ask, springs):
    from simworld.tellers import springs_engine

    said = ask('[[questions]]\nkind = "affected"\neps = 1e-3\n')
    with simworld.open_trajectories(springs / "springs.h5") as file:
        observed = file[0]
    faster = simworld.do(at=2, entities=0, velocities=simworld.intervene.scale(3.0))
    wanted = simworld.counterfactual(observed, faster, simulator=springs_engine(), num_steps=6)
    assert torch.equal(said.worlds["counterfactual"]["positions"], wanted.counterfactual["positions"])
    assert torch.equal(said.worlds["factual"]["positions"], wanted.factual["positions"])


def test_what_is_not_seen_is_predicted(ask):
    head = BALLS.replace("[names]", "history = 2\n[names]").replace('springs"}', 'springs", dt = 0.1}')
    said = ask('[[questions]]\nkind = "value"\nof = "speed[A]"\n', head)
    late = ask('[[questions]]\nkind = "value"\nof = "speed[A]"\n', BALLS.replace("horizon = 6", "history = [2, 9]"))
    assert len(said.worlds["factual"]) == 7
    assert len(late.worlds["factual"]) == 7
    assert torch.equal(late.worlds["factual"]["positions"][0], said.worlds["factual"]["positions"][2])


INFER = """
simulator = {engine = "springs"}
data = "springs.h5"
INFER
[[interventions]]
entities = [0]
scale = {spring_stiffnesses = 2.0}
[[questions]]
kind = "effect"
entities = 0
"""


def test_what_is_seen_is_what_is_inferred_from(ask):
    fields = 'fields = ["spring_stiffnesses"]\nwindow = 2\nnum_starts = 1\nstart = {spring_stiffnesses = 0.3}'
    known = ask("", INFER.replace("INFER", ""))
    said = ask("", INFER.replace("INFER", f"truth = {{engine = 'springs'}}\n[infer]\n{fields}"))
    stiffnesses = found(said, "inferred")
    assert stiffnesses.answer.values["values"] == pytest.approx([1, 1], abs=1e-6)
    assert stiffnesses.answer.values["rows"] == [0, 1]
    assert (stiffnesses.naive.values["values"], stiffnesses.truth.values["values"]) == ([0.3, 0.3], [1, 1])
    assert said.answers[0] is stiffnesses
    assert said.worlds["counterfactual"].initial.spring_stiffnesses.tolist() == pytest.approx([2, 1], abs=1e-6)
    size = found(known, "effect").answer.values["size"]
    assert found(said, "effect").answer.values["size"] == pytest.approx(size, rel=1e-4)
    one = ask("", INFER.replace("INFER", f"history = 4\nhorizon = 6\n[infer]\n{fields}\nentities = 1"))
    assert found(one, "inferred").answer.values["rows"] == [1]
    assert one.worlds["factual"].initial.spring_stiffnesses.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert found(one, "inferred").truth is None


@pytest.mark.parametrize(
    ("infer", "says"),
    [
        ('infer = ["velocities"]', "static fields of numbers.* got 'velocities'"),
        ('infer = ["weight"]', "infer: .* got 'weight'"),
        ("infer = []", "each named once"),
        ("infer = 3", "fields must be a list"),
        ('infer = ["charges"]', "carry no charges"),
        ("[infer]\nwindow = 2", "lacks the key 'fields'"),
        ('[infer]\nfields = ["masses"]\nwindows = 2', "unknown key 'windows'; the known ones are fields"),
        ('[infer]\nfields = ["masses"]\nwindow = 9', "window must be from 1 to the 8 steps"),
        ('[infer]\nfields = ["masses"]\nwindow = 2\nnum_starts = 0', "1 or more num_windows and num_starts"),
        ('[infer]\nfields = ["masses"]\nwindow = 2\nentities = 7', "rows 0 to 3 of 'masses'"),
        ('[infer]\nfields = ["masses"]\nentities = "nobody"', "nobody"),
        ('[infer]\nfields = ["masses"]\nstart = {masses = -1.0}', "masses must be positive"),
        ('[infer]\nfields = ["masses"]\nstart = {charges = 1.0}', "start is for the fields .* got 'charges'"),
        ('[infer]\nfields = ["weight"]\nstart = {weight = 1.0}', "weight"),
        ('history = 1\ninfer = ["masses"]', "2 frames or more"),
        ('infer = ["masses"]\n[[actions]]\nvalue = [0.0, 0.0]', "actions are for scenes"),
    ],
)
def test_what_cannot_be_inferred_is_told_in_a_sentence(springs, monkeypatch, capfd, infer, says):
    (springs / "wrong.toml").write_text(INFER.replace("INFER", infer))
    code, _, error = command(monkeypatch, capfd, springs / "wrong.toml")
    assert (code, "Traceback" in error) == (2, False)
    with pytest.raises(ValueError, match=says) as told:
        explore(read_query(springs / "wrong.toml"))
    assert str(told.value).startswith(f"{springs / 'wrong.toml'}")


def test_nothing_is_inferred_from_a_scene(tmp_path):
    text = (FOLDER / "rope_cylinder_gone.toml").read_text().replace("../rope.toml", str(FOLDER.parent / "rope.toml"))
    (tmp_path / "query.toml").write_text(text.replace("horizon = 60", 'horizon = 9\ninfer = ["masses"]'))
    with pytest.raises(ValueError, match="infer needs a recording"):
        explore(read_query(tmp_path / "query.toml"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("horizon = 6", "horizont = 6"), "unknown key 'horizont'"),
        (('data = "springs.h5"', ""), "must start from one of"),
        (('data = "springs.h5"', 'data = "none.h5"'), "there is no file 'none.h5'"),
        (("horizon = 6", "horizon = 60"), "actions are known for 8 steps"),
        (("horizon = 6", 'horizon = "3 weeks"'), "horizon must be a number of steps"),
        (("horizon = 6", "history = 99"), "history must be a number of frames"),
        (("horizon = 6", "episode = 4"), "holds 1 episodes"),
        (("horizon = 6", "truth = true"), "truth = true is for a \\[world\\]"),
        (("horizon = 6", "truth = {branch = 0}"), "has 0 branches"),
        (('"springs"}', '"magic"}'), "engine must be one of newton"),
        (('"springs"}', '"springs", dt = 0.2}'), "makes steps of 0.2 s, the data has 0.1 s"),
        (('simulator = {engine = "springs"}', 'simulator = "rope"'), "makes steps of 0.02 s"),
        (('simulator = {engine = "springs"}', 'simulator = "none"'), "there is no file 'none'"),
        (('near = "positions.x < 2"', 'near = "positions.x < -2"'), "Entities must be one or more of 0 to 3"),
        (('near = "positions.x < 2"', "near = 7"), "Entities must be one or more of 0 to 3"),
        (("scale = {velocities", "scale = {masses"), "history = \\[2, 9\\]|'masses' is constant in time"),
        (("at = 2", "at = 0\nset = {masses = -1.0}"), "masses"),
        (("at = 2", "at = 0\nset = {temperature = 1.0}"), "temperature"),
        (("at = 2", 'at = "__import__(1)"'), "there is no function __import__"),
        (("at = 2", 'at = "(lambda: 0)()"'), "is no expression"),
        (("at = 2", 'at = "().__class__.__bases__"'), "is no expression"),
        (("at = 2", 'at = "positions.__class__"'), "is no expression"),
        (("at = 2", f'at = "{"(" * 5000}1{")" * 5000}"'), "1 to 1000 characters"),
        (("at = 2", f'at = "{"(" * 400}1{")" * 400}"'), "nested more than 40"),
        (("at = 2", f'at = "{"1+" * 500_000}1"'), "1 to 1000 characters"),
        (("of = ", "off = "), "unknown key 'off'"),
        (('kind = "event"', 'kind = "guess"'), "kind must be one of effect"),
        (("gap(A, B) <= 0", "gap(A, B)"), "has no 'radii'|must be one condition"),
        (("gap(A, B) <= 0", "sped[A] > 0"), "has no 'sped'"),
        (("gap(A, B) <= 0", "speed[9] > 0"), "picks none"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_sentence(springs, monkeypatch, capfd, change, says):
    table = next((one for key, one in TABLES.items() if change[1].startswith(key)), "")
    text = BALLS + '[[questions]]\nkind = "event"\nof = "gap(A, B) <= 0"\n'
    assert change[0] in text
    (springs / "wrong.toml").write_text(text.replace(*change))
    code, _, error = command(monkeypatch, capfd, springs / "wrong.toml")
    assert code == 2
    assert "Traceback" not in error
    assert len(error) < 3000
    with pytest.raises((ValueError, FileNotFoundError), match=says) as told:
        explore(read_query(springs / "wrong.toml"))
    assert str(told.value).startswith(f"{springs / 'wrong.toml'}")
    if table:
        assert str(told.value).startswith(f"{springs / 'wrong.toml'}, {table}")


TABLES = {  # of what is wrong, which the message names
    "near = ": "names, near",
    "scale = {masses": "interventions",
    "at = ": "interventions",
    "off = ": "question 0",
    "sped[": "question 0",
    "speed[9]": "question 0",
    "gap(A, B)": "question 0",
}


def command(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["simworld", "counterfactual", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    out, error = capfd.readouterr()
    return end.value.code or 0, out, " ".join(error.split())


def test_the_command(springs, monkeypatch, capfd):
    pytest.importorskip("PIL", reason="Pillow is not here; it comes with simworld[view]")
    text = BALLS.replace("at = 2", 'at = "speed[B] > 99"') + '[[questions]]\nkind = "effect"\nentities = "B"\n'
    (springs / "query.toml").write_text(text)
    film = springs / "film.gif"
    code, out, error = command(monkeypatch, capfd, springs / "query.toml", "--json", "-", "--film", film)
    said = json.loads(out)
    assert code == 0
    assert error.count("The event speed[B] > 99 never came") == 1
    assert said["schema"] == 1
    assert said["answers"][0]["answer"]["size"] == 0
    assert said["query"]["names"]["A"] == 0
    assert said["interventions"][0]["scale"] == {"velocities": 3.0}
    assert film.stat().st_size > 1000
    code, _, error = command(monkeypatch, capfd, springs / "query.toml", "--film", "film.txt")
    assert (code, "--film must be" in error) == (2, True)


def test_an_engine_of_another_world_does_not_tell_the_truth():
    with pytest.raises(ValueError, match="truth, planets misses what was recorded by"):
        asked("balls_heavier", truth={"engine": "planets", "dt": 0.01})
