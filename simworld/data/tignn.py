"""Simulations of ThermodynamicsGNN (Hernandez et al. 2022, arXiv 2203.01874), each world repacked as one .npz file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simworld.data.arrays import Array
from simworld.data.unpickle import load_npz
from simworld.fields import Field
from simworld.kinds import MeshState
from simworld.trajectory import Trajectory

COUETTE, BEAM = 5, 12  # numbers of a node
DT = {COUETTE: 1 / 150, BEAM: 1 / 20}
Flow = MeshState.with_units(
    rest_positions="1", positions="1", velocities="1", stresses="1", parameters="1"
).with_fields(energies=Field(unit="1"))


def read_tignn(path: str | Path) -> Iterator[Trajectory]:
    """Yield the simulations in an .npz of `states` [s, T, n, k], `edge_index` [2, e] and `node_type_onehot` [n, 2].

    With k = 5, the start-up of a Couette flow of an Oldroyd-B fluid, in numbers without a unit: positions (2), speed
    along the first axis, internal energy, shear stress; `g` [s, 2] holds Reynolds and Weissenberg numbers, which are
    the scene's `parameters`. With k = 12, a beam that is bent: positions (3), velocities (3), stresses (6); `f`
    [s, T - 1, n, 3] are forces on nodes, which are actions. Nodes of the second type are kinematic. A frame each
    1/150 (flow) or 1/20 (beam). Edges become cells of two nodes.

    Raises:
        ValueError: the file is not such an .npz, or its arrays have other shapes.
    """
    found = load_npz(path)
    names = ("states", "edge_index", "node_type_onehot")
    missing = [name for name in names if not isinstance(found.get(name), np.ndarray)]
    if missing:
        raise ValueError(f"{path} is not a recording of ThermodynamicsGNN's: it has no array '{missing[0]}'.")
    states, ends, types = (found[name] for name in names)
    kind = states.shape[-1] if states.ndim == 4 else 0
    if kind not in DT or not len(states) or states.shape[1] < 2:
        raise ValueError(
            f"{path} must hold states [s, T, n, {COUETTE} or {BEAM}] of a simulation and two frames or more; "
            f"got {list(states.shape)}."
        )
    more = _beside(path, found, states)
    whole = ends.ndim == 2 and len(ends) == 2 and ends.size and np.issubdtype(ends.dtype, np.integer)
    if not whole or ends.min() < 0 or ends.max() >= states.shape[2] or (ends[0] == ends[1]).any():
        raise ValueError(
            f"{path} must hold edge_index [2, e], whole numbers, of two of nodes 0 to {states.shape[2] - 1}."
        )
    if types.shape != (states.shape[2], 2):
        raise ValueError(f"{path} must hold node_type_onehot [{states.shape[2]}, 2]; got {list(types.shape)}.")
    held = torch.from_numpy(types[:, 1] > 0.5)
    shared: dict[str, Any] = {
        "cells": torch.from_numpy(np.unique(np.sort(ends.T.astype(np.int64), 1), axis=0)),
        "node_types": held.long(),
        "kinematic": held,
    }
    for number, values in enumerate(torch.from_numpy(states.astype(np.float32))):
        given = torch.from_numpy(more[number].astype(np.float32))
        frames = _flow(values) if kind == COUETTE else _beam(values)
        first: dict[str, Any] = {name: value[0] for name, value in frames.items()}
        if kind == COUETTE:
            first["parameters"] = given[None]
        start = (Flow if kind == COUETTE else MeshState)(rest_positions=frames["positions"][0], **first, **shared)
        there = torch.ones(len(values), len(held), dtype=torch.bool)
        acted = None if kind == COUETTE else given
        path_of = Trajectory(initial=start, frames=frames, active=there, dt=DT[kind], actions=acted)
        path_of.check_finite()
        yield path_of


def _flow(values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    speeds = values[..., 2:3]
    velocities = torch.cat([speeds, torch.zeros_like(speeds)], -1)
    return {
        "positions": values[..., :2],
        "velocities": velocities,
        "energies": values[..., 3],
        "stresses": values[..., 4:],
    }


def _beam(values: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"positions": values[..., :3], "velocities": values[..., 3:6], "stresses": values[..., 6:]}


def _beside(path: str | Path, found: Mapping[str, Any], states: Array) -> Array:
    """Return what acts on the simulations: numbers of scenes or forces on nodes."""
    count, frames, nodes, kind = states.shape
    name, shape = ("g", (count, 2)) if kind == COUETTE else ("f", (count, frames - 1, nodes, 3))
    given = found.get(name)
    if not isinstance(given, np.ndarray) or given.shape != shape:
        got = list(given.shape) if isinstance(given, np.ndarray) else "none"
        raise ValueError(f"{path} must hold {name} {list(shape)} beside its states; got {got}.")
    return given
