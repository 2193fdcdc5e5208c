"""Slots: does masking whole objects make a predictor find who acts on whom? Judged against true influence graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from simworld.bench.rows import Progress, checkpoints_of, titles
from simworld.bench.slot_exam import (
    ACTING,
    ASKED,
    HORIZONS,
    SEEDS,
    Answers,
    Array,
    Exam,
    Scored,
    Seen,
    answer_seen,
    answer_slots,
    answer_states,
    answer_truth,
    auroc,
    dataset_of,
    nearness,
    pairs_of,
    see_states,
    set_exam,
)
from simworld.bench.slot_films import Films, film_exam, see_films
from simworld.metrics import Row, Static
from simworld.models import (
    CausalJEPA,
    InteractionNetwork,
    LatentWorld,
    LearnedSimulator,
    SlotAttention,
    TrueSlots,
    load_checkpoint,
    load_encoder,
)
from simworld.models.checkpoint import holds_encoder, shipped
from simworld.slot_metrics import collapse
from simworld.state import State

MASKED = range(5)  # values of |M|
LONGER = ", four times the steps"
SAMPLES = 300  # of the bootstrap
ALONE, STATES, ENDED = "no interactions", "interaction network, true states", "end to end, one embedding"
OWN = "told its own place and velocity"  # the actor, as proprioception
FILMS, CODE = "films", "as the code"  # what models are trained on, or how, beside the name of the world
TEXT = "as the text"
UNITS = {"position_error": "frame widths", "velocity_error": "frame widths/s"}
NAMES = {"slot_rmse": "slot_rmse", "positions": "position_error", "velocities": "velocity_error"}
CODED = {
    "same_masks": "the same objects masked in every batch",
    "anchor": "loss on the first frame, too",
    "exactly": "as many masked in every scene",
    "unnormed": "no normalization before attention",
    "all": "all four",
    "wide": "heads eight times as wide",
    "slots": "slots read out, not changes",
}
"""How the authors' code, and how we, depart from the text, by the names of checkpoints."""
Model = LearnedSimulator | LatentWorld


@dataclass(frozen=True, kw_only=True)
class SlotsAsBefore:
    """The naive simulator of slots in which each goes on as it went: z' = 2 z - z one frame before."""

    dt: float

    def step(self, state: State, action: torch.Tensor | None = None) -> State:
        """Return the state with every slot changed as it last was."""
        return state.advanced(slots=2 * state["slots"] - state["history"][:, -1])


