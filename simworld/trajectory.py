"""What happened to a state: its trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simworld.state import State, cast_tensor, cat_rows, rows_between

UNMIRRORED = ("quats", "angular_velocities", "outlines", "covars", "harmonics", "slots")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What happened to a state: frame 0 is `initial`, frame t is t steps of `dt` seconds later.

    `frames` holds [T, ...] tensors: the dynamic fields of the state, or whatever `rollout` was asked to
    observe; past fields only where other frames do not tell them. `active` is [T, n]. `actions` [T - 1, ...],
    where known, took each frame to the next. `interventions` tell, as plain values, what was done to it on the way.
    """

    initial: State
    frames: Mapping[str, Tensor]
    active: Tensor
    dt: float
    actions: Tensor | None = None
    interventions: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.dt, int | float) and 0 < self.dt < float("inf")):
            raise ValueError(f"dt must be a positive number of seconds; got {self.dt!r}.")
        if self.active.ndim != 2 or not len(self.active):
            raise ValueError(f"active must be [frames, entities] with a frame or more; got {list(self.active.shape)}.")
        for name, value in self.frames.items():
            if value.shape[:1] != self.active.shape[:1]:
                raise ValueError(
                    f"'{name}' has {value.shape[0]} frames where 'active' has {len(self)}; give equally many."
                )
            if name in self.initial and value.shape[1:] != self.initial[name].shape:
                raise ValueError(
                    f"'{name}' must have shape {[len(self), *self.initial[name].shape]}, as in the initial state; "
                    f"got {list(value.shape)}. A body that comes or goes keeps its row; say so by active [T, n]."
                )
        if self.actions is not None and len(self.actions) != len(self) - 1:
            raise ValueError(
                f"A trajectory of {len(self)} frames has {len(self) - 1} actions between them; got {len(self.actions)}."
            )

    def __len__(self) -> int:
        return int(self.active.shape[0])

    def __getitem__(self, name: str) -> Tensor:
        """Return a quantity at all frames, [T, ...]; static fields come as they are, without a time axis."""
        if not isinstance(name, str):
            raise TypeError(
                f"A trajectory has quantities by name; got {name!r}. Take frame({name!r}) for a state, or put the "
                "trajectory in a list, [trajectory], where several are expected."
            )
        if name in self.frames:
            return self.frames[name]
        if name in self.initial and self.initial.fields[name].static:
            return self.initial[name]
        if name in self.initial.past_fields:
            return self._pasts(name, 0, len(self))
        raise KeyError(
            f"This trajectory has no '{name}'; it has {', '.join([*self.frames, *self.initial.static_fields])}."
        )

    @property
    def num_steps(self) -> int:
        """Number of steps between the first frame and the last."""
        return len(self) - 1

    def frame(self, index: int) -> State:
        """Return the state at frame `index`; negative numbers count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"The trajectory has frames 0 to {len(self) - 1}; got {index}.")
        missing = [name for name in self.initial.dynamic_fields if name not in self.frames]
        if missing:
            raise KeyError(
                f"Frames were kept without {', '.join(missing)}; roll out without `observe` to get states back."
            )
        changes = {name: self.frames[name][index] for name in self.initial.dynamic_fields}
        index %= len(self)
        changes |= {name: self._pasts(name, index, index + 1)[0] for name in self.initial.past_fields}
        return self.initial._like({**self.initial._values, **changes}, active=self.active[index])

    def _pasts(self, name: str, start: int, stop: int) -> Tensor:
        """Return [stop - start, n, h, ...]: a past field at some frames, from the first frame's and what came since."""
        if name in self.frames:
            return self.frames[name][start:stop]
        first, present = self.initial[name], self.frames[self.initial.fields[name].past_of]
        length = first.shape[1]
        known = torch.cat([first[:, start:].transpose(0, 1), present[max(0, start - length) : stop - 1]])
        return torch.stack([known[t : t + length] for t in range(stop - start)]).transpose(1, 2)

    def window(self, start: int, stop: int) -> Trajectory:
        """Return frames `start` to `stop` - 1, with the actions between them."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"A window of frames 0 to {len(self)} needs 0 <= start < stop; got {start} and {stop}.")
        return Trajectory(
            initial=self.frame(start),
            frames={name: value[start:stop] for name, value in self.frames.items()},
            active=self.active[start:stop],
            dt=self.dt,
            actions=None if self.actions is None else self.actions[start : stop - 1],
            interventions=self.interventions,
        )

    def with_mean_velocities(self) -> Trajectory:
        """Return the trajectory from its second frame on, with velocities (x_t - x_(t-1)) / dt: means over a step.

        Some models take these where an engine records its own, of an instant, or none are recorded.

        Raises:
            ValueError: there is a single frame, or states without positions, that know no velocities or have a past.
        """
        state = self.initial
        lacking = "positions" not in self.frames or "velocities" not in state.fields
        if lacking or len(self) < 2 or any(state.fields[name].past_of == "velocities" for name in state.past_fields):
            raise ValueError(
                "Mean velocities are of two frames or more of positions, without a history; this "
                f"trajectory has {len(self)} frames of {', '.join([*self.frames, *state.past_fields])}."
            )
        rest = self.window(1, len(self))
        means = self.frames["positions"].diff(dim=0) / self.dt
        initial = rest.initial.replace(velocities=means[0])
        return replace(rest, initial=initial, frames={**rest.frames, "velocities": means})

    def mirrored(self, axis: int | Sequence[int]) -> Trajectory:
        """Return the trajectory as a mirror through the origin shows it.

        The mirror is across an axis of space, along which vectors change sign, or in the diagonal plane between two,
        whose parts it exchanges. Actions [t, n, d] are vectors too, forces for example; `stresses` are tensors in the
        order of `MeshState`. Rest positions of another dimension than space's are not in space and stay.

        Raises:
            ValueError: there is no such axis, or what a mirror makes of some of it is not known: rotations, outlines,
                stresses and actions of other sizes, fields of one's own that may be vectors but do not say so ("d").
        """
        state = self.initial
        spatial = [name for name in state if state.fields[name].shape[-1:] in (("d",), ("e",))]
        size = max((state[name].shape[-1] for name in spatial), default=0)
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if len(axes) not in (1, 2) or len({*axes}) < len(axes) or not all(0 <= one < size for one in axes):
            raise ValueError(f"A mirror is at one of the axes of space, 0 and up, or between two of them; got {axis}.")
        own = [
            k for k in state if state.fields[k].shape == (size,) and state.fields[k].kind == "float" and k != "colors"
        ]
        unknown = [*(name for name in state if name in UNMIRRORED), *own]
        if "stresses" in state and state["stresses"].shape[-1] != size * (size + 1) / 2:
            unknown.append("stresses")
        if self.actions is not None and self.actions.shape[1:] != (state.num_entities, size):
            unknown.append("actions")
        if unknown:
            raise ValueError(f"What a mirror makes of {', '.join(unknown)} is not known; leave the mirror out.")
        turned = {name for name in spatial if state[name].shape[-1] == size} | {"stresses"}
        shown = partial(_shown, axes=axes, size=size)
        initial = state.replace(**{name: shown(name, state[name]) for name in state if name in turned})
        frames = {name: shown(name, values) if name in turned else values for name, values in self.frames.items()}
        actions = None if self.actions is None else shown("actions", self.actions)
        return replace(self, initial=initial, frames=frames, actions=actions)

    def as_scenes(self, stop: int | None = None) -> State:
        """Return the frames before `stop` as the scenes of one state: frame 0 of all scenes, frame 1, ..."""
        count = len(self) if stop is None else stop
        if not 1 <= count <= len(self):
            raise ValueError(f"The trajectory has {len(self)} frames to make scenes of; got stop={stop}.")
        copies = self.initial.repeat(count)
        changes = {name: self.frames[name][:count].flatten(0, 1) for name in self.initial.dynamic_fields}
        changes |= {name: self._pasts(name, 0, count).flatten(0, 1) for name in self.initial.past_fields}
        return copies._like({**copies._values, **changes}, active=self.active[:count].flatten())

    def scenes(self) -> list[Trajectory]:
        """Return the scenes as trajectories of their own: the inverse of `cat`."""
        owners = {name: field.per for name, field in self.initial.fields.items()}
        odd = [k for k in self.frames if owners.get(k) not in ("entity", "scene")]
        if odd:
            raise ValueError(f"A trajectory is split by entities and scenes; {', '.join(odd)} has other rows.")
        per_scene = self.actions is not None and self.actions.shape[1] != self.initial.num_entities
        found = []
        for number in range(self.initial.num_scenes):
            bodies, scene = rows_between(self.initial.batch, number), slice(number, number + 1)
            rows = {"entity": bodies, "scene": scene}
            acted = None if self.actions is None else self.actions[:, scene if per_scene else bodies]
            frames = {name: value[:, rows[owners[name]]] for name, value in self.frames.items()}
            initial, active = self.initial.scene(number), self.active[:, bodies]
            found.append(replace(self, initial=initial, frames=frames, active=active, actions=acted))
        return found

    def check_finite(self) -> None:
        """Raise a ValueError that names the quantity and the first frame with NaN or infinity."""
        quantities = {**self.frames, **({} if self.actions is None else {"actions": self.actions})}
        for name, value in quantities.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                frame = int((~torch.isfinite(value)).nonzero()[0, 0])
                raise ValueError(f"{name} must be finite; frame {frame} holds NaN or infinity. Repair or drop it.")

    def to(self, *args: Any) -> Trajectory:
        """Return this trajectory on another device, or its floating-point values in another dtype."""
        initial = self.initial.to(*args)
        return Trajectory(
            initial=initial,
            frames={name: cast_tensor(value, *args) for name, value in self.frames.items()},
            active=self.active.to(initial.device),
            dt=self.dt,
            actions=None if self.actions is None else cast_tensor(self.actions, *args),
            interventions=self.interventions,
        )

    @staticmethod
    def cat(trajectories: Sequence[Trajectory]) -> Trajectory:
        """Return one trajectory with the scenes of all; they must have equal length, step and fields."""
        if not trajectories:
            raise ValueError("Trajectory.cat needs at least one trajectory, got none.")
        first = trajectories[0]
        for other in trajectories:
            if (len(other), other.dt, set(other.frames)) != (len(first), first.dt, set(first.frames)):
                raise ValueError("Trajectories to join must have the same number of frames, dt and quantities.")
        states = [t.initial for t in trajectories]
        known = [t.actions for t in trajectories if t.actions is not None]
        return Trajectory(
            initial=type(first.initial).cat(states),
            frames={
                k: cat_rows(states, k, [t.frames[k] for t in trajectories], dim=1)
                if k in first.initial.fields
                else torch.cat([t.frames[k] for t in trajectories], dim=1)
                for k in first.frames
            },
            active=torch.cat([t.active for t in trajectories], dim=1),
            dt=first.dt,
            actions=torch.cat(known, dim=1) if len(known) == len(trajectories) else None,
            interventions=first.interventions
            if all(t.interventions == first.interventions for t in trajectories)
            else (),
        )


def _shown(name: str, values: Tensor, axes: tuple[int, ...], size: int) -> Tensor:
    """Return what a mirror makes of vectors, tensors of stress or boundaries; flags of axes have no sign."""
    order, signs = torch.arange(size), torch.ones(size)
    if len(axes) == 2:
        order[list(axes)] = order[list(axes[::-1])]
    else:
        signs[axes[0]] = -1
    if name == "stresses":
        parts = [(i, i) for i in range(size)] + [(i, j) for i in range(size) for j in range(i + 1, size)]
        places = [sorted((int(order[i]), int(order[j]))) for i, j in parts]
        signs = torch.stack([signs[i] * signs[j] for i, j in parts])
        order = torch.tensor([parts.index((i, j)) for i, j in places])
    values = values[..., order.to(values.device)]
    if not values.is_floating_point():
        return values
    signs = signs.to(values)
    values = values * signs
    if name == "boundaries":  # the upper wall is the lower one now
        values = torch.where(signs < 0, values.flip(-2), values)
    return values
