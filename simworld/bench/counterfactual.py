"""Counterfactual trajectories: learned answers to "what if" beside an engine's, floors and ceilings.

An engine answers interventions at the first frame of unseen episodes; what a simulator makes of the same start is
measured against it. `cf_gain` is 1 for the truth and 0 for a copy of what was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from simworld import causal_metrics as metrics
from simworld.abduction import abduct
from simworld.bench.causal_exam import (
    Answered,
    Exam,
    Told,
    answer,
    asked_of_engine,
    asker,
    set_exam,
    told,
    told_truth,
    told_what_was,
)
from simworld.bench.causal_worlds import WORLDS, Edits, world_named
from simworld.bench.rows import Progress, titles
from simworld.causal_metrics import Case
from simworld.events import event_changes, event_f1
from simworld.intervene import Do
from simworld.metrics import ConstantVelocity, Horizon, Row, Static
from simworld.models import load_checkpoint
from simworld.simulate import Simulator

EFFECT = 0.05  # of how far free bodies move: cases of smaller true effects are not asked about
CORRECTED = ", corrected by what was"
INFERRED = 6  # episodes of which hidden parameters are inferred
WINDOW = 2  # frames by which a contact may come too early or too late


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows of one world, and the lines of its plots by name: doses with sizes of effects, gains over time.

    `doses` maps kinds to answerers to (doses, mean sizes of effects); `gains` answerers to the median gain [T].
    """

    world: str
    rows: list[Row]
    doses: Mapping[str, Mapping[str, tuple[list[float], list[float]]]]
    gains: Mapping[str, Mapping[str, Tensor]]
    dt: float
    unit: str


