"""What engines make of interventions: a changed world is built anew and goes on; nothing is written into a solver.

An engine that remembers more from step to step than its states show runs in one solver until an intervention changes
a state, and from there on in a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.simulate import Edit, Edits, Intervention
from simworld.state import State
from simworld.trajectory import Trajectory


class Session(Protocol):
    """A solver at work on one scene."""

    def again(self, before: State, changed: State) -> Self:
        """Return a fresh solver that goes on from `changed`, which `before` was until something changed it."""
        ...

    def advance(self, scene: State, action: Tensor | None) -> State:
        """Return `scene`, which this solver has reached, one step later; rows of inactive entities are held."""
        ...


class Remembering:
    """The simulator of one rollout from `start`: a session per scene, begun again where its scene was changed.

    A scene that is bit for bit what its session reached goes on in it; at the steps `restarts` all begin again.
    """

    def __init__(self, start: State, sessions: Sequence[Session], *, dt: float, restarts: Collection[int] = ()) -> None:
        self._last, self._sessions, self._dt = start, list(sessions), dt
        self._restarts, self._steps = restarts, 0

    @property
    def dt(self) -> float:
        """Seconds that one step covers."""
        return self._dt

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state."""
        scenes, again = _scenes(state), self._steps in self._restarts
        if again or not (state is self._last or state.identical(self._last)):
            for k, (before, scene) in enumerate(zip(_scenes(self._last), scenes, strict=True)):
                if again or not scene.identical(before):
                    self._sessions[k] = self._sessions[k].again(before, scene)
        after = []
        for k, (session, scene) in enumerate(zip(self._sessions, scenes, strict=True)):
            after.append(session.advance(scene, None if action is None else _of_scene(action, state, k)))
        self._steps += 1
        self._last = after[0]
        if len(after) > 1:
            self._last = state.replace(**{k: torch.cat([one[k] for one in after]) for k in state.moving_fields})
        return self._last


def _of_scene(action: Tensor, state: State, number: int) -> Tensor:
    """Return the rows of an action that are a scene's: of its entities, or its own where there is one per scene."""
    return action[number : number + 1] if len(action) == state.num_scenes else action[state.batch == number]


def _scenes(state: State) -> list[State]:
    return [state] if state.num_scenes == 1 else [state.scene(k) for k in range(state.num_scenes)]


def changed_names(before: State, after: State) -> list[str]:
    """Return the fields, and `active`, of which two states hold other values, or which only one of them holds."""
    names = [k for k in after if k not in before or not torch.equal(before[k], after[k])]
    names += [] if torch.equal(before.active, after.active) else ["active"]
    return names + [k for k in before if k not in after]


def heeded(interventions: Sequence[Intervention], engine: str, reads: Collection[str]) -> tuple[Intervention, ...]:
    """Return interventions that refuse to change what an engine does not heed.

    Raises:
        ValueError: when applied, a field was changed that the engine does not read, or the velocity of a fixed body.
    """

    def checked(intervention: Intervention, state: State, step: int) -> State:
        after = intervention(state, step)
        if after is state:
            return state
        if idle := [name for name in changed_names(state, after) if name not in reads]:
            held = ", ".join(name for name in reads if name == "active" or name in state)
            raise ValueError(
                f"A change of {idle[0]} at frame {step} would change nothing else: {engine} does not read it. "
                f"Change {held}."
            )
        _check_fixed(state, after)
        return after

    return tuple(
        _Checked(one, checked) if isinstance(one, Edit) else wraps(one)(partial(checked, one)) for one in interventions
    )


class _Checked(Edit):
    """An intervention that says what it is, and what it makes of states is `checked`."""

    def __init__(self, inner: Edit, checked: Callable[[Intervention, State, int], State]) -> None:
        self.inner, self.checked, self.event, self.once = inner, checked, inner.event, inner.once

    def applies(self, state: State, step: int) -> bool:
        return self.inner.applies(state, step)

    def begun(self, state: State, step: int) -> _Checked:
        return _Checked(self.inner.begun(state, step), self.checked)

    def __call__(self, state: State, step: int) -> State:
        return self.checked(self.inner, state, step)

    def act(self, action: Tensor | None, state: State, step: int) -> Tensor | None:
        return self.inner.act(action, state, step)

    def to_json(self) -> dict[str, Any]:
        return self.inner.to_json()


def _check_fixed(before: State, after: State) -> None:
    if "fixed" not in before or "fixed" not in after:
        return
    odd = before.fixed & after.fixed & (before.velocities != after.velocities).any(1)
    if bool(odd.any()):
        raise ValueError(f"Body {int(odd.nonzero()[0, 0])} is fixed and stays, whatever its velocity; change others.")


class SceneByScene:
    """The interventions of one rollout of a batch, which see each of its scenes by itself, and none an action."""

    def __init__(self, interventions: Sequence[Intervention], num_scenes: int) -> None:
        self._edits = [Edits(interventions, 0) for _ in range(num_scenes if interventions else 0)]

    def __call__(self, state: State, step: int) -> State:
        """Return the state of a frame as the interventions make it; the state itself if none acts."""
        if not self._edits:
            return state
        scenes, after = _scenes(state), []
        for edits, scene in zip(self._edits, scenes, strict=True):
            after.append(edits.on_state(scene, step))
            edits.on_action(None, after[-1], step)  # refuses what changes actions
        if all(one is scene for one, scene in zip(after, scenes, strict=True)):
            return state
        return type(after[0]).cat(after)

    def told(self, path: Trajectory) -> list[Trajectory]:
        """Return the scenes of a trajectory, each with what was done to it."""
        if not self._edits:
            return path.scenes()
        for edits in self._edits:
            edits.warn(path.num_steps)
        return [
            replace(scene, interventions=edits.provenance())
            for scene, edits in zip(path.scenes(), self._edits, strict=True)
        ]


def through(
    changes: Intervention, seen: Callable[[State], State], rebuilt: Callable[[State, State], State]
) -> Intervention:
    """Return a change of an engine's full states from one of what is recorded of them.

    `seen` is what is recorded of a full state; `rebuilt` makes a full state from the one before and a changed record.
    """

    def change(full: State, step: int) -> State:
        record = seen(full)
        after = changes(record, step)
        return full if after is record or not changed_names(record, after) else rebuilt(full, after)

    return change


def alike(changes: Tensor) -> NDArray[np.float64]:
    """Return by what all nodes of a rigid body [n, 3] were changed, [3].

    Raises:
        ValueError: they were not changed alike.
    """
    if bool(((changes - changes[0]).abs() > 1e-6).any()):
        raise ValueError("The ball is rigid and does not turn; change positions or velocities of all its nodes alike.")
    return np.asarray(changes.mean(0).numpy())
