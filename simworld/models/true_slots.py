"""A pass-through encoder: slots made of true states, so that dynamics can be judged apart from perception."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simworld.kinds import SlotState
from simworld.models.slot_tokens import places
from simworld.state import State
from simworld.trajectory import Trajectory

SEEN = ("positions", "radii", "colors")
"""What a perception of single frames could know of a body: no velocities, which follow from the history alone."""


@dataclass(frozen=True, kw_only=True)
class TrueSlots:
    """Slots that hold fields of bodies, side by side and normalized: one slot per body, in the body's row.

    `fields` are named in the order of the columns, `sizes` are how many columns each has. A value is less its
    column's `means` and in units of its field's `scales`, one for all columns, so that lengths stay comparable.
    `history_length` frames are known of each slot, the present one among them: frame 0 of an encoded trajectory is
    recorded frame `history_length` - 1. The default fields are those that single frames of a film show. Place and
    velocity of the body number `actor` of each scene are its proprioception, where one is named.
    """

    fields: tuple[str, ...]
    sizes: tuple[int, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    history_length: int
    actor: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.history_length, int) and self.history_length >= 1):
            raise ValueError(f"history_length counts frames, the present one too; got {self.history_length!r}.")
        if not self.fields or not len(self.fields) == len(self.sizes) == len(self.scales):
            raise ValueError(f"Slots hold one field or more, each with its size and scale; got {self.fields}.")

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory],
        *,
        fields: Sequence[str] = SEEN,
        history_length: int = 4,
        actor: int | None = None,
    ) -> TrueSlots:
        """Return the encoder whose means and scales are those of training data.

        Raises:
            ValueError: there are no trajectories, or they lack a field or hold no numbers in it.
        """
        samples: dict[str, list[Tensor]] = {name: [] for name in fields}
        for path in trajectories:
            for name in fields:
                samples[name].append(_columns(path, name)[path.active].double())
        if not fields or not samples[fields[0]]:
            raise ValueError("Slots need at least one trajectory and one field to be measured on; got none.")
        found = {name: torch.cat(values) for name, values in samples.items()}
        means = {name: values.mean(0) for name, values in found.items()}
        scales = [float((found[name] - means[name]).square().mean().sqrt()) for name in fields]
        return TrueSlots(
            fields=tuple(fields),
            sizes=tuple(values.shape[1] for values in found.values()),
            means=tuple(x for name in fields for x in means[name].tolist()),
            scales=tuple(scale if scale > 0 else 1.0 for scale in scales),
            history_length=history_length,
            actor=actor,
        )

    @property
    def slot_size(self) -> int:
        """Number of columns of a slot."""
        return sum(self.sizes)

    def encode(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory of slots [n, s] of recorded bodies, `history_length` - 1 frames shorter.

        Actions per scene are kept, with the past ones that the slots' history needs.

        Raises:
            ValueError: a field is missing, of another width or not finite, or the recording is too short.
        """
        before = self.history_length - 1
        if len(trajectory) <= before:
            raise ValueError(
                f"Slots with a history of {self.history_length} frames need a recording of as many; "
                f"got {len(trajectory)}. Record more frames or ask for a shorter history."
            )
        columns = [_columns(trajectory, name) for name in self.fields]
        for name, size, values in zip(self.fields, self.sizes, columns, strict=True):
            if values.shape[2] != size:
                raise ValueError(f"These slots hold {size} columns of {name}; the recording has {values.shape[2]}.")
        values = torch.cat(columns, 2)
        values = (values - values.new_tensor(self.means)) / values.new_tensor(self._stretched)
        first = trajectory.initial
        path = Trajectory(
            initial=SlotState(
                slots=values[before],
                history=values[:before].transpose(0, 1),
                batch=first.batch,
                active=trajectory.active[before],
            ),
            frames={"slots": values[before:]},
            active=trajectory.active[before:],
            dt=trajectory.dt,
            interventions=trajectory.interventions,
        )
        path = with_proprioception(under_actions(path, trajectory), trajectory, self.actor)
        path.check_finite()
        return path

    def encode_state(self, state: State, history: Sequence[State] = ()) -> SlotState:
        """Return the slots of one state, with those of the states before it, the oldest first, as history."""
        frames = [*history, state]
        moving = {name: torch.stack([frame[name] for frame in frames]) for name in state.dynamic_fields}
        active = torch.stack([frame.active for frame in frames])
        path = Trajectory(initial=frames[0], frames=moving, active=active, dt=1.0)
        made = replace(self, history_length=len(frames)).encode(path).initial
        assert isinstance(made, SlotState)
        return made

    def decode(self, slots: Tensor) -> dict[str, Tensor]:
        """Return the fields [..., size] that slots [..., s] stand for, in their units: the inverse of encoding."""
        if slots.shape[-1] != self.slot_size:
            raise ValueError(f"These slots have {self.slot_size} columns; got {list(slots.shape)}.")
        values = slots * slots.new_tensor(self._stretched) + slots.new_tensor(self.means)
        return dict(zip(self.fields, torch.split(values, list(self.sizes), dim=-1), strict=True))

    def bodies(self, slots: Trajectory, recorded: Trajectory) -> Trajectory:
        """Return the last frames of recorded bodies, as many as of slots, with the moving fields that these say."""
        path, told = recorded.window(len(recorded) - len(slots), len(recorded)), self.decode(slots["slots"])
        if "quats" in told:
            told["quats"] = torch.nn.functional.normalize(told["quats"], dim=-1)
        said = {name: value.to(path[name]).view_as(path[name]) for name, value in told.items() if name in path.frames}
        first = path.initial.replace(active=slots.active[0], **{name: value[0] for name, value in said.items()})
        return replace(path, initial=first, frames={**path.frames, **said}, active=slots.active)

    def to_json(self) -> dict[str, Any]:
        """Return the encoder as plain values, as checkpoints of models of its slots carry it."""
        return {"encoder": "true", **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}}

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> TrueSlots:
        """Return the encoder that `to_json` wrote.

        Raises:
            ValueError: it was another encoder that wrote it.
        """
        if said.get("encoder") != "true":
            raise ValueError(f"These are not slots of true states, but of the encoder {said.get('encoder')!r}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if k != "encoder"}
        return TrueSlots(**values)

    @property
    def _stretched(self) -> list[float]:
        return [scale for scale, size in zip(self.scales, self.sizes, strict=True) for _ in range(size)]


def under_actions(slots: Trajectory, recorded: Trajectory) -> Trajectory:
    """Return slots of the last frames of a recording with its actions, and the past ones that their history needs.

    Raises:
        ValueError: the actions are not per scene, as slots take them.
    """
    actions, before = recorded.actions, len(recorded) - len(slots)
    if actions is None:
        return slots
    if actions.shape[1] != slots.initial.num_scenes:
        raise ValueError(f"Slots go with actions [T, b, a] per scene; got {list(actions.shape)}.")
    past = _past(actions, before, len(slots))
    return replace(
        slots,
        initial=slots.initial.replace(past_actions=past[0]),
        frames={**slots.frames, "past_actions": past},
        actions=actions[before:],
    )


def with_proprioception(slots: Trajectory, recorded: Trajectory, actor: int | None) -> Trajectory:
    """Return slots of the last frames of a recording with what an actor knows of itself: its place and velocity.

    `actor` is the number of a body in its scene, or None for nobody.

    Raises:
        ValueError: a scene has no such body, or the recording no velocities.
    """
    if actor is None:
        return slots
    state, before = recorded.initial, len(recorded) - len(slots)
    rows = (places(state)[1] == actor).nonzero()[:, 0]
    if len(rows) != state.num_scenes or "velocities" not in recorded.frames:
        raise ValueError(
            f"An actor is a body of each scene, by its number, with a place and velocity; got actor={actor} and a "
            f"recording of {state.num_entities} bodies in {state.num_scenes} scenes with {', '.join(recorded.frames)}."
        )
    known = torch.cat([recorded["positions"][:, rows], recorded["velocities"][:, rows]], 2)
    now = {"proprioception": known[before:], "past_proprioception": _past(known, before, len(slots))}
    first = {name: values[0] for name, values in now.items()}
    return replace(slots, initial=slots.initial.replace(**first), frames={**slots.frames, **now})


def _past(values: Tensor, before: int, count: int) -> Tensor:
    """Return [count, b, before, k]: of each of some frames the values [T, b, k] of those before it."""
    return torch.stack([values[t : t + before] for t in range(count)]).transpose(1, 2)


def _columns(trajectory: Trajectory, name: str) -> Tensor:
    """Return a field of bodies at all frames as [T, n, k]."""
    state = trajectory.initial
    field = state.fields.get(name)
    if field is None or name not in state or field.per != "entity":
        known = ", ".join(k for k in state if state.fields[k].per == "entity")
        raise ValueError(f"Slots cannot hold '{name}': the recording has {known}. Name some of these.")
    values = trajectory[name]
    values = values.expand(len(trajectory), *values.shape) if field.static else values
    return values.to(state.dtype).reshape(len(trajectory), state.num_entities, -1)
