"""The one loop: a simulator applied to its own output."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from simworld.fields import time_unit
from simworld.space import inside
from simworld.state import State
from simworld.trajectory import Trajectory

Intervention = Callable[[State, int], State]
"""Changes a state at a step; returns the state itself, the same object, where it does not apply."""

FAR_OUT = 0.1  # of a box's longest side, beyond which none may be; recordings may lie a little beyond their walls

Observer = Callable[[State], Mapping[str, Tensor]]


class Edit(ABC):
    """An intervention that says what it is, so that a trajectory can tell how it came about.

    `event` is the condition that it waits for, "" where its steps are known beforehand, from `first` on; with `once` it
    acts at the first step alone at which that holds. `changes_past` says that it may change, after frame 0, what states
    know of frames before, which frames then cannot tell.
    """

    event: str = ""
    once: bool = False
    first: int = 0
    changes_past: bool = False

    @abstractmethod
    def applies(self, state: State, step: int) -> bool:
        """Return whether it acts at a step."""

    def begun(self, state: State, step: int) -> Edit:
        """Return what it goes on as, once it has acted for the first time, at this step: by default itself."""
        return self

    def idle(self, state: State, step: int) -> str:
        """Return why it changes nothing at a step at which it acts; "" where it may change something."""
        return ""

    @abstractmethod
    def __call__(self, state: State, step: int) -> State:
        """Return the state as it makes it; the state itself where it does not act."""

    def act(self, action: Tensor | None, state: State, step: int) -> Tensor | None:
        """Return the action of a step as it makes it; by default it leaves it alone."""
        return action

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values."""


def listed(interventions: Sequence[Intervention] | Intervention) -> list[Intervention]:
    """Return interventions as a list, also one that was given by itself."""
    return [interventions] if callable(interventions) else list(interventions)


class BrokeDown(ValueError):
    """What is raised where a state cannot be stepped on any more: it has NaN or infinity, or bodies beyond walls."""


@runtime_checkable
class Simulator(Protocol):
    """Whatever takes a state one step of `dt` seconds further: a network, an engine, a function."""

    @property
    def dt(self) -> float:
        """Seconds that one step covers."""
        ...

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state; the given one stays as it is."""
        ...


@runtime_checkable
class Replaying(Simulator, Protocol):
    """A simulator that remembers more from step to step than its states show, and can be run uninterruptedly."""

    def replay(
        self,
        state: State,
        actions: Tensor | None = None,
        *,
        num_steps: int | None = None,
        interventions: Sequence[Intervention] = (),
    ) -> Trajectory:
        """Return an uninterrupted run, begun again where an intervention changes the state."""
        ...


def rollout(
    state: State,
    actions: Tensor | None = None,
    *,
    simulator: Simulator | None = None,
    num_steps: int | None = None,
    interventions: Sequence[Intervention] | Intervention = (),
    noise: Mapping[str, Tensor] | None = None,
    every: int = 1,
    first_step: int = 0,
    observe: Observer | None = None,
    progress: bool = False,
) -> Trajectory:
    """Return what the simulator makes of `state`: frame 0 is the state itself, so `num_steps` + 1 frames.

    `actions` is [T, n, a] per entity or [T, b, a] per scene, as the simulator takes them; `num_steps`
    defaults to its length. Interventions act on the state of each frame before it is recorded and stepped
    on, then on its action; static fields may be changed at frame 0 only. They are told the number of the step, which
    is `first_step` at frame 0; the trajectory tells what they were. `noise` maps fields to [T, ...] values added to
    frame t before step t. `every` keeps each k-th frame. `observe` replaces the recorded fields by the
    quantities it returns, so that long or large rollouts need not be held whole. Rows of inactive
    entities are held. Differentiable where gradients are enabled.

    Raises:
        ValueError: no simulator is known, the number of steps is unclear, shapes do not fit, the start state holds
            NaN or infinity or a step makes them, or an entity starts far outside its box.

    Warns:
        UserWarning: an event that an intervention waits for never came, its first step lies beyond the last, or there
            is nobody whom it could act on.
    """
    simulator = _simulator_of(state, simulator)
    num_steps = _count_steps(state, actions, num_steps)
    _check_noise(state, noise, num_steps)
    if every < 1:
        raise ValueError(f"every must be 1 or more, the distance between kept frames; got {every}.")
    if first_step == 0:  # who goes on may have been led anywhere
        _check_place(state)
    kept: list[Mapping[str, Tensor]] = []
    active: list[Tensor] = []
    acted: list[Tensor] = []
    edits = Edits(listed(interventions), first_step)
    _check_edited(simulator, edits.said)
    first = state
    for t in _counter(num_steps + 1, progress):
        state = edits.on_state(state, t)
        if t == 0:
            first = state
            _check_start(state)
        if t % every == 0:
            # A past that went between the kept frames, or was noisy or changed, cannot be told from these.
            own_past = every > 1 or noise or edits.change_past
            names = (*state.dynamic_fields, *(state.past_fields if own_past else ()))
            kept.append({k: state[k] for k in names} if observe is None else observe(state))
            active.append(state.active)
        if t < num_steps:
            action = edits.on_action(None if actions is None else actions[t], state, t)
            state = _step(simulator, state, action, noise, t)
            _check_finite(state, t)
            if action is not None:
                acted.append(action)
    edits.warn(num_steps)
    return Trajectory(
        initial=first,
        frames={name: torch.stack([frame[name] for frame in kept]) for name in kept[0]},
        active=torch.stack(active),
        dt=simulator.dt * every,
        actions=_taken(actions, acted) if actions is not None and every == 1 else None,
        interventions=edits.provenance(),
    )


def _check_edited(simulator: Simulator, interventions: Sequence[Intervention]) -> None:
    """Raise a ValueError if an intervention changes what a step writes without looking at it."""
    told = set(getattr(simulator, "told", ()))
    for intervention in interventions:
        without = sorted(told & set(getattr(intervention, "changes", ())))
        if without:
            raise ValueError(
                f"A {type(simulator).__name__} reads {without[0]} out of its slots and goes on from these, so to "
                f"change {without[0]} would change nothing; change slots, with do(slots=...) or replace_slots."
            )


def check_suits(name: str, simulator: Simulator, recorded: Trajectory) -> None:
    """Raise a ValueError if a simulator's step is not that of the data, or it learned places in another unit."""
    dt, unit = recorded.dt, time_unit({k: field.unit for k, field in recorded.initial.fields.items()})
    if abs(simulator.dt - dt) > 1e-6 * dt:
        raise ValueError(
            f"{name} makes steps of {simulator.dt} {unit}, the data has {dt} {unit}; use data of the same dt."
        )
    learned = getattr(simulator, "provenance", {}).get("units", {})
    for field in ("positions", "velocities"):
        units = learned.get(field, "1"), recorded.initial.fields[field].unit if field in recorded.initial else "1"
        if units[0] != units[1] and "1" not in units:  # who says 1 says nothing
            raise ValueError(
                f"{name} learned from {field} in {units[0]}, the data has {units[1]}; use data in the same unit."
            )


