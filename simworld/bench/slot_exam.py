"""What is asked of slot models: unseen episodes, an engine's answers to removals, and who acted on whom.

Everything is asked at the branch frame, up to which models see the recording: how the episode goes on, how it would
go on without each of its bodies, and thereby who acts on whom, by the effect that removing one has on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simworld.bench.rows import Progress, episodes_of
from simworld.causal_metrics import distance
from simworld.data.generate import GENERATORS, SPLITS, Generator
from simworld.intervene import do, remove
from simworld.models import CausalJEPA, TrueSlots
from simworld.models.probes import Probe
from simworld.simulate import Simulator, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

BRANCH = 10  # recorded frame up to which all is known, or the next at which a changed world can begin
LATEST = 19  # such frame that leaves as many as the farthest horizon
NOTHING, PLACEBO = 1e-12, 1e-6  # change of velocities that is none, and how far from the recording it should lead
HORIZONS = (1, 10, 30)  # frames after it at which errors are measured
ASKED = 10  # frames over which counterfactuals are compared
ACTING = (5, 10)  # frames over which bodies count as acting on each other, in two tables
CHANGED = max(ASKED, *ACTING)  # frames that a changed world is rolled out for
EFFECT = 0.02  # frame widths: cases of smaller true effects are not asked about
SMALL = EFFECT / 10  # how far a change that is none may lead, where it always leads somewhere
PROBED, PROBED_FILMS = 40, 100  # training episodes that probes are fitted on, of true states and of films
SEEDS: Mapping[str, int] = {"billiards": 2031, "springs": 2032, "push_t": 2036}
"""Worlds, and the seeds of the data that their models are trained on; tests are that data's split "test"."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions about a world: episodes, their true continuations without each body, and who acted on whom.

    `removed[e][j]` is episode e without body j from the branch frame `branches[e]` on. `training` are episodes of the
    training data, for probes.
    """

    world: str
    factual: Sequence[Trajectory]
    branches: Sequence[int]
    removed: Sequence[Sequence[Trajectory]]
    training: Sequence[Trajectory]

    def cases(self) -> list[tuple[int, int]]:
        """Return the counterfactuals that count, as (episode, body removed): those whose true effect is not tiny."""
        return [(e, j) for e, paths in enumerate(self.removed) for j in range(len(paths)) if self.effect(e, j) > EFFECT]

    def effect(self, episode: int, body: int) -> float:
        """Return the root mean square of what removing a body does to the others' positions, in frame widths."""
        was, would = self.places(episode), self.places(episode, body)
        return distance(was, would, others(was.shape[1], body))

    def acting(self, frames: int) -> list[Tensor]:
        """Return [n, n] for each episode: whether body j (column) acts on i within some frames after the branch."""
        after = [
            path["influences"][branch + 1 : branch + frames + 1].any(0)
            for path, branch in zip(self.factual, self.branches, strict=True)
        ]
        return [table[:, : len(table)] for table in after]

    def places(self, episode: int, body: int | None = None) -> Tensor:
        """Return true positions [ASKED + 1, n, 2] from the branch frame on, without a body if one is named."""
        path = self.factual[episode] if body is None else self.removed[episode][body]
        return path["positions"][self.branches[episode] : self.branches[episode] + ASKED + 1].double()

    def after(self, episode: int, name: str, count: int) -> Tensor:
        """Return a recorded field [count, n, ...] from the branch frame on."""
        return self.factual[episode][name][self.branches[episode] : self.branches[episode] + count]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one simulator makes of an exam, in episodes and cases as the exam has them.

    `errors` maps quantities to [episodes, horizons]; `missed` [cases] are distances of the predicted from the true
    counterfactual, `missed_effect` those of the observed course plus the predicted effect. `effects`, `attention` and
    `probed_effects` map numbers of frames to scores [pairs] of who acts on whom, in the order of `pairs_of`: the last
    are effects on probed positions. `embeddings` [N, s] are all slots of bodies that were rolled out, scaled. What a
    simulator does not answer is empty.
    """

    errors: Mapping[str, Array]
    missed: Array = field(default_factory=lambda: np.zeros(0))
    missed_effect: Array = field(default_factory=lambda: np.zeros(0))
    effects: Mapping[int, Array] = field(default_factory=dict)
    attention: Mapping[int, Array] = field(default_factory=dict)
    probed_effects: Mapping[int, Array] = field(default_factory=dict)
    embeddings: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an encoder makes of the episodes of an exam: `encoded`, trajectories whose last frames are the episodes'.

    Of episode e body i is read by the probe of `bodies[e][i]` from the slot of that row. Where there is one slot for
    each body, it is in the body's row, before the slots of nobody. Errors of slots are in units of `scales` [s].
    """

    encoded: Sequence[Trajectory]
    bodies: Sequence[Sequence[tuple[Probe, int]]]
    scales: Tensor

    def read(self, episode: int, path: Trajectory) -> dict[str, Tensor]:
        """Return the attributes [T, n, k] of bodies that the slots of an episode tell."""
        told = {id(probe): probe.read(path.to(torch.float64)) for probe, _ in self.bodies[episode]}
        read = [(told[id(probe)], row) for probe, row in self.bodies[episode]]
        return {name: torch.stack([made[name][:, row] for made, row in read], 1) for name in self.bodies[0][0][0].sizes}

    def rows(self, episode: int) -> list[int]:
        """Return the rows of slots that tell of bodies."""
        return sorted({row for _, row in self.bodies[episode]})

    def firsts(self, exam: Exam) -> list[int]:
        """Return which frame of each encoded episode is its branch frame."""
        return [
            branch - (len(whole) - len(path))
            for branch, whole, path in zip(exam.branches, exam.factual, self.encoded, strict=True)
        ]

    def later(self, exam: Exam) -> Tensor:
        """Return [N, s] all slots that tell of bodies, scaled, at the frames that rollouts are to predict."""
        found = [
            path["slots"][first + 1 : first + max(HORIZONS) + 1, self.rows(e)].flatten(0, 1)
            for e, (path, first) in enumerate(zip(self.encoded, self.firsts(exam), strict=True))
        ]
        return torch.cat(found).double() / self.scales


