"""Trajectories in HDF5: field names are dataset names, so reader and writer follow the declarations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, overload

import numpy as np
import torch
from torch import Tensor

from simworld.data.views import read_views, write_views
from simworld.fields import Field
from simworld.kinds import KINDS
from simworld.render.filming import View
from simworld.saving import folder, replacing
from simworld.state import State
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    import h5py

SCHEMA = "simworld.trajectories"
SCHEMA_VERSION = 1
Answers = list[tuple[dict[str, Any], Trajectory]]


class TrajectoryFile:
    """A sequence of recorded trajectories, read from disk one by one as they are asked for.

    `kind` is the class of their states, made from the declarations in the file; `dt` [s], `dataset`,
    `seed`, `recipe` and `statistics` are what the writer said.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, foreign or of a newer schema.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        with _named(self.path):
            said = self._file.attrs
            self.dt = float(said["dt"])
            self.dataset, self.recipe = str(said["dataset"]), str(said.get("recipe", ""))
            self.seed = int(said.get("seed", 0))
            self.action_unit = str(said.get("action_unit", "1"))
            self.kind = _kind(str(said["state"]), str(said["fields"]))
            self._names = sorted(self._file["episodes"].keys(), key=lambda name: (len(name), name))
            if not (self.dt > 0 and self._names):
                raise ValueError(f"it has {len(self._names)} episodes and dt {self.dt}")

    @property
    def units(self) -> dict[str, str]:
        """Unit of each field that the first episode carries."""
        return {name: self.kind.fields[name].unit for name in self[0].initial} if len(self) else {}

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Mean and standard deviation of each field, where the file has them."""
        with _named(self.path, "statistics"):
            group = self._file.get("statistics", {})
            return {name: {k: float(group[name].attrs[k]) for k in ("mean", "std")} for name in group}

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        """Return a trajectory, or the list of those in a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} episodes; got number {index}.")
        return self._read(f"episodes/{self._names[index]}")

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def counterfactuals(self, index: int) -> Answers:
        """Return the interventions on an episode whose true outcome was recorded, with that outcome."""
        name = f"episodes/{self._names[index]}"
        with _named(self.path, f"{name}/counterfactuals"):
            group = self._file.get(f"{name}/counterfactuals", {})
            said = {k: json.loads(group[k].attrs["intervention"]) for k in sorted(group)}
        if not said:
            return []
        observed = self[index]
        return [(said[k], self._read(f"{name}/counterfactuals/{k}", observed)) for k in said]

    def views(self, index: int, counterfactual: int | None = None) -> list[View]:
        """Return the films of an episode, or of its counterfactual outcome of that number; none if it has none.

        Raises:
            IndexError: there is no such episode, or no such outcome.
            ValueError: a film is damaged, or not of this episode.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} episodes; got number {index}.")
        name = f"episodes/{self._names[index]}"
        if counterfactual is not None:
            count = len(self._file.get(f"{name}/counterfactuals", ()))
            if not 0 <= counterfactual < count:
                raise IndexError(f"{self.path}, {name} has {count} counterfactuals; got number {counterfactual}.")
            name += f"/counterfactuals/{counterfactual:04d}"
        with _named(self.path, name):
            group = self._file[name]
            over_time = (k for k, field in self.kind.fields.items() if _over_time(field) and field.per == "entity")
            frames, bodies = group[next(k for k in over_time if k in group)].shape[:2]
            return read_views(group, frames, bodies)

    def close(self) -> None:
        """Close the file; trajectories already read stay valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, name: str, observed: Trajectory | None = None) -> Trajectory:
        with _named(self.path, name):
            group, fields = self._file[name], self.kind.fields
            values = {k: _tensor(group[k]) for k in fields if k in group}
            if observed is not None:
                values = {**{k: observed.initial[k] for k in observed.initial if not _over_time(fields[k])}, **values}
            missing = [k for k, field in fields.items() if field.required and k not in values]
            if missing:
                raise ValueError(f"it lacks the field '{missing[0]}'")
            frames = {k: v for k, v in values.items() if _over_time(fields[k])}
            shape = frames[next(k for k in frames if fields[k].per == "entity")].shape[:2]
            active = _tensor(group["active"]) if "active" in group else torch.ones(shape, dtype=torch.bool)
            given = None if observed is None else observed.actions
            actions = _tensor(group["actions"]) if "actions" in group else given
            rows: dict[str, Any] = {k: v[0] if _over_time(fields[k]) else v for k, v in values.items()}
            initial = self.kind(active=active[0], **rows)
            done = tuple(json.loads(group["interventions"][()])) if "interventions" in group else ()
            made = Trajectory(
                initial=initial, frames=frames, active=active, dt=self.dt, actions=actions, interventions=done
            )
            made.check_finite()
        return made


