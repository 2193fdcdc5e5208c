"""Errors of predicted trajectories, always beside those of naive predictors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.kinds import MeshState, SlotState
from simworld.models.base import LearnedSimulator
from simworld.prescriptions import script
from simworld.simulate import Simulator, check_suits, rollout
from simworld.space import shortest, wrapped
from simworld.state import State
from simworld.trajectory import Trajectory

Metric = Callable[[Trajectory, Trajectory], Tensor]
"""`(predicted, target) -> [T]`: a figure per frame, NaN at frames that it is not measured at."""

Horizon = int | str
ROUNDING = 1e-9  # of the largest: what is smaller is what a solver leaves of zero
STATES_AT_ONCE, ENTITIES_AT_ONCE = 2048, 2**15  # scenes and entities that single steps are measured in together


@dataclass(frozen=True, kw_only=True)
class Static:
    """The naive simulator in which nothing moves."""

    dt: float

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state as it is, its past moved on."""
        return state.advanced()


@dataclass(frozen=True, kw_only=True)
class ConstantVelocity:
    """The naive simulator in which everything goes on as it went: x' = x + dt v."""

    dt: float

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state with every position one step further along its velocity."""
        return state.advanced(positions=wrapped(state, state.positions + self.dt * state.velocities))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an error table; `spread` is the standard deviation over trajectories.

    Over several `seeds` of training, `value` is their median and `low` and `high` are their range.
    """

    model: str
    dataset: str
    metric: str
    horizon: Horizon
    value: float
    unit: str
    trajectories: int
    spread: float | None = None
    source: str | None = None
    seeds: int | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain values, without what is not known."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def position_mse(predicted: Trajectory, target: Trajectory) -> Tensor:
    """Return [T]: squared position error per frame, averaged over entities, fixed ones too, and coordinates.

    Entities that are not there in the target's frame do not count. The `rollout_error_mse` of the GNS reference code,
    per frame (Sanchez-Gonzalez et al. 2020). Along periodic axes an error is the shortest way.
    """
    shapes = list(predicted["positions"].shape), list(target["positions"].shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"Trajectories to compare must have positions of one shape; got {shapes[0]} and {shapes[1]}.")
    errors = _misses(target.initial, predicted["positions"], target["positions"]).square()
    return _of_those_there(errors, target.active).mean((1, 2)) / target.active.double().mean(1)


def position_distance(predicted: Trajectory, target: Trajectory) -> Tensor:
    """Return [T]: how far positions are off per frame, averaged over the entities that are there."""
    away = _misses(target.initial, predicted["positions"], target["positions"]).norm(dim=2)
    return _of_those_there(away, target.active).mean(1) / target.active.double().mean(1)


def relative_l2(name: str) -> Metric:
    """Return the metric of a field, per frame the root of (summed squares of the error over those of the target).

    Summed over all entities, those held included, and components; NaN at frames at which the target is zero
    throughout, but for rounding beside what it comes to. As ThermodynamicsGNN's tables have it (Hernandez et al. 2022).
    """

    def metric(predicted: Trajectory, target: Trajectory) -> Tensor:
        per_entity = target.initial.fields[name].per == "entity"
        pair = (predicted[name].double(), target[name].double())
        got, wanted = ((_of_those_there(v, target.active) if per_entity else v).flatten(1) for v in pair)
        size = wanted.square().sum(1)
        there = size > ROUNDING**2 * size.max()
        return torch.where(there, ((got - wanted).square().sum(1) / size).sqrt(), torch.nan)

    return metric


def field_mse(name: str) -> Metric:
    """Return the metric of a field, its squared error averaged over entities, those held included, and components.

    The root of its mean over frames and trajectories is the RMSE of MeshGraphNets' tables (Pfaff et al. 2021).
    """

    def metric(predicted: Trajectory, target: Trajectory) -> Tensor:
        errors = (predicted[name].double() - target[name].double()).square()
        if target.initial.fields[name].per != "entity":
            return errors.flatten(1).mean(1)
        return _of_those_there(errors, target.active).flatten(1).mean(1) / target.active.double().mean(1)

    return metric


def _of_those_there(values: Tensor, active: Tensor) -> Tensor:
    """Return values [T, n, ...] with 0 for entities that are not `active` [T, n]."""
    return (
        values if bool(active.all()) else values.masked_fill(~active.view(*active.shape, *[1] * (values.ndim - 2)), 0)
    )


