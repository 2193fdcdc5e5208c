"""The kinds of states: which fields bodies, particles, meshes, splats and slots may carry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from simworld.fields import Field, index_field
from simworld.state import State

RIGID, KINEMATIC, WATER, SAND, GOOP = 0, 3, 5, 6, 7
"""Types of particles, numbered as in DeepMind's data."""

NORMAL, OBSTACLE, HANDLE, INFLOW, OUTFLOW, WALL = 0, 1, 3, 4, 5, 6
"""Types of nodes of a mesh, numbered as in DeepMind's data, which calls 2 airfoil."""


class ObjectState(State):
    """Bodies: balls, boxes, planets, charges, joints of a rope.

    Lengths, times and masses are in the units of the data (the declared SI units are the default);
    velocities are those of the interval that ended at this instant where a recording says so.
    `springs` [m, 2] names the bodies that a spring or bond joins; with `spring_lengths` but without
    stiffnesses they are rigid rods. `fixed` bodies never move. `quats` are unit quaternions (w, x, y, z) that turn
    the body's axes into the world's; `angular_velocities` are in the world's axes. `half_extents` are those
    of a box along its own axes. Bodies in the plane may be made of k boxes: `outlines` hold the centre and the half
    sides of each in the body's own axes, (x, y, across, up), zeros where there is none. `boundaries` are the
    lower and the upper corner of the walls round a scene.
    `influences` tell who acted on whom since the frame before, where an engine recorded it: row i has a column for
    each body of its scene, by its number there. `colors` (red, green, blue; 0 to 1) are what films show.
    """

    fields = MappingProxyType(
        {
            "positions": Field(unit="m", shape=("d",), required=True),
            "velocities": Field(unit="m/s", shape=("d",), required=True),
            "quats": Field(unit="1", shape=(4,), limits="unit length"),
            "angular_velocities": Field(unit="rad/s", shape=(3,)),
            "masses": Field(unit="kg", static=True, limits="positive"),
            "charges": Field(unit="C", static=True),
            "radii": Field(unit="m", static=True),
            "half_extents": Field(unit="m", shape=(3,), static=True, limits="positive"),
            "outlines": Field(unit="m", shape=("k", 4), static=True),
            "restitutions": Field(unit="1", static=True),
            "frictions": Field(unit="1", static=True),
            "fixed": Field(unit="1", static=True, kind="bool"),
            "object_types": Field(unit="1", static=True, kind="int"),
            "attributes": Field(unit="1", shape=("k",), static=True),
            "colors": Field(unit="1", shape=(3,), static=True),
            "influences": Field(unit="1", shape=("m",), kind="bool"),
            "springs": index_field(2),
            "spring_lengths": Field(unit="m", per="springs", static=True),
            "spring_stiffnesses": Field(unit="N/m", per="springs", static=True),
            "spring_dampings": Field(unit="N s/m", per="springs", static=True),
            "gravity": Field(unit="m/s^2", shape=("d",), per="scene", static=True),
            "boundaries": Field(unit="m", shape=(2, "d"), per="scene", static=True),
        }
    )
    positions: Tensor
    velocities: Tensor
    quats: Tensor
    angular_velocities: Tensor
    masses: Tensor
    charges: Tensor
    radii: Tensor
    half_extents: Tensor
    outlines: Tensor
    restitutions: Tensor
    frictions: Tensor
    fixed: Tensor
    object_types: Tensor
    attributes: Tensor
    colors: Tensor
    influences: Tensor
    springs: Tensor
    spring_lengths: Tensor
    spring_stiffnesses: Tensor
    spring_dampings: Tensor
    gravity: Tensor
    boundaries: Tensor


class ParticleState(State):
    """Particles of fluids, sand, goop and of what they flow round.

    `velocities` are those of the interval that ended at this instant, (x_t - x_(t-1)) / dt, and `history`
    [n, h, d] holds those of the h intervals before it. `particle_types` are numbered as in DeepMind's data
    (0 rigid, 3 kinematic, 5 water, 6 sand, 7 goop) or as the data has it. `kinematic` particles go on at
    their velocity, whatever meets them, or as an intervention moves them: walls, ramps, grippers.
    `boundaries` are the lower and the upper corner of the box, walls but on `periodic` axes, where what leaves
    on one side comes in on the other. `materials` are parameters of each particle, `context` of each scene.
    """

    fields = MappingProxyType(
        {
            "positions": Field(unit="m", shape=("d",), required=True),
            "velocities": Field(unit="m/s", shape=("d",), required=True),
            "history": Field(unit="m/s", shape=("h", "d"), past_of="velocities"),
            "masses": Field(unit="kg", static=True, limits="positive"),
            "particle_types": Field(unit="1", static=True, kind="int"),
            "kinematic": Field(unit="1", static=True, kind="bool"),
            "materials": Field(unit="1", shape=("k",), static=True),
            "gravity": Field(unit="m/s^2", shape=("d",), per="scene", static=True),
            "boundaries": Field(unit="m", shape=(2, "d"), per="scene", static=True),
            "periodic": Field(unit="1", shape=("d",), per="scene", static=True, kind="bool"),
            "context": Field(unit="1", shape=("c",), per="scene"),
        }
    )
    positions: Tensor
    velocities: Tensor
    history: Tensor
    masses: Tensor
    particle_types: Tensor
    kinematic: Tensor
    materials: Tensor
    gravity: Tensor
    boundaries: Tensor
    periodic: Tensor
    context: Tensor


