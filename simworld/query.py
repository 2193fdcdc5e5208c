"""Counterfactual queries in TOML: where to start, what to change, what to ask, and the answers.

A query holds values and conditions of `simworld.expressions`; nothing in it is run by Python.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.abduction import Abduction
from simworld.data.ephemeris import BODIES
from simworld.data.store import open_trajectories
from simworld.data.toml import about, check_arguments, check_keys, read_toml
from simworld.expressions import Names
from simworld.fields import time_unit
from simworld.intervene import Do
from simworld.intervention_tables import interventions_from
from simworld.models import load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.questions import QUESTIONS, Case, Finding, Question, Said, Teller, entities_of
from simworld.scene import load_scene
from simworld.simulate import Simulator, check_suits, rollout
from simworld.state import State
from simworld.tellers import (
    Generated,
    Recorded,
    Simulated,
    Unchanged,
    answers_interventions,
    are_planets,
    check_tells,
    check_world,
    engine_from,
    episode_of,
    with_masses,
)
from simworld.trajectory import Trajectory
from simworld.worlds import inferred

SOURCES = ("scene", "data", "world")
INFERRED_LISTED = 12  # rows that a text gives the values of
TABLES = ("names", "actions", "interventions", "questions")
KEYS = ("about", *SOURCES, "episode", "simulator", "history", "horizon", "infer", "truth", *TABLES)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query as its file says it, checked; `folder` is where its paths begin, `where` what messages say of it."""

    where: str
    folder: Path
    said: Mapping[str, Any]
    questions: tuple[Question, ...]

    @property
    def about(self) -> str:
        """What the query is about, in its own words."""
        return str(self.said.get("about", Path(self.where).stem))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to one question: the simulator's, that of who says nothing changes, and the engine's if asked.

    Those of kind "inferred" come first and are of no question but of `infer`: the values of a field with their standard
    deviations, beside what the search started from, as `naive`, and what `truth` has.
    """

    question: str
    kind: str
    answer: Finding
    naive: Finding
    truth: Finding | None

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain values."""
        truth = None if self.truth is None else dict(self.truth.values)
        found = {"question": self.question, "kind": self.kind, "answer": dict(self.answer.values)}
        return {**found, "naive": dict(self.naive.values), "truth": truth}


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """Answers to a query, the worlds by name that they are about, and what was done to the asked one."""

    query: Query
    answers: tuple[Answer, ...]
    worlds: Mapping[str, Trajectory]
    interventions: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return query, interventions and answers as plain values."""
        return {
            "query": {"file": self.query.where, **self.query.said},
            "interventions": [dict(one) for one in self.interventions],
            "answers": [answer.to_json() for answer in self.answers],
        }


def read_query(path: str | Path) -> Query:
    """Return the query in a TOML file.

    Keys: `about`; where it starts: `scene`, a file; `data`, a file of trajectories or the name of a shipped one, and
    `episode`; or `[world]`, an episode to be made: `dataset`, `seed`, `split`, `number`, `[world.episode]`.
    `simulator`, a checkpoint or {engine = NAME}, of `simworld.tellers.ENGINES`. `history`, how many recorded frames
    are seen, or [from, before]; steps count from the first of them, and prediction begins at the first change or the
    last of them. `horizon`, in steps, or with a unit, "1.5 s". `infer`, static fields that are taken as hidden, or
    `[infer]` with `fields`, `entities`, `window`, `num_windows`, `num_starts` of `abduct` and `start`, a number for
    each field from which to search, as recorded if there is none: all frames that are seen, the `history` or else the
    whole recording, are explained by the query's simulator, and what is asked is asked of the world with what was
    inferred (a counterfactual; without, *do*). `truth`: true for the engine of the world, {engine = NAME}, or {branch =
    NUMBER} of the file; it tells with recorded parameters. `[names]` of entities: numbers, or a condition on frame 0.
    `[[actions]]` (`at`, `entities`, `value`) of a world that recorded none. `[[interventions]]`, as
    `interventions_from` reads them. `[[questions]]`, each of a `kind` of `simworld.questions.QUESTIONS` with its
    arguments. Paths begin at the query's folder or, if nothing is there, at the working directory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, has an unknown key, or says what cannot be read.
    """
    path = Path(path)
    said, _ = read_toml(path)
    where = str(path)
    check_keys(where, said, KEYS, required=("questions",))
    given = [key for key in SOURCES if key in said]
    if len(given) != 1:
        raise ValueError(f"{where} must start from one of {', '.join(SOURCES)}; got {' and '.join(given) or 'none'}.")
    for key in ("about", "scene", "data"):
        if not isinstance(said.get(key, ""), str):
            raise ValueError(f"{where}: {key} must be a text; got {said[key]!r}.")
    if "world" in said:
        check_world(said["world"], f"{where}, world")
    if "episode" in said and ("data" not in said or not _is_count(said["episode"])):
        raise ValueError(f"{where}: episode is the number of one in a file of data, from 0; got {said['episode']!r}.")
    names = said.get("names", {})
    if not isinstance(names, Mapping):
        raise ValueError(f"{where}: names must be a table of entities; got {names!r}.")
    known = dict.fromkeys((*BODIES, *names), (0,))  # what they stand for is known with the first frame
    interventions_from(said.get("interventions", []), f"{where}, interventions", names=known)
    _inference(said.get("infer"), where)
    return Query(where=where, folder=path.parent, said=said, questions=_questions(said["questions"], where))


def ask(query: Query) -> list[Answer]:
    """Return the answers to a query.

    Raises:
        FileNotFoundError: a file that it names is not there.
        ValueError: it does not fit its world, or as `counterfactual` does.

    Warns:
        UserWarning: an event that an intervention waits for never came.
    """
    return list(explore(query).answers)


def explore(query: Query) -> Exploration:
    """Return the answers to a query with the worlds they are about; it raises and warns as `ask` does."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = _explored(query)
    for text in dict.fromkeys(str(one.message) for one in caught):  # engines and doses repeat them
        warnings.warn(f"{query.where}: {text}", stacklevel=2)
    return found


