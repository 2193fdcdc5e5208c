"""MeshGraphNets: flows, solids and cloth on meshes (Pfaff et al. 2021, arXiv 2010.03409)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simworld.graph import coarse_edges, mesh_edges, world_edges
from simworld.kernels.graph_block import Connections
from simworld.models.base import LearnedSimulator, Noise, check_sizes, noise_by_field
from simworld.models.flow_terms import FLOW, GAINS, FlowTerms, check_flow, flow_samples, flow_terms
from simworld.models.graph_network import EncodeProcessDecode, Groups
from simworld.models.normalizer import Moments, mean_and_std, summed
from simworld.models.strains import along, edge_strains, node_strains
from simworld.state import State
from simworld.trajectory import Trajectory

Actions = Literal["input", "none"]
Strained = Literal["edges", "nodes"]
Normalizer = Literal["dataset", "online"]
Integrator = Literal["semi_implicit_euler", "trapezoid"]
SMALLEST = 1e-12  # under a root, whose slope is then finite
PLACES = ("positions", "rest_positions")
RATES = "strain_rates"
STRAINS = ("strains", RATES)
FRAMES_OF_EDGES = 10  # of each trajectory, at which differences along edges are measured


class MeshGraphNet(LearnedSimulator):
    """Nodes of a mesh that act on their neighbours, as a graph network that encodes, processes and decodes.

    A node is told the fields in `inputs` and its type; a mesh edge the way between its ends in the mesh and, where
    nodes move, in the world; a world edge, between nodes that come near and that no mesh edge joins, the way in the
    world. Edge sets have networks of their own.

    `outputs` says of each predicted field how often what the network gives is integrated in time: 0, it is the field
    itself; 1, its change, f' = f + change; 2, for positions, the change of their velocity, v' = v + change and
    x' = x + dt v' (or x' = x + dt (v + v') / 2). Each is in units of its standard deviation about its mean. Nodes that
    are kinematic are seen and not moved: they keep their values, or are held to others by interventions; but fields
    that are not integrated, the pressure at a wall, are predicted of them like of all.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Sequence[float]],
        outputs: Mapping[str, int],
        inputs: Sequence[str] = (),
        relative_inputs: Sequence[str] = (),
        strains: Sequence[Strained] = (),
        num_node_types: int = 1,
        num_dimensions: int = 2,
        num_rest_dimensions: int = 2,
        world_radius: float | None = None,
        num_coarse_levels: int = 0,
        num_contexts: int = 0,
        incompressible: bool = False,
        latent_size: int = 128,
        num_message_passing_steps: int = 15,
        num_hidden_layers: int = 2,
        actions: Actions = "none",
        integrator: Integrator = "semi_implicit_euler",
        normalizer: Normalizer = "dataset",
        backend: str | None = None,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `MeshGraphNet.measure` returns for the training data. `inputs` are fields of nodes or
        scenes, moving or not; of `relative_inputs` edges are told the differences between their ends; `actions` [n, a]
        or [b, a], forces for example, are one more if "input". `strains` tell what stresses of a solid follow from,
        however it has turned: "edges" the strain along each mesh edge and the rate at which it grows, "nodes" the
        tensors of strain and of its rate, in the axes of space (`models.strains`). `num_dimensions` is that of
        positions, 0 where nodes have none; `num_rest_dimensions` likewise. World edges reach as far as `world_radius`,
        in the unit of positions. With `num_coarse_levels`, edges of coarser and coarser meshes (`graph.coarse_edges`)
        carry messages over long ways in every round. Before each of the first `num_contexts` rounds every node is told
        the mean latents of each type of nodes of its scene: what is far away counts at once. An `incompressible` flow
        is told what its equations say on the mesh (`models.flow_terms`), at once everywhere; the network says of each
        node how much of each term goes into its velocity and its pressure, and what they lack. The `integrator` follows
        from what the data's velocities are: those of the interval that ended ("semi_implicit_euler") or at the instant
        ("trapezoid"). The `normalizer` keeps to `statistics` ("dataset"), or begins with them and counts in the data
        that training shows it ("online"). `backend` is that of
        the message passing.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        arguments: dict[str, Any] = {
            "statistics": {name: list(values) for name, values in statistics.items()},
            "outputs": dict(outputs),
            "inputs": [inputs] if isinstance(inputs, str) else list(inputs),
            "relative_inputs": [relative_inputs] if isinstance(relative_inputs, str) else list(relative_inputs),
            "strains": [strains] if isinstance(strains, str) else list(strains),
            "num_node_types": num_node_types,
            "num_dimensions": num_dimensions,
            "num_rest_dimensions": num_rest_dimensions,
            "world_radius": world_radius,
            "num_coarse_levels": num_coarse_levels,
            "num_contexts": num_contexts,
            "incompressible": incompressible,
            "latent_size": latent_size,
            "num_message_passing_steps": num_message_passing_steps,
            "num_hidden_layers": num_hidden_layers,
            "actions": actions,
            "integrator": integrator,
            "normalizer": normalizer,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.outputs, self.inputs, self.actions = dict(outputs), tuple(arguments["inputs"]), actions
        self.auxiliary = tuple(name for name, order in outputs.items() if order == 0)
        self.relative_inputs, self.strains = (tuple(arguments[name]) for name in ("relative_inputs", "strains"))
        self.num_node_types, self.world_radius = num_node_types, world_radius
        self.num_coarse_levels, self.incompressible = num_coarse_levels, incompressible
        self.share = 0.5 if integrator == "trapezoid" else 1.0  # of the new velocity in a step's way
        self.dimensions = {"rest_positions": num_rest_dimensions, "positions": num_dimensions}
        self.online = normalizer == "online"
        self.moments = nn.ModuleDict(dict(_moments(statistics, self.online)))
        self.sizes = {name: len(statistics[f"{self._predicted(name)}_std"]) for name in self.outputs}
        relative = sum(self._of(f"{name}_edge").size for name in self.relative_inputs)
        mesh = sum(size + 1 for size in self.dimensions.values() if size) + relative
        mesh += len(STRAINS) if "edges" in self.strains else 0
        self.gains = {name: GAINS[name] for name in self.outputs if incompressible and name in GAINS}
        told = [*self._told, *(FLOW if incompressible else ())]
        told += [f"{name}_node" for name in STRAINS] if "nodes" in self.strains else []
        world = [] if world_radius is None else [num_dimensions + 1 + relative]
        self.network = EncodeProcessDecode(
            sum(self._of(name).size for name in told) + (num_node_types if num_node_types > 1 else 0),
            [mesh] * (1 + num_coarse_levels) + world,
            sum(self.sizes.values()) + sum(map(len, self.gains.values())),
            latent_size,
            num_message_passing_steps,
            num_hidden_layers,
            num_contexts=num_contexts,
            num_kinds=num_node_types,
            backend=backend,
        )

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory],
        *,
        noise_std: Noise = 0.0,
        actions: Any = "none",
        strains: Sequence[Strained] = (),
        incompressible: bool = False,
    ) -> dict[str, list[float]]:
        """Return mean and standard deviation of every field of nodes or scenes and of its change, and of edges.

        Noise that training will add to velocities enters in the standard deviations. `strains` and `incompressible` as
        for the constructor.

        Raises:
            ValueError: there are no steps with a node that moves, or a quantity is not finite.
        """
        sums: dict[str, Tensor] = {}
        for trajectory in trajectories:
            for name, part in _sums(trajectory, noise_std, strains, incompressible).items():
                sums[name] = sums[name] + part if name in sums else part
        if not any(name.endswith("_change") for name in sums):
            raise ValueError("Statistics need at least one trajectory of two frames with a node that moves.")
        found: dict[str, list[float]] = {}
        for name, part in sums.items():
            if not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"The data's {name} is not finite throughout; look for NaN, infinity and edges of no length."
                )
            mean, std = mean_and_std(part)
            found[f"{name}_mean"], found[f"{name}_std"] = mean.tolist(), std.tolist()
        return found

    def observe(self, trajectory: Trajectory, noise_std: Noise = 0.0) -> None:
        """Count recorded data in, where the normalizer is "online"."""
        if self.online:
            for name, part in _sums(trajectory, noise_std, self.strains, self.incompressible).items():
                if f"of_{name}" in self.moments:  # of what it began with
                    self._of(name).count(part)

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        needed = {
            *self.outputs,
            *self.inputs,
            *self.relative_inputs,
            "cells",
            *(name for name, size in self.dimensions.items() if size),
        }
        needed |= {"velocities"} if 2 in self.outputs.values() or self.strains else set()
        needed |= {"rest_positions"} if self.num_coarse_levels else set()
        lacking = sorted(name for name in needed if name not in state)
        if lacking:
            raise ValueError(f"This model steps states with {', '.join(lacking)}; the state has {', '.join(state)}.")
        sizes = {name: self._of(name).size for name in (*self.outputs, *self.inputs)}
        sizes |= {name: self._of(f"{name}_edge").size for name in self.relative_inputs}
        sizes |= {name: size for name, size in self.dimensions.items() if size}
        for name, size in sizes.items():
            if state[name][0].numel() != size:
                raise ValueError(f"This model was made for {name} of {size} numbers; got {state[name][0].numel()}.")
        dtype = next(self.network.parameters()).dtype
        if any(state[name].dtype != dtype for name in needed if state[name].is_floating_point()):
            raise ValueError(
                f"This model computes in {dtype}; convert the state with state.to({dtype}), or the model with "
                "model.double()."
            )
        types = self.num_node_types
        if types > 1 and not state.derived(f"node types < {types}", ("node_types",), lambda s: _all_below(s, types)):
            raise ValueError(f"This model tells types of nodes apart; give the state node_types from 0 to {types - 1}.")
        if (action is None) != (self.actions == "none"):
            way = (
                "was trained without actions; leave them out" if self.actions == "none" else "needs actions; give them"
            )
            raise ValueError(f"This model {way}.")
        if action is not None:
            size, rows = self._of("action").size, (state.num_entities, state.num_scenes)
            if action.ndim != 2 or action.shape[1] != size or len(action) not in rows:
                raise ValueError(
                    f"This model takes actions [{rows[0]}, {size}] of nodes or [{rows[1]}, {size}] of scenes; "
                    f"got {list(action.shape)}."
                )

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, o]: the outputs, each in standard deviations about its mean; zero where none is predicted."""
        sets = [mesh_edges(state), *coarse_edges(state, self.num_coarse_levels)]
        features = [self._edge_features(state, edges, PLACES) / 2**level for level, edges in enumerate(sets)]
        flow = flow_terms(state, self.dt) if self.incompressible else None
        if self.world_radius is not None:
            sets.append(world_edges(state, self.world_radius))
            features.append(self._edge_features(state, sets[-1], ("positions",)))
        groups = _groups(state, self.num_node_types) if len(self.network.contexts) else None
        told = self._node_features(state, action, flow)
        made: Tensor = self.network(told, features, sets, _strips(state), groups)
        if flow is not None:
            made = self._with_flow(made, flow)
        return torch.where(self._predicted_of(state), made, 0.0)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state, as `outputs` say; kinematic nodes keep what is integrated."""
        made: dict[str, Tensor] = {}
        parts = torch.split(change, list(self.sizes.values()), 1)
        for (name, order), part in zip(self.outputs.items(), parts, strict=True):
            given = self._of(self._predicted(name)).back(part).reshape(state[name].shape)
            where = self._nodes_of(name, state).reshape(-1, *[1] * (given.ndim - 1))
            if order == 2:
                made["velocities"] = torch.where(where, state.velocities + given, state.velocities)
                given = state.positions + self.dt * torch.lerp(state.velocities, made["velocities"], self.share)
            elif order == 1:
                given = state[name] + given
            made[name] = torch.where(where, given, state[name])
        if "positions" in made and "velocities" in state and "velocities" not in made:
            way = (made["positions"] - state.positions) / self.dt
            made["velocities"] = torch.where(self.free(state)[:, None], way, state.velocities)
        return state.advanced(**made)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized outputs that `integrate` turns into `next_state`; zero where none is predicted."""
        parts = []
        for name, order in self.outputs.items():
            source = "velocities" if order == 2 else name
            wanted = next_state[source] if order == 0 else next_state[source] - state[source]
            parts.append(self._of(self._predicted(name))(wanted.reshape(len(wanted), -1)))
        return torch.where(self._predicted_of(state), torch.cat(parts, 1), 0.0)

    def free(self, state: State) -> Tensor:
        """Return which nodes [n] the model moves: active and not kinematic."""
        return state.free

    @property
    def _told(self) -> tuple[str, ...]:
        return (*self.inputs, *(("action",) if self.actions == "input" else ()))

    def _nodes_of(self, name: str, state: State) -> Tensor:
        """Return the nodes [n] of which a field is predicted."""
        return state.active if name in self.auxiliary else self.free(state)

    def _predicted_of(self, state: State) -> Tensor:
        """Return [n, o]: which outputs of which nodes are predicted."""
        return torch.cat([self._nodes_of(name, state)[:, None].expand(-1, k) for name, k in self.sizes.items()], 1)

    def _predicted(self, name: str) -> str:
        return {0: name, 1: f"{name}_change", 2: "velocities_change"}[self.outputs[name]]

    def _of(self, name: str) -> Moments:
        found = self.moments[f"of_{name}"]
        assert isinstance(found, Moments)
        return found

    def _node_features(self, state: State, action: Tensor | None, flow: FlowTerms | None) -> Tensor:
        count, features = state.num_entities, []
        for name in self._told:
            values = action if name == "action" else state[name]
            assert values is not None
            rows = values if len(values) == count else values[state.batch]
            features.append(self._of(name)(rows.reshape(count, -1)))
        if "nodes" in self.strains:
            edges = mesh_edges(state)
            made = {name: node_strains(state, edges, rates=name == RATES) for name in STRAINS}
            features += [self._of(f"{name}_node")(values) for name, values in made.items()]
        if flow is not None:
            features += [self._of(name).by_spread(values) for name, values in flow.named().items()]
        if self.num_node_types > 1:
            kinds = torch.nn.functional.one_hot(state.node_types, self.num_node_types)
            features.append(kinds.to(next(self.network.parameters()).dtype))
        return torch.cat(features, 1)

    def _with_flow(self, made: Tensor, flow: FlowTerms) -> Tensor:
        """Return outputs [n, o] of the network's [n, o + gains]: a flow's terms added, as much as it says of each."""
        found, *gains = torch.split(made, [sum(self.sizes.values()), *map(len, self.gains.values())], 1)
        parts = dict(zip(self.sizes, torch.split(found, list(self.sizes.values()), 1), strict=True))
        viscous = self._of("velocities_change").std.norm() / self._of("diffusion").std.norm()  # of unknown viscosity
        units = made.new_tensor([self.dt, self.dt, self.dt, viscous])
        terms = {"velocities": flow.accelerations * units[:, None], "pressures": flow.pressures[:, :, None]}
        for (name, base), gain in zip(self.gains.items(), gains, strict=True):
            added = ((gain + gain.new_tensor(base))[:, :, None] * terms[name]).sum(1)
            parts[name] = parts[name] + self._of(self._predicted(name)).by_spread(added)
        return torch.cat(list(parts.values()), 1)

    def _edge_features(self, state: State, edges: Connections, places: Sequence[str]) -> Tensor:
        """Return [e, k]: ways from sender to receiver, their lengths, and differences, in units of the mesh's edges."""
        features = []
        for name in places:
            if not self.dimensions[name]:
                continue
            ways = self._of(f"{name}_edge").by_length(along(state[name], edges))
            features += [ways, (ways.square().sum(1, keepdim=True) + SMALLEST).sqrt()]
        for name in self.relative_inputs:
            difference = along(state[name].reshape(state.num_entities, -1), edges)
            features.append(self._of(f"{name}_edge").by_spread(difference))
        if places == PLACES and "edges" in self.strains:
            for name in STRAINS:
                made = edge_strains(state, edges, rates=name == RATES)
                features.append(self._of(f"{name}_edge").by_spread(made))
        return torch.cat(features, 1)


