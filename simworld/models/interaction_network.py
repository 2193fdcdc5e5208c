"""The Interaction Network (Battaglia et al. 2016, arXiv 1612.00222), with propagation along the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.graph import NUM_RELATIONS, Edges, object_edges
from simworld.kernels import segment_sum
from simworld.models.base import LearnedSimulator
from simworld.state import State, Trajectory

Messages = Literal["vector", "scalar"]
Actions = Literal["impulse", "input", "none"]
EDGE_FEATURES = NUM_RELATIONS + 5


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
        self.num_steps, size = num_message_passing_steps, latent_size
        vector = messages == "vector"
        self.edge_encoder = nn.Sequential(
            nn.Linear(EDGE_FEATURES + (0 if vector else 2 * num_dimensions), size),
            nn.SiLU(),
            nn.Linear(size, self.num_steps * size),
        )
        self.node_encoder = nn.Linear(4 + num_object_types + (0 if vector else 2 * num_dimensions), size)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(self.num_steps))
        self.decoder = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 2 if vector else num_dimensions))

    @staticmethod
    def measure(trajectories: Iterable[Trajectory], *, noise_std: float = 0.0) -> dict[str, float]:
        """Return the sizes of inputs and changes in recorded data, by which the network normalizes.

        Noise that training will add to velocities enters in the standard deviations.

        Raises:
            ValueError: there are no steps, or velocities are not position differences over dt.
        """
        sums = dict.fromkeys(STATISTICS, 0.0)
        counts = dict.fromkeys(STATISTICS, 0)
        for trajectory in trajectories:
            for name, values in _samples(trajectory).items():
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
        if state.positions.shape[1] != self.num_dimensions:
            raise ValueError(
                f"This model was made for positions [n, {self.num_dimensions}]; got {list(state.positions.shape)}."
            )
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
        relative, distances = _separations(state.positions, edges)
        closing = _relative(velocities, edges)
        normals = relative / distances
        along = (closing * normals).sum(1, keepdim=True)
        edge_inputs = [*self._edge_features(state, edges, distances), along]
        pushes = self._pushes(state, velocities, action)
        node_inputs = [self._node_features(state, pushes)]
        if self.messages == "scalar":
            edge_inputs += [relative / self.scales["distance"], closing]
            node_inputs += [velocities, pushes]
        first, activation, last = self.edge_encoder
        hidden = activation(first(torch.cat(edge_inputs, 1)))
        inputs = last(hidden).view(len(along), self.num_steps, -1).unbind(1)
        nodes = self.node_encoder(torch.cat(node_inputs, 1))
        if self.messages == "scalar":
            for block, given in zip(self.blocks, inputs, strict=True):
                nodes = block(nodes, edges, block.messages(nodes, edges, given))
            return torch.where(self.free(state)[:, None], self.decoder(nodes), 0.0)
        return self._solve(state, nodes, edges, normals, along, inputs, velocities, pushes)

    def _solve(
        self,
        state: State,
        nodes: Tensor,
        edges: Edges,
        normals: Tensor,
        along: Tensor,
        inputs: tuple[Tensor, ...],
        velocities: Tensor,
        pushes: Tensor,
    ) -> Tensor:
        """Let every edge push its receiver along the line between the bodies, once in each block."""
        moved, given = velocities, torch.zeros_like(along)
        for number, (block, constant) in enumerate(zip(self.blocks, inputs, strict=True)):
            if number:
                along = (_relative(moved, edges) * normals).sum(1, keepdim=True)
            messages = block.messages(nodes, edges, constant, along, given)
            impulses = messages @ block.impulse
            given = given + impulses
            moved = moved + segment_sum(impulses * normals, edges.receivers, len(nodes))
            nodes = block(nodes, edges, messages)
        drag, gain = self.decoder(nodes).split(1, dim=1)
        change = (moved - velocities + drag * velocities + gain * pushes) * self._velocity_per_change
        return torch.where(self.free(state)[:, None], change, 0.0)

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

    def free(self, state: State) -> Tensor:
        """Return which bodies [n] move: active and not fixed."""
        return _free(state)

    @property
    def _velocity_per_change(self) -> float:
        return self.scales["velocity"] / self.scales["change"]

    def _pushes(self, state: State, velocities: Tensor, action: Tensor | None) -> Tensor:
        if action is None or self.actions == "none":
            return torch.zeros_like(velocities)
        return action / self.scales["action"]

    def _node_features(self, state: State, pushes: Tensor) -> Tensor:
        masses = _masses(state)
        fixed = _column(state, "fixed", 0.0).to(masses)
        radii = _column(state, "radii", 0.0).to(masses) / self.scales["radius"]
        strength = pushes.square().sum(1, keepdim=True)
        types = masses.new_ones(len(masses), 1)
        if self.num_object_types > 1:
            types = functional.one_hot(state.object_types, self.num_object_types).to(masses)
        return torch.cat([masses.log(), fixed, radii, strength / (1 + strength), types], 1)

    def _edge_features(self, state: State, edges: Edges, distances: Tensor) -> list[Tensor]:
        kinds = functional.one_hot(edges.relations, NUM_RELATIONS).to(distances)
        rest, stretch = torch.zeros_like(distances), torch.zeros_like(distances)
        if "spring_lengths" in state and len(state.springs):
            joined = (edges.springs >= 0)[:, None]
            lengths = state.spring_lengths[edges.springs.clamp(min=0)][:, None]
            rest = torch.where(joined, lengths / self.scales["spring"], rest)
            stretch = torch.where(joined, (distances - lengths) / self.scales["stretch"], stretch)
        reach = distances
        if "radii" in state:
            reach = reach - (state.radii[edges.senders] + state.radii[edges.receivers])[:, None]
        near = reach / self.scales["distance"] if self.margin is None else (reach / self.margin).clamp(max=1)
        return [kinds, rest, stretch, near, (reach < 0).to(distances)]


class _Block(nn.Module):
    """One round of messages: the relation network's second half and the object network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ends = nn.Linear(size, 2 * size, bias=False)
        self.along = nn.Parameter(torch.randn(size) * 0.5)
        self.given = nn.Parameter(torch.randn(size) * 0.5)
        self.impulse = nn.Parameter(torch.randn(size, 1) * 0.1 / size**0.5)
        self.hidden = nn.Linear(2 * size, size)
        self.update = nn.Linear(size, size)

    def messages(
        self, nodes: Tensor, edges: Edges, constant: Tensor, along: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Return [e, size], the effect of each edge."""
        senders, receivers = self.ends(nodes).chunk(2, dim=1)
        total = constant + senders.index_select(0, edges.senders) + receivers.index_select(0, edges.receivers)
        if along is not None and given is not None:
            total = total.addcmul(along, self.along).addcmul(given, self.given)
        return functional.silu(total)

    def forward(self, nodes: Tensor, edges: Edges, messages: Tensor) -> Tensor:
        """Return the bodies' latents after the messages that reach them."""
        heard = segment_sum(messages, edges.receivers, len(nodes))
        change: Tensor = self.update(functional.silu(self.hidden(torch.cat([nodes, heard], 1))))
        return nodes + change


STATISTICS = ("velocity", "change", "action", "distance", "radius", "spring", "stretch")
"""Root mean squares of: speeds, changes and actions of free bodies, coordinate spread within a scene, radii,
spring lengths, spring extensions."""


def _samples(trajectory: Trajectory) -> dict[str, Tensor]:
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
    statistics = arguments["statistics"]
    missing = [name for name in STATISTICS if not isinstance(statistics, Mapping) or name not in statistics]
    if missing:
        raise ValueError(f"statistics lack {', '.join(missing)}; compute them with InteractionNetwork.measure(trajectories).")


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
