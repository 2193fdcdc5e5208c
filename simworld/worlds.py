"""What would have happened: an observed trajectory, kept up to an intervention and predicted from there on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from simworld.abduction import Abduction, abduct
from simworld.expressions import Expression
from simworld.intervene import Do, Rule
from simworld.models.base import LearnedSimulator
from simworld.prescriptions import script
from simworld.simulate import Edit, Intervention, Replaying, Simulator, listed, rollout
from simworld.space import shortest
from simworld.state import State, rows_between
from simworld.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """Two worlds that part at frame `step`: one without an intervention and one with it.

    Both hold the observed frames before `step`, bit for bit, and what the simulator makes of them from there on.
    What differs between them is the effect: errors that the simulator makes in both worlds cancel. `abduction` is how
    hidden parameters of both were inferred; None where they were given.
    """

    observed: Trajectory
    factual: Trajectory
    counterfactual: Trajectory
    step: int
    abduction: Abduction | None = None

    def effect(self, name: str | None = None) -> Tensor:
        """Return [T, n, ...]: what the intervention changes of a quantity, by the shortest way along periodic axes.

        That is of positions where not said, or of slots where these are what there is.
        """
        name = self._quantity(name)
        difference = self.counterfactual[name] - self.factual[name]
        return shortest(self.factual.initial, difference) if name == "positions" else difference

    def _quantity(self, name: str | None) -> str:
        frames = self.factual.frames
        return name or ("slots" if "slots" in frames and "positions" not in frames else "positions")

    def corrected(self, name: str | None = None) -> Tensor:
        """Return [T, n, ...]: a quantity as observed plus the effect, for as many frames as were observed.

        That leaves out what the simulator gets wrong of the observed world: the additive noise of a structural causal
        model, inferred from what was observed and kept.
        """
        name = self._quantity(name)
        length = min(len(self.observed), len(self.counterfactual))
        observed, predicted = self.observed[name][:length], self.counterfactual[name][:length]
        kept = torch.where(_rows(self.counterfactual.active[:length], predicted), observed, predicted)
        changed = kept + self.effect(name)[:length]
        return torch.where(_rows(self.counterfactual.active[:length], predicted), changed, predicted)

    def affected(self, eps: float, name: str | None = None) -> Tensor:
        """Return which entities [n] are changed in a quantity by more than `eps`, in its unit, at some frame."""
        sizes = self.effect(name).flatten(2).norm(dim=2) if self.effect(name).ndim > 2 else self.effect(name).abs()
        return (sizes > eps).any(0)


def _rows(active: Tensor, like: Tensor) -> Tensor:
    return active.view(*active.shape, *[1] * (like.ndim - 2))


def counterfactual(
    observed: Trajectory | State,
    interventions: Sequence[Intervention] | Intervention,
    *,
    simulator: Simulator | None = None,
    actions: Tensor | None = None,
    num_steps: int | None = None,
    infer: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Counterfactual:
    """Return what would have happened under interventions, and what happens without, by a simulator.

    Steps are those of `observed`, a recorded trajectory or the state to begin from; up to the first at which an
    intervention acts, or `actions` differ from the recorded ones, both worlds are the recorded one. From its last
    frame or the first change on, whichever comes first, the simulator goes on to `num_steps` steps: as many as there
    are recorded, or actions. Kinematic entities move as recorded in both worlds, and a `context` changes when the
    recorded one does, but for what an intervention that acts at all those steps, as `do(at=range(...))`, makes of them.

    Without `infer` parameters are taken as given: this is *do*. With it this is a *counterfactual with inferred
    parameters* (abduction, action, prediction; Pearl 2009): static fields that are hidden are inferred by `abduct` from
    all that was observed, by the same simulator, before both worlds are told with them; interventions act on what was
    inferred. `infer` names a field or several, or is a table of `fields` and further arguments of `abduct`, as in
    {"fields": ["masses"], "window": 30}; the search starts from the values in `observed` if it names no `start`.

    Raises:
        ValueError: there is nothing to ask (no intervention and no other actions), an intervention changes a static
            field after the start, or as `rollout`, and with `infer` as `abduct` does.

    Warns:
        UserWarning: an event that an intervention waits for never came.
    """
    edits = listed(interventions)
    recorded = _as_trajectory(observed, simulator)
    if not edits and actions is None:
        raise ValueError("counterfactual() needs an intervention or other actions to ask about; got neither.")
    abduction = None if infer is None else inferred(recorded, infer, simulator)
    observed = recorded
    if abduction is not None:
        recorded = replace(recorded, initial=abduction.state)
    _check_goes_on(recorded, actions, num_steps)
    given = recorded.actions
    length = num_steps if num_steps is not None else max(recorded.num_steps, 0 if actions is None else len(actions))
    step = min(first_change(recorded, edits), _first_other(given, actions), length)
    with_edits = continued(recorded, step, simulator, given if actions is None else actions, length, edits)
    without = continued(recorded, step, simulator, given, length, ())
    return Counterfactual(observed=observed, factual=without, counterfactual=with_edits, step=step, abduction=abduction)


def inferred(
    observed: Trajectory, infer: str | Sequence[str] | Mapping[str, Any], simulator: Simulator | None
) -> Abduction:
    """Return the abduction that `infer` asks for, as `counterfactual` takes it.

    Raises:
        ValueError: it has an unknown key or no fields, there are no two frames to infer from, or as `abduct` does.
    """
    options = dict(infer) if isinstance(infer, Mapping) else {"fields": infer}
    arguments = inspect.signature(abduct).parameters
    known = ["fields", *(key for key in arguments if key not in ("observed", "names", "simulator"))]
    if unknown := [key for key in options if key not in known]:
        raise ValueError(f"infer has an unknown key '{unknown[0]}'; the known ones are {', '.join(known)}.")
    fields = options.pop("fields", ())
    names = [fields] if isinstance(fields, str) else list(fields)
    if observed.num_steps < 1:
        raise ValueError("Parameters are inferred from what was observed, two frames or more; got a single state.")
    return abduct(observed, *names, simulator=simulator, **options)


def _check_goes_on(recorded: Trajectory, actions: Tensor | None, num_steps: int | None) -> None:
    if len(recorded) == 1 and actions is None and num_steps is None:
        raise ValueError("A single state does not tell how far to go; give num_steps, or actions.")


def _as_trajectory(observed: Trajectory | State, simulator: Simulator | None) -> Trajectory:
    if isinstance(observed, Trajectory):
        return observed
    stepper = observed.simulator if simulator is None else simulator
    if stepper is None:
        raise ValueError("This state is tied to no simulator; pass counterfactual(..., simulator=...).")
    frames = {name: observed[name][None] for name in observed.dynamic_fields}
    return Trajectory(initial=observed, frames=frames, active=observed.active[None], dt=stepper.dt)


def first_change(recorded: Trajectory, edits: Sequence[Intervention]) -> int:
    """Return the first recorded frame at which an intervention acts; the last frame, if none does before."""
    for step in range(recorded.num_steps):
        frame = recorded.frame(step)
        for edit in edits:
            acted = edit.applies(frame, step) if isinstance(edit, Edit) else edit(frame, step) is not frame
            if acted:
                return step
    return recorded.num_steps


def _first_other(given: Tensor | None, actions: Tensor | None) -> int:
    """Return the first step whose action is not the recorded one."""
    if actions is None:
        return torch.iinfo(torch.int64).max
    if given is None:
        return 0
    shared = min(len(given), len(actions))
    other = (given[:shared] != actions[:shared]).flatten(1).any(1).nonzero()
    return int(other[0, 0]) if len(other) else shared


def continued(
    recorded: Trajectory,
    step: int,
    simulator: Simulator | None,
    actions: Tensor | None,
    length: int,
    edits: Sequence[Intervention],
) -> Trajectory:
    """Return the recorded frames before `step`, then a rollout from that frame to `length` steps: one of the worlds.

    `actions` are those of all steps; kinematic entities move as recorded.
    """
    start = recorded.frame(step)
    stepper = start.simulator if simulator is None else simulator
    held = script(recorded, stepper.auxiliary if isinstance(stepper, LearnedSimulator) else ())
    left = None if actions is None else actions[step:]
    after = rollout(
        start, left, simulator=simulator, num_steps=length - step, interventions=[*held, *edits], first_step=step
    )
    if not step:
        return after
    for name in start.static_fields:
        if not torch.equal(after.initial[name], start[name]):
            raise ValueError(
                f"'{name}' is constant in time, and this intervention changes it at step {step}: ask of what was "
                f"observed from there on, observed.window({step}, {len(recorded)}), at step 0."
            )
    taken = None if actions is None or after.actions is None else torch.cat([actions[:step], after.actions])
    return replace(
        after,
        initial=recorded.initial,
        frames={name: torch.cat([recorded[name][:step], value]) for name, value in after.frames.items()},
        active=torch.cat([recorded.active[:step], after.active]),
        actions=taken,
    )


def branches(
    starts: Sequence[Trajectory | State],
    asked: Sequence[Sequence[Intervention] | Intervention],
    *,
    simulator: Simulator | None = None,
    num_steps: int | None = None,
    max_scenes: int = 256,
) -> list[Trajectory]:
    """Return what a simulator makes of each start under its own interventions, many as the scenes of one rollout.

    `starts` are single scenes, trajectories for their first frames, actions and kinematic entities; pair k is asked of
    `asked`[k]. At most `max_scenes` are rolled out together, which bounds the memory. Engines that remember more than
    states show are run uninterruptedly, as their `replay` does.

    Raises:
        ValueError: there are not as many sets of interventions as starts, an intervention waits for an event (ask
            `counterfactual` of each alone), or as `rollout` does.
    """
    if len(starts) != len(asked) or not starts or max_scenes < 1:
        raise ValueError(
            f"branches() takes a set of interventions for each start, and max_scenes of 1 or more; got {len(starts)} "
            f"starts, {len(asked)} sets and max_scenes={max_scenes}."
        )
    paths = [_as_trajectory(start, simulator) for start in starts]
    edits = [listed(one) for one in asked]
    found: list[Trajectory] = []
    for first in range(0, len(paths), max_scenes):
        some = slice(first, first + max_scenes)
        found += _branches(paths[some], edits[some], simulator, num_steps)
    return found


def _branches(
    paths: Sequence[Trajectory],
    asked: Sequence[Sequence[Intervention]],
    simulator: Simulator | None,
    num_steps: int | None,
) -> list[Trajectory]:
    _check_goes_on(min(paths, key=len), None, num_steps)
    steps = min(path.num_steps for path in paths) if num_steps is None else num_steps
    whole = Trajectory.cat([replace(path.window(0, min(len(path), steps + 1)), interventions=()) for path in paths])
    stepper = whole.initial.simulator if simulator is None else simulator
    held = script(whole, stepper.auxiliary if isinstance(stepper, LearnedSimulator) else ())
    edits = [*held, _InScenes(asked)]
    actions = None if whole.actions is None else whole.actions[:steps]
    if isinstance(stepper, Replaying):
        made = stepper.replay(whole.initial, actions, num_steps=steps, interventions=edits)
    else:
        made = rollout(whole.initial, actions, simulator=stepper, num_steps=steps, interventions=edits)
    said = [tuple(edit.to_json() for edit in edits if isinstance(edit, Edit)) for edits in asked]
    return [replace(path, interventions=done) for path, done in zip(made.scenes(), said, strict=True)]


class _InScenes(Edit):
    """Interventions of which each set acts on a scene of its own."""

    def __init__(self, asked: Sequence[Sequence[Intervention]]) -> None:
        waiting = [edit for edits in asked for edit in edits if isinstance(edit, Edit) and edit.event]
        if waiting:
            raise ValueError(
                f"Many worlds at once are asked about steps, not about the event {waiting[0].event}; ask "
                "counterfactual() of each alone."
            )
        self.asked = [list(edits) for edits in asked]

    def applies(self, state: State, step: int) -> bool:
        """Return whether any of the sets may act at a step."""
        edits = [edit for edits in self.asked for edit in edits]
        return any(not isinstance(edit, Edit) or edit.applies(state, step) for edit in edits)

    def __call__(self, state: State, step: int) -> State:
        """Return the state with each scene as its own set makes it."""
        made: dict[str, Tensor] = {}
        for number, edits in enumerate(self.asked):
            if not any(_acts(edit, state, step) for edit in edits):
                continue
            before = after = state.scene(number)
            for place, edit in enumerate(edits):
                if isinstance(edit, Edit) and edit.applies(after, step):
                    edits[place] = edit.begun(after, step)  # what is to be held is held to what it is here
                after = edits[place](after, step)
            _put(state, made, number, before, after)
        return state.replace(**made) if made else state

    def act(self, action: Tensor | None, state: State, step: int) -> Tensor | None:
        """Return the actions, those of each scene as its own set makes them."""
        acting = {
            number: [edit for edit in edits if _changes_actions(edit) and edit.applies(state, step)]
            for number, edits in enumerate(self.asked)
        }
        acting = {number: edits for number, edits in acting.items() if edits}
        if not acting:
            return action
        if action is None:
            return next(iter(acting.values()))[0].act(None, state, step)  # says what is missing
        per_scene = len(action) == state.num_scenes != state.num_entities
        changed = self._scaled(action, None if per_scene else state.batch, acting)
        for number, edits in acting.items():
            here = slice(number, number + 1) if per_scene else rows_between(state.batch, number)
            for edit in edits:
                scene = state.scene(number) if isinstance(edit.entities, Expression) else state
                changed[here] = cast(Tensor, edit.act(changed[here], scene, step))
        return changed

    @staticmethod
    def _scaled(action: Tensor, batch: Tensor | None, acting: dict[int, list[Do]]) -> Tensor:
        """Return a copy of the actions in which scenes that only multiply theirs have been seen to, all at once."""
        factors = [1.0] * (len(action) if batch is None else int(batch[-1]) + 1)
        for number, edits in list(acting.items()):
            rules = [edit.changes["actions"] for edit in edits if edit.entities is None]
            rule = rules[0] if len(rules) == len(edits) == 1 else None
            if isinstance(rule, Rule) and rule.verb == "scale" and isinstance(rule.amount, float):
                factors[number] = rule.amount
                del acting[number]
        by_scene = action.new_tensor(factors)
        by_row = by_scene if batch is None else by_scene[batch]
        return action * by_row.view(-1, *[1] * (action.ndim - 1))

    def to_json(self) -> dict[str, Any]:
        """Return all that the sets do."""
        return {"scenes": [[edit.to_json() for edit in edits if isinstance(edit, Edit)] for edits in self.asked]}


def _changes_actions(edit: Intervention) -> TypeGuard[Do]:
    return isinstance(edit, Do) and "actions" in edit.changes


def _acts(edit: Intervention, state: State, step: int) -> bool:
    """Return whether an intervention may change the state at a step."""
    if isinstance(edit, Do) and edit.changes.keys() == {"actions"}:
        return False
    return not isinstance(edit, Edit) or edit.applies(state, step)


def _put(state: State, made: dict[str, Tensor], number: int, before: State, after: State) -> None:
    """Put what became of a scene into the fields of all scenes that changed so far."""
    here = rows_between(state.batch, number)
    if after.active is not before.active:
        made.setdefault("active", state.active.clone())[here] = after.active
    for name in after:
        if after[name] is not before[name]:
            made.setdefault(name, state[name].clone())[state.rows_of(name, number, here)] = after[name]