def _explored(query: Query) -> Exploration:
    said, where = query.said, query.where
    start = _Start.of(query)
    names = _names(said.get("names", {}), start.initial, where)
    edits = interventions_from(said.get("interventions", []), f"{where}, interventions", names=names)
    simulator = start.simulated(said.get("simulator"), "simulator")
    teller, infer = start.teller(simulator, names), _inference(said.get("infer"), where)
    if infer is not None:
        believed, found = start.inferred(infer, teller, names)
        teller = replace(believed, observed=replace(believed.observed, initial=found.state))
    asked = _case(teller, edits, names, where)
    cases = [asked, _case(Unchanged(worlds=asked.worlds), edits, names, where)]
    worlds = {"factual": asked.worlds.factual, "counterfactual": asked.worlds.counterfactual}
    if said.get("truth", False) is not False:
        cases.append(_case(start.truth(said["truth"], edits, names), edits, names, where))
        worlds["engine, counterfactual"] = cases[2].worlds.counterfactual
    answers = []
    for number, question in enumerate(query.questions):
        with about(where, f"question {number}"):
            answers.append(_answer(question, *cases))
    if infer is not None:
        answers = infer.answers(found, believed.observed.initial, cases) + answers
    usual = asked.worlds.factual.interventions  # kinematic entities move as recorded
    done = tuple(one for one in asked.worlds.counterfactual.interventions if one not in usual)
    return Exploration(query=query, answers=tuple(answers), worlds=worlds, interventions=done)


def _case(teller: Teller, edits: tuple[Do, ...], names: Names, where: str) -> Case:
    with about(where, "interventions"):
        return Case(edits=edits, names=names, teller=teller, worlds=teller.under(edits))


def _answer(question: Question, asked: Case, naive: Case, true: Case | None = None) -> Answer:
    try:
        truth = None if true is None else question.find(true)
    except LookupError:  # what was recorded does not tell
        truth = None
    kind = next(name for name, one in QUESTIONS.items() if isinstance(question, one))
    said, answer = question.text, question.find(asked)
    return Answer(question=said, kind=kind, answer=answer, naive=question.find(naive), truth=truth)


