"""What is asked of a simulator about a world, the engine's answers, and the simulator's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simworld import causal_metrics as metrics
from simworld.bench.causal_worlds import Edits, Kind, World, answers, started, world_named
from simworld.bench.other_meshes import same_nodes, seen_at
from simworld.bench.rows import Progress
from simworld.causal_metrics import Case
from simworld.events import contact_events
from simworld.intervene import Do
from simworld.models import LearnedSimulator
from simworld.models.force_network import ForceNetwork
from simworld.simulate import Intervention, Simulator
from simworld.state import State
from simworld.trajectory import Trajectory

TWIN, NOISE = 1e-6, 1e-4  # of the speeds of a world: perturbations for the Lyapunov time and for the sieve
NUM_TWINS = 50
Ask = Callable[[Sequence[Edits], Sequence[Trajectory]], list[list[Trajectory]]]
"""What becomes of each of some starts under each of some sets of interventions."""

Told = Sequence[Sequence[Trajectory]]
"""What becomes of all episodes of an exam without interventions, then of those of each question, in its order."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One kind of intervention at one dose: the episodes that it changes, what is true, and what hangs on noise.

    Worlds that are others from their start on are `elsewhere`: who answers is given their first frames.
    """

    kind: Kind
    dose: float
    edits: tuple[Do, ...]
    episodes: Sequence[int]
    truth: Sequence[Trajectory]
    flipped: Sequence[bool]

    @property
    def elsewhere(self) -> bool:
        """Whether the question is of other worlds, not of other states of the same."""
        return self.kind.elsewhere is not None


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All that is asked of a world, with the engine's answers: the same for every simulator.

    `movement` is how far free bodies move, root mean square over frames, in the unit of what is compared, and
    `lyapunov` the Lyapunov time [s].
    """

    world: World
    name: str
    episodes: Sequence[Trajectory]
    factual: Sequence[Trajectory]
    asked: Sequence[Asked]
    movement: float
    lyapunov: float

    @property
    def dt(self) -> float:
        """Seconds between frames."""
        return self.factual[0].dt


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A case and what tells it apart from others.

    `leak` is the largest effect on an entity before any of the simulator's messages could have reached it, NaN where
    that cannot be told; `events` are contacts of predicted and true, counterfactual and factual, worlds.
    """

    case: Case
    kind: str
    seen: bool
    episode: int
    flipped: bool
    leak: float
    events: Mapping[str, Tensor] | None


def set_exam(
    name: str,
    *,
    count: int | None = None,
    episode: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Exam:
    """Return what is asked of a world, answered by its engine; `episode` are other arguments of its generator.

    Raises:
        ValueError: there is no such world, or no episode to ask about.
    """
    world = world_named(name)
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, the number of episodes to ask about; got {count}.")
    world = replace(world, episode={**world.episode, **(episode or {})})
    episodes = world.episodes(count or world.count)
    (factual,) = world.truth(episodes, [()])
    asked: list[Asked] = []
    for kind, dose, edits, true, noisy in _outcomes(world, episodes):
        asked.append(_asked(world.quantity, factual, kind, dose, edits, true, noisy))
        if progress:
            progress(len(asked) * len(episodes))
    movement = _movement(world, factual)
    return Exam(
        world=world,
        name=name,
        episodes=episodes,
        factual=factual,
        asked=asked,
        movement=movement,
        lyapunov=_lyapunov(world, episodes, factual, movement),
    )


Outcome = tuple[Kind, float, tuple[Do, ...], list[Trajectory], list[Trajectory]]


def _outcomes(world: World, episodes: Sequence[Trajectory]) -> Iterator[Outcome]:
    """Return of each kind and dose the interventions, and what the engine makes of them without and with noise."""
    noise = _noise(NOISE, 0)
    doses = [(kind, dose, kind.edits(dose)) for kind in world.kinds if kind.elsewhere is None for dose in kind.doses]
    true = world.truth(episodes, [edits for _, _, edits in doses])
    noisy = world.truth(episodes, [(*edits, noise) for _, _, edits in doses])
    for (kind, dose, edits), one, other in zip(doses, true, noisy, strict=True):
        yield kind, dose, edits, one, other
    others = [(kind, dose, kind.elsewhere(dose)) for kind in world.kinds if kind.elsewhere for dose in kind.doses]
    for kind, dose, said in others:
        yield kind, dose, (), world.made(len(episodes), (), **said), world.made(len(episodes), (noise,), **said)


def _movement(world: World, factual: Sequence[Trajectory]) -> float:
    moved = []
    for path in factual:
        rows = path[world.quantity]
        moved.append(metrics.distance(rows, rows[:1].expand_as(rows), path.initial.free))
    return float(torch.tensor(moved).square().mean().sqrt())


def _asked(
    name: str,
    factual: Sequence[Trajectory],
    kind: Kind,
    dose: float,
    edits: tuple[Do, ...],
    truth: Sequence[Trajectory],
    noisy: Sequence[Trajectory],
) -> Asked:
    """Return the engine's answers to one kind of intervention at one dose, where it changes anything."""
    there = [k for k, (t, f) in enumerate(zip(truth, factual, strict=True)) if not _same(t, f)]
    flipped = []
    for k in there:
        was = seen_at(factual[k], truth[k].initial, name)
        flipped.append(metrics.flips(truth[k][name], noisy[k][name], was, _compared(factual[k], truth[k])))
    return Asked(kind=kind, dose=dose, edits=edits, episodes=there, truth=[truth[k] for k in there], flipped=flipped)