def slots(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    worlds: Sequence[str] | None = None,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Causal-JEPA by |M|: rollouts, removals and who acts on whom, with floors and ceilings, on several kinds of slots.

    Slots are of true states or of films, which the encoder makes that a model was trained on. `worlds` are billiards,
    springs and push_t, where a disc acts, all or those of the checkpoints if None; `count` unseen episodes of each, 60
    if None. `checkpoints` of slot models are measured under their names in place of those shipped. Intervals (`low`,
    `high`) hold 95 % of bootstrap samples, in which seeds of training and episodes are drawn anew.

    Raises:
        ValueError: there is no such world, data is given (the truth needs the world's engine), a checkpoint does not
            say what slots it was trained on or was trained on another world, or an encoder has collapsed.
        FileNotFoundError: there is no such checkpoint.
    """
    if data is not None:
        raise ValueError("Slots are judged in worlds whose engine tells who acts on whom; leave --data out.")
    for name in worlds or ():
        if name not in SEEDS:
            raise ValueError(f"There is no exam on slots in '{name}'; there is one in {', '.join(SEEDS)}.")
    rows = []
    for world in worlds or _worlds_of(checkpoints or ()):
        groups = models_of_world(world, checkpoints)
        if not groups:
            raise ValueError(f"There are no models of slots in {world}; train one and give it with --checkpoint.")
        exam, films = set_exam(world, count=60 if count is None else count, progress=progress), None
        for title, models in groups.items():
            if films is None and title == FILMS:
                films = film_exam(exam, size=64, progress=progress)
            asked = replace(exam, world=f"{world}, {title}" if title else world)
            rows += judged(asked, models, films if title == FILMS else None, floors=title != CODE)
    return rows


def _worlds_of(checkpoints: Sequence[str | Path]) -> list[str]:
    """Return the worlds that checkpoints say that they were trained on; all where none says one of these."""
    learned = {_loaded(one).provenance.get("dataset") for one in checkpoints}
    return [world for world in SEEDS if dataset_of(world) in learned] or list(SEEDS)


def models_of_world(world: str, checkpoints: Sequence[str | Path] | None = None) -> dict[str, dict[str, list[Model]]]:
    """Return the models of a world by group and by the name of their rows, one per seed: those shipped, or given.

    Groups are "" (slots of true states), "films", and "as the code", which has variants of one setting.
    """
    groups: dict[str, dict[str, list[Model]]] = {"": {}, FILMS: {}, CODE: {}}
    if checkpoints:
        for title, one in zip(titles(checkpoints), checkpoints, strict=True):
            model = _loaded(one)
            learned = model.provenance.get("dataset", dataset_of(world))
            if learned != dataset_of(world):
                raise ValueError(
                    f"The exam on slots in {world} is about {dataset_of(world)}; checkpoint '{title}' was trained on "
                    f"{learned}. Judge it in its own world."
                )
            filmed = not isinstance(model, InteractionNetwork) and not isinstance(encoder_of(model), TrueSlots)
            groups[FILMS if filmed else ""][title] = [model]
        return {title: models for title, models in groups.items() if models}
    known = {name.rpartition("_")[0] for name in shipped(".safetensors")}
    named = {f"causal_jepa, |M| = {count}": f"jepa_{world}_m{count}" for count in MASKED}
    named |= {f"causal_jepa, |M| = {count}{LONGER}": f"jepa_{world}_long_m{count}" for count in MASKED}
    named |= {ALONE: f"jepa_{world}_alone", OWN: f"jepa_{world}_own", STATES: f"in_{world}"}
    filmed_names = {f"causal_jepa, |M| = {count}": f"jepa_{world}_films_m{count}" for count in MASKED}
    filmed_names |= {ALONE: f"jepa_{world}_films_alone", ENDED: f"latent_{world}", STATES: f"in_{world}"}
    coded = {TEXT: f"jepa_{world}_m2"} | {said: f"jepa_{world}_code_{name}" for name, said in CODED.items()}
    for title, names in (("", named), (FILMS, filmed_names), (CODE, coded)):
        found = {said: name for said, name in names.items() if name in known}
        if set(found) - {STATES, TEXT}:
            groups[title] = {said: [_loaded(one) for one in checkpoints_of(name)] for said, name in found.items()}
    if TEXT in groups[CODE]:
        groups[CODE][TEXT] = groups[CODE][TEXT][:1]  # variants have one seed
    return {title: models for title, models in groups.items() if models}


def _loaded(path: str | Path) -> Model:
    if not holds_encoder(path):
        return load_checkpoint(path)
    encoder = load_encoder(path)
    if not isinstance(encoder, LatentWorld):
        raise ValueError(
            f"'{path}' holds a {type(encoder).__name__}, which predicts nothing; give a model of its slots."
        )
    return encoder


def encoder_of(model: Model) -> TrueSlots | SlotAttention | LatentWorld:
    """Return the encoder whose slots a model was trained on.

    Raises:
        ValueError: the checkpoint names none, or one that makes no slots.
    """
    if isinstance(model, LatentWorld):
        return model
    said = model.provenance.get("slots")
    if not isinstance(said, Mapping):
        raise ValueError(
            "This checkpoint does not say what slots it was trained on; train one with [slots] in its run, or on what "
            "simworld encode wrote."
        )
    if said.get("encoder") == "true":
        return TrueSlots.from_json(said)
    encoder = load_encoder(str(said["encoder"]))
    assert isinstance(encoder, SlotAttention | LatentWorld)
    return encoder


def judged(
    exam: Exam, models: Mapping[str, Sequence[Model]], films: Films | None = None, *, floors: bool = True
) -> list[Row]:
    """Return the rows of some models, several seeds of each, with floors and ceilings; differences to |M| = 0 last.

    Models of slots of films need the `films` of the exam. Without `floors` there are no rows but those of the models.
    """
    found: dict[str, list[Answers]] = {}
    seen: dict[str, Seen] = {}
    for title, several in models.items():
        if isinstance(several[0], InteractionNetwork):
            found[title] = [answer_states(exam, one.double()) for one in several]
        elif isinstance(several[0], CausalJEPA | LatentWorld):
            found[title] = [answer_slots(exam, one, _seen(exam, title, one, films, seen)) for one in several]
        else:
            raise ValueError(f"Slots are judged of CausalJEPA and InteractionNetwork; got {type(several[0]).__name__}.")
    if floors:
        found |= _floors(exam, seen or {"": see_states(exam, TrueSlots.measure(exam.training))}, films is not None)
    scored = {title: tables(exam, several) for title, several in found.items()}
    if floors:
        near, pairs = nearness(exam)[None], [("ablation_auroc", frames) for frames in ACTING]
        scored["nearness at the branch"] = {key: replace(scored["engine"][key], values=near) for key in pairs}
    rows = [_row(exam, title, key, one) for title, some in scored.items() for key, one in some.items()]
    rows += [row for title, several in found.items() for row in _collapse_rows(exam, title, several)]
    return rows + _differences(exam, scored)


def _seen(exam: Exam, title: str, model: Model, films: Films | None, known: dict[str, Seen]) -> Seen:
    """Return what the encoder of a model makes of an exam, and keep it: others may have the same encoder."""
    encoder = encoder_of(model)
    if isinstance(encoder, TrueSlots):
        name = json.dumps(encoder.to_json())
    else:
        name = title if isinstance(model, LatentWorld) else str(model.provenance["slots"]["encoder"])
    if name not in known:
        if isinstance(encoder, TrueSlots):
            known[name] = see_states(exam, encoder)
        elif films is not None:
            known[name] = see_films(exam, films, name, encoder)
        else:
            raise ValueError(f"{title} was trained on slots of films; give the films of the exam.")
    return known[name]


def _floors(exam: Exam, seen: Mapping[str, Seen], filmed: bool) -> dict[str, list[Answers]]:
    """Return the answers of naive simulators of each kind of slots, of who is shown what others predict, and true."""
    found, dt = {}, exam.factual[0].dt
    if not filmed:  # slots are the same, whatever is told beside them
        seen = {json.dumps(json.loads(name or "{}") | {"actor": None}): one for name, one in seen.items()}
    for number, (name, one) in enumerate(seen.items()):
        of = "" if len(seen) == 1 else f", {name}" if filmed else f", encoder {number + 1}"
        for title, naive in (("static", Static(dt=dt)), ("constant_velocity", SlotsAsBefore(dt=dt))):
            told = answer_slots(exam, naive, one)
            found[f"{title}{of}"] = [replace(told, effects={}, probed_effects={})]  # they predict none
        if filmed:
            found[f"shown the frames{of}"] = [answer_seen(exam, one)]
    return {**found, "engine": [answer_truth(exam)]}


def _collapse_rows(exam: Exam, title: str, several: Sequence[Answers]) -> list[Row]:
    """Return how much of their space the slots of bodies fill that some seeds roll out, at the median seed."""
    told = [collapse(one.embeddings).figures() for one in several if one.embeddings is not None]
    if not told:
        return []
    return [
        Row(
            model=title,
            dataset=exam.world,
            metric=metric,
            horizon=max(HORIZONS),
            value=float(np.median([one[metric] for one in told])),
            unit="1",
            trajectories=len(exam.factual),
            seeds=len(told),
        )
        for metric in told[0]
    ]


def tables(exam: Exam, several: Sequence[Answers]) -> dict[tuple[str, int], Scored]:
    """Return what is measured of several seeds, by metric and horizon."""
    first = several[0]
    found: dict[tuple[str, int], Scored] = {}
    everyone, nothing = np.arange(len(exam.factual)), np.zeros(len(exam.factual))
    for name in first.errors:
        for column, horizon in enumerate(HORIZONS):
            errors = np.stack([one.errors[name][:, column] for one in several])
            found[NAMES[name], horizon] = Scored(
                values=errors, beside=nothing, episodes=everyone, statistic=lambda x, _: float(np.mean(x))
            )
    if len(first.missed) and (cases := exam.cases()):
        effects = np.array([exam.effect(e, j) for e, j in cases])
        missed, whose = np.stack([one.missed for one in several]), np.array([e for e, _ in cases])
        scored = Scored(values=missed, beside=effects, episodes=whose, statistic=_gain)
        found["cf_gain", ASKED] = scored
        found["cf_gain_median", ASKED] = replace(scored, statistic=_median_gain)
        found["cf_gain_corrected", ASKED] = replace(scored, values=np.stack([one.missed_effect for one in several]))
    for frames in ACTING:
        acting, whose = pairs_of(exam.acting(frames))
        for metric, made in (
            ("ablation_auroc", [one.effects for one in several]),
            ("attention_auroc", [one.attention for one in several]),
            ("probed_ablation_auroc", [one.probed_effects for one in several]),
        ):
            if frames in made[0]:
                scores = np.stack([one[frames] for one in made])
                found[metric, frames] = Scored(values=scores, beside=acting, episodes=whose, statistic=auroc)
    return found


def _gain(missed: Array, effects: Array) -> float:
    """Return 1 - d(predicted, counterfactual) / d(factual, counterfactual), distances summed over cases."""
    return float(1 - missed.sum() / effects.sum()) if len(effects) else float("nan")


def _median_gain(missed: Array, effects: Array) -> float:
    return float(np.median(1 - missed / effects)) if len(effects) else float("nan")


def _row(exam: Exam, title: str, key: tuple[str, int], one: Scored) -> Row:
    metric, horizon = key
    return _interval_row(exam, title, metric, horizon, one, one.value(), one.samples(SAMPLES, len(exam.factual)))


def _interval_row(exam: Exam, title: str, metric: str, horizon: int, one: Scored, value: float, samples: Array) -> Row:
    kept = samples[~np.isnan(samples)]
    low, high = (float(np.quantile(kept, q)) for q in (0.025, 0.975)) if len(kept) else (None, None)
    return Row(
        model=title,
        dataset=exam.world,
        metric=metric,
        horizon=horizon,
        value=value,
        unit=UNITS.get(metric.partition("_less_that_of_")[0], "1"),
        trajectories=len(exam.factual),
        seeds=len(one.values),
        low=low,
        high=high,
    )


def _differences(exam: Exam, scored: Mapping[str, Mapping[tuple[str, int], Scored]]) -> list[Row]:
    """Return by how much each |M| differs from |M| = 0 of as long training, and each variant from the text's.

    On the same episodes, with intervals.
    """
    pairs = [
        (f"causal_jepa, |M| = {count}{trained}", f"causal_jepa, |M| = {MASKED[0]}{trained}", "m0")
        for count, trained in product(MASKED[1:], ("", LONGER))
    ]
    rows = []
    for title, start, said in (*pairs, *((said, TEXT, "text") for said in CODED.values())):
        if start not in scored or title not in scored:
            continue
        for (metric, horizon), one in scored[title].items():
            base, num = scored[start][metric, horizon], len(exam.factual)
            samples = one.samples(SAMPLES, num) - base.samples(SAMPLES, num, stream=2)
            name, apart = f"{metric}_less_that_of_{said}", one.value() - base.value()
            rows.append(_interval_row(exam, title, name, horizon, one, apart, samples))
    return rows