def _moments(statistics: Mapping[str, Sequence[float]], online: bool) -> Iterator[tuple[str, Moments]]:
    for name in _measured(statistics):
        mean, std = (torch.tensor(statistics[f"{name}_{which}"], dtype=torch.float64) for which in ("mean", "std"))
        yield f"of_{name}", Moments(mean, std, online=online)  # a bare name may be that of a method of a dict's


def _strips(state: State) -> Tensor:
    """Return nodes [n] by scene and along the longest way through the mesh, so that parts of a mesh are strips."""

    def order(s: State) -> Tensor:
        places = s["rest_positions" if "rest_positions" in s else "positions"].detach()
        first = torch.argsort(places[:, int((places.amax(0) - places.amin(0)).argmax())])
        return first[torch.argsort(s.batch[first], stable=True)]

    return state.derived("strips", ("rest_positions", "batch"), order)


def _groups(state: State, num_types: int) -> Groups:
    """Return the nodes of each scene by their types, or all together where types are not told apart."""

    def found(s: State) -> Groups:
        types = s.node_types if num_types > 1 else torch.zeros_like(s.batch)
        return Groups.of(s.batch, types, s.active, s.num_scenes, num_types)

    return state.derived(f"groups of {num_types}", ("node_types", "batch", "active"), found)