def dataset_of(world: str) -> str:
    """Return the name of the data that models of a world are trained on."""
    return world if world in GENERATORS else f"video_{world}"


def others(count: int, body: int) -> Tensor:
    """Return which of some bodies [n] are not this one."""
    return torch.arange(count) != body


def set_exam(world: str, *, count: int = 60, progress: Progress | None = None) -> Exam:
    """Return the exam of a world on `count` episodes of its test split.

    Raises:
        ValueError: there is no such world.
    """
    if world not in SEEDS:
        raise ValueError(f"There is no exam on slots in '{world}'; there is one in {', '.join(SEEDS)}.")
    generator, seed = GENERATORS[dataset_of(world)], SEEDS[world]
    factual = episodes_of(dataset_of(world), seed, count)
    removed, branches = [], []
    for number, path in enumerate(factual):
        key = [seed, SPLITS.index("test"), number]
        branches.append(_branch(generator, key, path))
        edits = [[remove([body], at=branches[-1])] for body in range(path.initial.num_entities)]
        removed.append([generator.make([key], interventions=edit)[0].to(torch.float64) for edit in edits])
        if progress:
            progress(number + 1)
    training = episodes_of(dataset_of(world), seed, PROBED, split="train")
    return Exam(world=world, factual=factual, branches=branches, removed=removed, training=training)