def one_step_position_mse(simulator: Simulator, trajectory: Trajectory) -> float:
    """Return the squared error of a step from every recorded frame, averaged as in `position_mse`.

    Kinematic particles are put where they were recorded, so they add nothing to the sum; the GNS reference code
    charges them for what its model makes of them here, and overwrites them in rollouts only.
    """
    error = 0.0
    for part, after in _single_steps(simulator, trajectory):
        wanted, there = part["positions"][1:].flatten(0, 1), _stay(part)
        error += float(_misses(after, after["positions"], wanted)[there].square().mean()) * part.num_steps
    return error / trajectory.num_steps


def one_step_velocity_mse(simulator: Simulator, trajectory: Trajectory) -> float:
    """Return the squared error of velocities after a step from every recorded frame, over free bodies.

    Averaged over frames, bodies and coordinates, as Interaction Networks are compared (Battaglia et al. 2016).
    """
    total, count = 0.0, 0
    for part, after in _single_steps(simulator, trajectory):
        start = part.as_scenes(part.num_steps)
        free = start.free & _stay(part)
        errors = (after["velocities"].double() - part["velocities"][1:].flatten(0, 1).double())[free]
        total, count = total + float(errors.square().sum()), count + errors.numel()
    return total / count


def _stay(part: Trajectory) -> Tensor:
    """Return which entities [T n] are there before and after each step; who appears can be foreseen by nobody."""
    return (part.active[:-1] & part.active[1:]).flatten()


def _misses(state: State, got: Tensor, wanted: Tensor) -> Tensor:
    return shortest(state, got.double() - wanted.double())


