"""The metadata.json that data sets of particles carry beside their episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simworld.data.arrays import Array, displacements, periodic_size, recorded_positions, step_statistics
from simworld.kinds import ParticleState
from simworld.saving import replacing
from simworld.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a metadata.json says: box [2, d] m, dimensions, seconds between stored frames, and all it holds."""

    path: Path
    boundaries: Array
    dim: int
    dt: float
    values: Mapping[str, Any]

    def number(self, name: str) -> float:
        """Return a number by its name; a ValueError says that it is lacking."""
        return _number(self.path, self.values, name)


def read_metadata(path: str | Path, part: str = "") -> Metadata:
    """Return what a metadata.json says, or the one in a folder or beside a file.

    Where the file has a section called `part` ("train", "rollout"), that section counts. A `write_every`
    says how many steps of `dt` lie between stored frames.

    Raises:
        ValueError: there is none, it is not JSON, or bounds, dim or dt are lacking or disagree.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = (path if path.is_dir() else path.parent) / "metadata.json"
    if not path.is_file():
        raise ValueError(f"There is no '{path}'; put the data set's metadata.json beside its episodes.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from error
    values = values.get(part, values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object with bounds, dim and dt; got {type(values).__name__}.")
    bounds = _bounds(path, values)
    dim = values.get("dim", len(bounds))
    if dim != len(bounds):
        raise ValueError(f"{path} says dim {dim} but bounds of {len(bounds)} axes; correct one of them.")
    steps = _number(path, values, "write_every") if "write_every" in values else 1
    dt = _number(path, values, "dt") * steps
    return Metadata(path=path, boundaries=bounds.T, dim=int(dim), dt=dt, values=values)


def peer_metadata(trajectories: Iterable[Trajectory], *, connectivity_radius: float) -> dict[str, Any]:
    """Return the metadata that peers need to train on trajectories: box, sizes, dt, statistics of steps.

    The statistics are those of particles that are not kinematic, over all frames; peers' steps are of one
    frame, so velocities are in m per frame there.

    Raises:
        ValueError: there are no trajectories, they have no `boundaries`, or differ in these or in dt.
    """
    if not (isinstance(connectivity_radius, int | float) and 0 < connectivity_radius < math.inf):
        raise ValueError(f"connectivity_radius must be a positive number of metres; got {connectivity_radius!r}.")
    scene: dict[str, Any] = {}
    sizes: list[tuple[int, int]] = []
    contexts: list[Array] = []

    def moves() -> Iterator[Array]:
        for number, trajectory in enumerate(trajectories):
            try:
                state, said, positions = _particles(trajectory), _scene(trajectory), recorded_positions(trajectory)
            except ValueError as error:
                raise ValueError(f"Trajectory {number}: {error}") from error
            if scene and said != scene:
                raise ValueError(f"Trajectory {number} {other_scene(said, scene)}")
            scene.update(said)
            sizes.append((positions.shape[0], positions.shape[1]))
            contexts.extend([trajectory["context"][:, 0].cpu().numpy()] if "context" in trajectory.frames else [])
            yield displacements(positions, periodic_size(state))[:, _counted(state)]

    statistics = step_statistics(moves())
    if not sizes:
        raise ValueError("There is no trajectory to describe; give at least one.")
    if contexts:
        every = np.concatenate(contexts).astype(np.float64)
        statistics |= {"context_mean": every.mean(0).tolist(), "context_std": every.std(0).tolist()}
    return {
        **scene,
        "sequence_length": min(frames for frames, _ in sizes) - 1,
        "num_particles_max": max(num for _, num in sizes),
        "default_connectivity_radius": float(connectivity_radius),
        **statistics,
    }


def other_scene(said: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Return in words what of the scene that one metadata.json can say is another than in the first's; "" if nothing.

    Materials, which add to `nnode_in`, are of the scene where there are any.
    """
    names = {"bounds": "box", "periodic_boundary_conditions": "periodic axes", "dim": "dimension", "dt": "dt"}
    for name, called in {**names, "nnode_in": "nnode_in (by its materials)"}.items():
        if said.get(name) != first.get(name):
            got = f"{said.get(name)} where it is {first.get(name)} there"
            return f"has another {called} than the first: {got}; peers' metadata has one for all. Export them apart."
    return ""


def write_metadata(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a metadata.json."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _counted(state: ParticleState) -> Array:
    """Return which particles [n] are not kinematic; all, if all are."""
    free: Array = ~state.kinematic.cpu().numpy() if "kinematic" in state else np.ones(state.num_entities, dtype=bool)
    return free if free.any() else ~free


def _particles(trajectory: Trajectory) -> ParticleState:
    if not isinstance(trajectory.initial, ParticleState):
        raise ValueError(f"Only ParticleState goes into such files; got {type(trajectory.initial).__name__}.")
    return trajectory.initial


def _scene(trajectory: Trajectory) -> dict[str, Any]:
    state = _particles(trajectory)
    if "boundaries" not in state:
        raise ValueError("Peers need to know the box; give the trajectories boundaries [1, 2, d].")
    dim = state.positions.shape[1]
    periodic = state.periodic[0].tolist() if "periodic" in state else [False] * dim
    bounds = state.boundaries[0].T.tolist()
    said = {"bounds": bounds, "periodic_boundary_conditions": periodic, "dim": dim, "dt": trajectory.dt}
    if "materials" in state:
        # geoelements' inputs: five velocities, distances of two walls an axis, 16 of the type, and the materials.
        said |= {"nnode_in": 7 * dim + 16 + state.materials.shape[1], "nedge_in": dim + 1}
    return said


def _bounds(path: Path, values: Mapping[str, Any]) -> Array:
    if "bounds" not in values:
        raise ValueError(f"{path} lacks bounds; add the lower and upper end of each axis: [[0.1, 0.9], ...].")
    try:
        bounds = np.asarray(values["bounds"], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has bounds that are no numbers ({error}); correct them.") from error
    if bounds.ndim != 2 or bounds.shape[1] != 2 or not bool((bounds[:, 0] < bounds[:, 1]).all()):
        raise ValueError(
            f"{path} must have bounds with a lower and an upper end for each axis; got {bounds.tolist()}: correct them."
        )
    return bounds


def _number(path: Path, values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{path} must have a positive {name}; got {value!r}: correct it.")
    return float(value)
