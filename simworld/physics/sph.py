"""A weakly compressible liquid in a periodic plane, by smoothed particle hydrodynamics.

Density is summed over the particles, pressure follows Tait's equation with exponent 1, and particles move at a
transport velocity that keeps them evenly spread (Adami, Hu and Adams 2013, "A transport-velocity formulation for
smoothed particle hydrodynamics"), by symplectic Euler steps; all as in the solver of LagrangeBench's data (Toshev et
al. 2024, "JAX-SPH"). Warp kernels of float64, on CPU and CUDA; results are the same bit for bit each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from simworld.fields import Field
from simworld.kinds import ParticleState
from simworld.physics.replay import changed_names
from simworld.space import shortest, wrapped
from simworld.state import State

SUPPORT, SKIN = 3.0, 0.3  # of the quintic spline, and beyond it where neighbors are kept, in smoothing lengths
FIRST_ROOM = 64  # neighbors of a particle; evenly spread there are about 34

LiquidState = ParticleState.with_fields(
    fluid_velocities=Field(unit="m/s", shape=("d",), required=True),
    transport_velocities=Field(unit="m/s", shape=("d",), required=True),
)
"""Particles with all that the method remembers of them, so that a step depends on the state alone.

`fluid_velocities` are those of the liquid at the instant, whose momentum is conserved; `transport_velocities` are
those at which its particles moved last.
"""


@dataclass(frozen=True, kw_only=True)
class SPHEngine:
    """Steps a `LiquidState` in the plane, in a box periodic on both axes.

    A step of `dt` seconds is `num_sub_steps` of the method. `spacing` [m] is the distance between particles at
    rest and the smoothing length; `density` [kg/m^2] that at rest, `sound_speed` [m/s] about ten times the speeds
    of the flow, `viscosity` [Pa s m] the dynamic one. `transport` is the share of the background pressure
    density x sound_speed^2 that shifts particles: 0 is standard SPH. An intervention on the speed of a particle
    changes its `fluid_velocities`. Computes in float64 whatever the state holds.

    Raises:
        ValueError: a number is outside its range, or sound or friction crosses so much of the spacing in a sub-step
            that the method is unstable.
    """

    dt: float
    num_sub_steps: int
    spacing: float
    density: float = 1.0
    sound_speed: float = 10.0
    viscosity: float = 0.01
    transport: float = 1.0
    READS: ClassVar = ("positions", "velocities", "masses", "boundaries", "active")

    def __post_init__(self) -> None:
        for name in ("dt", "num_sub_steps", "spacing", "density", "sound_speed"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"SPHEngine needs a positive {name}; got {getattr(self, name)}.")
        if not (0 <= self.viscosity < math.inf and 0 <= self.transport <= 1):
            raise ValueError(
                f"SPHEngine needs viscosity >= 0 and transport from 0 to 1; got {self.viscosity} and {self.transport}."
            )
        time = self.dt / self.num_sub_steps
        crossed = time * max(self.sound_speed / self.spacing, self.viscosity / (self.density * self.spacing**2))
        if crossed > 0.5:
            raise ValueError(
                f"Sound or friction crosses {crossed:.3g} of the spacing in a sub-step, which is unstable; "
                f"use num_sub_steps={math.ceil(4 * crossed * self.num_sub_steps)} or so."
            )

    @torch.no_grad()
    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state `dt` seconds later; no gradients pass through it.

        Raises:
            ValueError: an action is given, the state is not of a plane, lacks masses, boundaries or periodic axes, has
                kinematic particles, or its box is narrower than ten spacings.
        """
        if action is not None:
            raise ValueError("SPHEngine takes no actions; use gravity or an intervention instead.")
        work = _Work.of(state, self)
        work.run(self.num_sub_steps)
        found = {name: work.moving[name].to(state.positions.dtype) for name in _MOVING}
        found["positions"] = wrapped(state, found["positions"])
        velocities = shortest(state, found["positions"] - state.positions) / self.dt
        return state.advanced(**found, velocities=velocities)

    def rebuilt(self, full: State, record: State) -> State:
        """Return the full state of a changed `record`, positions, velocities and the like, of what was `full` before.

        `fluid_velocities` and `transport_velocities` change by as much as velocities.
        """
        changes = {name: record[name] for name in changed_names(full, record) if name in self.READS[:-1]}
        if "velocities" in changes:
            change = record.velocities - full.velocities
            changes |= {name: full[name] + change for name in ("fluid_velocities", "transport_velocities")}
        changed = full.replace(active=record.active, **changes)
        return changed.replace(positions=wrapped(changed, changed.positions))

    @torch.no_grad()
    def densities(self, state: State) -> Tensor:
        """Return the density [n] at each particle, in kg/m^2; 0 where a particle is inactive."""
        work = _Work.of(state, self)
        work.run(0)
        return work.moving["densities"].to(state.positions.dtype)