def _single_steps(simulator: Simulator, trajectory: Trajectory) -> Iterator[tuple[Trajectory, State]]:
    """Yield parts of a trajectory and what single steps from all their frames but the last lead to."""
    state, steps = trajectory.initial, trajectory.num_steps
    many = max(1, min(STATES_AT_ONCE // state.num_scenes, ENTITIES_AT_ONCE // state.num_entities))
    for start in range(0, steps, many):
        part = trajectory.window(start, min(start + many, steps) + 1)
        actions = None if part.actions is None else part.actions.flatten(0, 1)[None]
        first = part.as_scenes(part.num_steps)
        after = rollout(first, actions, simulator=simulator, num_steps=1).frame(1)
        if "kinematic" in first:
            moving = [k for k in ("positions", "velocities") if k in part.frames]
            recorded = {k: part[k][1:].flatten(0, 1) for k in moving}
            after = after.replace(
                **{k: torch.where(first.kinematic[:, None], value, after[k]) for k, value in recorded.items()}
            )
        yield part, after


@torch.no_grad()
def evaluate(
    simulators: Mapping[str, Simulator],
    trajectories: Iterable[Trajectory],
    *,
    dataset: str,
    horizons: Sequence[Horizon] = (1, 20, "all"),
    metrics: Mapping[str, tuple[Metric, str]] | None = None,
    baselines: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Return the error rows of some simulators, by name, and of the naive ones, on recorded trajectories.

    Horizon 1 is a step from every recorded frame (`one_step_position_mse`); a horizon h > 1 is the mean
    over the first h frames after the first of a rollout from frame 0 under the recorded actions, "all"
    over all of them (`rollout_position_mse`). Kinematic particles are moved, others appear and vanish, and a `context`
    changes as recorded, for all simulators; who is not there does not count.

    `metrics` names further figures, each a metric and its unit, in which {name} stands for the unit of a field:
    `{"sinkhorn_divergence": (sinkhorn_divergence, "{positions}^2")}`. Each is the mean over those of the first h
    frames of the rollout that it is measured at, h = 1 too; where there are none, there is no row. Without `metrics`,
    meshes have the `relative_l2` of every field that moves, slots a `slot_mse`. States without positions, a flow on a
    mesh that stays where it is, have rows of metrics alone.

    Raises:
        ValueError: there are no trajectories, or one is shorter than a horizon or of another dt.
    """
    errors: dict[tuple[str, str, Horizon], list[float]] = {}
    units: dict[str, str] = {}
    said: dict[str, str] = {}
    # What a model predicts of kinematic entities, too, is given to nobody: the naive rows stay comparable.
    learned = [simulator for simulator in simulators.values() if isinstance(simulator, LearnedSimulator)]
    apart = {name for simulator in learned for name in simulator.auxiliary}
    count = 0
    for trajectory in trajectories:
        measured = _field_metrics(trajectory) if metrics is None else metrics
        said |= {metric: unit for metric, (_, unit) in measured.items()}
        named = dict(simulators)
        if baselines:
            named["static"] = Static(dt=trajectory.dt)
            if moves(trajectory):
                named["constant_velocity"] = ConstantVelocity(dt=trajectory.dt)
        _check_horizons(trajectory, horizons, simulators)
        units = {name: field.unit for name, field in trajectory.initial.fields.items()}
        for name, simulator in named.items():
            for (metric, horizon), value in _errors(simulator, trajectory, horizons, measured, apart).items():
                errors.setdefault((name, metric, horizon), []).append(value)
        count += 1
        if progress:
            progress(count)
    if not count:
        raise ValueError(f"There are no trajectories in {dataset} to measure on; give at least one.")
    return [
        _row(dataset, name, metric, horizon, values, said.get(metric, "{positions}^2").format_map(units))
        for (name, metric, horizon), values in errors.items()
    ]


def _field_metrics(trajectory: Trajectory) -> dict[str, tuple[Metric, str]]:
    """Return what is measured of meshes, slots and bodies seen in films if nothing is asked for; of others nothing."""
    if isinstance(trajectory.initial, SlotState):
        return {"slot_mse": (field_mse("slots"), "1")}
    if "slots" in trajectory.initial:
        return {"rollout_position_distance": (position_distance, trajectory.initial.fields["positions"].unit)}
    if not isinstance(trajectory.initial, MeshState):
        return {}
    moving = sorted(name for name, values in trajectory.frames.items() if values.is_floating_point())
    return {f"{name}_relative_l2": (relative_l2(name), "1") for name in moving}


def _errors(
    simulator: Simulator,
    trajectory: Trajectory,
    horizons: Sequence[Horizon],
    metrics: Mapping[str, tuple[Metric, str]],
    apart: Collection[str],
) -> dict[tuple[str, Horizon], float]:
    found: dict[tuple[str, Horizon], float] = {}
    placed = "positions" in trajectory.frames
    if 1 in horizons and placed:
        found["one_step_position_mse", 1] = one_step_position_mse(simulator, trajectory)
    farther = [h for h in horizons if h != 1]
    if not farther and not metrics:
        return found
    steps = trajectory.num_steps
    held = script(trajectory, apart)
    predicted = rollout(
        trajectory.initial, trajectory.actions, simulator=simulator, num_steps=steps, interventions=held
    )
    wanted: list[tuple[str, Metric, list[Horizon]]] = []
    if placed:
        wanted.append(("rollout_position_mse", position_mse, farther))
    wanted += [(name, metric, list(horizons)) for name, (metric, _) in metrics.items()]
    for name, metric, here in wanted:
        per_frame = metric(predicted, trajectory)[1:]
        for horizon in here:
            values = per_frame[: None if horizon == "all" else int(horizon)]
            values = values[~values.isnan()]
            if len(values):
                found[name, horizon] = float(values.mean())
    return found


def moves(trajectory: Trajectory) -> bool:
    """Return whether positions and velocities change, so that constant velocity says something."""
    return all(name in trajectory.frames for name in ("positions", "velocities"))


def _row(dataset: str, name: str, metric: str, horizon: Horizon, values: list[float], unit: str) -> Row:
    per_trajectory = torch.tensor(values, dtype=torch.float64)
    return Row(
        model=name,
        dataset=dataset,
        metric=metric,
        horizon=horizon,
        value=float(per_trajectory.mean()),
        unit=unit,
        trajectories=len(values),
        spread=float(per_trajectory.std()) if len(values) > 1 else None,
    )


def _check_horizons(trajectory: Trajectory, horizons: Sequence[Horizon], simulators: Mapping[str, Simulator]) -> None:
    if trajectory.num_steps < 1:
        raise ValueError("Errors need trajectories of two frames or more; got one of a single frame.")
    if trajectory.actions is not None and trajectory.actions.ndim != 3:
        raise ValueError(f"actions must be [T, n, a] or [T, b, a]; got {list(trajectory.actions.shape)}.")
    for horizon in horizons:
        if horizon != "all" and not (isinstance(horizon, int) and 1 <= horizon <= trajectory.num_steps):
            raise ValueError(
                f"A horizon is 'all' or a number of steps from 1 to {trajectory.num_steps}, the recorded length; "
                f"got {horizon!r}."
            )
    for name, simulator in simulators.items():
        check_suits(name, simulator, trajectory)
