"""What of a recorded trajectory happens from outside: its context, who is moved by hand, appears and vanishes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.expressions import Expression
from simworld.intervene import Entities, chosen_rows, current_rows
from simworld.simulate import Edit
from simworld.state import State
from simworld.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Prescription(Edit):
    """What `prescribe` returns: some entities that follow a trajectory."""

    target: Trajectory
    rows: Tensor
    names: tuple[str, ...]

    def applies(self, state: State, step: int) -> bool:
        """Return whether it acts at a step."""
        return step < len(self.target) and bool(self.rows.numel())

    def __call__(self, state: State, step: int) -> State:
        """Return the state with its entities where the trajectory has them at the step."""
        if not self.applies(state, step):
            return state
        if state.num_entities != self.target.initial.num_entities:
            raise ValueError(
                f"prescribe() follows a trajectory of {self.target.initial.num_entities} entities; the state has "
                f"{state.num_entities}. Start from a frame of that trajectory."
            )
        made = {}
        for name in self.names:
            current = current_rows(state, name)
            wanted = (self.target.active if name == "active" else self.target[name])[step]
            here = self.rows.to(current.device)
            made[name] = current.index_copy(0, here, wanted.to(current)[here])
        return state.replace(**made)

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values, without the trajectory that is followed."""
        return {"prescribe": list(self.names), "entities": self.rows.tolist(), "steps": len(self.target)}


def prescribe(target: Trajectory, entities: Entities, *names: str) -> Prescription:
    """Return the intervention that moves some entities as a trajectory has it: at step t as in its frame t.

    `entities` are entity numbers or a mask of entities, the same in the state and in `target`; `names` are fields
    of the trajectory's frames, or `active`: positions and velocities, if none are named. Everything else is left
    to the simulator. After the last frame of `target`, and for no entities, the state itself is returned: what
    was prescribed is then moved as the simulator moves it, which is on at their velocity for kinematic particles.

    Raises:
        ValueError: `target` has no such quantity per entity, or no such entity; when applied, the state has
            other entities than `target`.
    """
    start = target.initial
    chosen, mask_size = chosen_rows(entities, "prescribe")
    rows = chosen.entities(start) if isinstance(chosen, Expression) else chosen
    assert rows is not None
    if mask_size not in (None, start.num_entities):
        raise ValueError(f"prescribe() got a mask of {mask_size} entities; the trajectory has {start.num_entities}.")
    names = names or ("positions", "velocities")
    known = ("active", *(name for name in start.moving_fields if name in target.frames))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"prescribe() takes what the trajectory has of each entity, {', '.join(known)}; got {unknown}."
        )
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < start.num_entities:
        raise ValueError(f"prescribe() got entities {rows.tolist()}; there are 0 to {start.num_entities - 1}.")
    return Prescription(target=target, rows=rows, names=names)


@dataclass(frozen=True, kw_only=True)
class Presence(Edit):
    """Entities appear and vanish as a trajectory has it: those that appear are where and what it has them to be."""

    target: Trajectory

    def applies(self, state: State, step: int) -> bool:
        """Return whether it acts at a step: some entity appears or vanishes."""
        active = self.target.active
        return 0 < step < len(self.target) and not torch.equal(active[step], active[step - 1])

    def __call__(self, state: State, step: int) -> State:
        """Return the state with those there that have just appeared, and without those that have just vanished."""
        if not self.applies(state, step):
            return state
        there, before = (self.target.active[k].to(state.active.device) for k in (step, step - 1))
        recorded, new = self.target.frame(step), there & ~before
        made = {"active": torch.where(there == before, state.active, there)}
        for name in (*state.moving_fields, *state.past_fields):
            if name in recorded and state.fields[name].per == "entity":
                wanted = recorded[name].to(state[name])
                made[name] = torch.where(new.view(-1, *[1] * (wanted.ndim - 1)), wanted, state[name])
        return state.replace(**made)

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values, without the trajectory that is followed."""
        changing = (self.target.active != self.target.active[0]).any(0)
        entities = changing.nonzero()[:, 0].tolist()
        return {"prescribe": ["active"], "entities": entities, "steps": len(self.target)}


@dataclass(frozen=True, kw_only=True)
class Surroundings(Edit):
    """Scenes are under the `context` that a trajectory has: where that changes from a frame to the next, it is set."""

    target: Trajectory

    def applies(self, state: State, step: int) -> bool:
        """Return whether it acts at a step: the context of some scene is another than a step before."""
        known = self.target["context"]
        return 0 < step < len(self.target) and not torch.equal(known[step], known[step - 1])

    def __call__(self, state: State, step: int) -> State:
        """Return the state with the context as recorded at the step, in scenes where it has just changed."""
        if not self.applies(state, step):
            return state
        now, before = (self.target["context"][k].to(state["context"]) for k in (step, step - 1))
        changed = (now != before).any(1, keepdim=True)
        return state.replace(context=torch.where(changed, now, state["context"]))

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values, without the trajectory that is followed."""
        return {"prescribe": ["context"], "steps": len(self.target)}


def script(target: Trajectory, but: Collection[str] = ()) -> tuple[Edit, ...]:
    """Return what of a trajectory happens from outside: its `context`, who is moved, and who appears and vanishes.

    Kinematic entities are given all fields `but` those that a simulator predicts of them, too: pressure at a wall, for
    example. Where there is nothing of the kind, nothing is returned.
    """
    start = target.initial
    edits: list[Edit] = [] if bool((target.active == target.active[0]).all()) else [Presence(target=target)]
    if "context" in target.frames and not torch.equal(target["context"][1:], target["context"][:-1]):
        edits.append(Surroundings(target=target))
    names = [name for name in start.moving_fields if name in target.frames and name not in but]
    if names and "kinematic" in start and bool(start.kinematic.any()):
        edits.append(prescribe(target, start.kinematic, *names))
    return tuple(edits)
