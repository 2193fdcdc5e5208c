"""Data sets of "Learning to simulate complex physics with graph networks" (Sanchez-Gonzalez et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simworld.data.arrays import Array, from_arrays, recorded_positions
from simworld.data.metadata import Metadata, read_metadata
from simworld.data.tfrecord import SequenceExample, Value, read_tfrecord, write_tfrecord
from simworld.kinds import KINEMATIC, WATER, ParticleState
from simworld.saving import replacing
from simworld.trajectory import Trajectory


def read_deepmind(path: str | Path, *, history: int = 5) -> Iterator[Trajectory]:
    """Yield the episodes of a TFRecord file, one by one; metadata.json lies beside it.

    Particles of type 3 are kinematic. A `step_context` becomes `context`, that of a frame acts on the step
    that leaves it. Frame 0 is recorded frame `history` + 1; see `from_arrays`.

    Raises:
        ValueError: the file is damaged, or metadata and arrays disagree; it names file and record.
    """
    said = read_metadata(path)
    number = -1
    for number, example in enumerate(read_tfrecord(path)):
        try:
            yield _trajectory(example, said, history)
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    if number < 0:
        raise ValueError(f"{path} holds no record; give a TFRecord file with an episode or more.")


def write_deepmind(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write trajectories to a TFRecord file that DeepMind's code and its followers read; see `peer_metadata`.

    Positions are stored in single precision; kinematic particles get type 3, others without a type 5.

    Raises:
        ValueError: there are none, they differ in length, which metadata must name once, or have periodic axes.
    """
    with replacing(path) as partial:
        write_tfrecord(partial, _examples(trajectories))


def peer_types(state: ParticleState) -> Array:
    """Return DeepMind's type [n] int64 of each particle: kinematic ones are 3, those without a type water.

    Raises:
        ValueError: an axis is periodic, which DeepMind's code and its followers take for a jump.
    """
    if "periodic" in state and bool(state.periodic.any()):
        raise ValueError(
            "Files of DeepMind's and geoelements' know no periodic axes, and their models would see particles jump; "
            "use the lagrangebench format."
        )
    types = np.full(state.num_entities, WATER)
    if "particle_types" in state:
        types = state.particle_types.cpu().numpy()
    if "kinematic" in state:
        types = np.where(state.kinematic.cpu().numpy(), KINEMATIC, types)
    return types.astype(np.int64)


def _examples(trajectories: Iterable[Trajectory]) -> Iterator[SequenceExample]:
    length = None
    for number, trajectory in enumerate(trajectories):
        positions = recorded_positions(trajectory).astype("<f4")
        if len(positions) != (length or len(positions)):
            raise ValueError(f"Trajectory {number} has another length than the first; metadata has one for all.")
        length = len(positions)
        state = trajectory.initial
        if not isinstance(state, ParticleState):
            raise ValueError(f"Only ParticleState goes into such files; got {type(state).__name__}.")
        sequences = {"position": [[frame.tobytes()] for frame in positions]}
        if "context" in trajectory.frames:
            known = trajectory["context"][:, 0].cpu().numpy().astype("<f4")
            rows = [known[0]] * (length - len(known)) + list(known)
            sequences["step_context"] = [[row.tobytes()] for row in rows]
        context: dict[str, Sequence[Value]] = {"particle_type": [peer_types(state).astype("<i8").tobytes()]}
        yield SequenceExample(context={"key": [number], **context}, sequences=sequences)
    if length is None:
        raise ValueError("There is no trajectory to write; give at least one.")


def _trajectory(example: SequenceExample, said: Metadata, history: int) -> Trajectory:
    positions = _stacked(example, "position")
    frames = int(said.number("sequence_length")) + 1
    types = _array(example.context.get("particle_type", []), "<i8", "particle_type")
    if positions.size % (frames * said.dim) or not positions.size:
        raise ValueError(
            f"position holds {positions.size} numbers, no multiple of the {frames} frames and {said.dim} dimensions "
            f"that {said.path.name} says (sequence_length + 1, dim); correct it."
        )
    if len(example.sequences["position"]) not in (1, frames):
        raise ValueError(
            f"it has {len(example.sequences['position'])} frames, where {said.path.name} says {frames} "
            "(sequence_length + 1); correct it."
        )
    places = positions.reshape(frames, -1, said.dim)
    if len(types) != places.shape[1]:
        raise ValueError(
            f"it has {len(types)} particle types and positions of {places.shape[1]} particles in {said.dim} dimensions "
            f"({said.path.name}: dim); correct one of them."
        )
    context: Array | None = None
    if "step_context" in example.sequences:
        context = _stacked(example, "step_context").reshape(-1)
        if context.size % frames:
            raise ValueError(f"step_context holds {context.size} numbers, no multiple of {frames} frames; correct it.")
        context = context.reshape(frames, -1)
    return from_arrays(
        positions=places,
        dt=said.dt,
        history=history,
        particle_types=types,
        boundaries=said.boundaries,
        context=context,
    )


def _stacked(example: SequenceExample, name: str) -> Array:
    if name not in example.sequences:
        raise ValueError(f"it has no sequence '{name}' but {', '.join(example.sequences) or 'none'}; give another.")
    return np.concatenate([_array(v, "<f4", name) for v in example.sequences[name]] or [np.empty(0, np.float32)])


def _array(values: Sequence[Value], dtype: str, name: str) -> np.ndarray[Any, Any]:
    if len(values) != 1 or not isinstance(values[0], bytes) or len(values[0]) % np.dtype(dtype).itemsize:
        raise ValueError(f"{name} must be the bytes of an array of {np.dtype(dtype)} in a frame; give another file.")
    return np.frombuffer(values[0], dtype=dtype)