def _step(
    simulator: Simulator, state: State, action: Tensor | None, noise: Mapping[str, Tensor] | None, t: int
) -> State:
    before = state
    if noise:
        state = state.replace(**{name: state[name] + value[t] for name, value in noise.items()})
    after = simulator.step(state, action)
    if not bool(state.active.all()):
        after = after.replace(**{k: _hold(state.active, before[k], after[k]) for k in state.moving_fields})
    return after


def _check_start(state: State) -> None:
    """Raise a ValueError if a rollout starts from NaN, for which its first step is not to blame."""
    if (found := _not_finite(state, (*state.dynamic_fields, *state.past_fields))) is not None:
        name, row = found
        raise ValueError(
            f"The start state holds NaN or infinity in {name} of {_row_of(state, name)} {row}; repair it, or start "
            "from a frame that is finite."
        )


def _check_place(state: State) -> None:
    """Raise a ValueError if an entity that moves freely is so far outside its box that one of the two is wrong."""
    if "positions" not in state or "boundaries" not in state:
        return
    lower, upper = state.boundaries[state.batch].unbind(1)
    missed = (state.positions - inside(state, state.positions)).abs()
    lost = ((missed > FAR_OUT * (upper - lower).amax(1, keepdim=True)).any(1) & state.free).nonzero()
    if len(lost):
        row = int(lost[0, 0])
        raise ValueError(
            f"The start state has entity {row} at {_rounded(state.positions[row])}, far outside its box from "
            f"{_rounded(lower[row])} to {_rounded(upper[row])}; move it inside, or correct the boundaries."
        )


def _rounded(place: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in place.tolist()]