_MOVING = ("positions", "fluid_velocities", "transport_velocities")
_SUMS = ("densities", "pressures", "volumes2")
_STILL = ("masses", "kinematic", "boundaries", "periodic", "gravity", "batch", "active")


@dataclass(frozen=True)
class _Still:
    """What no step changes: tensors of float64 and int32; `owners` are the scenes of cells."""

    scenes: Mapping[str, Tensor]
    particles: Mapping[str, Tensor]
    owners: Tensor
    spacing: float

    @staticmethod
    def of(state: State, engine: SPHEngine) -> _Still:
        _check(state)
        corners = state.boundaries.double()
        width = corners[:, 1] - corners[:, 0]
        reach = (SUPPORT + SKIN) * engine.spacing
        cells = (width / reach).floor().long()
        if int(cells.min()) < 3:
            raise ValueError(
                f"SPHEngine needs a box of {3 * reach:.3g} m or more along each axis, {3 * (SUPPORT + SKIN):.3g} "
                f"spacings; got {float(width.min()):.3g} m."
            )
        ends = cells.prod(1).cumsum(0)
        gravity = state.gravity.double() if "gravity" in state else torch.zeros_like(width)
        scenes = {
            "lower": corners[:, 0].contiguous(),
            "width": width,
            "gravity": gravity,
            "cells": cells.int(),
            "first": (ends - cells.prod(1)).int(),
        }
        here = torch.where(state.active, state.batch, -1).int()
        particles = {"masses": state.masses.double(), "scenes": here}
        owners = torch.repeat_interleave(torch.arange(len(width), device=ends.device), cells.prod(1)).int()
        return _Still(scenes=scenes, particles=particles, owners=owners, spacing=engine.spacing)


def _check(state: State) -> None:
    for name in ("masses", "boundaries", "periodic"):
        if name not in state:
            raise ValueError(f"SPHEngine needs {name} of the state; give them with state.replace({name}=...).")
    if state.positions.shape[1] != 2 or not bool(state.periodic.all()):
        raise ValueError(
            f"SPHEngine steps particles of the plane in boxes periodic on both axes; got positions of "
            f"{state.positions.shape[1]} coordinates and periodic={state.periodic.tolist()}."
        )
    if lacking := [name for name in _MOVING if name not in state]:
        raise ValueError(f"SPHEngine needs {', '.join(lacking)} of the state; make it a LiquidState that has them.")
    if "kinematic" in state and bool(state.kinematic.any()):
        raise ValueError("SPHEngine knows no kinematic particles; let all of them be liquid.")