def _branch(generator: Generator, key: Sequence[int], path: Trajectory) -> int:
    """Return the first frame at which an engine can begin anew as if it had not, or that with the smallest difference.

    A solver that is begun anew amid an impact has forgotten it, so that whatever is changed then, bodies that nothing
    was done to go on otherwise.
    """
    moved = []
    for branch in range(BRANCH, LATEST + 1):
        placebo = do(at=branch, velocities=lambda rows: rows + NOTHING)
        (again,) = generator.make([key], interventions=[placebo])
        apart = (again["positions"] - path["positions"])[branch : branch + ASKED + 1]
        moved.append(float(apart.abs().max()))
        if moved[-1] < PLACEBO:
            return branch
    if min(moved) < SMALL:
        return BRANCH + int(np.argmin(moved))
    raise ValueError(f"Episode {list(key)} has an impact at each of frames {BRANCH} to {LATEST}; use another.")


def pairs_of(tables: Sequence[Tensor]) -> tuple[Array, NDArray[np.int64]]:
    """Return the values [pairs] of tables [n, n] off their diagonals, and the episode of each."""
    values, episodes = [], []
    for number, table in enumerate(tables):
        chosen = table[~torch.eye(len(table), dtype=torch.bool, device=table.device)]
        values.append(chosen.double().cpu().numpy())
        episodes.append(np.full(len(chosen), number))
    return np.concatenate(values), np.concatenate(episodes)


def see_states(exam: Exam, encoder: TrueSlots) -> Seen:
    """Return the slots of true states of an exam: a slot a body, each in its row."""
    probe = Probe.fit([encoder.encode(path) for path in exam.training], exam.training)
    encoded = [encoder.encode(path) for path in exam.factual]
    bodies = [[(probe, row) for row in range(path.initial.num_entities)] for path in exam.factual]
    return Seen(encoded=encoded, bodies=bodies, scales=torch.ones(encoder.slot_size, dtype=torch.float64))


@torch.no_grad()
def answer_slots(exam: Exam, simulator: Simulator, seen: Seen) -> Answers:
    """Return what a simulator of slots makes of an exam; its positions and velocities are probed.

    One whose scenes have a single slot for all bodies is not asked what happens without one of them.
    """
    dtype = next(simulator.parameters()).dtype if isinstance(simulator, nn.Module) else torch.float64
    firsts = seen.firsts(exam)
    starts = [path.to(dtype).frame(first) for path, first in zip(seen.encoded, firsts, strict=True)]
    counts = [path.initial.num_entities for path in exam.factual]
    apart = all(len(seen.rows(e)) == count for e, count in enumerate(counts))
    actions = _actions([path.to(dtype) for path in seen.encoded], firsts)
    paths = _continued(simulator, starts, counts if apart else [0] * len(counts), actions)
    probed = [[seen.read(e, path) for path in some] for e, some in enumerate(paths)]
    slots = [[path["slots"][:, seen.rows(e)].double() / seen.scales for path in some] for e, some in enumerate(paths)]
    wanted = [
        path["slots"][first : first + len(some[0]), seen.rows(e)].double() / seen.scales
        for e, (path, first, some) in enumerate(zip(seen.encoded, firsts, paths, strict=True))
    ]
    quantities = {
        "slot_rmse": [(made - w).square().mean(2).sqrt() for (made, *_), w in zip(slots, wanted, strict=True)]
    }
    for name in probed[0][0]:
        quantities[name] = [
            (made[name] - exam.after(e, name, len(made[name]))).norm(dim=2) for e, (made, *_) in enumerate(probed)
        ]
    errors = _errors(quantities)
    embeddings = torch.cat([made[1:].flatten(0, 1) for made, *_ in slots])
    if not apart:
        return Answers(errors=errors, embeddings=embeddings)
    places = [[one["positions"] for one in some] for some in probed]
    missed, missed_effect = _missed(exam, places)
    return Answers(
        errors=errors,
        missed=missed,
        missed_effect=missed_effect,
        effects=_effects(slots),
        attention=_attention(simulator, [some[0] for some in paths], counts, actions)
        if isinstance(simulator, CausalJEPA)
        else {},
        probed_effects=_effects(places),
        embeddings=embeddings,
    )


