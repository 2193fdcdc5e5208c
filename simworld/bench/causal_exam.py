"""What is asked of a simulator about a world, the engine's answers, and the simulator's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simworld import causal_metrics as metrics
from simworld.bench.causal_worlds import Edits, Kind, World, answers, started, world_named
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
Ask = Callable[[Sequence[Edits]], list[list[Trajectory]]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One kind of intervention at one dose: the episodes that it changes, what is true, and what hangs on noise."""

    kind: Kind
    dose: float
    edits: tuple[Do, ...]
    episodes: Sequence[int]
    truth: Sequence[Trajectory]
    flipped: Sequence[bool]


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
    doses = [(kind, dose, kind.edits(dose)) for kind in world.kinds for dose in kind.doses]
    asked: list[Asked] = []
    true = world.truth(episodes, [edits for _, _, edits in doses])
    noisy = world.truth(episodes, [(*edits, _noise(NOISE, 0)) for _, _, edits in doses])
    for (kind, dose, edits), *outcomes in zip(doses, true, noisy, strict=True):
        asked.append(_asked(world.quantity, factual, kind, dose, edits, *outcomes))
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
    flipped = [
        metrics.flips(truth[k][name], noisy[k][name], factual[k][name], _compared(factual[k], truth[k])) for k in there
    ]
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
    return factual.initial.free & other.initial.free


def asker(exam: Exam, simulator: Simulator) -> Ask:
    """Return what answers sets of interventions at the start of all episodes of an exam by a simulator."""
    world = exam.world
    return lambda asked: answers(
        simulator, exam.episodes, asked, num_steps=world.num_steps, max_scenes=world.max_scenes
    )


def asked_of_engine(exam: Exam, believed: Edits) -> Ask:
    """Return what answers as the engine does that believes `believed` of both worlds; slow engines answer once."""
    if exam.world.engine is None and not believed:
        known = {id(asked.edits): asked for asked in exam.asked}
        return lambda asked: [_known(exam, known.get(id(edits))) for edits in asked]
    return lambda asked: exam.world.truth(exam.episodes, [(*believed, *edits) for edits in asked])


def _known(exam: Exam, asked: Asked | None) -> list[Trajectory]:
    """Return the engine's answers in the order of the episodes; what an intervention leaves alone is as it was."""
    paths = list(exam.factual)
    if asked is not None:
        for number, path in zip(asked.episodes, asked.truth, strict=True):
            paths[number] = path
    return paths


def answer(exam: Exam, ask: Ask, simulator: Simulator | None = None) -> list[Answered]:
    """Return all cases of an exam with the answers to them; leaks are told of a `simulator` with a graph."""
    without, *predicted = ask([(), *(asked.edits for asked in exam.asked)])
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
    for number, truth, flipped in zip(asked.episodes, asked.truth, asked.flipped, strict=True):
        factual = exam.factual[number]
        touched = _touched(exam.episodes[number], asked.edits)
        case = Case(
            factual=factual[quantity],
            counterfactual=truth[quantity],
            predicted_factual=without[number][quantity].double(),
            predicted=predicted[number][quantity].double(),
            compared=_compared(factual, truth),
            touched=touched,
            dose=asked.kind.size(asked.dose),
        )
        worlds = {"factual": without[number], "predicted": predicted[number]}
        found.append(
            Answered(
                case=case,
                kind=asked.kind.name,
                seen=asked.kind.seen(asked.dose),
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
    # Within one step the sub-steps of a law pass as many messages as there are bodies.
    everyone = isinstance(simulator, ForceNetwork)
    rounds = len(case.touched) if everyone else int(simulator.arguments["num_message_passing_steps"])
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