def _same(a: Trajectory, b: Trajectory) -> bool:
    """Return whether an intervention found nothing to change: an episode without obstacles, for example."""
    return torch.equal(a.active, b.active) and all(torch.equal(a[name], b[name]) for name in a.frames)


def _noise(size: float, seed: int) -> Intervention:
    """Return what adds noise to the velocities of free entities at step 0, `size` of their root mean square."""

    def intervention(state: State, step: int) -> State:
        if step:
            return state
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(state.velocities.shape, generator=generator, dtype=torch.float64).to(state.velocities)
        free = state.free[:, None]
        speed = (state.velocities.square() * free).sum().div(free.sum().clamp(min=1)).sqrt()
        return state.replace(velocities=torch.where(free, state.velocities + size * speed * drawn, state.velocities))

    return intervention


def _lyapunov(world: World, episodes: Sequence[Trajectory], factual: Sequence[Trajectory], movement: float) -> float:
    """Return the Lyapunov time of a world [s], of twins of its first episodes."""
    some, distances = min(NUM_TWINS, len(episodes)), []
    (twins,) = world.truth(episodes[:some], [(_noise(TWIN, 1),)])
    for path, twin in zip(factual, twins, strict=False):
        apart = metrics.distance_per_frame(path[world.quantity], twin[world.quantity], path.initial.free)
        # Velocities were put apart; places are so from the first step on, as far as single precision tells them.
        distances.append((apart[1:] if apart[0] == 0 else apart).clamp(min=1e-3 * TWIN * movement))
    return metrics.lyapunov_time(torch.stack(distances), factual[0].dt, scale=movement)


def _compared(factual: Trajectory, other: Trajectory) -> Tensor:
    if same_nodes(factual.initial, other.initial):
        return factual.initial.free & other.initial.free
    return other.initial.free


def asker(exam: Exam, simulator: Simulator) -> Ask:
    """Return what answers sets of interventions at the first frames of episodes by a simulator."""
    steps, most = exam.world.num_steps, exam.world.max_scenes
    return lambda asked, starts: answers(simulator, starts, asked, num_steps=steps, max_scenes=most)


def asked_of_engine(exam: Exam, believed: Edits) -> Ask:
    """Return what answers as the engine does that believes `believed` of both worlds."""
    return lambda asked, starts: exam.world.truth(starts, [(*believed, *edits) for edits in asked])


def told(exam: Exam, ask: Ask) -> Told:
    """Return what somebody answers to all that an exam asks."""
    changed = [asked for asked in exam.asked if not asked.elsewhere]
    without, *under = ask([(), *(asked.edits for asked in changed)], exam.episodes)
    known = {(asked.kind.name, asked.dose): paths for asked, paths in zip(changed, under, strict=True)}
    found = [list(without)]
    for asked in exam.asked:
        if asked.elsewhere:
            found.append(ask([()], asked.truth)[0])
        else:
            paths = known[asked.kind.name, asked.dose]
            found.append([paths[number] for number in asked.episodes])
    return found