class _Work:
    """The tensors of one step and the kernels that change them."""

    def __init__(self, state: State, engine: SPHEngine, still: _Still) -> None:
        self._still, self._start = still, {name: state[name].double() for name in _MOVING}
        self._setting = _setting(engine)
        self.moving: dict[str, Tensor] = {}

    @staticmethod
    def of(state: State, engine: SPHEngine) -> _Work:
        still = state.derived("sph", _STILL, lambda s: _Still.of(s, engine))
        return _Work(state, engine, still if still.spacing == engine.spacing else _Still.of(state, engine))

    def run(self, num_sub_steps: int) -> None:
        """Take the particles further and find densities at the last sub-step's start; with 0, where they are.

        Where some particle has more neighbors than there is room for, all is done again with room enough.
        """
        room, most = 0, FIRST_ROOM
        while most > room:
            room = most
            most = self._try(num_sub_steps, room)

    def _try(self, num_sub_steps: int, room: int) -> int:
        """Do as `run` says and return the largest number of neighbors there was."""
        from simworld.kernels.warp_start import filled, stream_of, wp
        from simworld.physics import sph_kernels as kernels

        still, count = self._still, len(self._start["positions"])
        where = self._start["positions"].device
        sums = dict.fromkeys((*_SUMS, "paths"), (count,))
        self.moving = {name: value.clone() for name, value in self._start.items()}
        self.moving.update(_zeros(torch.float64, where, **sums, changes=(count, 4)))
        lists = {"cells": (count,), "num_neighbors": (count,), "neighbors": (count, room), "most": (1,)}
        found = _zeros(torch.int32, where, **lists)
        grid = _zeros(torch.int32, where, members=(count,), counts=still.owners.shape, ends=still.owners.shape)
        stale = torch.ones(len(still.scenes["lower"]), dtype=torch.int32, device=where)
        names = {"fluid_velocities": "fluid", "transport_velocities": "transport"}
        particles = filled(kernels.Particles, {**still.particles, **self.moving, **found}, names)
        scenes = filled(kernels.Scenes, {**still.scenes, "stale": stale})
        cells = filled(kernels.Cells, {**grid, "scenes": still.owners})
        with wp.ScopedStream(stream_of(where)):
            density, motion = self._launches(scenes, particles, cells, len(stale))
            for launch in (density + motion) * num_sub_steps if num_sub_steps else density:
                launch()
        return int(found["most"])

    def _launches(self, scenes: Any, particles: Any, cells: Any, num_scenes: int) -> tuple[list[Any], list[Any]]:
        """Return calls that find neighbors and densities, and calls that move the particles."""
        from simworld.kernels.warp_start import wp
        from simworld.physics import sph_kernels as kernels

        where = wp.device_from_torch(self._start["positions"].device)
        sizes = {"p": len(self._start["positions"]), "c": len(self._still.owners), "s": num_scenes}
        setting = self._setting

        def prepared(kernel: Any, per: str, *given: Any) -> Any:
            # Packing the arguments of a launch takes longer than a small scene's work, so it is done once.
            return wp.launch(kernel, sizes[per], inputs=list(given), device=where, record_cmd=True).launch

        density = [
            prepared(kernels.clear, "c", scenes, cells),
            prepared(kernels.locate, "p", scenes, particles, cells),
            lambda: wp.utils.array_scan(cells.counts, cells.ends, inclusive=True),
            prepared(kernels.reset, "c", scenes, cells),
            prepared(kernels.fill, "p", scenes, particles, cells),
            prepared(kernels.sort, "c", scenes, cells),
            prepared(kernels.find_neighbors, "p", setting, scenes, particles, cells),
            prepared(kernels.refresh, "s", scenes),
            prepared(kernels.sum_density, "p", setting, scenes, particles),
        ]
        motion = [
            prepared(kernels.accelerate, "p", setting, scenes, particles),
            prepared(kernels.move, "p", setting, scenes, particles),
        ]
        return density, motion


def _zeros(dtype: torch.dtype, device: torch.device, **shapes: Sequence[int]) -> dict[str, Tensor]:
    return {name: torch.zeros(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def _setting(engine: SPHEngine) -> Any:
    from simworld.physics import sph_kernels as kernels

    s: Any = kernels.Setting()
    s.dt, s.length, s.skin = engine.dt / engine.num_sub_steps, engine.spacing, SKIN * engine.spacing
    s.density, s.viscosity, s.transport = engine.density, engine.viscosity, engine.transport
    s.stiffness = engine.density * engine.sound_speed**2
    return s
