"""Trajectories of particles from plain arrays of positions, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike

from simworld.kinds import KINEMATIC, ParticleState
from simworld.simulate import FAR_OUT
from simworld.space import wrapped
from simworld.state import State
from simworld.trajectory import Trajectory

Array = np.ndarray[Any, np.dtype[Any]]


@overload
def from_arrays(*, positions: list[Any], dt: float, history: int = 5, **arrays: Any) -> list[Trajectory]: ...
@overload
def from_arrays(*, positions: ArrayLike, dt: float, history: int = 5, **arrays: Any) -> Trajectory: ...
def from_arrays(*, positions: Any, dt: float, history: int = 5, **arrays: Any) -> Trajectory | list[Trajectory]:
    """Return the trajectory of recorded positions [T, n, d] in m, `dt` seconds from frame to frame.

    Frame 0 of the trajectory is recorded frame `history` + 1, the first whose velocities (those of the
    interval that ended there) and `history` of earlier intervals are known; velocities are differences of
    positions over `dt`, along periodic axes the shortest. Further arrays, each optional: `particle_types` [n]
    or one number, `kinematic` [n] (those of type 3, if not given), `masses` [n] kg, `materials` [n, k] or [n],
    `boundaries` [2, d] m (lower and upper corner), `periodic` [d], `gravity` [d] m/s^2, `context` [T, c] or
    [c], and `actions` [T - 1, ...], which took each recorded frame to the next.

    Episodes of different sizes are a list of positions, and make a list of trajectories; any other array is
    then one for all, or a list with one for each, as its shape tells. `write_trajectories` saves them with their
    statistics.

    Raises:
        ValueError: shapes do not fit, numbers are not finite, an episode is too short, or a list of plain numbers may
            be meant for all episodes as well as one by one.
    """
    unknown = sorted(arrays.keys() - {*_PER_PARTICLE, *_PER_SCENE, "context", "actions"})
    if unknown:
        known = ", ".join([*_PER_PARTICLE, *_PER_SCENE, "context", "actions"])
        raise ValueError(f"from_arrays knows no array '{unknown[0]}'; it knows {known}.")
    given = {name: value for name, value in arrays.items() if value is not None}
    if not isinstance(positions, list):
        return _trajectory(positions, dt, history, given)
    if not positions:
        raise ValueError("positions is an empty list; give an array [T, n, d] for each episode.")
    listed = [name for name, value in given.items() if isinstance(value, list) and _is_one_each(name, value, positions)]
    made = []
    for k, rows in enumerate(positions):
        own = {name: value[k] if name in listed else value for name, value in given.items()}
        try:
            made.append(_trajectory(rows, dt, history, own))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Episode {k}: {error}") from error
    return made


def _is_one_each(name: str, value: list[Any], episodes: list[Any]) -> bool:
    """Return whether a list holds a value for each episode, not one for all of them; refuse what may be both."""
    if len(value) == len(episodes) and isinstance(value[0], np.ndarray | torch.Tensor):
        return True
    fits_all = all(_fits(name, value, rows) for rows in episodes)
    fits_each = len(value) == len(episodes) and all(_fits(name, *pair) for pair in zip(value, episodes, strict=True))
    if fits_all and fits_each:
        raise ValueError(
            f"{name} may be one for all {len(episodes)} episodes or a list with one for each; say np.array({name}) if "
            "it is for all, and give a list of arrays if not."
        )
    if not (fits_all or fits_each) and len(value) != len(episodes):
        raise ValueError(
            f"{name} lists {len(value)} values where positions lists {len(episodes)} episodes, and does not fit each "
            "of these; give np.array(...) for one for all, or a list of as many arrays."
        )
    return fits_each or not fits_all


def _fits(name: str, value: Any, positions: Any) -> bool:
    """Return whether an array's shape is that of `name` for positions [T, n, d]."""
    try:
        shape, (frames, num, dim) = np.shape(value), np.shape(positions)
    except (ValueError, TypeError):  # rows of several lengths, or no such positions
        return False
    if name == "materials":
        return len(shape) in (1, 2) and shape[0] == num
    if name == "context":
        return len(shape) == 1 or (len(shape) == 2 and shape[0] == frames)
    if name == "actions":
        return len(shape) > 1 and shape[0] == frames - 1
    known: dict[str, list[tuple[int, ...]]] = {
        "boundaries": [(2, dim)],
        "periodic": [(dim,)],
        "gravity": [(dim,)],
        "particle_types": [(), (num,)],
    }
    return shape in known.get(name, [(num,)])


