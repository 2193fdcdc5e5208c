"""The Interaction Network (Battaglia et al. 2016, arXiv 1612.00222), with propagation along the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.graph import Edges, closings, object_edges, separations
from simworld.kinds import ObjectState
from simworld.models.base import LearnedSimulator, Noise, check_sizes, noise_by_field
from simworld.models.message_passing import Block, EdgeTable, edge_signs, pass_messages
from simworld.state import State
from simworld.trajectory import Trajectory

Messages = Literal["vector", "response", "scalar"]
Actions = Literal["impulse", "input", "none"]
NODE_FEATURES, EDGE_FEATURES, EDGE_HISTORY = 4, 8, 2
KINDS = 4  # of edges: springs, what touches, what is about to, what stays apart
AIMS = (1.0, 0.01, 0.01, 0.01, 1.0)  # first bounds of the shares of calls that make an aim; see `_responses`
KICKS = (0.1, 0.01, 0.01, 0.1)  # no closing speed: a contact that was kicked too hard could not pull back
MOST_DRAG = 0.05  # of a body's speed in a step, where edges respond


class InteractionNetwork(LearnedSimulator):
    """Bodies that act on each other along springs and where their surfaces come near.

    A relation network looks at each directed edge, an object network at each body with the sum of what
    reaches it; `num_message_passing_steps=1` is the paper's model, more let an effect travel within one
    step (Propagation Networks, Li et al. 2019, arXiv 1809.11169).

    `messages="vector"`: every edge also changes the receiver's velocity along the line between the bodies,
    by an amount computed from distances, speeds along that line and what the edge has given so far. Step by
    step this is a learned form of the iterative solver in a rigid-body engine, and it is exactly
    equivariant to translations, rotations and reflections (with pairwise central directions as in
    Satorras et al. 2021, arXiv 2102.09844). `"response"` lets an edge answer only what calls for an answer, and in
    proportion: closing speeds, extensions of springs and rods, overlaps, now and a step ago, where x - dt v says
    that bodies were. By constant fields alone it has a firmness, a closing speed at which it aims, and a kick; the
    rounds bring all edges to their aims together, as an engine's sweeps do, and messages alter how fast. What
    touches can push but not pull.
    `"scalar"` is the paper's form: coordinates are features and the object network's last layer is the change.

    The change is that of the velocity beyond the known effect of gravity and the action:
    v' = v + dt g + a / m + scale * change and x' = x + dt v'. Velocities are position differences over dt.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, float],
        num_dimensions: int = 2,
        actions: Actions = "impulse",
        messages: Messages = "vector",
        margin: float | None = None,
        latent_size: int = 48,
        num_message_passing_steps: int = 8,
        num_object_types: int = 1,
        walls: bool = False,
        node_fields: tuple[str, ...] = (),
        edge_fields: tuple[str, ...] = (),
        masses_of_fixed: bool = True,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `InteractionNetwork.measure` returns for the training data. `actions` are
        impulses [n, d] whose effect a / m is known exactly, plain inputs [n, d], or none. `margin` is the
        distance between surfaces [unit of positions] under which bodies see each other, None for always. With
        `walls`, a body sees its own mirror image behind each of the state's `boundaries`, as it would an equal
        body. `node_fields` and `edge_fields` name further static fields of bodies (restitutions, charges) and of
        springs (spring_stiffnesses) that are features. Without `masses_of_fixed` those are taken as 1: what does not
        move has a mass that means nothing, and a network that is told one lets it matter when it is changed.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        arguments = {
            "statistics": dict(statistics),
            "num_dimensions": num_dimensions,
            "actions": actions,
            "messages": messages,
            "margin": margin,
            "latent_size": latent_size,
            "num_message_passing_steps": num_message_passing_steps,
            "num_object_types": num_object_types,
            "walls": walls,
            "node_fields": list(node_fields),
            "edge_fields": list(edge_fields),
            "masses_of_fixed": masses_of_fixed,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.scales = {name: float(statistics[name]) for name in (*STATISTICS, *node_fields, *edge_fields)}
        self.node_fields, self.edge_fields, self.walls = tuple(node_fields), tuple(edge_fields), walls
        self.num_dimensions, self.num_object_types = num_dimensions, num_object_types
        self.actions, self.messages, self.margin = actions, messages, margin
        self.masses_of_fixed = masses_of_fixed
        size = latent_size
        scalar, response = messages == "scalar", messages == "response"
        columns = 2 * num_dimensions if scalar else 0
        edge_columns = EDGE_FEATURES + columns + len(edge_fields) + int(walls) + (EDGE_HISTORY if response else 0)
        self.edge_encoder = nn.Sequential(nn.Linear(edge_columns, size), nn.SiLU())
        self.node_encoder = nn.Linear(NODE_FEATURES + num_object_types + columns + len(node_fields), size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(num_message_passing_steps))
        silent = nn.Linear(size, 2) if response else None
        if silent is not None:
            nn.init.zeros_(silent.weight)  # what no edge calls for is at first nothing
            nn.init.zeros_(silent.bias)
            known = 2 * (3 + num_object_types + len(node_fields)) + 4 + len(edge_fields) + int(walls)
            factors = 1 + len(AIMS) + len(KICKS)
            self.responders = nn.ModuleList(
                nn.Sequential(nn.Linear(known, size), nn.SiLU(), nn.Linear(size, factors)) for _ in range(KINDS)
            )
            self.bounds = nn.Parameter(torch.tensor([*AIMS, *KICKS]).log())
        first, last = nn.Linear(size, size), silent or nn.Linear(size, num_dimensions if scalar else 2)
        self.decoder = nn.Sequential(first, nn.SiLU(), last)

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Actions = "impulse"
    ) -> dict[str, float]:
        """Return the sizes of inputs and changes in recorded data, by which the network normalizes.

        `actions` is what the constructor will be given: the known effect of impulses is not a change. Noise
        that training will add to velocities enters in the standard deviations.

        Raises:
            ValueError: there are no steps, or velocities are not position differences over dt.
        """
        sums = dict.fromkeys(STATISTICS, 0.0)
        counts = dict.fromkeys(STATISTICS, 0)
        for trajectory in trajectories:
            for name, values in _samples(trajectory, actions).items():
                sums[name] = sums.get(name, 0.0) + float(values.double().square().sum())
                counts[name] = counts.get(name, 0) + values.numel()
        if not counts["change"]:
            raise ValueError("Statistics need at least one trajectory of two frames with a body that moves; got none.")
        scales = {k: (sums[k] / counts[k]) ** 0.5 if counts[k] else 0.0 for k in sums}
        for name in ("velocity", "change"):
            scales[name] = (scales[name] ** 2 + noise_by_field(noise_std).get("velocities", 0.0) ** 2) ** 0.5
        return {k: v if v > 0 else 1.0 for k, v in scales.items()}

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        if "positions" not in state or "velocities" not in state:
            raise ValueError(f"An InteractionNetwork steps an ObjectState; got a {type(state).__name__}.")
        if state.positions.shape[1] != self.num_dimensions:
            raise ValueError(
                f"This model was made for positions [n, {self.num_dimensions}]; got {list(state.positions.shape)}."
            )
        if state.positions.dtype != self.dtype:
            raise ValueError(
                f"This model computes in {self.dtype}; got a state in {state.positions.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        if self.num_object_types > 1 and "object_types" not in state:
            raise ValueError("This model tells types of bodies apart; give the state object_types.")
        name, types = f"types < {self.num_object_types}", self.num_object_types
        if types > 1 and not state.derived(name, ("object_types",), lambda s: _all_below(s, types)):
            raise ValueError(f"This model knows object_types 0 to {types - 1}; the state has others.")
        lacking = [k for k in (*self.node_fields, *self.edge_fields) if k not in state]
        if lacking or (self.walls and "boundaries" not in state):
            names = ", ".join(lacking) or "boundaries"
            raise ValueError(f"This model was trained on states with {names}; give them with state.replace(...).")
        if action is not None and action.dtype != self.dtype:
            raise ValueError(f"This model takes actions in {self.dtype}; got {action.dtype}. Use actions.to(dtype).")
        if action is not None and action.shape != state.positions.shape:
            raise ValueError(
                f"This model takes an action {list(state.positions.shape)} per step, a row per entity; "
                f"got {list(action.shape)}."
            )
        if action is not None and self.actions == "none":
            raise ValueError("This model was trained without actions; leave them out or train with actions='impulse'.")

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, d]: the change of velocity beyond what is known of it, in units of its rms."""
        edges = object_edges(state, margin=self.margin, walls=self.walls)
        velocities = (state.velocities + _fall(state, self.dt)) / self.scales["velocity"]
        pushes = self._pushes(state, velocities, action)
        node_inputs = self._node_features(state, pushes)
        moved = velocities
        if self.messages == "scalar":
            node_inputs += [velocities, pushes]
            moved = velocities[:, :0]
        nodes = self.node_encoder(torch.cat(node_inputs, 1))
        table = self._table(state, edges, velocities)
        nodes, moved = pass_messages(self.blocks, self.edge_encoder, state, nodes, moved, table)
        change = self.decoder(nodes)
        if self.messages != "scalar":
            drag, gain = change.split(1, dim=1)
            drag = MOST_DRAG * drag.tanh() if self.messages == "response" else drag
            change = (moved - velocities + drag * velocities + gain * pushes) * (
                self.scales["velocity"] / self.scales["change"]
            )
        return torch.where(self.free(state)[:, None], change, 0.0)

    def _table(self, state: State, edges: Edges, velocities: Tensor) -> EdgeTable:
        relative = separations(state, edges)
        distances = _lengths(relative)
        normals = relative / distances
        closing = closings(velocities, edges)
        inputs = self._edge_features(state, edges, distances)
        responses = None
        if self.messages == "response":
            responses, past = self._responses(state, edges, relative, distances, closing)
            inputs += past
        if self.walls and edges.walls is not None:
            inputs.append((edges.walls >= 0).to(distances)[:, None])
        inputs.append((closing * normals).sum(1, keepdim=True))
        if self.messages == "scalar":
            inputs += [relative / self.scales["distance"], closing]
            normals = normals[:, :0]
        return EdgeTable(
            inputs=torch.cat(inputs, 1),
            normals=normals,
            pairs=torch.stack([edges.senders, edges.receivers], 1),
            starts=edges.starts,
            signs=edge_signs(edges, distances),
            responses=responses,
        )

    def _responses(
        self, state: State, edges: Edges, relative: Tensor, distances: Tensor, closing: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the table's columns that say how edges respond, and features of the edges' past.

        What calls for a response are the closing speed and, as speeds that would undo them in a step, the
        extension of a spring, the overlap, the overlap a step before, and the gap of what is about to touch.
        Aims and kicks are shares of them, which constant fields alone decide.
        """
        speeds = (closing * (relative / distances)).sum(1, keepdim=True)
        gaps = distances - _reach(state, edges)
        before = _lengths(relative - self.dt * closings(state.velocities, edges)) - _reach(state, edges)
        kinds = _kinds(edges, gaps, gaps + self.dt * self.scales["velocity"] * speeds)
        coming, answering = kinds[:, 2:3], 1 - kinds[:, 3:]
        features, stretch, *_ = self._edge_features(state, edges, distances)
        stretch = stretch * self.scales["stretch"]
        lengths = torch.cat([stretch, gaps.clamp(max=0), before.clamp(max=0), gaps * coming], 1)
        calls = torch.cat([speeds * answering, lengths / (self.dt * self.scales["velocity"])], 1)
        bodies = self._node_features(state, torch.zeros_like(state.positions))[0]
        known = [bodies[edges.senders], bodies[edges.receivers], features]
        if self.walls and edges.walls is not None:
            known.append((edges.walls >= 0).to(distances)[:, None])
        constant = torch.cat(known, 1)
        each = [kinds[:, k : k + 1] * responder(constant) for k, responder in enumerate(self.responders)]
        factors = torch.stack(each).sum(0)
        shares = factors[:, 1:].tanh() * self.bounds.exp() * torch.cat([calls, calls[:, 1:]], 1)
        aim, kick = (part.sum(1, keepdim=True) for part in (shares[:, : len(AIMS)], shares[:, len(AIMS) :]))
        size = self.scales["distance"] if self.margin is None else self.margin
        past = [(before / size).clamp(max=1), (before < 0).to(before)]
        alters = answering * _mass_shares(state, edges)
        return torch.cat([factors[:, :1], aim, kick, alters, kinds[:, :1]], 1), past

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: v' = v + dt g + a / m + scale * change, x' = x + dt v'; fixed bodies stay."""
        moves = self.free(state)[:, None]
        velocities = state.velocities + change * self.scales["change"] + _fall(state, self.dt)
        if self.actions == "impulse" and action is not None:
            velocities = velocities + action / _masses(state)
        velocities = torch.where(moves, velocities, state.velocities)
        positions = torch.where(moves, state.positions + self.dt * velocities, state.positions)
        return state.replace(positions=positions, velocities=velocities)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for fixed bodies."""
        change = next_state.velocities - state.velocities - _fall(state, self.dt)
        if self.actions == "impulse" and action is not None:
            change = change - action / _masses(state)
        return torch.where(self.free(state)[:, None], change / self.scales["change"], 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return self.node_encoder.weight.dtype

    def free(self, state: State) -> Tensor:
        """Return which bodies [n] move: active and not fixed."""
        return state.free

    def _pushes(self, state: State, velocities: Tensor, action: Tensor | None) -> Tensor:
        if action is None or self.actions == "none":
            return torch.zeros_like(velocities)
        return torch.where(self.free(state)[:, None], action / self.scales["action"], 0.0)

    def _node_features(self, state: State, pushes: Tensor) -> list[Tensor]:
        sources = ("masses", "fixed", "radii", "object_types", *self.node_fields)
        fields = [self.scales[name] for name in self.node_fields]
        name = (
            f"nodes.{self.scales['radius']}.{self.num_object_types}.{self.node_fields}.{fields}.{self.masses_of_fixed}"
        )
        constant = state.derived(name, sources, self._constant_node_features)
        strength = pushes.square().sum(1, keepdim=True)
        return [constant, strength / (1 + strength)]

    def _constant_node_features(self, state: State) -> Tensor:
        masses = _masses(state)
        fixed = _column(state, "fixed", 0.0).to(masses)
        masses = masses if self.masses_of_fixed else torch.where(fixed > 0, 1.0, masses)
        radii = _column(state, "radii", 0.0).to(masses) / self.scales["radius"]
        types = torch.ones_like(masses)
        if self.num_object_types > 1:
            types = functional.one_hot(state.object_types, self.num_object_types).to(masses)
        further = [state[name][:, None] / self.scales[name] for name in self.node_fields]
        return torch.cat([masses.log(), fixed, radii, types, *further], 1)

    def _edge_features(self, state: State, edges: Edges, distances: Tensor) -> list[Tensor]:
        fields = [self.scales[name] for name in self.edge_fields]
        name = f"springs.{self.scales['spring']}.{self.scales['stretch']}.{self.edge_fields}.{fields}"
        springs = state.derived(name, ("springs", "spring_lengths", *self.edge_fields), self._spring_features)
        known = springs[edges.springs]
        lengths, per_length, features = known[:, :1], known[:, 1:2], known[:, 2:]
        gaps = distances - _reach(state, edges)
        near = gaps / self.scales["distance"] if self.margin is None else (gaps / self.margin).clamp(max=1)
        return [features, (distances - lengths) * per_length, near, (gaps < 0).to(distances)]

    def _spring_features(self, state: State) -> Tensor:
        """Return a row for every direction of every spring, and a last one for edges without a spring.

        Columns: rest length, 1 / scale of extensions (0 without rest lengths), which of the three relations
        it is, normalized rest length, further fields.
        """
        count = len(state.springs) if "springs" in state else 0
        kinds = torch.repeat_interleave(
            torch.eye(3, dtype=state.positions.dtype, device=state.device),
            torch.tensor([count, count, 1], device=state.device),
            dim=0,
        )
        lengths, per_length = kinds.new_zeros(2 * count + 1, 1), kinds.new_zeros(2 * count + 1, 1)
        if "spring_lengths" in state:
            lengths[:-1, 0] = state.spring_lengths.repeat(2)
            per_length[:-1] = 1 / self.scales["stretch"]
        further = [kinds.new_zeros(2 * count + 1, 1) for _ in self.edge_fields]
        for column, field in zip(further, self.edge_fields, strict=True):
            if field in state:
                column[:-1, 0] = state[field].repeat(2) / self.scales[field]
        return torch.cat([lengths, per_length, kinds, lengths / self.scales["spring"], *further], 1)


STATISTICS = ("velocity", "change", "action", "distance", "radius", "spring", "stretch")
"""Root mean squares of: speeds, changes and actions of free bodies, coordinate spread within a scene, radii,
spring lengths, spring extensions. Further fields of bodies and springs stand under their own names."""


def _samples(trajectory: Trajectory, actions: Actions) -> dict[str, Tensor]:
    state = trajectory.initial
    moving = state.free
    velocities = trajectory["velocities"][:, moving]
    there = state.active  # what is not there keeps its velocity and stays
    drift = (trajectory["positions"].diff(dim=0) - trajectory.dt * trajectory["velocities"][1:])[:, there]
    if drift.numel() and float(drift.abs().max()) > 1e-3 * float(trajectory["positions"].abs().max()):
        raise ValueError(
            "Velocities must be position differences over dt, (x_t - x_(t-1)) / dt; these differ by "
            f"{float(drift.abs().max()):.3g} in position. Recompute them from the positions."
        )
    change = velocities.diff(dim=0) - _fall(state, trajectory.dt)[moving]
    samples = {"velocity": velocities, "radius": state.radii if "radii" in state else velocities[:0]}
    if trajectory.actions is not None and trajectory.actions.shape[1:] == state.positions.shape:
        samples["action"] = trajectory.actions[:, moving]
        if actions == "impulse":
            change = change - samples["action"] / _masses(state)[moving]
    centred = trajectory["positions"] - trajectory["positions"].mean(1, keepdim=True)
    samples |= {"change": change, "distance": centred, **{name: state[name] for name in _further_fields(state)}}
    if "spring_lengths" in state:
        first, second = state.springs.unbind(1)
        lengths = (trajectory["positions"][:, second] - trajectory["positions"][:, first]).norm(dim=-1)
        samples |= {"spring": state.spring_lengths, "stretch": lengths - state.spring_lengths}
    return samples


def _further_fields(state: State) -> list[str]:
    """Return the constant numbers of bodies and springs that a model may be told as they are."""
    return [
        name
        for name in state.static_fields
        if state.fields[name].kind == "float"
        and not state.fields[name].shape
        and state.fields[name].per in ("entity", "springs")
        and name not in ("masses", "radii", "spring_lengths")
    ]


def _check_arguments(arguments: Mapping[str, object]) -> None:
    for name, choices in (("actions", get_args(Actions)), ("messages", get_args(Messages)), ("num_dimensions", (2, 3))):
        if arguments[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {arguments[name]!r}.")
    check_sizes(arguments, "latent_size", "num_message_passing_steps", "num_object_types")
    margin = arguments["margin"]
    if margin is not None and not (isinstance(margin, int | float) and margin > 0):
        raise ValueError(f"margin must be a positive distance, or None for all pairs; got {margin!r}.")
    statistics = arguments["statistics"]
    if isinstance(statistics, Mapping) and not all(
        isinstance(value, int | float) and 0 < value < float("inf") for value in statistics.values()
    ):
        raise ValueError(f"statistics must be positive numbers, as measure() returns them; got {dict(statistics)}.")
    named = (*STATISTICS, *_names(arguments, "node_fields"), *_names(arguments, "edge_fields"))
    missing = [name for name in named if not isinstance(statistics, Mapping) or name not in statistics]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}; compute them with InteractionNetwork.measure(trajectories)."
        )


def _names(arguments: Mapping[str, object], which: str) -> list[str]:
    names, per = arguments[which], "entity" if which == "node_fields" else "springs"
    fields = ObjectState.fields
    known = [k for k, f in fields.items() if f.static and f.kind == "float" and f.per == per and not f.shape]
    if not isinstance(names, list) or not set(names) <= set(known):
        raise ValueError(f"{which} must be names among {', '.join(known)}; got {names!r}.")
    return names


def _all_below(state: State, count: int) -> bool:
    return bool(((state.object_types >= 0) & (state.object_types < count)).all())


def _column(state: State, name: str, default: float) -> Tensor:
    if name in state:
        return state[name][:, None]
    return state.positions.new_full((state.num_entities, 1), default)


def _masses(state: State) -> Tensor:
    return _column(state, "masses", 1.0)


def _mass_shares(state: State, edges: Edges) -> Tensor:
    """Return [e, 1]: the share of a change of the closing speed that falls to the receiver."""
    masses = _masses(state)
    sender, receiver = masses[edges.senders], masses[edges.receivers]
    held = _column(state, "fixed", 0.0).to(masses)[edges.senders]
    return torch.where(held > 0, 1.0, sender / (sender + receiver))


def _fall(state: State, dt: float) -> Tensor:
    """Return the velocity that gravity adds to free bodies in a step, [n, d]."""
    if "gravity" not in state:
        return torch.zeros_like(state.positions)
    return torch.where(state.free[:, None], dt * state.gravity[state.batch], 0.0)


def _kinds(edges: Edges, gaps: Tensor, gaps_to_come: Tensor) -> Tensor:
    """Return [e, 4]: which edges are springs, touch, are about to touch, stay apart."""
    spring, touching = edges.springs[:, None] >= 0, gaps < 0
    coming = ~touching & (gaps_to_come < 0)
    apart = ~(spring | touching | coming)
    return torch.cat([spring, ~spring & touching, ~spring & coming, apart], 1).to(gaps)


def _lengths(vectors: Tensor) -> Tensor:
    """Return [e, 1]: lengths of vectors [e, d], never zero."""
    return (vectors.square().sum(1, keepdim=True) + 1e-12).sqrt()


def _reach(state: State, edges: Edges) -> Tensor | float:
    """Return [e, 1]: at which distance of centres surfaces touch."""
    return (state.radii[edges.senders] + state.radii[edges.receivers])[:, None] if "radii" in state else 0.0
