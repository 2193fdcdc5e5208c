"""The Interaction Network (Battaglia et al. 2016, arXiv 1612.00222), with propagation along the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.graph import Edges, object_edges
from simworld.kernels import gather_sum, segment_sum
from simworld.models.base import LearnedSimulator
from simworld.state import State
from simworld.trajectory import Trajectory

Messages = Literal["vector", "scalar"]
Actions = Literal["impulse", "input", "none"]
NODE_FEATURES, EDGE_FEATURES = 4, 8
EDGES_AT_ONCE = 4096  # of 48 latents: about half a megabyte for each tensor of them


class InteractionNetwork(LearnedSimulator):
    """Bodies that act on each other along springs and where their surfaces come near.

    A relation network looks at each directed edge, an object network at each body with the sum of what
    reaches it; `num_message_passing_steps=1` is the paper's model, more let an effect travel within one
    step (Propagation Networks, Li et al. 2019, arXiv 1809.11169).

    `messages="vector"`: every edge also changes the receiver's velocity along the line between the bodies,
    by an amount computed from distances, speeds along that line and what the edge has given so far. Step by
    step this is a learned form of the iterative solver in a rigid-body engine, and it is exactly
    equivariant to translations, rotations and reflections (with pairwise central directions as in
    Satorras et al. 2021, arXiv 2102.09844). `"scalar"` is the paper's form: coordinates are features and
    the object network's last layer is the change.

    The change is that of the velocity beyond the known effect of the action:
    v' = v + a / m + scale * change and x' = x + dt v'. Velocities are position differences over dt.
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
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `InteractionNetwork.measure` returns for the training data. `actions` are
        impulses [n, d] whose effect a / m is known exactly, plain inputs [n, d], or none. `margin` is the
        distance between surfaces [unit of positions] under which bodies see each other, None for always.

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
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.scales = {name: float(statistics[name]) for name in STATISTICS}
        self.num_dimensions, self.num_object_types = num_dimensions, num_object_types
        self.actions, self.messages, self.margin = actions, messages, margin
        size = latent_size
        vector = messages == "vector"
        columns = 0 if vector else 2 * num_dimensions
        self.edge_encoder = nn.Sequential(nn.Linear(EDGE_FEATURES + columns, size), nn.SiLU())
        self.node_encoder = nn.Linear(NODE_FEATURES + num_object_types + columns, size)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(num_message_passing_steps))
        self.decoder = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 2 if vector else num_dimensions))

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: float = 0.0, actions: Actions = "impulse"
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
                sums[name] += float(values.double().square().sum())
                counts[name] += values.numel()
        if not counts["change"]:
            raise ValueError("Statistics need at least one trajectory of two frames with a body that moves; got none.")
        scales = {k: (sums[k] / counts[k]) ** 0.5 if counts[k] else 0.0 for k in STATISTICS}
        for name in ("velocity", "change"):
            scales[name] = (scales[name] ** 2 + noise_std**2) ** 0.5
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
        """Return [n, d]: the change of velocity beyond the action's known effect, in units of its rms."""
        edges = object_edges(state, margin=self.margin)
        velocities = state.velocities / self.scales["velocity"]
        pushes = self._pushes(state, velocities, action)
        relative, distances = _separations(state.positions, edges)
        normals = relative / distances
        closing = _relative(velocities, edges)
        edge_inputs = self._edge_features(state, edges, distances)
        edge_inputs.append((closing * normals).sum(1, keepdim=True))
        node_inputs = self._node_features(state, pushes)
        if self.messages == "scalar":
            edge_inputs += [relative / self.scales["distance"], closing]
            node_inputs += [velocities, pushes]
            normals, moved = normals[:, :0], velocities[:, :0]
        else:
            moved = velocities
        nodes = self.node_encoder(torch.cat(node_inputs, 1))
        nodes, moved = self._pass_messages(state, nodes, moved, torch.cat(edge_inputs, 1), normals, edges)
        change = self.decoder(nodes)
        if self.messages == "vector":
            drag, gain = change.split(1, dim=1)
            change = (moved - velocities + drag * velocities + gain * pushes) * (
                self.scales["velocity"] / self.scales["change"]
            )
        return torch.where(self.free(state)[:, None], change, 0.0)

    def _pass_messages(
        self, state: State, nodes: Tensor, moved: Tensor, edge_inputs: Tensor, normals: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor]:
        """Return the bodies' latents and velocities after all rounds of messages."""
        pairs = torch.stack([edges.senders, edges.receivers], 1)
        if torch.is_grad_enabled() or nodes.is_cuda or len(pairs) <= 2 * EDGES_AT_ONCE:
            return self._rounds(nodes, moved, edge_inputs, normals, pairs, edges.starts)
        # Without gradients, scenes go through all rounds a few at a time, so that latents stay in the cache.
        done = []
        for (node, last_node), (edge, last_edge) in _portions(state, edges):
            here, there = slice(node, last_node), slice(edge, last_edge)
            inputs = edge_inputs[there], normals[there], pairs[there] - node, edges.starts[here] - edge
            done.append(self._rounds(nodes[here], moved[here], *inputs))
        latents, velocities = zip(*done, strict=True)
        return torch.cat(latents), torch.cat(velocities)

    def _rounds(
        self, nodes: Tensor, moved: Tensor, edge_inputs: Tensor, normals: Tensor, edges: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = self.edge_encoder(edge_inputs)
        given = features.new_zeros(len(features), 1)
        ends = torch.add(edges.new_tensor([0, 1]), edges, alpha=3)
        for block in self.blocks:
            nodes, moved, given = block(nodes, moved, given, features, normals, edges, ends, starts)
        return nodes, moved

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: v' = v + a / m + scale * change, x' = x + dt v'; fixed bodies stay."""
        moves = self.free(state)[:, None]
        velocities = state.velocities + change * self.scales["change"]
        if self.actions == "impulse" and action is not None:
            velocities = velocities + action / _masses(state)
        velocities = torch.where(moves, velocities, state.velocities)
        positions = torch.where(moves, state.positions + self.dt * velocities, state.positions)
        return state.replace(positions=positions, velocities=velocities)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for fixed bodies."""
        change = next_state.velocities - state.velocities
        if self.actions == "impulse" and action is not None:
            change = change - action / _masses(state)
        return torch.where(self.free(state)[:, None], change / self.scales["change"], 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return self.node_encoder.weight.dtype

    def free(self, state: State) -> Tensor:
        """Return which bodies [n] move: active and not fixed."""
        return _free(state)

    def _pushes(self, state: State, velocities: Tensor, action: Tensor | None) -> Tensor:
        if action is None or self.actions == "none":
            return torch.zeros_like(velocities)
        return torch.where(self.free(state)[:, None], action / self.scales["action"], 0.0)

    def _node_features(self, state: State, pushes: Tensor) -> list[Tensor]:
        sources = ("masses", "fixed", "radii", "object_types")
        name = f"nodes.{self.scales['radius']}.{self.num_object_types}"
        constant = state.derived(name, sources, self._constant_node_features)
        strength = pushes.square().sum(1, keepdim=True)
        return [constant, strength / (1 + strength)]

    def _constant_node_features(self, state: State) -> Tensor:
        masses = _masses(state)
        fixed = _column(state, "fixed", 0.0).to(masses)
        radii = _column(state, "radii", 0.0).to(masses) / self.scales["radius"]
        types = torch.ones_like(masses)
        if self.num_object_types > 1:
            types = functional.one_hot(state.object_types, self.num_object_types).to(masses)
        return torch.cat([masses.log(), fixed, radii, types], 1)

    def _edge_features(self, state: State, edges: Edges, distances: Tensor) -> list[Tensor]:
        name = f"springs.{self.scales['spring']}.{self.scales['stretch']}"
        springs = state.derived(name, ("springs", "spring_lengths"), self._spring_features)
        known = springs[edges.springs]
        lengths, per_length, features = known[:, :1], known[:, 1:2], known[:, 2:]
        gaps = distances
        if "radii" in state:
            gaps = gaps - (state.radii[edges.senders] + state.radii[edges.receivers])[:, None]
        near = gaps / self.scales["distance"] if self.margin is None else (gaps / self.margin).clamp(max=1)
        return [features, (distances - lengths) * per_length, near, (gaps < 0).to(distances)]

    def _spring_features(self, state: State) -> Tensor:
        """Return a row for every direction of every spring, and a last one for edges without a spring.

        Columns: rest length, 1 / scale of extensions (0 without rest lengths), which of the three relations
        it is, normalized rest length.
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
        return torch.cat([lengths, per_length, kinds, lengths / self.scales["spring"]], 1)


class _Block(nn.Module):
    """One round of messages: the relation network along every edge, the object network at every body.

    The relation network is a perceptron of (sender, receiver, edge features, closing speed, what the edge
    has given), whose first layer is applied to bodies before they are gathered to edges, and whose last is
    applied after the messages were summed: the same function with fewer operations.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.nodes = nn.Parameter(_uniform(size, 3 * size))
        self.bias = nn.Parameter(torch.zeros(3 * size))
        self.inputs = nn.Parameter(torch.cat([_uniform(size, size), torch.randn(2, size) * 0.5]))
        self.impulse = nn.Parameter(torch.randn(size, 1) * 0.1 / size**0.5)
        self.heard = nn.Parameter(_uniform(size, size))
        self.update = nn.Parameter(_uniform(size, size))

    def forward(
        self,
        nodes: Tensor,
        moved: Tensor,
        given: Tensor,
        features: Tensor,
        normals: Tensor,
        edges: Tensor,
        ends: Tensor,
        starts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents [n, size], velocities [n, d] and given impulses [e, 1] after this round.

        `edges` [e, 2] are senders and receivers; `ends` are the rows where they stand in a table that has
        three for each body: what it is as a sender, as a receiver and to itself.
        """
        count, size = nodes.shape
        seen = torch.addmm(self.bias, nodes, self.nodes)
        met = gather_sum(seen.view(3 * count, size), ends)
        pair = moved.index_select(0, edges.flatten()).view(len(edges), 2, moved.shape[1])
        closing = ((pair[:, 1] - pair[:, 0]) * normals).sum(1, keepdim=True)
        messages = functional.silu(torch.addmm(met, torch.cat([features, closing, given], 1), self.inputs))
        impulses = messages @ self.impulse
        heard = segment_sum(messages, starts)
        inner = functional.silu(torch.addmm(seen[:, 2 * size :], heard, self.heard))
        moved = moved.index_add(0, edges[:, 1], impulses * normals)
        return torch.addmm(nodes, inner, self.update), moved, given + impulses


def _uniform(rows: int, columns: int) -> Tensor:
    return nn.init.uniform_(torch.empty(rows, columns), -(rows**-0.5), rows**-0.5)


STATISTICS = ("velocity", "change", "action", "distance", "radius", "spring", "stretch")
"""Root mean squares of: speeds, changes and actions of free bodies, coordinate spread within a scene, radii,
spring lengths, spring extensions."""


def _portions(state: State, edges: Edges) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return ranges of bodies and of their edges, whole scenes of about `EDGES_AT_ONCE` edges together."""
    scenes = torch.searchsorted(state.batch, torch.arange(state.num_scenes, device=state.device))
    first_nodes = [*scenes.tolist(), state.num_entities]
    first_edges = [*edges.starts[scenes].tolist(), len(edges.senders)]
    cuts = [0]
    for number in range(1, len(first_edges)):
        if first_edges[number] - first_edges[cuts[-1]] >= EDGES_AT_ONCE or number == len(first_edges) - 1:
            cuts.append(number)
    return [((first_nodes[a], first_nodes[b]), (first_edges[a], first_edges[b])) for a, b in pairwise(cuts)]


def _samples(trajectory: Trajectory, actions: Actions) -> dict[str, Tensor]:
    state = trajectory.initial
    moving = _free(state)
    velocities = trajectory["velocities"][:, moving]
    drift = trajectory["positions"].diff(dim=0) - trajectory.dt * trajectory["velocities"][1:]
    if drift.numel() and float(drift.abs().max()) > 1e-3 * float(trajectory["positions"].abs().max()):
        raise ValueError(
            "Velocities must be position differences over dt, (x_t - x_(t-1)) / dt; these differ by "
            f"{float(drift.abs().max()):.3g} in position. Recompute them from the positions."
        )
    change = velocities.diff(dim=0)
    samples = {"velocity": velocities, "radius": state.radii if "radii" in state else velocities[:0]}
    if trajectory.actions is not None and trajectory.actions.shape[1:] == state.positions.shape:
        samples["action"] = trajectory.actions[:, moving]
        if actions == "impulse":
            change = change - samples["action"] / _masses(state)[moving]
    centred = trajectory["positions"] - trajectory["positions"].mean(1, keepdim=True)
    samples |= {"change": change, "distance": centred}
    if "spring_lengths" in state:
        first, second = state.springs.unbind(1)
        lengths = (trajectory["positions"][:, second] - trajectory["positions"][:, first]).norm(dim=-1)
        samples |= {"spring": state.spring_lengths, "stretch": lengths - state.spring_lengths}
    return samples


def _check_arguments(arguments: Mapping[str, object]) -> None:
    for name, choices in (("actions", get_args(Actions)), ("messages", get_args(Messages)), ("num_dimensions", (2, 3))):
        if arguments[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {arguments[name]!r}.")
    for name in ("latent_size", "num_message_passing_steps", "num_object_types"):
        value = arguments[name]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")
    margin = arguments["margin"]
    if margin is not None and not (isinstance(margin, int | float) and margin > 0):
        raise ValueError(f"margin must be a positive distance, or None for all pairs; got {margin!r}.")
    statistics = arguments["statistics"]
    if isinstance(statistics, Mapping) and not all(
        isinstance(value, int | float) and 0 < value < float("inf") for value in statistics.values()
    ):
        raise ValueError(f"statistics must be positive numbers, as measure() returns them; got {dict(statistics)}.")
    missing = [name for name in STATISTICS if not isinstance(statistics, Mapping) or name not in statistics]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}; compute them with InteractionNetwork.measure(trajectories)."
        )


def _all_below(state: State, count: int) -> bool:
    return bool(((state.object_types >= 0) & (state.object_types < count)).all())


def _free(state: State) -> Tensor:
    return state.active & ~state.fixed if "fixed" in state else state.active


def _column(state: State, name: str, default: float) -> Tensor:
    if name in state:
        return state[name][:, None]
    return state.positions.new_full((state.num_entities, 1), default)


def _masses(state: State) -> Tensor:
    return _column(state, "masses", 1.0)


def _relative(values: Tensor, edges: Edges) -> Tensor:
    """Return receiver minus sender, [e, k]."""
    return values.index_select(0, edges.receivers) - values.index_select(0, edges.senders)


def _separations(positions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
    """Return the vector from sender to receiver [e, d] and its length [e, 1], never zero."""
    relative = _relative(positions, edges)
    return relative, (relative.square().sum(1, keepdim=True) + 1e-12).sqrt()