@dataclass(frozen=True, kw_only=True)
class _Inference:
    """What is to be inferred, as `infer` says it: fields, rows of them, and how `abduct` is to go about it."""

    fields: Sequence[str]
    entities: Said | None = None
    window: int = 10
    num_windows: int | None = None
    num_starts: int = 4
    start: Mapping[str, float] = field(default_factory=dict)

    def believed(self, teller: Simulated, names: Names) -> Simulated:
        """Return who tells, with the values from which to search; other rows keep what is recorded of them."""
        state, rows, made = teller.observed.initial, self._rows(teller.observed.initial, names), {}
        for name, number in self.start.items():
            if name not in self.fields:
                raise ValueError(f"start is for the fields to be inferred, {', '.join(self.fields)}; got '{name}'.")
            told = state[name] if name in state else torch.full((state.num_entities,), number, dtype=state.dtype)
            numbers = torch.arange(len(told))
            chosen = torch.isin(numbers, numbers if rows is None else torch.tensor(rows))
            made[name] = torch.where(chosen.view(-1, *[1] * (told.ndim - 1)), number, told)
        return replace(teller, observed=replace(teller.observed, initial=state.replace(**made)))

    def found(self, teller: Simulated, names: Names) -> Abduction:
        """Return what is inferred from the frames that are seen."""
        options = {"window": self.window, "num_windows": self.num_windows, "num_starts": self.num_starts}
        asked = {"fields": self.fields, "entities": self._rows(teller.observed.initial, names), **options}
        return inferred(teller.observed.window(0, teller.seen + 1), asked, teller.simulator)

    def answers(self, found: Abduction, believed: State, cases: Sequence[Case]) -> list[Answer]:
        """Return for each field what was inferred, what the search started from, and what the truth has."""
        rows, made = self._rows(believed, cases[0].names), []
        for name, stds in found.stds.items():
            here = list(range(len(stds))) if rows is None else rows
            answer, naive, *true = (
                _told(state, name, here, cases[0], stds if state is found.state else None)
                for state in (found.state, believed, *(case.worlds.observed.initial for case in cases[2:]))
                if name in state
            )
            truth, naive = true[0] if true else None, replace(naive, text=f"start: {naive.text}")
            made.append(Answer(question=f"{name}, inferred", kind="inferred", answer=answer, naive=naive, truth=truth))
        return made

    def _rows(self, state: State, names: Names) -> list[int] | None:
        if self.entities is None:
            return None
        if isinstance(self.entities, str):
            return [int(row) for row in entities_of(self.entities, state, names)]
        return [self.entities] if isinstance(self.entities, int) else list(self.entities)


def _inference(said: object, where: str) -> _Inference | None:
    """Return what `infer` of a query says, None if it says nothing."""
    if said is None:
        return None
    table = said if isinstance(said, Mapping) else {"fields": said}
    check_arguments(f"{where}, infer", table, _Inference, required=("fields",))
    return _Inference(**table)