class MeshState(State):
    """Nodes of a mesh: a flow, a solid, a cloth.

    `rest_positions` are where nodes lie in the mesh, in its own dimension e: 2 for a cloth in space. `positions`
    are where they are now; a mesh that stays where it is has none. `cells` [c, k] name the nodes of lines (k = 2),
    triangles (3), quads or tetrahedra (4, told apart by the dimension of rest positions) or hexahedra (8).
    `node_types` are numbered as in DeepMind's data (0 normal, 1 obstacle, 3 handle, 4 inflow, 5 outflow, 6 wall) or
    as the data has it. `kinematic` nodes are seen and not moved by a simulator: they keep their values, or have
    those that an intervention gives them. `forces` act on nodes, `parameters` hold for a scene (a Reynolds number).
    `stresses` [n, s] are tensors in the order xx, yy, zz, xy, xz, yz (xx, yy, xy in the plane) or, with s = 1, numbers.
    """

    fields = MappingProxyType(
        {
            "rest_positions": Field(unit="m", shape=("e",), static=True),
            "positions": Field(unit="m", shape=("d",)),
            "velocities": Field(unit="m/s", shape=("d",)),
            "history": Field(unit="m/s", shape=("h", "d"), past_of="velocities"),
            "pressures": Field(unit="Pa"),
            "stresses": Field(unit="Pa", shape=("s",)),
            "temperatures": Field(unit="K"),
            "forces": Field(unit="N", shape=("d",)),
            "masses": Field(unit="kg", static=True, limits="positive"),
            "node_types": Field(unit="1", static=True, kind="int"),
            "kinematic": Field(unit="1", static=True, kind="bool"),
            "cells": index_field("k"),
            "parameters": Field(unit="1", shape=("p",), per="scene", static=True),
            "gravity": Field(unit="m/s^2", shape=("d",), per="scene", static=True),
        }
    )
    rest_positions: Tensor
    positions: Tensor
    velocities: Tensor
    history: Tensor
    pressures: Tensor
    stresses: Tensor
    temperatures: Tensor
    forces: Tensor
    masses: Tensor
    node_types: Tensor
    kinematic: Tensor
    cells: Tensor
    parameters: Tensor
    gravity: Tensor


class SplatState(State):
    """Gaussian splats: what a scene looks like (Kerbl et al. 2023).

    `means` are centres; a splat's covariance is R diag(scales)^2 R^T, R the rotation of `quats` (w, x, y, z; of any
    length but 0), or `covars` where these are given. `opacities` are from 0 to 1; `harmonics` [n, k, 3], k = 1, 4, 9
    or 16, are coefficients of the colour by the direction it is seen from, less 0.5.
    """

    fields = MappingProxyType(
        {
            "means": Field(unit="m", shape=(3,), required=True),
            "quats": Field(unit="1", shape=(4,)),
            "scales": Field(unit="m", shape=(3,)),
            "covars": Field(unit="m^2", shape=(3, 3)),
            "opacities": Field(unit="1", required=True),
            "harmonics": Field(unit="1", shape=("k", 3), required=True),
        }
    )
    means: Tensor
    quats: Tensor
    scales: Tensor
    covars: Tensor
    opacities: Tensor
    harmonics: Tensor


class SlotState(State):
    """Slots: what an encoder made of one frame of a film, or of true states, an object in each.

    `slots` are vectors of features without unit; `history` [n, h, s] holds those of the h frames before, the oldest
    first, the same slot in the same row. `past_actions` [b, h, a] are the actions that led from each frame of the
    history to the next. `proprioception` [b, p] is what an actor knows of itself, with `past_proprioception` [b, h, p].
    """

    fields = MappingProxyType(
        {
            "slots": Field(unit="1", shape=("s",), required=True),
            "history": Field(unit="1", shape=("h", "s"), past_of="slots"),
            "past_actions": Field(unit="1", shape=("h", "a"), per="scene"),
            "proprioception": Field(unit="1", shape=("p",), per="scene"),
            "past_proprioception": Field(unit="1", shape=("h", "p"), per="scene"),
        }
    )
    slots: Tensor
    history: Tensor
    past_actions: Tensor
    proprioception: Tensor
    past_proprioception: Tensor


KINDS: Mapping[str, type[State]] = MappingProxyType(
    {kind.__name__: kind for kind in (ObjectState, ParticleState, MeshState, SplatState, SlotState)}
)
