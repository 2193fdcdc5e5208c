"""What models of particles are told of each, and how the changes that they predict move them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simworld.models.base import LearnedSimulator, Noise, check_sizes, noise_by_field
from simworld.space import inside, wrapped
from simworld.state import State
from simworld.trajectory import Trajectory

Actions = Literal["input", "none"]
Statistics = dict[str, list[float]]
SMALLEST = 1e-12  # scale of what does not vary in the training data
BEYOND = "beyond_gravity"


class ParticleMotion(nn.Module):
    """Features of particles, and the rule that moves them by a predicted change of velocity and its inverse.

    It has no weights: it holds the `statistics` of the training data, which a checkpoint has among its arguments.
    """

    def __init__(self, arguments: Mapping[str, Any], *, wall_distance: float) -> None:
        """Take of a model's constructor arguments what is said of particles, among them `dt`.

        Particles are told how far walls are up to `wall_distance`, in the unit of positions.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        super().__init__()
        _check_arguments(arguments)
        self.dt, self.wall_distance = float(arguments["dt"]), float(wall_distance)
        self.num_dimensions: int = arguments["num_dimensions"]
        self.num_velocities: int = arguments["num_velocities"]
        self.num_particle_types: int = arguments["num_particle_types"]
        self.actions: Actions = arguments["actions"]
        self.further_fields: tuple[str, ...] = tuple(arguments["further_fields"])
        self.solid_walls: bool = arguments["solid_walls"]
        self.known_gravity: bool = arguments["known_gravity"]
        for name, values in arguments["statistics"].items():
            self.register_buffer(f"_{name}", torch.tensor(values, dtype=torch.float64), persistent=False)
        embedded = arguments["embedding_size"] if self.num_particle_types > 1 else 0
        further = sum(len(self.get_buffer(f"_{name}_rms")) for name in self._further)
        self.num_features = (self.num_velocities + 2) * self.num_dimensions + embedded + further

    @staticmethod
    def measure(trajectories: Iterable[Trajectory], noise_std: Noise = 0.0) -> Statistics:
        """Return by axis mean and standard deviation of velocities and their changes, and rms of further quantities.

        Where states have gravity, these include the changes beyond it. Noise that training will add to velocities
        enters in the standard deviations and there.

        Raises:
            ValueError: there are no steps with a particle that moves.
        """
        sums: dict[str, Tensor] = {}
        for trajectory in trajectories:
            for name, values in _samples(trajectory).items():
                rows = values.reshape(-1, values.shape[-1]).double()
                counts = rows.new_full((values.shape[-1],), len(rows))
                part = torch.stack([counts, rows.sum(0), rows.square().sum(0)])
                sums[name] = sums[name] + part if name in sums else part
        if "change" not in sums or not bool((sums["change"][0] > 0).all()):
            raise ValueError("Statistics need at least one trajectory of two frames with a particle that moves.")
        found: Statistics = {}
        noise = noise_by_field(noise_std).get("velocities", 0.0) ** 2
        for name, (count, total, squares) in sums.items():
            mean, second = total / count, squares / count
            if name in ("velocity", "change"):
                found[f"{name}_mean"] = mean.tolist()
                variance = (second - mean.square()).clamp(min=0) + noise
                found[f"{name}_std"] = variance.sqrt().clamp(min=SMALLEST).tolist()
            else:
                second = second + noise if name == BEYOND else second
                found[f"{name}_rms"] = torch.where(second > 0, second.sqrt(), 1.0).tolist()
        return found

    def check(self, model: str, dtype: torch.dtype, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what a model, by name, of given dtype needs and the state or action lacks."""
        if "positions" not in state or "velocities" not in state:
            raise ValueError(f"A {model} steps a ParticleState; got a {type(state).__name__}.")
        if state.positions.shape[1] != self.num_dimensions:
            raise ValueError(
                f"This model was made for positions [n, {self.num_dimensions}]; got {list(state.positions.shape)}."
            )
        if state.positions.dtype != dtype:
            raise ValueError(
                f"This model computes in {dtype}; got a state in {state.positions.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        past = state.history.shape[1] if "history" in state else 0
        if past < self.num_velocities - 1:
            raise ValueError(
                f"This model looks at {self.num_velocities} velocities, so it needs history [n, "
                f"{self.num_velocities - 1}, {self.num_dimensions}]; the state has {past}. Make it from earlier frames."
            )
        types = self.num_particle_types
        if types > 1 and not state.derived(
            f"particle types < {types}", ("particle_types",), lambda s: _all_below(s, types)
        ):
            raise ValueError(
                f"This model tells types of particles apart; give the state particle_types from 0 to {types - 1}, or "
                "make a model with num_particle_types=1."
            )
        if self.known_gravity and "gravity" not in state:
            raise ValueError(
                "This model adds gravity itself, so the state must say it; give it gravity [b, "
                f"{self.num_dimensions}] in m/s^2, zeros where there is none."
            )
        self._check_further(state)
        self._check_action(dtype, state, action)

    def _check_further(self, state: State) -> None:
        lacking = [name for name in self.further_fields if name not in state]
        if lacking:
            raise ValueError(f"This model was trained on states with {', '.join(lacking)}; give them to the state.")
        for name in self.further_fields:
            size, given = len(self.get_buffer(f"_{name}_rms")), state[name][0].numel()
            if given != size:
                raise ValueError(
                    f"This model was trained on {name} of {size} numbers; give these, the state has {given}."
                )

    def _check_action(self, dtype: torch.dtype, state: State, action: Tensor | None) -> None:
        if self.actions == "none":
            if action is not None:
                raise ValueError(
                    "This model was trained without actions; leave them out or train with actions='input'."
                )
            return
        size, counts = len(self.get_buffer("_action_rms")), (state.num_entities, state.num_scenes)
        if action is not None and (
            action.ndim != 2 or action.shape[1] != size or len(action) not in counts or action.dtype != dtype
        ):
            raise ValueError(
                f"This model takes an action of {size} numbers, {dtype}, per particle [{counts[0]}, {size}] or scene "
                f"[{counts[1]}, {size}]; got {list(action.shape)}, {action.dtype}."
            )

    def features(self, state: State, action: Tensor | None, embedding: nn.Embedding | None) -> Tensor:
        """Return [n, num_features]: velocity, distances to walls, past changes, type, further fields and action."""
        features = [self._scaled("velocity", state.velocities), self._wall_distances(state)]
        if self.num_velocities > 1:
            # In units of velocities, what they say of forces would be small, and slow to be found.
            known = torch.cat([state.history[:, 1 - self.num_velocities :], state.velocities[:, None]], 1)
            features.append(self._scaled("change", known.diff(dim=1)).flatten(1))
        if embedding is not None:
            features.append(embedding(state.particle_types))
        for name in self._further:
            values = action if name == "action" else state[name]
            scale = self.get_buffer(f"_{name}_rms").to(state.positions)
            if values is None:
                features.append(scale.new_zeros(state.num_entities, len(scale)))
                continue
            rows = values if len(values) == state.num_entities else values[state.batch]
            features.append(rows.reshape(state.num_entities, -1) / scale)
        return torch.cat(features, 1)

    def in_changes(self, velocities: Tensor) -> Tensor:
        """Return velocities [n, d] in units of the changes of a step: small differences between neighbours show."""
        return velocities / self.get_buffer("_change_std").to(velocities)

    def in_spreads(self, velocities: Tensor) -> Tensor:
        """Return velocities [n, d] in units of their standard deviations."""
        return velocities / self.get_buffer("_velocity_std").to(velocities)

    def in_outputs(self, state: State, changes: Tensor) -> Tensor:
        """Return changes of velocity [n, d] in units of the output."""
        return changes / self._expected(state)[1]

    def integrate(self, state: State, change: Tensor) -> State:
        """Return the next state: v' = v + expected + scale * change, x' = x + dt v'; kinematic ones keep velocities."""
        active, free = state.active[:, None], state.free[:, None]
        expected, scale = self._expected(state)
        velocities = torch.where(free, state.velocities + (change * scale + expected), state.velocities)
        positions = state.positions + self.dt * velocities
        if self.solid_walls:
            stopped = torch.where(free, inside(state, positions), positions)
            velocities = torch.where(stopped == positions, velocities, (stopped - state.positions) / self.dt)
            positions = stopped
        positions = torch.where(active, wrapped(state, positions), state.positions)
        return state.advanced(positions=positions, velocities=velocities)

    def target(self, state: State, next_state: State) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for what is not moved."""
        expected, scale = self._expected(state)
        change = (next_state.velocities - state.velocities - expected) / scale
        return torch.where(state.free[:, None], change, 0.0)

    @property
    def _further(self) -> tuple[str, ...]:
        return (*self.further_fields, *(("action",) if self.actions == "input" else ()))

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        mean, std = self._moments(name, values)
        return (values - mean) / std

    def _moments(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"_{name}_mean").to(like), self.get_buffer(f"_{name}_std").to(like)

    def _expected(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the change of velocity that is not learned, [n, d] or [d], and the unit [d] of what is."""
        if not self.known_gravity:
            return self._moments("change", state.velocities)
        rms = self.get_buffer(f"_{BEYOND}_rms").to(state.velocities)
        return self.dt * state.gravity[state.batch], rms

    def _wall_distances(self, state: State) -> Tensor:
        """Return [n, 2 d]: how far lower and upper walls are in units of `wall_distance`, at most 1, also for none."""
        if "boundaries" not in state:
            return state.positions.new_ones(state.num_entities, 2 * self.num_dimensions)
        lower, upper = state.boundaries[state.batch].unbind(1)
        distances = torch.cat([state.positions - lower, upper - state.positions], 1) / self.wall_distance
        distances = distances.clamp(-1, 1)
        if "periodic" not in state:
            return distances
        return torch.where(state.periodic[state.batch].repeat(1, 2), 1.0, distances)


class ParticleSimulator(LearnedSimulator):
    """What `GNS` and `NeuralMPM` share: a change of velocity that `motion` normalizes and applies."""

    motion: ParticleMotion

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Any = "none"
    ) -> dict[str, list[float]]:
        """Return `ParticleMotion.measure` of trajectories: all that is there to be told, so `actions` matter not.

        Raises:
            ValueError: there are no steps with a particle that moves.
        """
        return ParticleMotion.measure(trajectories, noise_std)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: v' = v + expected + scale * change, x' = x + dt v'; kinematic ones keep velocities."""
        return self.motion.integrate(state, change)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for what is not moved."""
        return self.motion.target(state, next_state)

    def free(self, state: State) -> Tensor:
        """Return which particles [n] the model moves: active and not kinematic."""
        return state.free

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return next(self.parameters()).dtype


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's `arguments` as plain values, as a checkpoint holds them."""
    further: str | Sequence[str] = arguments["further_fields"]
    return {
        **arguments,
        "statistics": {name: list(values) for name, values in arguments["statistics"].items()},
        "further_fields": [further] if isinstance(further, str) else list(further),
    }


