"""Slots: does masking whole objects make a predictor find who acts on whom? Judged against true influence graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from simworld.bench.rows import Progress, checkpoints_of
from simworld.bench.slot_exam import (
    ACTING,
    ASKED,
    HORIZONS,
    SEEDS,
    Answers,
    Array,
    Exam,
    Scored,
    answer_slots,
    answer_states,
    answer_truth,
    auroc,
    nearness,
    pairs_of,
    set_exam,
)
from simworld.metrics import Row, Static
from simworld.models import CausalJEPA, InteractionNetwork, LearnedSimulator, TrueSlots, load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.state import State

MASKED = range(5)  # values of |M|
LONGER = ", four times the steps"
SAMPLES = 300  # of the bootstrap
ALONE, STATES = "no interactions", "interaction network, true states"
UNITS = {"slot_rmse": "1", "positions": "1", "velocities": "1/s"}
NAMES = {"slot_rmse": "slot_rmse", "positions": "position_error", "velocities": "velocity_error"}


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
    """Slots of true states: Causal-JEPA by |M|, rollouts, removals and who acts on whom, with floors and ceilings.

    `worlds` are billiards and springs, both if None; `count` unseen episodes of each, 60 if None. `checkpoints` of
    slot models are measured under their names in place of those shipped. Intervals (`low`, `high`) hold 95 % of
    bootstrap samples, in which seeds of training and episodes are drawn anew.

    Raises:
        ValueError: there is no such world, data is given (the truth needs the world's engine), or a checkpoint was
            not trained on slots of true states.
        FileNotFoundError: there is no such checkpoint.
    """
    if data is not None:
        raise ValueError("Slots are judged in worlds whose engine tells who acts on whom; leave --data out.")
    for name in worlds or ():
        if name not in SEEDS:
            raise ValueError(f"There is no exam on slots in '{name}'; there is one in {', '.join(SEEDS)}.")
    rows = []
    for world in worlds or tuple(SEEDS):
        models = models_of_world(world, checkpoints)
        rows += judged(set_exam(world, count=60 if count is None else count, progress=progress), models)
    return rows


def models_of_world(world: str, checkpoints: Sequence[str | Path] | None = None) -> dict[str, list[LearnedSimulator]]:
    """Return the models of a world by the name of their rows, one per seed: those shipped, or those given."""
    if checkpoints:
        return {Path(one).stem: [load_checkpoint(one)] for one in checkpoints}
    known = {name.rpartition("_")[0] for name in shipped(".safetensors")}
    named = {f"causal_jepa, |M| = {count}": f"jepa_{world}_m{count}" for count in MASKED}
    named |= {f"causal_jepa, |M| = {count}{LONGER}": f"jepa_{world}_long_m{count}" for count in MASKED}
    named |= {ALONE: f"jepa_{world}_alone", STATES: f"in_{world}"}
    found = {title: name for title, name in named.items() if name in known}
    return {title: [load_checkpoint(one) for one in checkpoints_of(name)] for title, name in found.items()}


def encoder_of(model: LearnedSimulator) -> TrueSlots:
    """Return the encoder whose slots a model was trained on.

    Raises:
        ValueError: the checkpoint names none, or another than that of true states.
    """
    said = model.provenance.get("slots")
    if not isinstance(said, Mapping):
        raise ValueError("This checkpoint was not trained on slots of true states; train one with [slots] in its run.")
    return TrueSlots.from_json(said)


def judged(exam: Exam, models: Mapping[str, Sequence[LearnedSimulator]]) -> list[Row]:
    """Return the rows of some models, several seeds of each, with floors and ceilings; differences to |M| = 0 last."""
    found: dict[str, list[Answers]] = {}
    encoder = TrueSlots.measure(exam.training)
    for title, several in models.items():
        if isinstance(several[0], CausalJEPA):
            found[title] = [answer_slots(exam, one, encoder_of(one)) for one in several]
        elif isinstance(several[0], InteractionNetwork):
            found[title] = [answer_states(exam, one.double()) for one in several]
        else:
            raise ValueError(f"Slots are judged of CausalJEPA and InteractionNetwork; got {type(several[0]).__name__}.")
    dt = exam.factual[0].dt
    found["static"] = [answer_slots(exam, Static(dt=dt), encoder)]
    found["constant_velocity"] = [answer_slots(exam, SlotsAsBefore(dt=dt), encoder)]
    found["engine"] = [answer_truth(exam)]
    scored = {title: tables(exam, several) for title, several in found.items()}
    near, pairs = nearness(exam)[None], [("ablation_auroc", frames) for frames in ACTING]
    scored["nearness at the branch"] = {key: replace(scored["engine"][key], values=near) for key in pairs}
    for title in ("static", "constant_velocity"):  # they predict no effects
        for key in pairs:
            del scored[title][key]
    rows = [_row(exam, title, key, one) for title, some in scored.items() for key, one in some.items()]
    return rows + _differences(exam, scored)


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
    if cases := exam.cases():
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
    units = {NAMES[name]: unit for name, unit in UNITS.items()}
    return _interval_row(
        exam, title, metric, horizon, one, one.value(), one.samples(SAMPLES, len(exam.factual)), units.get(metric, "1")
    )


def _interval_row(
    exam: Exam, title: str, metric: str, horizon: int, one: Scored, value: float, samples: Array, unit: str = "1"
) -> Row:
    kept = samples[~np.isnan(samples)]
    low, high = (float(np.quantile(kept, q)) for q in (0.025, 0.975)) if len(kept) else (None, None)
    return Row(
        model=title,
        dataset=exam.world,
        metric=metric,
        horizon=horizon,
        value=value,
        unit=unit,
        trajectories=len(exam.factual),
        seeds=len(one.values),
        low=low,
        high=high,
    )


def _differences(exam: Exam, scored: Mapping[str, Mapping[tuple[str, int], Scored]]) -> list[Row]:
    """Return by how much each |M| differs from |M| = 0 of as long training, on the same episodes, with intervals."""
    rows = []
    for count, trained in product(MASKED[1:], ("", LONGER)):
        start, title = scored.get(f"causal_jepa, |M| = {MASKED[0]}{trained}"), f"causal_jepa, |M| = {count}{trained}"
        if start is None or title not in scored:
            continue
        for (metric, horizon), one in scored[title].items():
            base, num = start[metric, horizon], len(exam.factual)
            samples = one.samples(SAMPLES, num) - base.samples(SAMPLES, num, stream=2)
            rows.append(
                _interval_row(
                    exam, title, f"{metric}_less_that_of_m0", horizon, one, one.value() - base.value(), samples
                )
            )
    return rows