def answer_seen(exam: Exam, seen: Seen) -> Answers:
    """Return what an encoder's slots tell of the frames that others predict: what is lost in seeing alone."""
    quantities: dict[str, list[Tensor]] = {}
    for e, (path, first) in enumerate(zip(seen.encoded, seen.firsts(exam), strict=True)):
        for name, made in seen.read(e, path).items():
            shown = made[first : first + max(HORIZONS) + 1]
            quantities.setdefault(name, []).append((shown - exam.after(e, name, len(shown))).norm(dim=2))
    return Answers(errors=_errors(quantities), embeddings=seen.later(exam))


@torch.no_grad()
def answer_states(exam: Exam, simulator: Simulator) -> Answers:
    """Return what a simulator of true states makes of an exam."""
    recorded = [path.with_mean_velocities() for path in exam.factual]
    starts = [_bare(path.frame(branch - 1)) for path, branch in zip(recorded, exam.branches, strict=True)]
    paths = _continued(simulator, starts, [len(start) for start in starts])
    quantities = {
        name: [(some[0][name] - exam.after(e, name, len(some[0]))).norm(dim=2) for e, some in enumerate(paths)]
        for name in ("positions", "velocities")
    }
    places = [[path["positions"] for path in some] for some in paths]
    missed, missed_effect = _missed(exam, places)
    return Answers(errors=_errors(quantities), missed=missed, missed_effect=missed_effect, effects=_effects(places))


def answer_truth(exam: Exam) -> Answers:
    """Return what the engine makes of its own exam: the ceiling of what effects tell of who acts on whom."""
    places = [
        [exam.places(e), *(exam.places(e, body) for body in range(len(would)))] for e, would in enumerate(exam.removed)
    ]
    missed, missed_effect = _missed(exam, places)
    return Answers(errors={}, missed=missed, missed_effect=missed_effect, effects=_effects(places))


def nearness(exam: Exam) -> Array:
    """Return the score [pairs] of who acts on whom that needs no model: how near bodies are at the branch frame."""
    places = [exam.places(e)[0] for e in range(len(exam.factual))]
    return pairs_of([-torch.cdist(one, one) for one in places])[0]


def _actions(paths: Sequence[Trajectory], firsts: Sequence[int]) -> Tensor | None:
    """Return [T, b, a] what is done in some episodes from given frames on, if anything is."""
    done = [
        path.actions[first : first + max(HORIZONS)]
        for path, first in zip(paths, firsts, strict=True)
        if path.actions is not None
    ]
    return torch.cat(done, 1) if done else None


def _continued(
    simulator: Simulator, starts: Sequence[State], counts: Sequence[int], actions: Tensor | None = None
) -> list[list[Trajectory]]:
    """Return the rollouts of each start: as it is, and, over fewer frames, without each of its first `counts` rows."""
    kind, without = type(starts[0]), []
    for start, count in zip(starts, counts, strict=True):
        there = [start.active & others(len(start), body) for body in range(count)]
        without += [start.replace(active=flags) for flags in there]
    whole = rollout(kind.cat(starts), actions, simulator=simulator, num_steps=max(HORIZONS))
    paths = [[path] for path in whole.scenes()]
    if without:
        same = None if actions is None else actions[:CHANGED].repeat_interleave(torch.tensor(counts), 1)
        removed = iter(rollout(kind.cat(without), same, simulator=simulator, num_steps=CHANGED).scenes())
        for some, count in zip(paths, counts, strict=True):
            some += [next(removed) for _ in range(count)]
    return paths


