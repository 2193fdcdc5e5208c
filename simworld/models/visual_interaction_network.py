"""Visual Interaction Networks (Watters et al. 2017, arXiv 1706.01433): from six frames of a film to what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, get_args

import torch
from torch import Tensor

from simworld.fields import Field
from simworld.kinds import SlotState
from simworld.models.base import LearnedSimulator, Noise, check_sizes
from simworld.models.encoder import check_pictures
from simworld.models.slot_dynamics import Cores, Joined, Recurrent
from simworld.models.slot_eyes import FilmEyes, StateEyes
from simworld.state import State
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    from simworld.render.filming import View

Sight = Literal["films", "states"]
Dynamics = Literal["interactions", "alone", "lstm", "mlp"]
STATISTICS = ("centre", "spread", "velocity")
"""Mean of coordinates, their standard deviation, and the root mean square of velocities, in the data's units."""
RememberingSlots = SlotState.with_fields(memory=Field(unit="1", shape=("m",), per="scene"))
"""Slots, and what an LSTM remembers of the frames before them."""


class VisualInteractionNetwork(LearnedSimulator):
    """Objects seen in a film, as codes that interact.

    An encoder turns three frames that follow each other into a code for each object: the same convolutions over both
    pairs of frames with the coordinates of their pixels, then a network shared by objects over what both pairs gave.
    Cores at several temporal offsets each propose a change from the codes so many frames back, an aggregator makes
    one of them, and a linear decoder reads positions and velocities out of codes. Object k is in slot k by training
    alone, which tells the state of each: objects need something to tell them apart, such as `fixed_colors`.

    Unlike the paper's, which pools features down to one pixel, an object's features here are means over pixels by a
    map of weights of its own, along with the mean place (a soft arg max): some thousand steps of training suffice.

    The other choices are the paper's baselines. Dynamics: "interactions"; "alone", the same without pairs; "lstm"
    and "mlp" on the codes of all objects joined. With `sight` "states" codes are made from true states of single
    frames instead of films: positions, velocities, radii.
    """

    told = ("positions", "velocities")

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, float],
        num_objects: int = 3,
        sight: Sight = "films",
        dynamics: Dynamics = "interactions",
        image_size: int = 32,
        num_channels: int = 16,
        slot_size: int = 24,
        latent_size: int = 48,
        offsets: Sequence[int] = (1, 2, 4),
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `measure` returns for the training data. Films are `image_size` pixels wide and high, and
        the convolutions have `num_channels`. `offsets` say from how many
        frames back, 1 being the present, each core predicts.

        Raises:
            ValueError: a choice is unknown, a size is not a whole number above 0, or statistics lack a name.
        """
        arguments: dict[str, Any] = {
            "statistics": dict(statistics),
            "num_objects": num_objects,
            "sight": sight,
            "dynamics": dynamics,
            "image_size": image_size,
            "num_channels": num_channels,
            "slot_size": slot_size,
            "latent_size": latent_size,
            "offsets": list(offsets),
        }
        _check_arguments(arguments)
        super().__init__(dt, arguments)
        self.num_objects, self.image_size, self.slot_size = num_objects, image_size, slot_size
        self.sight, self.offsets, self.statistics = sight, tuple(offsets), dict(statistics)
        scales = {"centre": statistics["centre"], "spread": statistics["spread"], "step": dt * statistics["velocity"]}
        eyes = {"num_objects": num_objects, "slot_size": slot_size, "latent_size": latent_size}
        self.eyes: FilmEyes | StateEyes
        if sight == "films":
            self.eyes = FilmEyes(**eyes, image_size=image_size, num_channels=num_channels, scales=scales)
        else:
            self.eyes = StateEyes(slot_size=slot_size, latent_size=latent_size, statistics=statistics)
        joined = {"num_objects": num_objects, "slot_size": slot_size, "latent_size": 2 * latent_size}
        self.core: Cores | Joined | Recurrent
        if dynamics == "lstm":
            self.core = Recurrent(**joined)
        elif dynamics == "mlp":
            self.core = Joined(**joined, num_frames=max(offsets))
        else:
            self.core = Cores(slot_size, latent_size, self.offsets, related=dynamics == "interactions")
        self.decoder = torch.nn.Linear(slot_size, 4)

    @property
    def num_frames(self) -> int:
        """Number of frames that it must have seen: codes for the largest offset, from three frames each."""
        return max(self.offsets) + 2

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Any = "none"
    ) -> Mapping[str, float]:
        """Return the `statistics` of training data.

        Raises:
            ValueError: bodies are not in the plane, or something acts on them.
        """
        paths = list(trajectories)
        for path in paths:
            if path.actions is not None:
                raise ValueError("A VisualInteractionNetwork takes no actions; train it on recordings without.")
            if "positions" not in path.frames or path["positions"].shape[-1] != 2:
                raise ValueError(
                    "A VisualInteractionNetwork is told where bodies are in the plane; got "
                    f"{list(path['positions'].shape) if 'positions' in path.frames else 'no positions'}."
                )
        places, velocities = (torch.cat([p[k].flatten().double() for p in paths]) for k in ("positions", "velocities"))
        values = places.mean(), places.std(), velocities.square().mean().sqrt()
        return {name: float(value) for name, value in zip(STATISTICS, values, strict=True)}

    def encode(self, seen: View | Trajectory) -> Trajectory:
        """Return the codes of a film of `num_frames` frames or more, its first frame that of the last of these.

        For `sight` "films" a `View` (or a trajectory of filmed scenes, of equally many objects each), for "states" a
        trajectory with positions, velocities and radii.

        Raises:
            ValueError: the film has another size, too few frames or NaN; scenes have another number of objects.
        """
        codes = self._codes(seen)
        past, length = max(self.offsets) - 1, codes.shape[1]
        scenes = codes.shape[0]
        rows = codes.transpose(0, 1).flatten(1, 2)  # [t, b * n, s]
        batch = torch.arange(scenes, device=rows.device).repeat_interleave(self.num_objects)
        frames = {"slots": rows[past:]}
        active = torch.ones(length, scenes * self.num_objects, dtype=torch.bool, device=rows.device)
        if isinstance(seen, Trajectory):
            active = seen.active[len(seen) - length :]
        active = active[past:]
        values = {"slots": rows[past], "history": rows[:past].transpose(0, 1)}
        if not isinstance(self.core, Recurrent):
            return Trajectory(
                initial=SlotState(**values, batch=batch, active=active[0], simulator=self),
                frames=frames,
                active=active,
                dt=self.dt,
            )
        memories = [self.core.blank(codes[:, 0])]
        for t in range(length - 1):
            memories.append(self.core.remembering(codes[:, t], memories[-1]))
        frames["memory"] = torch.stack(memories[past:])
        state = RememberingSlots(**values, memory=memories[past], batch=batch, active=active[0], simulator=self)
        return Trajectory(initial=state, frames=frames, active=active, dt=self.dt)

    def watch(self, recorded: Trajectory, seen: Trajectory) -> Trajectory:
        """Return an episode from the last frame on that the model must see, its bodies with their codes.

        `seen` is what is encoded, all frames of it: `recorded` itself for `sight` "states", else the filmed one. A
        rollout of what is returned puts bodies where their codes say they are.

        Raises:
            ValueError: as `encode` does.
        """
        codes = self.encode(seen).to(recorded.initial.dtype)
        bodies = recorded.window(self.num_frames - 1, len(recorded))
        first, told = bodies.initial, codes.initial
        kind = type(first).with_fields(**{name: told.fields[name] for name in told})
        values = {name: part[name] for part in (first, told) for name in part}
        state = kind(**values, batch=first.batch, active=first.active, simulator=self)
        return replace(bodies, initial=state, frames={**bodies.frames, **codes.frames})

    def decode(self, states: State | Trajectory) -> tuple[Tensor, Tensor]:
        """Return the positions and velocities [..., n, 2] that the codes of a state or of all frames stand for."""
        return self.read(states["slots"])

    def read(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions and velocities [..., 2] that codes [..., s] stand for."""
        places, velocities = self.decoder(codes).split(2, -1)
        centre, spread, velocity = (self.statistics[name] for name in STATISTICS)
        return centre + spread * places, velocity * velocities

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError if the state is not one of this encoder's codes, or there are actions."""
        if action is not None:
            raise ValueError("A VisualInteractionNetwork takes no actions; roll out with num_steps alone.")
        past = max(self.offsets) - 1
        if "slots" not in state or "history" not in state:
            raise ValueError(
                "A VisualInteractionNetwork steps codes with their history; make them with encode(film).frame(0)."
            )
        shapes = list(state.slots.shape[1:]), list(state.history.shape[1:])
        if shapes != ([self.slot_size], [past, self.slot_size]):
            raise ValueError(
                f"This model's slots are [n, {self.slot_size}] with history [n, {past}, {self.slot_size}]; got rows of "
                f"{shapes[0]} and {shapes[1]}. Encode with the model that is to step them."
            )
        if isinstance(self.core, Recurrent) and "memory" not in state:
            raise ValueError("An LSTM needs the memory of a state; make one with encode(film).frame(0).")
        self._check_objects(state)

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return the change of codes [n, s] to the next frame."""
        there = state.active.view(-1, self.num_objects, 1)
        present = self._by_scene(state.slots) * there
        if isinstance(self.core, Recurrent):
            memory = self.core.remembering(present, state.memory)
            change: Tensor = self.core(present, memory)
            return change.flatten(0, 1)
        past = state.history.view(-1, self.num_objects, *state.history.shape[1:]).transpose(1, 2)
        codes = torch.cat([past * there[:, None], present[:, None]], 1)
        change = self.core(codes, there.to(codes))
        return change.flatten(0, 1)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: codes + change, the present ones at the end of the history, bodies as these say."""
        changes = {"slots": state.slots + change}
        if "positions" in state:
            changes["positions"], changes["velocities"] = self.read(changes["slots"])
        if isinstance(self.core, Recurrent):
            present = self._by_scene(state.slots) * state.active.view(-1, self.num_objects, 1)
            changes["memory"] = self.core.remembering(present, state.memory)
        return state.advanced(**changes)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the change of codes that leads to the next state's."""
        return next_state.slots - state.slots

    def free(self, state: State) -> Tensor:
        """Return which objects [n] change: active ones."""
        return state.active

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return self.decoder.weight.dtype

    def _by_scene(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.num_objects, *rows.shape[1:])

    def _codes(self, seen: View | Trajectory) -> Tensor:
        """Return the codes [b, t, n, s] of the third frame and those after it."""
        if isinstance(seen, Trajectory):
            self._check_objects(seen.initial)
        if len(seen) < self.num_frames:
            raise ValueError(
                f"This model must see {self.num_frames} frames before it predicts; got {len(seen)}. Give a longer film."
            )
        if isinstance(self.eyes, StateEyes):
            codes: Tensor = self.eyes(*self._states(seen))
            return codes[:, 2:]
        if isinstance(seen, Trajectory):
            if "rgb" not in seen.initial:
                raise ValueError(
                    "This model sees films; give a View, as film(trajectory, square_camera(size)) makes, or a filmed "
                    "trajectory, as filmed(trajectory, view) makes."
                )
            pictures = seen["rgb"].transpose(0, 1)
        else:
            shown = int(seen.masks.max()) if seen.masks.numel() else 0
            if shown > self.num_objects:  # fewer may be seen: bodies hide each other
                self._refuse(shown)
            pictures = seen.rgb[None] / 255
        if pictures.shape[2:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"This model sees films of {self.image_size} x {self.image_size} pixels in 3 colours; got "
                f"{list(pictures.shape[2:])}. Film with square_camera({self.image_size}), a recipe with size = "
                f"{self.image_size}."
            )
        check_pictures(pictures)
        return cast(Tensor, self.eyes(pictures.to(self.decoder.weight).permute(0, 1, 4, 2, 3)))

    def _states(self, seen: View | Trajectory) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions and velocities [b, T, n, 2] and radii [b, n, 1] of a trajectory."""
        if not isinstance(seen, Trajectory) or not {"positions", "velocities", "radii"} <= set(seen.initial):
            raise ValueError(
                "This model is told true states; give a trajectory with positions, velocities and radii, not a film."
            )
        moving = [
            self._by_scene(seen[name].transpose(0, 1)).transpose(1, 2).to(self.decoder.weight)
            for name in ("positions", "velocities")
        ]
        if not all(bool(torch.isfinite(part).all()) for part in moving):
            raise ValueError("True states must be finite; positions or velocities hold NaN or infinity.")
        return moving[0], moving[1], self._by_scene(seen.initial.radii[:, None]).to(self.decoder.weight)

    def _check_objects(self, state: State) -> None:
        counts = torch.bincount(state.batch, minlength=state.num_scenes)
        if bool((counts != self.num_objects).any()):
            self._refuse(int(counts[counts != self.num_objects][0]))

    def _refuse(self, found: int) -> NoReturn:
        raise ValueError(
            f"This model knows scenes of {self.num_objects} objects; got one of {found}. Choose scenes or train a "
            f"model with num_objects = {found}."
        )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, choices in (("sight", get_args(Sight)), ("dynamics", get_args(Dynamics))):
        if arguments[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {arguments[name]!r}.")
    check_sizes(arguments, "num_objects", "image_size", "num_channels", "slot_size", "latent_size")
    offsets = arguments["offsets"]
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in offsets)
    if not offsets or not whole or len(set(offsets)) != len(offsets):
        raise ValueError(f"offsets must be different whole numbers of frames, 1 or more; got {offsets}.")
    statistics = arguments["statistics"]
    sound = [k for k in STATISTICS if isinstance(statistics.get(k), int | float) and 0 < statistics[k] < float("inf")]
    missing = [name for name in STATISTICS if name not in sound]
    if missing:
        raise ValueError(
            f"statistics need {', '.join(missing)} as positive numbers; compute them with "
            "VisualInteractionNetwork.measure(trajectories)."
        )