def counterfactual(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    worlds: Sequence[str] | None = None,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Counterfactuals: gain, effects, doses, events and axioms against an engine's answers, with floors and ceilings.

    `worlds` are names of WORLDS, all if None; `count` episodes of each. `checkpoints` are measured beside each other
    under their names, the first shipped one of the world if None.

    Raises:
        ValueError: there is no such world, or data is given: the truth needs the world's engine.
        FileNotFoundError: there is no such checkpoint.
    """
    refuse(data)
    made = reports(worlds, checkpoints=checkpoints, count=count, progress=progress)
    return [row for report in made for row in report.rows]


def refuse(data: str | Path | None) -> None:
    """Raise a ValueError if data is given, which this table makes itself."""
    if data is not None:
        raise ValueError("Counterfactuals are asked of worlds whose engine answers; leave --data out.")


@torch.no_grad()
def reports(
    worlds: Sequence[str] | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Return the report of each world, as `counterfactual` asks for them."""
    for name in worlds or ():
        world_named(name)  # before hours are spent on the others
    return [_report(name, checkpoints, count, progress) for name in worlds or tuple(WORLDS)]


def _report(
    name: str, checkpoints: Sequence[str | Path] | None, count: int | None, progress: Progress | None
) -> Report:
    known = checkpoints or world_named(name).checkpoints()[:1]
    names = titles(known) if checkpoints else ["simworld"]
    models = {title: load_checkpoint(one) for title, one in zip(names, known, strict=True)}
    dataset = world_named(name).dataset
    for title, model in models.items():
        learned = model.provenance.get("dataset", dataset)
        if learned != dataset:
            raise ValueError(
                f"The questions of {name} are about {dataset}; checkpoint '{title}' was trained on {learned}."
            )
    return report(set_exam(name, count=count, progress=progress), models, count=count)


@torch.no_grad()
def report(exam: Exam, models: Mapping[str, Simulator], *, count: int | None = None) -> Report:
    """Return what simulators, by name, make of an exam, beside floors and ceilings.

    `count` is of how many episodes worlds of other sizes are made three times fewer; as the world says, if None.
    """
    known = told_truth(exam) if exam.world.engine is None else told(exam, asked_of_engine(exam, ()))
    found = {"truth": answer(exam, known)}
    rows = _world_rows(exam, found["truth"])
    sizes = _other_sizes(exam, count) if models else {}
    for title, model in models.items():
        found[title] = answer(exam, told(exam, asker(exam, model)), model)
        rows += _model_rows(exam, title, found[title]) + _axiom_rows(exam, title, model)
        rows += _size_rows(sizes, title, model)
    brackets = {f"{title}{CORRECTED}": _corrected(found[title]) for title in models}
    brackets["engine, true parameters"] = found["truth"]
    brackets |= {title: answer(exam, one) for title, one in _others(exam).items()}
    brackets |= _inferred(exam)
    for title, cases in brackets.items():
        rows += _gain_rows(exam, title, cases)
    unit = exam.factual[0].initial.fields[exam.world.quantity].unit
    return Report(
        world=exam.name,
        rows=rows,
        doses=_dose_lines(exam, found),
        gains=_gain_lines(exam, {k: v for k, v in {**found, **brackets}.items() if _drawn(k, len(models))}),
        dt=exam.dt,
        unit=unit,
    )


def _drawn(title: str, count: int) -> bool:
    """Return whether a plot of `count` models has a line of this name."""
    return title != "truth" and not (count > 1 and title.endswith(CORRECTED))


def _corrected(found: Sequence[Answered]) -> list[Answered]:
    """Return cases answered by what was observed plus the predicted effect, as `Counterfactual.corrected` does."""
    made = []
    for one in found:
        case = one.case
        predicted = case.factual.double() + case.predicted_effect
        made.append(replace(one, case=replace(case, predicted=predicted, predicted_factual=case.factual.double())))
    return made


def _others(exam: Exam) -> dict[str, Told]:
    """Return what floors, and an engine that believes in wrong parameters, answer, by name."""
    found = {"copy of the factual": told_what_was(exam), "static": told(exam, asker(exam, Static(dt=exam.dt)))}
    if exam.world.quantity == "positions":
        found["constant_velocity"] = told(exam, asker(exam, ConstantVelocity(dt=exam.dt)))
    if exam.world.wrong:
        found["engine, wrong parameters"] = told(exam, asked_of_engine(exam, exam.world.wrong))
    return found


def _inferred(exam: Exam) -> dict[str, list[Answered]]:
    """Return the cases of the first episodes as the engine answers them that inferred what is hidden from what was."""
    engine, hidden = exam.world.engine, exam.world.hidden
    if engine is None or not hidden:
        return {}
    few, begun = list(exam.factual[:INFERRED]), []
    for path in few:
        doubled = path.initial.replace(**{hidden: 2 * path.initial[hidden].abs()})  # where the search begins
        seen = replace(path, initial=doubled)
        begun.append(replace(path, initial=abduct(seen, hidden, simulator=engine, window=4, num_starts=2).state))
    asked = []
    for one in exam.asked:
        kept = [k for k, number in enumerate(one.episodes) if number < len(few)]
        asked.append(
            replace(
                one,
                episodes=[one.episodes[k] for k in kept],
                truth=[one.truth[k] for k in kept],
                flipped=[one.flipped[k] for k in kept],
            )
        )
    some = replace(exam, factual=few, asked=asked)
    # What is scaled or negated is what was inferred: each begins from its own belief.
    believed = replace(some, episodes=begun)
    return {"engine, inferred parameters": answer(some, told(believed, asker(believed, engine)))}


def _row(exam: Exam, model: str, group: str, metric: str, value: float, cases: int, unit: str = "1") -> Row:
    return Row(
        model=model,
        dataset=f"{exam.name}{group}",
        metric=metric,
        horizon=exam.world.num_steps,
        value=value,
        unit=unit,
        trajectories=cases,
    )


def _world_rows(exam: Exam, truth: Sequence[Answered]) -> list[Row]:
    """Return what the world itself is like: how far it moves, how chaotic it is, how many cases were dropped."""
    start, quantity = exam.factual[0].initial, exam.world.quantity
    large = [one for one in truth if _effect(one) > EFFECT * exam.movement]
    flipped = sum(one.flipped for one in large)
    return [
        _row(exam, "truth", "", "movement", exam.movement, len(exam.factual), start.fields[quantity].unit),
        _row(exam, "truth", "", "lyapunov_steps", exam.lyapunov / exam.dt, len(exam.factual)),
        _row(exam, "truth", "", "too_small_share", 1 - len(large) / max(len(truth), 1), len(truth)),
        _row(exam, "truth", "", "sieved_share", flipped / max(len(large), 1), len(large)),
    ]


def _effect(one: Answered) -> float:
    return metrics.distance(one.case.factual, one.case.counterfactual, one.case.compared)


def _kept(exam: Exam, found: Sequence[Answered]) -> list[Answered]:
    """Return the cases that count: whose true effect is large enough, and does not hang on noise."""
    return [one for one in found if not one.flipped and _effect(one) > EFFECT * exam.movement]


def _groups(exam: Exam, kept: Sequence[Answered]) -> dict[str, list[Answered]]:
    """Return the cases that count by kind and by stratum, under what is added to the world's name."""
    groups = {"": list(kept)}
    groups |= {f": {kind.name}": [one for one in kept if one.kind == kind.name] for kind in exam.world.kinds}
    groups |= {f", doses {word}": [one for one in kept if one.seen == seen] for word, seen in _SEEN.items()}
    sizes = [_effect(one) for one in kept]
    middle = float(torch.tensor(sizes).median()) if sizes else 0.0
    for word, large in (("small", False), ("large", True)):
        groups[f", {word} effects"] = [one for one, size in zip(kept, sizes, strict=True) if (size > middle) == large]
    if exam.world.contacts:
        for word, met in (("with", True), ("without", False)):
            groups[f", {word} contacts"] = [one for one in kept if bool(len(_of(one, "true"))) == met]
    return {name: cases for name, cases in groups.items() if cases}


_SEEN: Mapping[str, bool] = {"seen in training": True, "not seen": False}


def _of(one: Answered, world: str) -> Tensor:
    return torch.empty(0, 3, dtype=torch.long) if one.events is None else one.events[world]


def _gain_rows(exam: Exam, title: str, found: Sequence[Answered]) -> list[Row]:
    """Return mean gains with their bootstrap intervals, median gains, and those before the Lyapunov time."""
    rows = []
    for group, cases in _groups(exam, _kept(exam, found)).items():
        rows += _gains(exam, title, group, [one.case for one in cases], exam.world.num_steps)
    steps = exam.lyapunov / exam.dt
    if 1 <= steps < exam.world.num_steps:
        early = [replace(one, case=_until(one.case, math.ceil(steps))) for one in found]
        for group, cases in _groups(exam, _kept(exam, early)).items():
            if not group or group.startswith(":"):
                rows += _gains(exam, title, group, [one.case for one in cases], "1 Lyapunov time")
    return rows


def _until(case: Case, steps: int) -> Case:
    names = ("factual", "counterfactual", "predicted_factual", "predicted")
    return replace(case, **{name: vars(case)[name][: steps + 1] for name in names})


def _gains(exam: Exam, title: str, group: str, cases: Sequence[Case], horizon: Horizon) -> list[Row]:
    gains = torch.tensor([metrics.cf_gain(case) for case in cases], dtype=torch.float64)
    low, high = metrics.bootstrap(gains)
    mean = _row(exam, title, group, "cf_gain", float(gains.mean()), len(cases))
    middle = _row(exam, title, group, "cf_gain_median", float(gains.median()), len(cases))
    return [replace(mean, horizon=horizon, low=low, high=high), replace(middle, horizon=horizon)]


def _model_rows(exam: Exam, title: str, found: Sequence[Answered]) -> list[Row]:
    """Return gains, and of each kind of intervention errors of effects, directions, doses, who is affected, events."""
    rows = _gain_rows(exam, title, found)
    kept = _kept(exam, found)
    kinds = {"": kept} | {f": {k.name}": [one for one in kept if one.kind == k.name] for k in exam.world.kinds}
    for group, some in kinds.items():
        if some:
            rows += _effect_rows(exam, title, group, some)
    leaks = [one.leak for one in found if not math.isnan(one.leak)]
    if leaks:
        unit = exam.factual[0].initial.fields[exam.world.quantity].unit
        rows.append(_row(exam, title, "", "leakage", max(leaks), len(leaks), unit))
    return rows


def _effect_rows(exam: Exam, title: str, group: str, some: Sequence[Answered]) -> list[Row]:
    cases, unit = [one.case for one in some], exam.factual[0].initial.fields[exam.world.quantity].unit
    error, average = metrics.effect_error(cases), metrics.average_effect_error(cases, num_samples=500)
    distances = [metrics.distance(case.predicted, case.counterfactual, case.compared) for case in cases]
    eps = EFFECT * exam.movement
    scores = {
        "direction_cosine": [metrics.direction_cosine(case) for case in cases],
        "affected_auroc": [metrics.affected_auroc(case, eps) for case in cases],
        "affected_average_precision": [metrics.affected_average_precision(case, eps) for case in cases],
        **_dose_scores(some),
    }
    rows = [
        _row(exam, title, group, "cf_rmse", float(torch.tensor(distances).square().mean().sqrt()), len(cases), unit),
        _row(exam, title, group, "effect_error", error.error, len(cases), unit),
        _row(exam, title, group, "effect_error_relative", error.relative, len(cases)),
        replace(
            _row(exam, title, group, "average_effect_error", average.error, len(cases), unit),
            low=average.low,
            high=average.high,
        ),
    ]
    for metric, values in scores.items():
        known = [value for value in values if not math.isnan(value)]
        if known:
            rows.append(_row(exam, title, group, metric, sum(known) / len(known), len(known)))
    return rows + _event_rows(exam, title, group, some)


def _dose_scores(some: Sequence[Answered]) -> dict[str, list[float]]:
    """Return rank correlations and slopes of each episode asked the same at three doses or more."""
    found: dict[str, list[float]] = {"dose_rank": [], "dose_rank_true": [], "dose_slope": []}
    for key in sorted({(one.episode, one.kind) for one in some}):
        cases = [one.case for one in some if (one.episode, one.kind) == key]
        if len({abs(case.dose) for case in cases}) >= 3:
            known = metrics.dose_response(cases)
            for name, value in zip(found, (known.rank, known.true_rank, known.slope), strict=True):
                found[name].append(value)
    return found


def _event_rows(exam: Exam, title: str, group: str, some: Sequence[Answered]) -> list[Row]:
    """Return how contacts agree, and those that interventions make or prevent, over all cases together."""
    if any(one.events is None for one in some):
        return []
    whole = reduce(add, [event_f1(_of(one, "predicted"), _of(one, "true"), WINDOW) for one in some])
    changed = []
    for one in some:
        predicted = event_changes(_of(one, "predicted"), _of(one, "factual"), WINDOW)
        true = event_changes(_of(one, "true"), _of(one, "true factual"), WINDOW)
        changed += [event_f1(p, t, WINDOW) for p, t in zip(predicted, true, strict=True)]
    found = {"event_f1": whole, "changed_event_f1": reduce(add, changed)}
    return [_row(exam, title, group, k, v.f1, v.true) for k, v in found.items() if not math.isnan(v.f1)]


def _axiom_rows(exam: Exam, title: str, model: Simulator) -> list[Row]:
    """Return the largest differences that must be none, in units of how far the world moves.

    "placebo" is setting fields to what they are, "placebo_irrelevant" changing what has no effect, "composition" doing
    two things in either order.
    """
    name, count = exam.world.quantity, min(len(exam.episodes), 6)
    ask, changed = asker(exam, model), [asked for asked in exam.asked if not asked.elsewhere]
    first, last = changed[0], changed[-1]
    asked: dict[str, tuple[Edits, Edits]] = {"placebo": ((), _unchanged(first.edits))}
    if exam.world.irrelevant:
        asked["placebo_irrelevant"] = ((), exam.world.irrelevant)
    if first is not last:
        asked["composition"] = (*first.edits, *last.edits), (*last.edits, *first.edits)
    # Each on its own: sums over other scenes of a batch would round otherwise.
    some = exam.episodes[:count]
    checks = {metric: (ask([one], some)[0], ask([other], some)[0]) for metric, (one, other) in asked.items()}
    rows = []
    for metric, (one, other) in checks.items():
        # What broke down differs from everything, itself too.
        apart = [(a[name] - b[name]).abs().nan_to_num(math.inf) for a, b in zip(one, other, strict=True)]
        worst = max(float(part.max()) for part in apart)
        rows.append(_row(exam, title, "", metric, worst / exam.movement, count))
    return rows


def _unchanged(edits: Sequence[Do]) -> list[Do]:
    """Return interventions that set the same fields of the same entities to what they are."""
    keep: Callable[[Tensor], Tensor] = lambda rows: rows.clone()  # noqa: E731
    return [replace(edit, changes=dict.fromkeys(edit.changes, keep)) for edit in edits]


def _other_sizes(exam: Exam, count: int | None) -> dict[str, Exam]:
    """Return exams of worlds of other numbers of entities than training knew, by what tells them apart."""
    few = max(2, (count or exam.world.count) // 3)
    return {label: set_exam(exam.name, count=few, episode=said) for label, said in exam.world.sizes.items()}


def _size_rows(sizes: Mapping[str, Exam], title: str, model: Simulator) -> list[Row]:
    """Return gains in worlds of other sizes."""
    rows = []
    for label, exam in sizes.items():
        cases = [one.case for one in _kept(exam, answer(exam, told(exam, asker(exam, model))))]
        if cases:
            rows += _gains(exam, title, f", {label}", cases, exam.world.num_steps)
    return rows


def _dose_lines(
    exam: Exam, found: Mapping[str, Sequence[Answered]]
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for kind in exam.world.kinds:
        if len(kind.doses) < 3:
            continue
        nothing = 1.0 if kind.factors else 0.0
        for title, cases in found.items():
            doses, sizes = [nothing], [0.0]  # as the placebo shows
            for dose in sorted(kind.doses):
                some = [one.case for one in cases if one.kind == kind.name and one.case.dose == kind.size(dose)]
                if some:
                    effects = [metrics.distance(case.predicted, case.predicted_factual, case.compared) for case in some]
                    doses.append(dose)
                    sizes.append(sum(effects) / len(effects))
            order = sorted(range(len(doses)), key=doses.__getitem__)
            line = [doses[k] for k in order], [sizes[k] for k in order]
            lines.setdefault(kind.name, {})[title] = line
    return lines


def _gain_lines(exam: Exam, found: Mapping[str, Sequence[Answered]]) -> dict[str, dict[str, Tensor]]:
    lines: dict[str, dict[str, Tensor]] = {}
    for kind in exam.world.kinds:
        for title, cases in found.items():
            some = [one.case for one in _kept(exam, cases) if one.kind == kind.name]
            if some:
                gains = torch.stack([metrics.cf_gain_per_frame(case, 0.2 * EFFECT * exam.movement) for case in some])
                lines.setdefault(kind.name, {})[title] = gains.nanmedian(0).values
    return lines