def told_truth(exam: Exam) -> Told:
    """Return the engine's answers, which an exam holds."""
    return [list(exam.factual), *(asked.truth for asked in exam.asked)]


def told_what_was(exam: Exam) -> Told:
    """Return what who copies the factual answers."""
    return [list(exam.factual), *([exam.factual[k] for k in asked.episodes] for asked in exam.asked)]


def answer(exam: Exam, told: Told, simulator: Simulator | None = None) -> list[Answered]:
    """Return all cases of an exam with the answers to them; leaks are told of a `simulator` with a graph."""
    without, *predicted = told
    pairs = zip(exam.asked, predicted, strict=True)
    return [one for asked, paths in pairs for one in _answered(exam, asked, without, paths, simulator)]


def _answered(
    exam: Exam,
    asked: Asked,
    without: Sequence[Trajectory],
    predicted: Sequence[Trajectory],
    simulator: Simulator | None,
) -> list[Answered]:
    found, quantity = [], exam.world.quantity
    for number, truth, flipped, made in zip(asked.episodes, asked.truth, asked.flipped, predicted, strict=True):
        factual, start = exam.factual[number], truth.initial
        touched = start.active if asked.elsewhere else _touched(exam.episodes[number], asked.edits)
        case = Case(
            factual=seen_at(factual, start, quantity),
            counterfactual=truth[quantity],
            predicted_factual=seen_at(without[number], start, quantity).double(),
            predicted=seen_at(made, start, quantity).double(),
            compared=_compared(factual, truth),
            touched=touched,
            dose=asked.kind.size(asked.dose),
        )
        worlds = {"factual": without[number], "predicted": made}
        found.append(
            Answered(
                case=case,
                kind=asked.kind.name,
                seen=asked.kind.seen(asked.dose, start),
                episode=number,
                flipped=flipped,
                leak=_leak(exam, simulator, case, list(worlds.values())),
                events=_events({"true factual": factual, "true": truth, **worlds}) if exam.world.contacts else None,
            )
        )
    return found


def _touched(path: Trajectory, edits: Sequence[Do]) -> Tensor:
    """Return which entities [n] interventions change at the start; all, if they change more than entities."""
    before, after = path.initial, started(path, edits)
    touched = before.active != after.active
    for name in before:
        if before.fields[name].per == "entity":
            touched = touched | (before[name] != after[name]).reshape(len(before), -1).any(1)
    return touched if bool(touched.any()) else torch.ones_like(touched)


def _events(worlds: Mapping[str, Trajectory]) -> dict[str, Tensor]:
    """Return the contacts [e, 3] of each world, but for those of bodies that a spring joins."""
    found = {}
    for name, path in worlds.items():
        start = path.initial
        events = contact_events(path["positions"], start.radii, path.active)
        if "springs" in start:
            joined = {tuple(sorted(pair)) for pair in start.springs.tolist()}
            kept = torch.tensor([tuple(pair) not in joined for pair in events[:, :2].tolist()], dtype=torch.bool)
            events = events[kept]
        found[name] = events
    return found


def _leak(exam: Exam, simulator: Simulator | None, case: Case, worlds: Sequence[Trajectory]) -> float:
    """Return the largest predicted effect on an entity that no message has reached yet; NaN if that is not known."""
    whole = all(bool(path[exam.world.quantity].isfinite().all()) for path in worlds)
    if not isinstance(simulator, LearnedSimulator) or bool(case.touched.all()) or not whole:
        return math.nan
    # Within one step the sub-steps of a law pass as many messages as there are bodies. Models without rounds of
    # messages have no edges to count them along either.
    everyone = isinstance(simulator, ForceNetwork)
    rounds = len(case.touched) if everyone else int(simulator.arguments.get("num_message_passing_steps", 1))
    sizes, reached, worst = case.predicted_effect.norm(dim=2), case.touched, 0.0
    for t in range(exam.world.num_steps):
        edges = [exam.world.edges(path.frame(t), simulator) for path in worlds]
        known = [one for one in edges if one is not None]
        if len(known) < len(edges):
            return math.nan
        reached = metrics.light_cone([torch.cat(known, 1)], reached, rounds)
        if bool(reached.all()):
            break
        worst = max(worst, float(sizes[t + 1][~reached].max()))
    return worst