def recorded_positions(trajectory: Trajectory) -> Array:
    """Return the positions [h + 1 + T, n, d] that `from_arrays` makes this trajectory of.

    The frames before the first are followed back along its velocities and history. In the precision of
    `positions` that gives what was recorded, bit for bit, of each coordinate that moves by less than half
    its own value a step, and to rounding of the others.

    Raises:
        ValueError: there are several scenes, or particles that come or go.
    """
    state = trajectory.initial
    if not isinstance(state, ParticleState) or state.num_scenes != 1:
        raise ValueError(
            f"Recorded positions are those of one scene of particles; got {state.num_scenes} scenes of "
            f"{type(state).__name__}. Take scenes() apart."
        )
    if not bool(trajectory.active.all()):
        frame, particle = (~trajectory.active).nonzero()[0].tolist()
        raise ValueError(
            f"Recorded positions are those of particles that are all active throughout; particle {particle} is not "
            f"in frame {frame}. Leave out who comes or goes."
        )
    frames = _numpy(trajectory["positions"])
    past = [state.velocities]
    if "history" in state:
        past = [*state.history.unbind(1), state.velocities]
    inside = _wrap(*_box(state), frames.dtype)
    earlier = [frames[0]]
    for velocities in reversed(past):
        back = earlier[0].astype(np.float64) - trajectory.dt * _numpy(velocities).astype(np.float64)
        earlier.insert(0, inside(back))
    return np.concatenate([np.stack(earlier[:-1]), frames])


def step_statistics(recordings: Iterable[Array]) -> dict[str, list[float]]:
    """Return mean and standard deviation per axis of displacements [T, n, d] and of their change per frame.

    They are the `vel_mean`, `vel_std`, `acc_mean` and `acc_std` of peers' metadata, in m per frame and m per
    frame squared.
    """
    sums: dict[str, Array] = {}
    for moves in recordings:
        for name, values in (("vel", moves), ("acc", np.diff(moves, axis=0))):
            rows = values.reshape(-1, values.shape[-1])
            part = np.stack([np.full(rows.shape[-1], float(len(rows))), rows.sum(0), np.square(rows).sum(0)])
            sums[name] = sums[name] + part if name in sums else part
    found: dict[str, list[float]] = {}
    for name, (count, total, squares) in sums.items():
        mean = total / np.maximum(count, 1)
        spread = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0.0))
        found |= {f"{name}_mean": mean.tolist(), f"{name}_std": spread.tolist()}
    return found


def displacements(positions: Array, size: Array | None = None) -> Array:
    """Return how far particles go from frame to frame, float64; the shortest way where `size` [d] is finite."""
    moves = np.diff(positions.astype(np.float64), axis=0)
    if size is None:
        return moves
    periodic = np.isfinite(size)
    length = np.where(periodic, size, 1.0)
    return np.where(periodic, moves - length * np.round(moves / length), moves)


def periodic_size(state: State | Mapping[str, torch.Tensor]) -> Array | None:
    """Return the size [d] of a scene's box along periodic axes, infinite along others; None without such axes."""
    corners, periodic = _box(state)
    return None if corners is None or periodic is None else np.where(periodic, corners[1] - corners[0], np.inf)