def open_trajectories(path: str | Path) -> TrajectoryFile:
    """Return the trajectories in an HDF5 file of simworld's; see `TrajectoryFile`."""
    return TrajectoryFile(path)


def write_trajectories(
    path: str | Path,
    trajectories: Iterable[Trajectory],
    *,
    dataset: str,
    seed: int = 0,
    recipe: str = "",
    action_unit: str = "1",
    counterfactuals: Callable[[int], Answers | None] | None = None,
    views: Callable[[int], Sequence[View]] | None = None,
    counterfactual_views: Callable[[int, int], Sequence[View]] | None = None,
) -> None:
    """Write trajectories, with their statistics, to one HDF5 file: whole or not at all.

    `counterfactuals(number)` gives the interventions on an episode whose outcomes are known, with those.
    `views(number)` gives the films of an episode, `counterfactual_views(number, k)` those of its k-th outcome.
    Values are stored in the precision they come in. The states must be of one kind and each a single scene.

    Raises:
        TypeError: `trajectories` is a single one.
        ValueError: there are none, they differ in kind or dt, or a film is of another length.
        OSError: the file could not be written; nothing is left behind.
    """
    path = Path(path)
    said = {"dataset": dataset, "seed": seed, "recipe": recipe, "action_unit": action_unit}
    try:
        with folder(path.parent), replacing(path) as partial, open(partial, "w+b") as raw:
            disk = _Disk(raw)
            beside = _Beside(
                counterfactuals=counterfactuals or (lambda _: None),
                views=views or (lambda _: ()),
                counterfactual_views=counterfactual_views or (lambda _, __: ()),
            )
            _write_file(disk, trajectories, said, beside)
            disk.check()
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); free some space or choose another place.") from error


@dataclass(frozen=True, kw_only=True)
class _Beside:
    """What is written beside each episode, by its number."""

    counterfactuals: Callable[[int], Answers | None]
    views: Callable[[int], Sequence[View]]
    counterfactual_views: Callable[[int, int], Sequence[View]]


