"""Rope episodes recorded by Propagation Networks (Li et al. 2019), repacked as one .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from simworld.physics.rope import rope_state
from simworld.trajectory import Trajectory


def read_propnet_rope(path: str | Path) -> list[Trajectory]:
    """Return the episodes in an .npz of `states` [e, T, n, 4], `attrs` [e, T, n, 3], `actions` [e, T, n, 2].

    States are x, y, vx, vy in px and px/s; attributes are moving, fixed, radius; the balls come first, and
    two fixed cylinders last. The action of a frame is the impulse before the step that leaves it.

    Raises:
        ValueError: the file is not such an .npz, or its arrays have other shapes.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = [file[k].astype(np.float64) for k in ("states", "attrs", "actions")]
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a rope recording: expected an .npz with numbers in 'states', 'attrs' and 'actions'."
        ) from error
    states, attributes, actions = map(torch.from_numpy, arrays)
    frames = states.shape[:3]
    if states.ndim == 4 and (len(states) < 1 or states.shape[1] < 2 or states.shape[2] < 4):
        raise ValueError(f"{path} must hold 1 episode, 2 frames and 4 bodies or more; got states {list(states.shape)}.")
    if states.ndim != 4 or (states.shape[3], attributes.shape, actions.shape) != (4, (*frames, 3), (*frames, 2)):
        raise ValueError(
            f"{path} must hold states [e, T, n, 4], attrs [e, T, n, 3] and actions [e, T, n, 2]; "
            f"got {list(states.shape)}, {list(attributes.shape)} and {list(actions.shape)}."
        )
    episodes = [_episode(*rows) for rows in zip(states, attributes, actions, strict=True)]
    for number, episode in enumerate(episodes):
        try:
            episode.check_finite()
        except ValueError as error:
            raise ValueError(f"{path}, episode {number}: {error}") from error
    return episodes


def _episode(states: torch.Tensor, attributes: torch.Tensor, actions: torch.Tensor) -> Trajectory:
    positions, velocities = states[..., :2].contiguous(), states[..., 2:].contiguous()
    initial = rope_state(positions[0], velocities[0], attributes[0, :, 2].clone(), states.shape[1] - 2)
    impulses = torch.where(initial.fixed[:, None], 0.0, actions[:-1])
    return Trajectory(
        initial=initial,
        frames={"positions": positions, "velocities": velocities},
        active=torch.ones(positions.shape[:2], dtype=torch.bool),
        dt=1 / 50,
        actions=impulses,
    )