_PER_PARTICLE = ("particle_types", "kinematic", "masses", "materials")
_PER_SCENE = ("boundaries", "periodic", "gravity")


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused as not finite
def _trajectory(positions: Any, dt: float, history: int, given: dict[str, Any]) -> Trajectory:
    places = checked_places(positions, history)
    if not (isinstance(dt, int | float | np.integer | np.floating) and 0 < dt < float("inf")):
        raise ValueError(f"dt must be a positive number of seconds; got {dt!r}.")
    fields = static_fields(given, places)
    _check_inside(places, fields)
    speeds = torch.from_numpy((displacements(places, periodic_size(fields)) / dt).astype(places.dtype))
    frames = {"positions": torch.from_numpy(places[history + 1 :].copy()), "velocities": speeds[history:]}
    if "context" in given:
        frames["context"] = _context(given["context"], places)[history + 1 :, None]
    if history:
        fields["history"] = speeds[:history].transpose(0, 1).contiguous()
    values: dict[str, Any] = {**fields, **{name: value[0] for name, value in frames.items()}}
    initial = ParticleState(**values)
    frames["positions"] = wrapped(initial, frames["positions"])
    initial = initial.replace(positions=frames["positions"][0])
    actions = None if "actions" not in given else _actions(given["actions"], places)[history + 1 :]
    active = torch.ones(frames["positions"].shape[:2], dtype=torch.bool)
    made = Trajectory(initial=initial, frames=frames, active=active, dt=float(dt), actions=actions)
    made.check_finite()
    return made


def checked_places(positions: Any, history: int) -> Array:
    """Return positions [T, n, d] as precise as they come; refuse what they cannot be, or too few for a history."""
    if not isinstance(history, int) or history < 0:
        raise ValueError(f"history must be a whole number of earlier velocities, 0 or more; got {history!r}.")
    places = np.asarray(positions)
    if places.dtype.kind != "f" or places.ndim != 3 or 0 in places.shape or places.shape[2] > 3:
        raise ValueError(
            "positions must be real numbers [frames, particles, dimensions], none of them 0 and 3 dimensions at most; "
            f"got {places.dtype} {list(places.shape)}."
        )
    if len(places) < history + 2:
        raise ValueError(
            f"positions have {len(places)} frames; with history={history} the first frame that knows its velocities "
            f"is number {history + 1}: give {history + 2} frames or more, or a shorter history."
        )
    wrong = np.argwhere(~np.isfinite(places))
    if len(wrong):
        frame, particle, _ = wrong[0]
        raise ValueError(f"positions must be finite; particle {particle} at frame {frame} is not. Repair or drop it.")
    kept = places if places.dtype in (np.float32, np.float64) else places.astype(np.float32)
    return np.ascontiguousarray(kept.astype(kept.dtype.newbyteorder("="), copy=False))


def static_fields(given: dict[str, Any], places: Array) -> dict[str, torch.Tensor]:
    """Return the fields of a ParticleState that stay the same, checked."""
    num, dim = places.shape[1:]
    shapes = {"boundaries": (2, dim), "periodic": (dim,), "gravity": (dim,)}
    found: dict[str, Array] = {}
    for name in (*_PER_PARTICLE, *_PER_SCENE):
        if name not in given:
            continue
        value = np.asarray(given[name])
        if name == "particle_types" and value.ndim == 0:
            value = np.full(num, value)
        if name == "materials" and value.ndim == 1:
            value = value[:, None]
        wanted = shapes.get(name, (num, value.shape[-1]) if name == "materials" and value.ndim == 2 else (num,))
        if value.shape != wanted:
            raise ValueError(f"{name} must have shape {list(wanted)} for {num} particles; got {list(value.shape)}.")
        found[name] = (
            _typed(name, value, places.dtype)[None] if name in _PER_SCENE else _typed(name, value, places.dtype)
        )
    negative = np.flatnonzero(found.get("particle_types", np.zeros(0)) < 0)
    if len(negative):
        raise ValueError(
            f"particle_types must be 0 or more; particle {negative[0]} is of type "
            f"{found['particle_types'][negative[0]]}. Number types from 0, and leave rows of padding out."
        )
    if "particle_types" in found and "kinematic" not in found:
        found["kinematic"] = found["particle_types"] == KINEMATIC
    _check_box(found)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def _typed(name: str, value: Array, real: Any) -> Array:
    wanted = {"particle_types": "iu", "kinematic": "b", "periodic": "b"}.get(name, "fiu")
    if value.dtype.kind not in wanted:
        said = {"iu": "whole numbers", "b": "True or False", "fiu": "numbers"}[wanted]
        raise ValueError(f"{name} must hold {said}; got {value.dtype}.")
    return value.astype({"iu": np.int64, "b": np.bool_, "fiu": real}[wanted])