def _sums(
    trajectory: Trajectory, noise_std: Noise, strains: Sequence[Strained], incompressible: bool
) -> dict[str, Tensor]:
    """Return [3, k] of all quantities that the network may take and give, as `normalizer.summed` has them."""
    noise = noise_by_field(noise_std)
    if "positions" not in noise and "velocities" in noise:
        noise["positions"] = noise["velocities"] * trajectory.dt  # where noise in velocities leads
    found = {}
    flowing = flow_samples(trajectory, 1 + len(trajectory) // FRAMES_OF_EDGES) if incompressible else {}
    for name, values in (_samples(trajectory) | _strained(trajectory, strains) | flowing).items():
        noisy = noise.get(name.removesuffix("_change").removesuffix("_edge"), 0.0)
        both = 2**0.5 if name.endswith("_edge") else 1.0  # both ends of an edge have it
        if values.numel():
            found[name] = summed(values, both * noisy)
    return found


def _samples(trajectory: Trajectory) -> dict[str, Tensor]:
    """Return [..., k] tensors of the quantities that the network takes and gives."""
    state = trajectory.initial
    moving = trajectory.active & state.replace(active=torch.ones_like(state.active)).free
    samples: dict[str, Tensor] = {}
    edges = mesh_edges(state)
    for name in state:
        field = state.fields[name]
        if field.kind != "float" or field.past_of or field.per not in ("entity", "scene"):
            continue
        values = trajectory[name]
        samples[name] = values = values.reshape(*values.shape[: values.ndim - len(field.shape)], -1)
        if field.per != "entity":
            continue
        if not field.static:
            samples[f"{name}_change"] = values.diff(dim=0)[moving[1:] & moving[:-1]]
        some = values if field.static else values[:: 1 + len(values) // FRAMES_OF_EDGES]
        samples[f"{name}_edge"] = along(some, edges)
    if trajectory.actions is not None:
        samples["action"] = trajectory.actions
    return samples


def _strained(trajectory: Trajectory, strains: Sequence[Strained]) -> dict[str, Tensor]:
    """Return [..., k] tensors of the strains that edges or nodes are told, at some frames."""
    if not strains:
        return {}
    some, edges = slice(None, None, 1 + len(trajectory) // FRAMES_OF_EDGES), mesh_edges(trajectory.initial)
    fields = {name: trajectory[name][some] for name in ("positions", "velocities") if name in trajectory.frames}
    fields |= {name: trajectory[name] for name in ("rest_positions",) if name in trajectory.initial}
    strained = [str(strains)] if isinstance(strains, str) else list(strains)
    sizes = {name: fields[name].shape[-1] if name in fields else 0 for name in (*PLACES, "velocities")}
    _check_strains(strained, sizes)
    kinds = {"edge": edge_strains, "node": node_strains}
    return {
        f"{name}_{where}": kinds[where](fields, edges, rates=name == RATES)
        for where in (one.removesuffix("s") for one in strained)
        for name in STRAINS
    }


def _all_below(state: State, count: int) -> bool:
    if "node_types" not in state:
        return False
    return bool(((state.node_types >= 0) & (state.node_types < count)).all())


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, choices in (("actions", Actions), ("integrator", Integrator), ("normalizer", Normalizer)):
        if arguments[name] not in get_args(choices):
            known = " or ".join(map(repr, get_args(choices)))
            raise ValueError(f"{name} must be {known}; got {arguments[name]!r}.")
    outputs = arguments["outputs"]
    if not outputs or any(order not in (0, 1, 2) for order in outputs.values()):
        raise ValueError(f"outputs names fields and how often each is integrated, 0, 1 or 2; got {outputs}.")
    if any(order == 2 and name != "positions" for name, order in outputs.items()):
        raise ValueError(f"Only positions are integrated twice; got outputs {outputs}.")
    if outputs.get("positions") == 2 and "velocities" in outputs:
        raise ValueError("positions integrated twice bring their velocities along; leave velocities out of outputs.")
    _check_counts(arguments)
    sizes = {"positions": arguments["num_dimensions"], "rest_positions": arguments["num_rest_dimensions"]}
    if not any(sizes.values()) or any(size not in (0, 1, 2, 3) for size in sizes.values()):
        raise ValueError(f"num_dimensions and num_rest_dimensions must be 0 to 3, not both 0; got {sizes}.")
    strained = arguments["strains"]
    _check_strains(strained, sizes)
    radius = arguments["world_radius"]
    if radius is not None and not (
        isinstance(radius, int | float) and 0 < radius < float("inf") and sizes["positions"]
    ):
        raise ValueError(f"world_radius must be a positive distance between nodes with positions; got {radius!r}.")
    told = (*arguments["inputs"], *(("action",) if arguments["actions"] == "input" else ()))
    if not told and arguments["num_node_types"] == 1:
        raise ValueError("Nodes need something to be told by; name fields in inputs, or give num_node_types.")
    named = {0: "{}", 1: "{}_change", 2: "velocities_change"}
    needed = [*told, *(named[order].format(name) for name, order in outputs.items())]
    needed += [
        f"{name}_edge"
        for name in (
            *(name for name, size in sizes.items() if size),
            *arguments["relative_inputs"],
            *(STRAINS if "edges" in strained else ()),
        )
    ]
    needed += [f"{name}_node" for name in STRAINS] if "nodes" in strained else []
    if arguments["incompressible"]:
        check_flow(arguments)
        needed += FLOW
    missing = [name for name in needed if f"{name}_std" not in arguments["statistics"]]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}; those there are of "
            f"{', '.join(_measured(arguments['statistics']))}. Name one of these, or measure(trajectories) anew."
        )


def _check_strains(strains: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Raise a ValueError unless fields of these `sizes`, 0 of what is not there, have the strains."""
    unlike = "nodes" in strains and len(set(sizes.values())) > 1
    if any(name not in get_args(Strained) for name in strains) or (strains and not all(sizes.values())) or unlike:
        raise ValueError(
            "strains are of 'edges' and 'nodes', of meshes that have positions, rest_positions and velocities, for "
            f"nodes in as many dimensions; got {list(strains)}, with {dict(sizes)}."
        )


def _check_counts(arguments: Mapping[str, Any]) -> None:
    check_sizes(arguments, "num_node_types", "latent_size", "num_message_passing_steps", "num_hidden_layers")
    for name in ("num_coarse_levels", "num_contexts"):
        if not isinstance(arguments[name], int) or arguments[name] < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more; got {arguments[name]!r}.")
    if arguments["num_contexts"] > arguments["num_message_passing_steps"]:
        raise ValueError(
            "num_contexts are told before as many rounds, so there are at most num_message_passing_steps, "
            f"{arguments['num_message_passing_steps']}; got {arguments['num_contexts']}."
        )


def _measured(statistics: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix("_std") for name in statistics if name.endswith("_std")]