def _attention(
    model: CausalJEPA, paths: Sequence[Trajectory], counts: Sequence[int], actions: Tensor | None
) -> dict[int, Array]:
    """Return whom slots attend to along rollouts, averaged over as many of their first frames, [pairs] by number."""
    together, found = Trajectory.cat(paths), {}
    done = [None] * max(ACTING) if actions is None else actions[: max(ACTING)].unbind()
    whom = torch.stack([model.attention(together.frame(t), action) for t, action in enumerate(done)])
    for frames in ACTING:
        rows = torch.split(whom[:frames].mean(0), [path.initial.num_entities for path in paths])
        found[frames] = pairs_of([one[:count, :count] for one, count in zip(rows, counts, strict=True)])[0]
    return found


def _bare(state: State) -> State:
    """Return a state of bodies without what only an engine knows: who acted on whom."""
    values: dict[str, Any] = {name: state[name] for name in state if name != "influences"}
    return type(state)(batch=state.batch, active=state.active, **values)


def _errors(quantities: Mapping[str, Sequence[Tensor]]) -> dict[str, Array]:
    """Return [episodes, horizons] of each quantity [T, n] of some episodes: means over bodies."""
    return {
        name: np.array([[float(one[h].mean()) for h in HORIZONS] for one in values])
        for name, values in quantities.items()
    }


def _missed(exam: Exam, places: Sequence[Sequence[Tensor]]) -> tuple[Array, Array]:
    """Return how far counterfactual positions [1 + n][T, n, d], and observed ones plus effects, are from the true."""
    missed, missed_effect = [], []
    for e, j in exam.cases():
        truth, there = exam.places(e, j), others(len(exam.removed[e]), j)
        was, would = (places[e][number][: ASKED + 1].double() for number in (0, j + 1))
        missed.append(distance(would, truth, there))
        missed_effect.append(distance(exam.places(e) + would - was, truth, there))
    return np.array(missed), np.array(missed_effect)


def _effects(paths: Sequence[Sequence[Tensor]]) -> dict[int, Array]:
    """Return by number of frames the largest change [pairs] of body i when j is removed, of paths [1 + n][T, n, k]."""
    effects = {}
    for frames in ACTING:
        window, moved = slice(1, frames + 1), []
        for was, *would in paths:
            moved.append(torch.stack([(one[window] - was[window]).double().norm(dim=2).amax(0) for one in would], 1))
        effects[frames] = pairs_of(moved)[0]  # row i: what happens to i when j is removed
    return effects


def auroc(scores: Array, positive: Array) -> float:
    """Return the chance that a positive [k] has a larger score than a negative; ties count half, NaN without both."""
    those, others_sorted = scores[positive > 0], np.sort(scores[positive <= 0])
    if not len(those) or not len(others_sorted):
        return math.nan
    below, up_to = (np.searchsorted(others_sorted, those, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(others_sorted))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Values [seeds, cases] of which a statistic is taken, what they are compared with [cases], whose episode each is.

    The statistic of all is the mean over seeds of `statistic(values of one seed, beside)`.
    """

    values: Array
    beside: Array
    episodes: NDArray[np.int64]
    statistic: Callable[[Array, Array], float]

    def value(self) -> float:
        """Return the statistic."""
        return float(np.mean([self.statistic(one, self.beside) for one in self.values]))

    def samples(self, num_samples: int, num_episodes: int, *, stream: int = 1) -> Array:
        """Return the statistic of samples that are drawn with replacement: seeds of training, and episodes.

        The k-th sample has the same episodes for all models, so that differences are of like with like; which seeds
        it has depends on `stream`.
        """
        episodes_rng, seeds_rng = np.random.default_rng(0), np.random.default_rng([stream, 1])
        rows = [np.flatnonzero(self.episodes == e) for e in range(num_episodes)]
        found = []
        for _ in range(num_samples):
            chosen = np.concatenate([rows[e] for e in episodes_rng.integers(num_episodes, size=num_episodes)])
            drawn = seeds_rng.integers(len(self.values), size=len(self.values))
            known = {s: self.statistic(self.values[s, chosen], self.beside[chosen]) for s in set(drawn.tolist())}
            found.append(np.mean([known[s] for s in drawn.tolist()]))
        return np.array(found)