def _check_box(found: dict[str, Array]) -> None:
    if "boundaries" in found:
        lower, upper = found["boundaries"][0]
        if not bool((lower < upper).all()):
            raise ValueError(
                f"boundaries must be a lower and a higher upper corner; got {lower.tolist()} and {upper.tolist()}."
            )
    elif "periodic" in found:
        raise ValueError("periodic axes need their ends; give boundaries [2, d] too.")


def _check_inside(places: Array, fields: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError where particles that move freely are far beyond a wall; rounding and soft walls are let be."""
    corners, periodic = _box(fields)
    if corners is None:
        return
    lower, upper = corners
    beyond = np.maximum(lower - places, places - upper) > FAR_OUT * (upper - lower).max()
    if periodic is not None:
        beyond &= ~periodic
    if "kinematic" in fields:
        beyond &= ~_numpy(fields["kinematic"])[:, None]
    if beyond.any():
        frame, particle, _ = np.argwhere(beyond)[0]
        raise ValueError(
            f"Particle {particle} is at {places[frame, particle].tolist()} in frame {frame}, outside the box from "
            f"{lower.tolist()} to {upper.tolist()}. Check boundaries and units, or leave boundaries out."
        )


def _context(value: Any, places: Array) -> torch.Tensor:
    context = np.asarray(value)
    if context.ndim == 1 and context.dtype.kind in "fiu":
        context = np.broadcast_to(context, (len(places), len(context)))
    if context.ndim != 2 or len(context) != len(places) or context.dtype.kind not in "fiu":
        raise ValueError(
            f"context must be numbers [{len(places)}, c], a row for each frame, or [c]; "
            f"got {context.dtype} {list(context.shape)}."
        )
    return torch.from_numpy(context.astype(places.dtype))


def _actions(value: Any, places: Array) -> torch.Tensor:
    actions = np.asarray(value)
    if actions.ndim < 2 or len(actions) != len(places) - 1 or actions.dtype.kind not in "fiu":
        raise ValueError(
            f"actions must be numbers [{len(places) - 1}, ...], one between each two of {len(places)} frames; "
            f"got {actions.dtype} {list(actions.shape)}."
        )
    return torch.from_numpy(actions.astype(places.dtype))


def _box(state: State | Mapping[str, torch.Tensor]) -> tuple[Array | None, Array | None]:
    corners = _numpy(state["boundaries"])[0].astype(np.float64) if "boundaries" in state else None
    return corners, _numpy(state["periodic"])[0] if "periodic" in state else None


def _wrap(corners: Array | None, periodic: Array | None, dtype: Any) -> Callable[[Array], Array]:
    """Return a function that puts positions into the box, in the precision they are kept in."""
    if corners is None or periodic is None:
        return lambda places: places.astype(dtype)
    lower, size = corners[0], corners[1] - corners[0]
    return lambda places: np.where(
        periodic & ((places < lower) | (places > lower + size)), lower + np.mod(places - lower, size), places
    ).astype(dtype)


def _numpy(value: torch.Tensor) -> Array:
    return value.detach().cpu().numpy()