def _told(state: State, name: str, rows: list[int], case: Case, stds: Tensor | None) -> Finding:
    """Return rows of a field as an answer, with their standard deviations if they were inferred."""
    entities = state.fields[name].per == "entity"
    values = {"values": state[name][rows].tolist(), "entities" if entities else "rows": rows}
    if stds is not None:
        values["stds"] = stds[rows].tolist()
    parts = []
    for row in rows[:INFERRED_LISTED]:
        numbers = ", ".join(f"{value:.4g}" for value in state[name][row].reshape(-1).tolist())
        spread = "" if stds is None else " ± " + ", ".join(f"{std:.2g}" for std in stds[row].reshape(-1).tolist())
        parts.append(f"{case.text(row) if entities else row}: {numbers}{spread}")
    unit, more = state.fields[name].unit, ["..."] if len(rows) > INFERRED_LISTED else []
    return Finding({"field": name, "unit": unit, **values}, f"{'; '.join([*parts, *more])} [{unit}]")


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What a query starts from: recorded frames, or a scene's state alone, with all that may tell more."""

    query: Query
    initial: State
    recorded: Trajectory | None
    seen: int = 0
    simulator: Simulator | None = None
    world: Mapping[str, Any] | None = None
    branches: tuple[Trajectory, ...] = ()

    @staticmethod
    def of(query: Query) -> _Start:
        said = query.said
        if "scene" in said:
            with about(query.where, "scene"):
                state = load_scene(_path(query, said["scene"]))
            return _Start(query=query, initial=state, recorded=None, simulator=state.simulator)
        branches: tuple[Trajectory, ...] = ()
        if "world" in said:
            with about(query.where, "world"):
                path = episode_of(said["world"])
        else:
            with about(query.where, "data"):
                path, branches = _read(query)
        first, last = _frames(said.get("history"), len(path), query.where)
        path = path.window(first, len(path))
        world = said.get("world") if not first else None
        seen = last - first
        return _Start(query=query, initial=path.initial, recorded=path, seen=seen, world=world, branches=branches)

    def simulated(self, said: object, key: str) -> Simulator:
        """Return the simulator that a query names, as precise as the data."""
        where = f"{self.query.where}: {key}"
        if said is None and self.simulator is not None:
            return self.simulator
        if isinstance(said, Mapping):
            dt = self.recorded.dt if self.recorded else self.simulator.dt if self.simulator else None
            with about(self.query.where, key):
                made: Simulator = engine_from(said, where, dt)
        elif isinstance(said, str):
            known = said in shipped(".safetensors")
            with about(self.query.where, key):
                made = load_checkpoint(said if known else _path(self.query, said)).to(self.initial.dtype)
        else:
            raise ValueError(f"{where} must be a checkpoint or {{engine = NAME}}; got {said!r}.")
        if self.recorded is not None:
            check_suits(f"{where} ({said if isinstance(said, str) else said['engine']})", made, self.recorded)
        return made

    def teller(self, simulator: Simulator, names: Names) -> Simulated:
        """Return what a simulator makes of the start."""
        said, where = self.query.said, self.query.where
        if self.recorded is None:
            state = self.initial
            frames = {name: state[name][None] for name in state.dynamic_fields}
            observed = Trajectory(initial=state, frames=frames, active=state.active[None], dt=simulator.dt)
        else:
            observed = self.recorded
        num_steps = _horizon(said.get("horizon"), observed, where)
        observed, simulator = with_masses(observed, simulator)
        if "actions" in said:
            if self.recorded is not None:
                raise ValueError(f"{where}: actions are for scenes; of a recording, change them by an intervention.")
            actions = _actions(said["actions"], self.initial, num_steps, names, where)
            with about(where, "actions"):
                observed = rollout(observed.initial, actions, simulator=simulator, num_steps=num_steps)
        seen = self.seen if self.recorded is not None else observed.num_steps
        return Simulated(observed=observed, simulator=simulator, num_steps=num_steps, seen=seen)

    def inferred(self, infer: _Inference, teller: Simulated, names: Names) -> tuple[Simulated, Abduction]:
        """Return who tells as is believed before anything is inferred, and what is inferred."""
        if self.recorded is None or self.seen < 1:
            raise ValueError(
                f"{self.query.where}: infer needs a recording, data or a [world], of which 2 frames or more are seen."
            )
        with about(self.query.where, "infer"):
            believed = infer.believed(teller, names)
            return believed, infer.found(believed, names)

    def truth(self, said: object, edits: tuple[Do, ...], names: Names) -> Teller:
        """Return who knows the true answers."""
        where = self.query.where
        if isinstance(said, Mapping) and "branch" in said:
            check_keys(f"{where}: truth", said, ("branch",))
            if not _is_count(said["branch"]) or said["branch"] >= len(self.branches) or self.recorded is None:
                raise ValueError(f"{where}: the episode has {len(self.branches)} branches, from 0; got {said}.")
            return Recorded(observed=self.recorded, branch=self.branches[said["branch"]], edits=edits)
        if isinstance(said, Mapping):
            told = self.teller(self.simulated(said, "truth"), names)
            if self.recorded is not None:
                check_tells(told.simulator, told.observed, f"{where}: truth, {said['engine']}")
            return told
        if said is not True or self.world is None or not answers_interventions(self.world):
            raise ValueError(
                f"{where}: truth = true is for a [world], seen from its first frame, whose engine answers "
                f"interventions; name one by truth = {{engine = NAME}}, or a recorded {{branch = 0}}; got {said!r}."
            )
        assert self.recorded is not None
        num_steps = _horizon(self.query.said.get("horizon"), self.recorded, where)
        if num_steps > self.recorded.num_steps:
            raise ValueError(f"{where}: the world has {self.recorded.num_steps} steps; got a horizon of {num_steps}.")
        return Generated(world=self.world, observed=self.recorded, num_steps=num_steps)


