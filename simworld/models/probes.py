"""Linear probes: what slots say of positions and velocities, and interventions on what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.replacements import numbered
from simworld.simulate import Edit
from simworld.state import State
from simworld.trajectory import Trajectory

PROBED = ("positions", "velocities")
LEAST = 1e-6  # singular values, relative to the largest, below which columns of slots say nothing of their own
MISSED = 1e-4  # of the asked change: what a set attribute may miss


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Attributes as linear functions of a slot and its history: weights [h s + s, d], the slot's last, and biases [d].

    `sizes` are how many columns each attribute has, in the order of the columns.
    """

    weights: Tensor
    biases: Tensor
    sizes: Mapping[str, int]
    num_frames: int

    @staticmethod
    def fit(
        encoded: Sequence[Trajectory],
        recorded: Sequence[Trajectory],
        *,
        names: Sequence[str] = PROBED,
        num_frames: int = 2,
    ) -> Probe:
        """Return the probe with the least squared error over all frames of training episodes.

        `encoded` are trajectories of slots, `recorded` those of the bodies they are of, row for row, whose last frames
        are the slots'. It reads the present slot and the `num_frames` - 1 before it.

        Raises:
            ValueError: there are no episodes, they do not belong together, or slots have too short a history.
        """
        if not encoded or len(encoded) != len(recorded):
            raise ValueError(
                f"A probe is fitted on as many encoded as recorded episodes; got {len(encoded)}, {len(recorded)}."
            )
        inputs, wanted = [], []
        for slots, bodies in zip(encoded, recorded, strict=True):
            before = len(bodies) - len(slots)
            if slots.initial.num_entities != bodies.initial.num_entities or before < 0:
                raise ValueError(
                    f"Slots [{len(slots)}, {slots.initial.num_entities}] are not those of bodies "
                    f"[{len(bodies)}, {bodies.initial.num_entities}]; give them in the same order."
                )
            seen = slots.active
            inputs.append(_inputs(slots, num_frames)[seen].double())
            wanted.append(torch.cat([bodies[name][before:] for name in names], 2)[seen].double())
        x, y = torch.cat(inputs), torch.cat(wanted)
        x_mean, y_mean = x.mean(0), y.mean(0)
        # Static columns repeat from frame to frame: the least squares of least length, which spread weights evenly.
        weights = torch.linalg.pinv(x - x_mean, rtol=LEAST) @ (y - y_mean)
        sizes = {name: int(recorded[0][name].shape[2]) for name in names}
        return Probe(weights=weights, biases=y_mean - x_mean @ weights, sizes=sizes, num_frames=num_frames)

    def read(self, trajectory: Trajectory) -> dict[str, Tensor]:
        """Return the attributes [T, n, k] that the slots of a trajectory tell, in the units they were fitted in."""
        x = _inputs(trajectory, self.num_frames)
        made = x @ self.weights.to(x) + self.biases.to(x)
        return dict(zip(self.sizes, torch.split(made, list(self.sizes.values()), dim=2), strict=True))

    def read_state(self, state: State) -> dict[str, Tensor]:
        """Return the attributes [n, k] of the slots of a state."""
        x = _state_inputs(state, self.num_frames)
        made = x @ self.weights.to(x) + self.biases.to(x)
        return dict(zip(self.sizes, torch.split(made, list(self.sizes.values()), dim=1), strict=True))

    def columns(self, name: str) -> slice:
        """Return which columns of weights and biases an attribute has."""
        if name not in self.sizes:
            raise ValueError(f"This probe reads {', '.join(self.sizes)}; got '{name}'.")
        names = list(self.sizes)
        start = sum(self.sizes[one] for one in names[: names.index(name)])
        return slice(start, start + self.sizes[name])


def probe_errors(probe: Probe, encoded: Sequence[Trajectory], recorded: Sequence[Trajectory]) -> dict[str, float]:
    """Return the mean distance between probed and true attributes, over all frames and bodies there."""
    sums, count = dict.fromkeys(probe.sizes, 0.0), 0
    for slots, bodies in zip(encoded, recorded, strict=True):
        before = len(bodies) - len(slots)
        for name, made in probe.read(slots).items():
            missed = (made.double() - bodies[name][before:].double()).norm(dim=2)
            sums[name] += float(missed[slots.active].sum())
        count += int(slots.active.sum())
    return {name: total / count for name, total in sums.items()}


