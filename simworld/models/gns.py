"""Graph Network-based Simulators of particles (Sanchez-Gonzalez et al. 2020, arXiv 2002.09405)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simworld.graph import particle_edges
from simworld.kernels.neighbors import NeighborPairs, room
from simworld.models.base import LearnedSimulator, Noise, noise_by_field
from simworld.models.graph_network import EncodeProcessDecode
from simworld.space import inside, shortest, wrapped
from simworld.state import State
from simworld.trajectory import Trajectory

Actions = Literal["input", "none"]
Statistics = dict[str, list[float]]
SMALLEST = 1e-12  # scale of what does not vary in the training data
BEYOND = "beyond_gravity"


class GNS(LearnedSimulator):
    """Particles that act on their neighbours, as a graph network that encodes, processes and decodes.

    A particle is told its last velocities, how far the walls are and its type; an edge between particles nearer
    than `connectivity_radius` the way between them. The output is the change of velocity in units of its
    standard deviation about its mean, and v' = v + change, x' = x + dt v', wrapped along periodic axes. Of the
    velocities the last is told as it is and the others as the changes that led to it, in units of changes.

    With `known_gravity` what gravity g of the state does is added, not learned: the output is the rest of the change
    in units of its rms, and v' = v + dt g + rms * output, so that no output is a free fall. What lies still then needs
    an answer to gravity, which the network can give where `further_fields` tell it "gravity".

    Kinematic particles are seen and not moved: they go on at their velocity, or as interventions set them.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Sequence[float]],
        connectivity_radius: float,
        num_dimensions: int = 2,
        num_velocities: int = 5,
        num_particle_types: int = 9,
        embedding_size: int = 16,
        latent_size: int = 128,
        num_message_passing_steps: int = 10,
        num_hidden_layers: int = 2,
        actions: Actions = "none",
        further_fields: tuple[str, ...] = (),
        relative_velocities: bool = False,
        solid_walls: bool = False,
        known_gravity: bool = False,
        backend: str | None = None,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `GNS.measure` returns for the training data. `connectivity_radius` is in the unit of
        positions. `num_velocities` counts the present one and those of the state's `history`. `actions` [n, a] or
        [b, a], forces for example, are features if "input", no action being zeros; so are the `further_fields` of
        the state, by particle (masses, materials) or scene (gravity, context). `backend` is that of the message
        passing; all compute the same. Three choices go beyond the paper: with `relative_velocities` edges are told
        these too, with `solid_walls` what would leave the box stops at its wall, `known_gravity` is said above.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        arguments: dict[str, Any] = {
            "statistics": {name: list(values) for name, values in statistics.items()},
            "connectivity_radius": connectivity_radius,
            "num_dimensions": num_dimensions,
            "num_velocities": num_velocities,
            "num_particle_types": num_particle_types,
            "embedding_size": embedding_size,
            "latent_size": latent_size,
            "num_message_passing_steps": num_message_passing_steps,
            "num_hidden_layers": num_hidden_layers,
            "actions": actions,
            "further_fields": [further_fields] if isinstance(further_fields, str) else list(further_fields),
            "relative_velocities": relative_velocities,
            "solid_walls": solid_walls,
            "known_gravity": known_gravity,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.connectivity_radius, self.num_dimensions = float(connectivity_radius), num_dimensions
        self.num_velocities, self.num_particle_types = num_velocities, num_particle_types
        self.latent_size, self.num_message_passing_steps = latent_size, num_message_passing_steps
        self.actions, self.further_fields = actions, tuple(arguments["further_fields"])
        self.relative_velocities, self.solid_walls = relative_velocities, solid_walls
        self.known_gravity = known_gravity
        for name, values in arguments["statistics"].items():
            self.register_buffer(f"_{name}", torch.tensor(values, dtype=torch.float64), persistent=False)
        further = sum(len(statistics[f"{name}_rms"]) for name in self._further)
        typed = embedding_size if num_particle_types > 1 else 0
        self.embedding = nn.Embedding(num_particle_types, embedding_size) if typed else None
        self.network = EncodeProcessDecode(
            (num_velocities + 2) * num_dimensions + typed + further,
            num_dimensions * (1 + relative_velocities) + 1,
            num_dimensions,
            latent_size,
            num_message_passing_steps,
            num_hidden_layers,
            backend=backend,
        )

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Any = "none"
    ) -> dict[str, list[float]]:
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

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        if "positions" not in state or "velocities" not in state:
            raise ValueError(f"A GNS steps a ParticleState; got a {type(state).__name__}.")
        if state.positions.shape[1] != self.num_dimensions:
            raise ValueError(
                f"This model was made for positions [n, {self.num_dimensions}]; got {list(state.positions.shape)}."
            )
        if state.positions.dtype != self.dtype:
            raise ValueError(
                f"This model computes in {self.dtype}; got a state in {state.positions.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        past = state.history.shape[1] if "history" in state else 0
        if past < self.num_velocities - 1:
            raise ValueError(
                f"This model looks at {self.num_velocities} velocities, so it needs history [n, "
                f"{self.num_velocities - 1}, {self.num_dimensions}]; the state has {past}. Make it from earlier frames."
            )
        types = self.num_particle_types
        if self.embedding is not None and not state.derived(
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
        lacking = [name for name in self.further_fields if name not in state]
        if lacking:
            raise ValueError(f"This model was trained on states with {', '.join(lacking)}; give them to the state.")
        for name in self.further_fields:
            size, given = len(self.get_buffer(f"_{name}_rms")), state[name][0].numel()
            if given != size:
                raise ValueError(
                    f"This model was trained on {name} of {size} numbers; give these, the state has {given}."
                )
        self._check_action(state, action)

    def _check_action(self, state: State, action: Tensor | None) -> None:
        if self.actions == "none":
            if action is not None:
                raise ValueError(
                    "This model was trained without actions; leave them out or train with actions='input'."
                )
            return
        size = len(self.get_buffer("_action_rms"))
        if action is not None and (action.ndim != 2 or action.shape[1] != size or action.dtype != self.dtype):
            raise ValueError(
                f"This model takes an action of {size} numbers, {self.dtype}, per particle or scene; "
                f"got {list(action.shape)}, {action.dtype}."
            )

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, d]: the normalized change of velocity, or of what gravity leaves of it; zero for what stays."""
        kept = self.num_message_passing_steps + 1 if torch.is_grad_enabled() else 1
        edge_bytes = 2 * kept * self.latent_size * state.positions.element_size()
        edges = particle_edges(state, self.connectivity_radius, max_edges=room(state.device, edge_bytes))
        nodes = torch.cat(self._node_features(state, action), 1)
        change: Tensor = self.network(nodes, [self._edge_features(state, edges)], [edges])
        return torch.where(self.free(state)[:, None], change, 0.0)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: v' = v + expected + scale * change, x' = x + dt v'; kinematic ones keep velocities."""
        active, free = state.active[:, None], self.free(state)[:, None]
        expected, scale = self._expected(state)
        velocities = torch.where(free, state.velocities + (change * scale + expected), state.velocities)
        positions = state.positions + self.dt * velocities
        if self.solid_walls:
            stopped = torch.where(free, inside(state, positions), positions)
            velocities = torch.where(stopped == positions, velocities, (stopped - state.positions) / self.dt)
            positions = stopped
        positions = torch.where(active, wrapped(state, positions), state.positions)
        return state.advanced(positions=positions, velocities=velocities)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for what is not moved."""
        expected, scale = self._expected(state)
        change = (next_state.velocities - state.velocities - expected) / scale
        return torch.where(self.free(state)[:, None], change, 0.0)

    def free(self, state: State) -> Tensor:
        """Return which particles [n] the model moves: active and not kinematic."""
        return state.free

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return next(self.network.parameters()).dtype

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

    def _node_features(self, state: State, action: Tensor | None) -> list[Tensor]:
        features = [self._scaled("velocity", state.velocities), self._wall_distances(state)]
        if self.num_velocities > 1:
            # In units of velocities, what they say of forces would be small, and slow to be found.
            known = torch.cat([state.history[:, 1 - self.num_velocities :], state.velocities[:, None]], 1)
            features.append(self._scaled("change", known.diff(dim=1)).flatten(1))
        if self.embedding is not None:
            features.append(self.embedding(state.particle_types))
        for name in self._further:
            values = action if name == "action" else state[name]
            scale = self.get_buffer(f"_{name}_rms").to(state.positions)
            if values is None:
                features.append(scale.new_zeros(state.num_entities, len(scale)))
                continue
            rows = values if len(values) == state.num_entities else values[state.batch]
            features.append(rows.reshape(state.num_entities, -1) / scale)
        return features

    def _wall_distances(self, state: State) -> Tensor:
        """Return [n, 2 d]: distances to lower and upper walls in connectivity radii, at most 1, which is also none."""
        if "boundaries" not in state:
            return state.positions.new_ones(state.num_entities, 2 * self.num_dimensions)
        lower, upper = state.boundaries[state.batch].unbind(1)
        distances = torch.cat([state.positions - lower, upper - state.positions], 1) / self.connectivity_radius
        distances = distances.clamp(-1, 1)
        if "periodic" not in state:
            return distances
        return torch.where(state.periodic[state.batch].repeat(1, 2), 1.0, distances)

    def _edge_features(self, state: State, edges: NeighborPairs) -> Tensor:
        positions = state.positions
        ways = positions.index_select(0, edges.senders) - positions.index_select(0, edges.receivers)
        ways = shortest(state, ways, edges.receivers) / self.connectivity_radius
        lengths = (ways.square().sum(1, keepdim=True) + SMALLEST).sqrt()
        if not self.relative_velocities:
            return torch.cat([ways, lengths], 1)
        # In units of changes, not of velocities: what neighbours do to each other shows in small differences.
        velocities = state.velocities / self.get_buffer("_change_std").to(positions)
        relative = velocities.index_select(0, edges.senders) - velocities.index_select(0, edges.receivers)
        return torch.cat([ways, lengths, relative], 1)


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
    for name in ("num_velocities", "num_particle_types", "embedding_size", "latent_size", "num_message_passing_steps"):
        value = arguments[name]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")
    radius = arguments["connectivity_radius"]
    if not (isinstance(radius, int | float) and 0 < radius < float("inf")):
        raise ValueError(f"connectivity_radius must be a positive distance; got {radius!r}.")
    statistics, size = arguments["statistics"], arguments["num_dimensions"]
    further = (*arguments["further_fields"], *(("action",) if arguments["actions"] == "input" else ()))
    named = {f"{name}_{which}": size for name in ("velocity", "change") for which in ("mean", "std")}
    named |= {f"{BEYOND}_rms": size} if arguments["known_gravity"] else {}
    missing = [k for k in (*named, *(f"{name}_rms" for name in further)) if k not in statistics]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}; compute them with GNS.measure(trajectories) from states with what "
            "further_fields names, which are numbers of particles or scenes."
        )
    wrong = [name for name, count in named.items() if len(statistics[name]) != count]
    if wrong:
        raise ValueError(f"{wrong[0]} must have a number for each of {size} axes; got {statistics[wrong[0]]}.")