class _Disk:
    """A file for HDF5 that remembers the first failed write instead of raising it.

    HDF5 cannot close a file whose disk is full: it fails again in every destructor. So it is left to
    believe that all went well, and `check` tells the truth.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.error: OSError | None = None
        self.read, self.seek, self.tell = raw.read, raw.seek, raw.tell
        self.readinto = raw.readinto  # type: ignore[attr-defined]

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        self._try(lambda: self.raw.write(data))
        return size

    def truncate(self, size: int | None = None) -> int:
        self._try(lambda: self.raw.truncate(size))
        return size or 0

    def flush(self) -> None:
        self._try(self.raw.flush)

    def check(self) -> None:
        self.flush()
        if self.error is not None:
            raise self.error

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error


def _write_file(disk: _Disk, trajectories: Iterable[Trajectory], said: dict[str, Any], beside: _Beside) -> None:
    import h5py

    sums = _Sums()
    first: Trajectory | None = None
    with h5py.File(disk, "w") as file:
        for number, trajectory in enumerate(trajectories):
            if first is None:
                first = trajectory
                _write_header(file, first, said)
            _check_alike(first, trajectory, number)
            group = file.create_group(f"episodes/{number:06d}")
            _write_episode(group, trajectory, said["action_unit"])
            write_views(group, beside.views(number), len(trajectory))
            for k, (intervention, outcome) in enumerate(beside.counterfactuals(number) or []):
                branch = group.create_group(f"counterfactuals/{k:04d}")
                branch.attrs["intervention"] = json.dumps(intervention)
                _write_episode(branch, outcome, said["action_unit"], observed=trajectory)
                write_views(branch, beside.counterfactual_views(number, k), len(outcome))
            sums.add(trajectory)
            disk.check()
        if first is None:
            raise ValueError("There is no trajectory to write; give at least one.")
        sums.write(file)


def _check_alike(first: Trajectory, other: Trajectory, number: int) -> None:
    other.check_finite()
    if other.initial.fields != first.initial.fields or other.dt != first.dt:
        raise ValueError(
            f"Trajectory {number} differs from the first in kind of state or dt; write it to another file."
        )
    if KINDS.get(type(other.initial).__name__) is None:
        raise ValueError(
            f"Trajectory {number} has states of kind {type(other.initial).__name__}, which no file can name; "
            f"use {', '.join(KINDS)}, with_fields for further quantities."
        )
    if other.initial.num_scenes != 1:
        raise ValueError(f"Trajectory {number} has {other.initial.num_scenes} scenes; write each scene as one episode.")


def _write_header(file: h5py.File, first: Trajectory, said: dict[str, Any]) -> None:
    declared = {name: field.to_json() for name, field in first.initial.fields.items()}
    file.attrs.update(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "state": type(first.initial).__name__,
            "fields": json.dumps(declared),
            "dt": first.dt,
            "simworld_version": version("simworld"),
            **said,
        }
    )


def _write_episode(
    group: h5py.Group, trajectory: Trajectory, action_unit: str, *, observed: Trajectory | None = None
) -> None:
    """Write a trajectory; of a counterfactual one, what has a value at each frame or differs from the `observed`."""
    state = trajectory.initial
    for name in state:
        if _over_time(state.fields[name]):
            _write(group, name, trajectory[name], state.fields[name].unit)
        elif observed is None or not torch.equal(state[name], observed.initial[name]):
            _write(group, name, state[name], state.fields[name].unit)
    if not bool(trajectory.active.all()):
        _write(group, "active", trajectory.active, "1")
    if trajectory.actions is not None:
        _write(group, "actions", trajectory.actions, action_unit)
    if trajectory.interventions:
        group["interventions"] = json.dumps(trajectory.interventions)


def _over_time(field: Field) -> bool:
    """Return whether files hold the field for every frame; its past they hold for the first alone."""
    return not field.static and not field.past_of


def _write(group: h5py.Group, name: str, value: Tensor, unit: str) -> None:
    value = value.detach().cpu()
    array = value.numpy()
    packed = {"compression": "gzip", "shuffle": True} if array.nbytes > 2048 else {}
    group.create_dataset(name, data=array, **packed).attrs["unit"] = unit


class _Sums:
    """Running mean and standard deviation of every floating-point field and of the actions."""

    def __init__(self) -> None:
        self.totals: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def add(self, trajectory: Trajectory) -> None:
        state = trajectory.initial
        named = {name: trajectory[name] for name in (*state.dynamic_fields, *state.static_fields)}
        if trajectory.actions is not None:
            named["actions"] = trajectory.actions
        for name, value in named.items():
            if value.is_floating_point():
                x = value.double()
                part = np.array([x.numel(), float(x.sum()), float(x.square().sum())])
                self.totals[name] = self.totals.get(name, np.zeros(3)) + part

    def write(self, file: h5py.File) -> None:
        for name, (count, total, squares) in self.totals.items():
            mean = total / max(count, 1)
            group = file.create_group(f"statistics/{name}")
            group.attrs["mean"] = mean
            group.attrs["std"] = float(np.sqrt(max(squares / max(count, 1) - mean**2, 0.0)))


def _open(path: Path) -> h5py.File:
    import h5py

    if not path.is_file():
        raise FileNotFoundError(
            f"There is no trajectory file '{path}'; make one with: simworld generate RECIPE --out DIR"
        )
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a whole HDF5 file ({error}); copy or generate it again.") from error
    schema, number = file.attrs.get("schema"), file.attrs.get("schema_version")
    if not isinstance(schema, str) or schema != SCHEMA or "episodes" not in file:
        file.close()
        raise ValueError(f"{path} is HDF5, but not a {SCHEMA} file (its schema: {schema}); import it first.")
    if not isinstance(number, np.integer) or number > SCHEMA_VERSION:
        file.close()
        raise ValueError(
            f"{path} has schema version {number}, this simworld reads up to {SCHEMA_VERSION}; "
            "update it with: pip install --upgrade simworld"
        )
    return file


@contextmanager
def _named(path: Path, part: str = "") -> Iterator[None]:
    """Say of which file, and where in it, something could not be read."""
    try:
        yield
    except (OSError, KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        where = f"{path}, {part}" if part else f"{path}"
        raise ValueError(f"{where}: {str(error).rstrip('.')}; write, copy or generate the file again.") from error


def _tensor(dataset: Any) -> Tensor:
    array = np.asarray(dataset[()])
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"{dataset.name} must be an array of numbers; got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _kind(name: str, declared: str) -> type[State]:
    if name not in KINDS:
        raise ValueError(f"it holds states of kind '{name}', where this version knows {', '.join(KINDS)}")
    fields = {k: Field.from_json(v) for k, v in json.loads(declared).items()}
    base = KINDS[name]
    if not {k for k, field in base.fields.items() if field.required} <= fields.keys():
        raise ValueError(f"it declares too few fields for a {name}")
    own = base.with_units(**{k: f.unit for k, f in fields.items() if k in base.fields})
    return own.with_fields(**{k: f for k, f in fields.items() if k not in base.fields})