def set_probed(
    probe: Probe, name: str, value: Sequence[float] | Tensor, *, entities: Sequence[int] | int, at: int = 0
) -> SetProbed:
    """Return the intervention that moves slots so that a probe reads `value` of them, and all else it reads as before.

    `value` is [k], or [n, k] with a row for each of `entities`. Slots and the frames of their history that the probe
    reads move by the least squares that do so, frames before these by as much as the first of them: a probe of a single
    frame leaves speeds as they are.

    Raises:
        ValueError: the probe does not read the attribute, or the value has another shape; when applied, there is no
            such slot, or the attribute cannot be set without changing another.
    """
    wanted = torch.as_tensor(value, dtype=torch.float64)
    if (
        wanted.ndim == 0
        or wanted.shape[-1] != probe.sizes.get(name, wanted.shape[-1])
        or not bool(wanted.isfinite().all())
    ):
        raise ValueError(f"{name} is set to {probe.sizes.get(name)} finite numbers; got {value!r}.")
    probe.columns(name)
    rows = numbered(entities, "set_probed")
    if len(set(rows.tolist())) != len(rows):
        raise ValueError(f"set_probed() takes different slots; got {rows.tolist()}.")
    if wanted.ndim > 2 or (wanted.ndim == 2 and len(wanted) != len(rows)):
        raise ValueError(
            f"{name} of {len(rows)} slots are set to one row for all or {len(rows)}; got {list(wanted.shape)}."
        )
    return SetProbed(probe, name, wanted, tuple(rows.tolist()), at)


class SetProbed(Edit):
    """What `set_probed` returns."""

    def __init__(self, probe: Probe, name: str, value: Tensor, entities: tuple[int, ...], at: int) -> None:
        self.probe, self.name, self.value, self.entities, self.at = probe, name, value, entities, at
        self.changes_past = at != 0

    def applies(self, state: State, step: int) -> bool:
        """Return whether this is the step."""
        return step == self.at

    def __call__(self, state: State, step: int) -> State:
        """Return the state with moved slots; the state itself at other steps."""
        if step != self.at:
            return state
        wrong = [k for k in self.entities if not 0 <= k < state.num_entities]
        if wrong:
            raise ValueError(f"There are slots 0 to {state.num_entities - 1} to set {self.name} of; got {wrong[0]}.")
        rows = torch.tensor(self.entities, device=state.device)
        here = self.probe.columns(self.name)
        read = self.probe.read_state(state)[self.name][rows].double()
        asked = torch.zeros(len(rows), len(self.probe.biases), dtype=torch.float64, device=state.device)
        asked[:, here] = self.value.to(read) - read
        weights = self.probe.weights.double().to(state.device)
        moved = asked @ torch.linalg.pinv(weights, rtol=LEAST)
        if float((moved @ weights - asked).detach().abs().max()) > MISSED * float(
            asked.detach().abs().max().clamp(min=1e-12)
        ):
            others = ", ".join(name for name in self.probe.sizes if name != self.name)
            raise ValueError(
                f"These slots cannot have other {self.name} without other {others}; use a probe of one alone."
            )
        by_frame = moved.reshape(len(rows), self.probe.num_frames, -1).to(state.slots)
        changes = {"slots": state.slots.index_add(0, rows, by_frame[:, -1])}
        if "history" in state:
            before = state.history.shape[1] - (self.probe.num_frames - 1)
            moves = torch.cat([by_frame[:, :1].expand(-1, before, -1), by_frame[:, :-1]], 1)
            changes["history"] = state.history.index_add(0, rows, moves)
        return state.replace(**changes)

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values."""
        value = self.value.tolist()
        return {"set_probed": self.name, "value": value, "entities": list(self.entities), "at": self.at}


def _inputs(trajectory: Trajectory, num_frames: int) -> Tensor:
    """Return [T, n, num_frames s]: slots of each frame behind those of the frames before it."""
    states = trajectory.as_scenes()
    made = _state_inputs(states, num_frames)
    return made.reshape(len(trajectory), trajectory.initial.num_entities, -1)


def _state_inputs(state: State, num_frames: int) -> Tensor:
    known = state.history.shape[1] if "history" in state else 0
    if known < num_frames - 1:
        raise ValueError(f"This probe reads {num_frames} frames of a slot; the state has {known + 1}.")
    if num_frames == 1:
        return state.slots
    return torch.cat([state.history[:, known - (num_frames - 1) :], state.slots[:, None]], 1).flatten(1)