def _not_finite(state: State, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the first field and row that hold NaN or infinity, if any does."""
    for name in names:
        value = state[name]
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name, int((~torch.isfinite(value)).nonzero()[0, 0])
    return None


def _row_of(state: State, name: str) -> str:
    """Return what a row of a field is of, in words."""
    return "slot" if "slots" in (name, state.fields[name].past_of) else state.fields[name].per


def _check_finite(state: State, t: int) -> None:
    if (found := _not_finite(state, state.dynamic_fields)) is not None:
        name, row = found
        raise BrokeDown(
            f"Step {t + 1} made {name} of {_row_of(state, name)} {row} NaN or infinite; roll out fewer than "
            f"{t + 1} steps, or from a state nearer to those the simulator was made for."
        )


def _hold(active: Tensor, before: Tensor, after: Tensor) -> Tensor:
    return torch.where(active.view(-1, *[1] * (before.ndim - 1)), after, before)


class Edits:
    """The interventions of one rollout, whose frame 0 is step `first_step`, and which events have come."""

    def __init__(self, interventions: Sequence[Intervention], first_step: int) -> None:
        self.said, self.all, self.first_step = interventions, list(interventions), first_step
        self.change_past = any(isinstance(edit, Edit) and edit.changes_past for edit in self.all)
        self.came: dict[int, int] = {}  # at which step those that say what they are first acted

    def on_state(self, state: State, t: int) -> State:
        """Return the state of frame t as the interventions make it; itself if none acts."""
        step = t + self.first_step
        for number, edit in enumerate(self.all):
            if isinstance(edit, Edit):
                if (edit.once and number in self.came) or not edit.applies(state, step):
                    continue
                if number not in self.came:
                    self.came[number] = step
                    self.all[number] = edit.begun(state, step)
                    if why := edit.idle(state, step):
                        warnings.warn(f"Intervention {number} changes nothing at step {step}: {why}.", stacklevel=3)
            after = self.all[number](state, step)
            if t > 0 and after is not state:
                _check_static(state, after, t)
            state = after
        return state

    def on_action(self, action: Tensor | None, state: State, t: int) -> Tensor | None:
        """Return the action from frame t on as the interventions make it; itself if none acts on it."""
        for number, intervention in enumerate(self.all):
            step = t + self.first_step
            if isinstance(intervention, Edit) and not (intervention.once and self.came.get(number) != step):
                action = intervention.act(action, state, step)
        return action

    def warn(self, num_steps: int) -> None:
        """Warn of events that never came, and of steps beyond the last."""
        last = num_steps + self.first_step
        for number, intervention in enumerate(self.all):
            if isinstance(intervention, Edit) and intervention.first > last:
                warnings.warn(
                    f"Intervention {number} acts from step {intervention.first} on, after the last, {last}, so it "
                    "changed nothing; have it act earlier, or roll out for longer.",
                    stacklevel=3,
                )
            if isinstance(intervention, Edit) and intervention.event and number not in self.came:
                warnings.warn(
                    f"The event {intervention.event} never came in {last} steps, so "
                    f"intervention {number} changed nothing; check its condition, or roll out for longer.",
                    stacklevel=3,
                )

    def provenance(self) -> tuple[dict[str, Any], ...]:
        """Return what was done, and when events came."""
        said: list[dict[str, Any]] = []
        for number, intervention in enumerate(self.said):
            if isinstance(intervention, Edit):
                came = {"came": self.came[number]} if intervention.event and number in self.came else {}
                said.append({**intervention.to_json(), **came})
            else:
                said.append({"function": f"{intervention.__module__}.{intervention!r}".split(" at 0x")[0]})
        return tuple(said)


def _check_static(state: State, after: State, t: int) -> None:
    if set(after) != set(state):
        raise ValueError(f"An intervention at step {t} changed which fields there are; do that at step 0.")
    for name in state.static_fields:
        if after[name] is not state[name] and not torch.equal(after[name], state[name]):
            raise ValueError(
                f"'{name}' is constant in time; change it at step 0, not at step {t}, or begin a rollout there."
            )


def _taken(actions: Tensor, acted: Sequence[Tensor]) -> Tensor:
    """Return the actions that were applied: those given, unless an intervention made others."""
    given = actions[: len(acted)]
    if all(made.data_ptr() == one.data_ptr() for made, one in zip(acted, given, strict=True)):
        return given
    return torch.stack(list(acted))


def _simulator_of(state: State, simulator: Simulator | None) -> Simulator:
    simulator = state.simulator if simulator is None else simulator
    if simulator is None:
        raise ValueError(
            "This state is tied to no simulator; pass rollout(..., simulator=...) or tie one with state.using(...)."
        )
    if not isinstance(simulator, Simulator):
        raise TypeError(f"A simulator has dt and step(state, action); got {simulator!r}.")
    return simulator


def _count_steps(state: State, actions: Tensor | None, num_steps: int | None) -> int:
    if actions is None:
        if num_steps is None:
            raise ValueError("rollout needs actions or num_steps to know how far to go; got neither.")
    else:
        if not isinstance(actions, Tensor):
            raise TypeError(f"actions must be a torch.Tensor; got {type(actions).__name__}. Use torch.as_tensor.")
        if actions.ndim < 2 or actions.shape[1] not in (state.num_entities, state.num_scenes):
            raise ValueError(
                f"actions must be [T, {state.num_entities}, a] per entity or [T, {state.num_scenes}, a] per scene; "
                f"got {list(actions.shape)}."
            )
        if not bool(torch.isfinite(actions).all()):
            raise ValueError("actions must be finite; they hold NaN or infinity.")
        num_steps = len(actions) if num_steps is None else num_steps
        if num_steps > len(actions):
            raise ValueError(
                f"num_steps={num_steps} needs as many actions; got {len(actions)}. Give more or fewer steps."
            )
    if num_steps < 0:
        raise ValueError(f"num_steps must be 0 or more; got {num_steps}.")
    return num_steps


def _check_noise(state: State, noise: Mapping[str, Tensor] | None, num_steps: int) -> None:
    for name, value in (noise or {}).items():
        if name not in state.dynamic_fields:
            raise ValueError(
                f"noise is for fields that change in time, {', '.join(state.dynamic_fields)}; got '{name}'."
            )
        if list(value.shape) != [num_steps, *state[name].shape]:
            raise ValueError(f"noise for {name} must be {[num_steps, *state[name].shape]}; got {list(value.shape)}.")


def _counter(count: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(count)
    from rich.console import Console
    from rich.progress import track

    return track(range(count), description="rollout", console=Console(stderr=True), transient=True)