def _samples(trajectory: Trajectory) -> dict[str, Tensor]:
    """Return [..., k] tensors of the quantities that the network takes and gives."""
    state, velocities = trajectory.initial, trajectory["velocities"]
    moving = trajectory.active & state.replace(active=torch.ones_like(state.active)).free
    changes, known = velocities.diff(dim=0), moving[1:] & moving[:-1]
    samples = {"velocity": velocities[moving], "change": changes[known]}
    if "gravity" in state:
        samples[BEYOND] = (changes - trajectory.dt * state.gravity[state.batch])[known]
    for name in state:
        field = state.fields[name]
        if name in ("positions", "velocities", "boundaries") or field.kind != "float" or field.past_of:
            continue
        if field.per in ("entity", "scene"):
            values = trajectory[name]
            samples[name] = values.reshape(*values.shape[: values.ndim - len(field.shape)], -1)
    if trajectory.actions is not None:
        samples["action"] = trajectory.actions
    return {name: values for name, values in samples.items() if values.numel()}


def _all_below(state: State, count: int) -> bool:
    if "particle_types" not in state:
        return False
    return bool(((state.particle_types >= 0) & (state.particle_types < count)).all())


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if arguments["actions"] not in get_args(Actions):
        raise ValueError(
            f"actions must be one of {', '.join(map(repr, get_args(Actions)))}; got {arguments['actions']!r}."
        )
    if arguments["num_dimensions"] not in (2, 3):
        raise ValueError(f"num_dimensions must be 2 or 3; got {arguments['num_dimensions']!r}.")
    check_sizes(arguments, "num_velocities", "num_particle_types", "embedding_size")
    statistics, size = arguments["statistics"], arguments["num_dimensions"]
    further = (*arguments["further_fields"], *(("action",) if arguments["actions"] == "input" else ()))
    named = {f"{name}_{which}": size for name in ("velocity", "change") for which in ("mean", "std")}
    named |= {f"{BEYOND}_rms": size} if arguments["known_gravity"] else {}
    missing = [k for k in (*named, *(f"{name}_rms" for name in further)) if k not in statistics]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}: actions, further_fields and known_gravity need data that tell "
            "these, as numbers of particles or scenes; measure(trajectories) of the model's class finds them there."
        )
    wrong = [name for name, count in named.items() if len(statistics[name]) != count]
    if wrong:
        raise ValueError(
            f"{wrong[0]} must have a number for each of {size} axes; got {statistics[wrong[0]]}. Say num_dimensions=3 "
            "of data in space, 2 of data in the plane."
        )