def _read(query: Query) -> tuple[Trajectory, tuple[Trajectory, ...]]:
    """Return the episode of a file of data and its recorded branches."""
    name, number = query.said["data"], query.said.get("episode", 0)
    known = shipped(".h5")
    file = known[name] if name in known else _path(query, name)
    with open_trajectories(file) as episodes:
        if number >= len(episodes):
            raise ValueError(f"{query.where}: {file} holds {len(episodes)} episodes, from 0; got episode {number}.")
        return episodes[number], tuple(branch for _, branch in episodes.counterfactuals(number))


def _path(query: Query, name: str) -> Path:
    for path in (query.folder / name, Path(name)):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{query.where}: there is no file '{name}', neither in its folder nor in the working directory; give another."
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _questions(said: object, where: str) -> tuple[Question, ...]:
    if not isinstance(said, list) or not said:
        raise ValueError(f"{where}: questions must be tables, each headed [[questions]]; got {said!r}.")
    found = []
    for number, table in enumerate(said):
        place = f"{where}, question {number}"
        kind = table.get("kind") if isinstance(table, Mapping) else table
        if kind not in list(QUESTIONS):
            raise ValueError(f"{place}: kind must be one of {', '.join(QUESTIONS)}; got {kind!r}.")
        given = {key: value for key, value in table.items() if key != "kind"}
        made: Any = QUESTIONS[kind]
        check_arguments(place, given, made)
        with about(where, f"question {number}"):
            found.append(made(**given))
    return tuple(found)


def _names(said: Mapping[str, Any], state: State, where: str) -> dict[str, list[int]]:
    """Return names of entities: those said, and those of the bodies of the solar system."""
    known = {body: [number] for number, body in enumerate(BODIES)} if are_planets(state) else {}
    for name, rows in said.items():
        try:
            known[name] = entities_of(rows, state, known).tolist()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}, names, {name}: {error}") from error
    return known


def _frames(said: object, length: int, where: str) -> tuple[int, int]:
    """Return the first and the last recorded frame that are seen."""
    first, before = (0, length) if said is None else (0, said) if _is_count(said) else (-1, 0)
    if isinstance(said, list) and len(said) == 2 and all(map(_is_count, said)):
        first, before = said
    if not (isinstance(before, int) and 0 <= first < before <= length):
        raise ValueError(f"{where}: history must be a number of frames or [from, before], of {length}; got {said!r}.")
    return first, before - 1


def _horizon(said: object, observed: Trajectory, where: str) -> int:
    """Return how many steps are asked about: as many as were recorded, if none are said."""
    unit = time_unit({name: field.unit for name, field in observed.initial.fields.items()})
    steps = observed.num_steps if said is None else said
    if isinstance(steps, str):
        found = re.fullmatch(rf"\s*(\d+\.?\d*)\s*{re.escape(unit)}\s*", steps)
        steps = round(float(found.group(1)) / observed.dt) if found else None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f'{where}: horizon must be a number of steps, 1 or more, or a time, "2 {unit}"; got {said!r}.')
    if observed.actions is not None and steps > len(observed.actions):
        raise ValueError(f"{where}: actions are known for {len(observed.actions)} steps; got a horizon of {steps}.")
    return steps


def _actions(said: object, state: State, num_steps: int, names: Names, where: str) -> Tensor:
    """Return actions [T, n, a], those of all tables together."""
    place = f"{where}, actions"
    if not isinstance(said, list) or not said:
        raise ValueError(f"{place} must be tables, each headed [[actions]]; got {said!r}.")
    total: Tensor | None = None
    for table in said:
        check_keys(place, table, ("at", "entities", "value"), required=("value",))
        value, at = table["value"], table.get("at", [0, num_steps])
        if not isinstance(value, list) or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
            raise ValueError(f"{place}: value must be the numbers of one action; got {value!r}.")
        ends = [at, at + 1] if _is_count(at) else at
        if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_count, ends)) and ends[0] < ends[1]):
            raise ValueError(f"{place}: at must be a step or [from, before]; got {at!r}.")
        rows = entities_of(table.get("entities"), state, names)
        made = torch.zeros(num_steps, state.num_entities, len(value), dtype=state.dtype)
        made[ends[0] : ends[1], rows] = torch.tensor(value, dtype=state.dtype)
        if total is not None and total.shape != made.shape:
            raise ValueError(f"{place}: all values must be of one length; got {len(value)} and {total.shape[2]}.")
        total = made if total is None else total + made
    assert total is not None
    return total
