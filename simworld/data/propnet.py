"""Episodes recorded by Propagation Networks (Li et al. 2019), each world repacked as one .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simworld.physics.cradle import cradle_state
from simworld.physics.rope import rope_state
from simworld.state import State
from simworld.trajectory import Trajectory


def read_propnet_rope(path: str | Path) -> list[Trajectory]:
    """Return the episodes in an .npz of `states` [e, T, n, 4], `attrs` [e, T, n, 3], `actions` [e, T, n, 2].

    States are x, y, vx, vy in px and px/s; attributes are moving, fixed, radius; the balls come first, and
    two fixed cylinders last. The action of a frame is the impulse before the step that leaves it.

    Raises:
        ValueError: the file is not such an .npz, or its arrays have other shapes.
    """
    arrays = _arrays(path, "rope", ("states", "attrs", "actions"))
    states, attributes, actions = arrays
    if states.ndim == 4 and (len(states) < 1 or states.shape[1] < 2 or states.shape[2] < 4):
        raise ValueError(f"{path} must hold 1 episode, 2 frames and 4 bodies or more; got states {list(states.shape)}.")
    frames = states.shape[:3]
    if states.ndim != 4 or (states.shape[3], attributes.shape, actions.shape) != (4, (*frames, 3), (*frames, 2)):
        raise ValueError(
            f"{path} must hold states [e, T, n, 4], attrs [e, T, n, 3] and actions [e, T, n, 2]; "
            f"got {list(states.shape)}, {list(attributes.shape)} and {list(actions.shape)}."
        )
    return _checked(path, [_rope(*rows) for rows in zip(*arrays, strict=True)])


def read_propnet_cradle(path: str | Path) -> list[Trajectory]:
    """Return the episodes in an .npz of `states` [e, T, n, 4] and `attrs` [e, T, n, 2].

    States are x, y, vx, vy in px and px/s, a frame each millisecond; attributes are ball, anchor; as many
    anchors as balls follow these. Nothing moves from frame 0 to frame 1, although the raised ball is free: the
    engine's first step drifts at speed zero before it pulls. From frame 1 on a frame says all.

    Raises:
        ValueError: the file is not such an .npz, or its arrays have other shapes.
    """
    states, attributes = _arrays(path, "cradle", ("states", "attrs"))
    if states.ndim != 4 or states.shape[3] != 4 or attributes.shape != (*states.shape[:3], 2):
        raise ValueError(
            f"{path} must hold states [e, T, n, 4] and attrs [e, T, n, 2]; "
            f"got {list(states.shape)} and {list(attributes.shape)}."
        )
    half = states.shape[2] // 2
    if min(len(states), states.shape[1] - 1, half) < 1 or not bool((attributes[:, :, half:, 1] == 1).all()):
        raise ValueError(
            f"{path} must hold 1 episode, 2 frames and 1 ball or more, the balls first and as many anchors last; "
            f"got states {list(states.shape)} and other attributes."
        )
    return _checked(path, [_cradle(rows) for rows in states])


def _arrays(path: str | Path, world: str, names: Sequence[str]) -> list[Tensor]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return [torch.from_numpy(file[k].astype(np.float64)) for k in names]
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        listed = f"{', '.join(map(repr, names[:-1]))} and {names[-1]!r}"
        raise ValueError(f"{path} is not a {world} recording: expected an .npz with numbers in {listed}.") from error


def _checked(path: str | Path, episodes: list[Trajectory]) -> list[Trajectory]:
    for number, episode in enumerate(episodes):
        try:
            episode.check_finite()
        except ValueError as error:
            raise ValueError(f"{path}, episode {number}: {error}") from error
    return episodes


def _rope(states: Tensor, attributes: Tensor, actions: Tensor) -> Trajectory:
    initial = rope_state(*_first(states), attributes[0, :, 2].clone(), states.shape[1] - 2)
    return _episode(initial, states, 1 / 50, torch.where(initial.fixed[:, None], 0.0, actions[:-1]))


def _cradle(states: Tensor) -> Trajectory:
    return _episode(cradle_state(*_first(states)), states, 1e-3)


def _first(states: Tensor) -> tuple[Tensor, Tensor]:
    return states[0, :, :2].contiguous(), states[0, :, 2:].contiguous()


def _episode(initial: State, states: Tensor, dt: float, actions: Tensor | None = None) -> Trajectory:
    return Trajectory(
        initial=initial,
        frames={"positions": states[..., :2].contiguous(), "velocities": states[..., 2:].contiguous()},
        active=torch.ones(states.shape[:2], dtype=torch.bool),
        dt=dt,
        actions=actions,
    )
