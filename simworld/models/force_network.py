"""The Interaction Network whose effects are forces: a learned law between bodies, integrated in sub-steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simworld.models.base import LearnedSimulator, Noise, check_sizes, noise_by_field
from simworld.physics.forces import Graph, Pairs, Rule, advance, check_inside, pairs
from simworld.simulate import check_suits
from simworld.state import State
from simworld.trajectory import Trajectory

Masses = Literal["given", "learned", "equal"]
Actions = Literal["force", "none"]
Gradients = Literal["all", "law"]
EAGERNESS = 10.0
"""How much faster powers, constants and masses learn, and how much slower the perceptron, which only corrects."""
STATISTICS = ("distance", "mass", "stiffness", "position_change", "velocity_change")
"""Geometric means of distances between bodies, masses and stiffnesses; root mean squares of what positions change
by beyond dt v, and velocities: a number, or one per body where each has an object type of its own."""
FRAMES_MEASURED = 20


class ForceNetwork(LearnedSimulator):
    """Bodies that act on each other by forces along the lines between them; the law of force is learned.

    The relation network of an Interaction Network (Battaglia et al. 2016, arXiv 1612.00222) with messages
    along relative positions (Satorras et al. 2021, arXiv 2102.09844). With d the distance, m masses, q
    charges and w a spring's stiffness over the mean one, the force of j on i is

        F_ij = w d^a (m_i m_j)^b (A (1 + f) + q_i q_j B (1 + g)) (x_j - x_i) / d

    with a, b, A, B learned, and f, g perceptrons of log d, log m_i m_j and (log m_i / m_j)^2: a product of
    powers, as laws of nature are, corrected where the data says so. Forces are equal and opposite, so momentum is
    kept exactly, and the model is equivariant to translations, rotations and reflections. Accelerations F / m
    are integrated by `rule` in `num_sub_steps` sub-steps within each step of dt, with the same weights, and
    walls round the scene reflect.

    Where all bodies were equal in training, a state's `masses`, if it carries any, are inertia alone, 1 being that of
    the bodies known. With `masses="learned"` every body has a mass of its own, found from trajectories:
    `object_types` says which body is which. Then `masses_found` are in units of the first body's.

    The change is [n, 2 d]: that of positions beyond dt v, and that of velocities.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Any],
        num_dimensions: int = 2,
        graph: Graph = "full",
        masses: Masses = "equal",
        charges: bool = False,
        actions: Actions = "none",
        num_bodies: int = 1,
        num_sub_steps: int = 10,
        rule: Rule = "velocity_verlet",
        max_force: float | None = None,
        min_distance: float = 0.0,
        gradients: Gradients = "all",
        latent_size: int = 32,
        num_layers: int = 2,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `ForceNetwork.measure` returns for the training data. `graph` is who acts on
        whom: all pairs of a scene, or those joined by springs. `actions` are forces [n, d] held for a step.
        With `gradients="law"`, in training, they pass through the law alone and not through the places at which it
        is evaluated: right to first order, zero where the errors are, and bounded where paths are chaotic.
        Where the world is known to have them, `max_force` cuts off every component of a body's total force, and
        in the law distances are never taken as less than `min_distance`.
        `num_bodies` is how many bodies have learned masses.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        arguments = {
            "statistics": dict(statistics),
            "num_dimensions": num_dimensions,
            "graph": graph,
            "masses": masses,
            "charges": charges,
            "actions": actions,
            "num_bodies": num_bodies,
            "num_sub_steps": num_sub_steps,
            "rule": rule,
            "max_force": max_force,
            "min_distance": min_distance,
            "gradients": gradients,
            "latent_size": latent_size,
            "num_layers": num_layers,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.graph, self.masses, self.charges, self.actions = graph, masses, charges, actions
        self.num_dimensions, self.num_bodies = num_dimensions, num_bodies
        self.num_sub_steps, self.rule = num_sub_steps, rule
        self.max_force, self.min_distance, self.gradients = max_force, min_distance, gradients
        columns = 1 + (2 if masses == "given" else 0)
        layers: list[nn.Module] = [nn.Linear(columns, latent_size), nn.SiLU()]
        for _ in range(num_layers - 1):
            layers += [nn.Linear(latent_size, latent_size), nn.SiLU()]
        self.law = nn.Sequential(*layers, nn.Linear(latent_size, 1 + charges))
        self.powers = nn.Parameter(torch.zeros(2))
        self.constants = nn.Parameter(torch.full((1 + charges,), 1 / (1 + charges) / EAGERNESS))
        self.log_masses = nn.Parameter(torch.zeros(num_bodies if masses == "learned" else 0))

    @staticmethod
    def measure(trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Any = "none") -> dict[str, Any]:
        """Return the sizes of inputs and changes in recorded data, by which the network normalizes.

        Where all trajectories tell one body each of several `object_types` apart, changes are measured for
        each body.

        Raises:
            ValueError: there are no steps.
        """
        logs: dict[str, list[Tensor]] = {}
        squares: dict[str, list[Tensor]] = {}
        for trajectory in trajectories:
            for found, samples in ((logs, _logarithms(trajectory)), (squares, _changes(trajectory))):
                for name, values in samples.items():
                    found.setdefault(name, []).append(values.double())
        if not squares:
            raise ValueError("Statistics need at least one trajectory of two frames; got none.")
        scales: dict[str, Any] = {name: float(torch.cat(values).mean().exp()) for name, values in logs.items()}
        for name, changes in squares.items():
            if len({change.shape[1] for change in changes}) > 1:
                raise ValueError(
                    "Either all trajectories or none must tell every body apart by object_types 0 to n - 1, with the "
                    f"same n; got {sorted({change.shape[1] for change in changes})}. Leave object_types out."
                )
            noise = noise_by_field(noise_std).get("velocities", 0.0) if name == "velocity_change" else 0.0
            means = torch.cat(changes).square().mean(0) + noise**2
            sizes = torch.where(means > 0, means.sqrt(), 1.0).tolist()
            scales[name] = sizes if len(sizes) > 1 else sizes[0]
        return {name: scales.get(name, 1.0) for name in STATISTICS}

    @property
    def masses_found(self) -> Tensor:
        """Learned masses [num_bodies] in units of the first body's."""
        if self.masses != "learned":
            raise ValueError("Masses are found by models made with masses='learned'; this one's are not.")
        found: Tensor = (EAGERNESS * (self.log_masses - self.log_masses[0])).exp().detach()
        return found

    def at_rate(self, num_sub_steps: int, rule: Rule) -> ForceNetwork:
        """Return the same weights in other sub-steps: a law that was learned coarsely, integrated finely."""
        made = ForceNetwork(**{**self.arguments, "num_sub_steps": num_sub_steps, "rule": rule})
        made = made.to(self.powers.device, self.powers.dtype).train(self.training)
        made.load_state_dict(self.state_dict())
        made.provenance = {**self.provenance, "sub_steps_in_training": [self.num_sub_steps, self.rule]}
        return made

    @torch.no_grad()
    def with_masses_given(self) -> ForceNetwork:
        """Return the same law between bodies whose masses are the state's, in units of what was the first body's.

        A law learned with masses (`masses="learned"`) then answers what other masses would do, and other bodies.
        """
        if self.masses != "learned":
            raise ValueError(f"Masses are given once they were learned; this model's are {self.masses!r}.")
        said = self.arguments["statistics"]
        changes = {name: max(said[name]) if isinstance(said[name], Sequence) else said[name] for name in STATISTICS[3:]}
        unit = float((EAGERNESS * self.log_masses[0].double()).exp())
        statistics = {**said, **changes, "mass": 1 / unit}
        made = ForceNetwork(**{**self.arguments, "masses": "given", "num_bodies": 1, "statistics": statistics})
        made = made.to(self.powers.device, self.powers.dtype)
        weights = {name: value for name, value in self.state_dict().items() if name != "log_masses"}
        first = weights["law.0.weight"]
        weights["law.0.weight"] = torch.cat([first, first.new_zeros(len(first), 2)], 1)
        weights["powers"] = torch.stack([self.powers[0], self.powers.new_tensor(1 / EAGERNESS)])
        made.load_state_dict({**weights, "log_masses": made.log_masses})
        made.provenance = {**self.provenance, "masses_in_training": "learned"}
        return made.train(self.training)

    @torch.no_grad()
    def strength(self, distance: float) -> float:
        """Return the attraction of a body by the first learned mass over its square, times distance squared.

        With `masses="learned"` only: where the law is gravity's, this is G m of the first body at any distance.
        """
        if self.masses != "learned":
            raise ValueError("strength() tells the law between learned masses; this model's are not learned.")
        there = self.powers.new_tensor([[distance, *[0.0] * (self.num_dimensions - 1)]])
        weights = there.new_full((1, 1), self._unit_force) * (EAGERNESS * self.log_masses[0]).exp()
        return float(self._forces(there, there.new_zeros(1, 0), weights).norm()) * distance**2

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        if "positions" not in state or "velocities" not in state:
            raise ValueError(f"A ForceNetwork steps an ObjectState; got a {type(state).__name__}.")
        if state.positions.shape[1] != self.num_dimensions:
            raise ValueError(
                f"This model was made for positions [n, {self.num_dimensions}]; got {list(state.positions.shape)}."
            )
        if state.positions.dtype != self.powers.dtype:
            raise ValueError(
                f"This model computes in {self.powers.dtype}; got a state in {state.positions.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        needed = {"charges": self.charges, "masses": self.masses == "given", "object_types": self.masses == "learned"}
        for name, wanted in needed.items():
            if wanted and name not in state:
                raise ValueError(f"This model needs {name}; give the state a row of them per body.")
        if self.graph == "springs" and "springs" not in state:
            raise ValueError("This model acts along springs; give the state springs [m, 2].")
        if self.masses == "learned" and not state.derived(
            f"known bodies.{self.num_bodies}", ("object_types",), self._all_known
        ):
            raise ValueError(f"This model knows the masses of object_types 0 to {self.num_bodies - 1}; got others.")
        check_inside(state)
        if action is not None and self.actions == "none":
            raise ValueError("This model was made without actions; leave them out or train with actions='force'.")
        if action is not None and (action.shape != state.positions.shape or action.dtype != state.positions.dtype):
            raise ValueError(
                f"This model takes forces {list(state.positions.shape)} in {state.positions.dtype} per step; "
                f"got {list(action.shape)} in {action.dtype}."
            )

    def _all_known(self, state: State) -> bool:
        return bool(((state.object_types >= 0) & (state.object_types < self.num_bodies)).all())

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, 2 d]: what positions change by beyond dt v and what velocities change by, normalized."""
        among = pairs(state, self.graph)
        masses = self._masses(state)
        fixed, weights = self._pair_features(state, among, None if self.masses == "equal" else masses)

        def force(r: Tensor) -> Tensor:
            return self._forces(r.detach() if self.gradients == "law" and self.training else r, fixed, weights)

        x, v = advance(
            state,
            among,
            force,
            dt=self.dt,
            num_sub_steps=self.num_sub_steps,
            rule=self.rule,
            max_force=self.max_force,
            action=action,
            masses=masses,
        )
        return self._normalized(state, x, v)

    def _forces(self, separations: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
        """Return the forces on the first bodies of the pairs [p, d]."""
        squares = separations.square() @ separations.new_ones(separations.shape[1], 1)
        least = max(self.min_distance, 1e-10 * self._distance)
        logs = 0.5 * squares.clamp(min=least**2).log() - math.log(self._distance)
        inputs = torch.cat([logs, fixed], 1)
        distance, mass = (EAGERNESS * self.powers).unbind()
        powers = logs * (distance - 1)
        if self.masses == "given":
            powers = powers + fixed[:, :1] * mass
        strengths: Tensor = weights * (EAGERNESS * self.constants) * (1 + self.law(inputs) / EAGERNESS)
        return separations * (powers.exp() * strengths.sum(1, keepdim=True))

    @property
    def _distance(self) -> float:
        return float(self.arguments["statistics"]["distance"])

    def _masses(self, state: State) -> Tensor | None:
        if self.masses == "equal":
            return state.masses if "masses" in state else None
        return (EAGERNESS * self.log_masses).exp()[state.object_types] if self.masses == "learned" else state.masses

    def _pair_features(self, state: State, among: Pairs, masses: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the law sees of the pairs beyond their distance [p, k], and weights of f and g [p, 1 or 2]."""
        columns = []
        weights = state.positions.new_full((len(among.first), 1), self._unit_force)
        if masses is not None:
            scale = self.arguments["statistics"]["mass"] if self.masses == "given" else 1.0
            first, second = (masses / scale).log()[torch.stack([among.first, among.second])]
            if self.masses == "given":
                columns += [first + second, (first - second).square()]
            else:
                weights = weights * (first + second).exp()[:, None]
        features = torch.stack(columns, 1) if columns else state.positions.new_zeros(len(among.first), 0)
        if self.graph == "springs" and "spring_stiffnesses" in state:
            joined = state.active[state.springs].all(1)
            weights = weights * (state.spring_stiffnesses[joined] / self.arguments["statistics"]["stiffness"])[:, None]
        if self.charges:
            products = state.charges[among.first] * state.charges[among.second]
            weights = torch.cat([weights, weights * products[:, None]], 1)
        return features, weights

    @property
    def _unit_force(self) -> float:
        """The force per distance that makes a body's typical change of velocity within a step."""
        said = self.arguments["statistics"]
        change = said["velocity_change"]
        typical = max(change) if isinstance(change, Sequence) else change
        per_mass = float(said["mass"]) if self.masses == "given" else 1.0
        return float(typical) / (self.dt * self._distance) * per_mass

    def _scales(self, state: State) -> Tensor:
        """Return the sizes of changes of positions and velocities, [n, 2] or [1, 2]."""
        said = self.arguments["statistics"]
        values = [said["position_change"], said["velocity_change"]]
        table = torch.tensor(values, dtype=state.positions.dtype, device=state.device).view(2, -1).T
        return table[state.object_types] if len(table) > 1 else table

    def _normalized(self, state: State, positions: Tensor, velocities: Tensor) -> Tensor:
        scales = self._scales(state)
        beyond = positions - state.positions - self.dt * state.velocities
        change = torch.cat([beyond / scales[:, :1], (velocities - state.velocities) / scales[:, 1:]], 1)
        return torch.where(self.free(state)[:, None], change, 0.0)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: x' = x + dt v + scale * change, v' = v + scale * change; fixed bodies stay."""
        scales, moves = self._scales(state), self.free(state)[:, None]
        first, second = change.chunk(2, 1)
        positions = state.positions + self.dt * state.velocities + first * scales[:, :1]
        velocities = state.velocities + second * scales[:, 1:]
        return state.replace(
            positions=torch.where(moves, positions, state.positions),
            velocities=torch.where(moves, velocities, state.velocities),
        )

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for fixed bodies."""
        return self._normalized(state, next_state.positions, next_state.velocities)

    def free(self, state: State) -> Tensor:
        """Return which bodies [n] move: active and not fixed."""
        return state.free


def _logarithms(trajectory: Trajectory) -> dict[str, Tensor]:
    """Return logarithms of what is normalized by geometric means."""
    state = trajectory.initial
    among = pairs(state)
    chosen = trajectory["positions"][:: max(1, len(trajectory) // FRAMES_MEASURED)]
    distances = [among.separations(x).norm(dim=1) for x in chosen]
    found = {"distance": torch.cat(distances)} if len(among.first) else {}
    for name, field in (("mass", "masses"), ("stiffness", "spring_stiffnesses")):
        if field in state:
            found[name] = state[field]
    return {name: values[values > 0].log() for name, values in found.items() if bool((values > 0).any())}


def _changes(trajectory: Trajectory) -> dict[str, Tensor]:
    """Return changes over a step, [k, 1], or [k, n] where every body has an object type of its own."""
    if not trajectory.num_steps:
        return {}
    state = trajectory.initial
    x, v = trajectory["positions"], trajectory["velocities"]
    changes = {"position_change": x[1:] - x[:-1] - trajectory.dt * v[:-1], "velocity_change": v[1:] - v[:-1]}
    own = torch.arange(len(state), device=state.device)
    if len(state) > 1 and "object_types" in state and torch.equal(state.object_types, own):
        return {name: change.transpose(1, 2).flatten(0, 1) for name, change in changes.items()}
    return {name: change[:, state.free].reshape(-1, 1) for name, change in changes.items()}


def _check_arguments(said: Mapping[str, Any]) -> None:
    choices: dict[str, tuple[object, ...]] = {
        "num_dimensions": (2, 3),
        "graph": get_args(Graph),
        "masses": get_args(Masses),
        "charges": (False, True),
        "actions": get_args(Actions),
        "rule": get_args(Rule),
        "gradients": get_args(Gradients),
    }
    for name, known in choices.items():
        if said[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {said[name]!r}.")
    check_sizes(said, "num_bodies", "num_sub_steps", "latent_size", "num_layers")
    if said["max_force"] is not None and not (isinstance(said["max_force"], int | float) and said["max_force"] > 0):
        raise ValueError(f"max_force must be positive, or None for no cut-off; got {said['max_force']!r}.")
    if not (isinstance(said["min_distance"], int | float) and 0 <= said["min_distance"] < float("inf")):
        raise ValueError(f"min_distance must be a distance, 0 or more; got {said['min_distance']!r}.")
    statistics = said["statistics"]
    missing = [name for name in STATISTICS if not isinstance(statistics, Mapping) or name not in statistics]
    if missing:
        raise ValueError(f"statistics lack {', '.join(missing)}; compute them with ForceNetwork.measure(trajectories).")


@torch.no_grad()
def infer_springs(model: ForceNetwork, observed: Trajectory) -> State:
    """Return the first observed state with a spring between every pair of a scene, as stiff as frames show.

    Under the learned law of a spring, changes of velocity are linear in the stiffnesses: they are found by
    least squares, for each scene from all its frames, forces taken as the mean of those at both ends of a
    step. Pairs without a spring come out near zero. Hits on walls are not told apart from springs' doing.

    Raises:
        ValueError: the model is not of springs between equal masses, or of another dt or dtype than the frames.
    """
    if model.graph != "springs" or model.masses != "equal":
        raise ValueError("infer_springs needs a model of springs between equal masses; got another ForceNetwork.")
    if observed.num_steps < 1:
        raise ValueError("infer_springs needs two frames or more to see changes of velocity; got one.")
    bare = observed.initial
    check_suits("The model", model, observed)
    among = pairs(bare, "full")
    ends = torch.stack([among.first, among.second], 1)
    mean = model.arguments["statistics"]["stiffness"]
    stiff = torch.full((len(ends),), mean, dtype=bare.positions.dtype, device=bare.device)
    given: dict[str, Any] = {name: bare[name] for name in bare if not name.startswith("spring")}
    state = type(bare)(**given, batch=bare.batch, active=bare.active, springs=ends, spring_stiffnesses=stiff)
    state = state.using(bare.simulator)
    model.check(state, None)
    return state.replace(spring_stiffnesses=mean * _fitted_weights(model, state, observed))


def _fitted_weights(model: ForceNetwork, state: State, observed: Trajectory) -> Tensor:
    """Return the weight of each pair [p] for which the model explains the observed changes of velocity best."""
    among = pairs(state, "springs")
    fixed, weights = model._pair_features(state, among, None)
    forces = torch.stack([model._forces(among.separations(x), fixed, weights) for x in observed["positions"]])
    impulses = 0.5 * model.dt * (forces[1:] + forces[:-1])  # [t, p, d]
    changes = observed["velocities"].diff(dim=0)
    scene = state.batch[among.first]
    counts = torch.bincount(scene, minlength=state.num_scenes)
    first = counts.cumsum(0) - counts
    found = impulses.new_zeros(len(scene))
    for number in range(state.num_scenes):
        rows = slice(int(first[number]), int(first[number] + counts[number]))
        bodies = (state.batch == number).nonzero()[:, 0]
        design = impulses.new_zeros(len(impulses), len(bodies), impulses.shape[2], int(counts[number]))
        column = torch.arange(int(counts[number]), device=state.device)
        pushed = impulses[:, rows].permute(1, 0, 2)
        design[:, among.first[rows] - bodies[0], :, column] = pushed
        design[:, among.second[rows] - bodies[0], :, column] = -pushed
        free = model.free(state)[bodies]
        wanted = changes[:, bodies[free]].reshape(-1, 1)
        design = design[:, free].reshape(len(wanted), -1)
        # On the CPU, where columns that no frame tells apart are allowed.
        found[rows] = torch.linalg.lstsq(design.cpu(), wanted.cpu()).solution[:, 0].to(found.device)
    return found
