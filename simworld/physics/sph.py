"""A weakly compressible liquid in a periodic plane, by smoothed particle hydrodynamics.

Density is summed over the particles, pressure follows Tait's equation with exponent 1, and particles move at a
transport velocity that keeps them evenly spread (Adami, Hu and Adams 2013, "A transport-velocity formulation for
smoothed particle hydrodynamics"), by symplectic Euler steps; all as in the solver of LagrangeBench's data (Toshev et
al. 2024, "JAX-SPH"). Warp kernels of float64, on CPU and CUDA; results are the same bit for bit each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.fields import Field
from simworld.kinds import ParticleState
from simworld.space import shortest, wrapped
from simworld.state import State

SUPPORT = 3.0  # of the quintic spline, in smoothing lengths

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

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state `dt` seconds later.

        Raises:
            ValueError: an action is given, the state is not of a plane, lacks masses, boundaries or periodic axes, has
                kinematic particles, or its box is narrower than three supports of the kernel.
        """
        if action is not None:
            raise ValueError("SPHEngine takes no actions; use gravity or an intervention instead.")
        work = _Work.of(state, self)
        work.run()
        found = {name: work.moving[name].to(state.positions.dtype) for name in _MOVING}
        found["positions"] = wrapped(state, found["positions"])
        velocities = shortest(state, found["positions"] - state.positions) / self.dt
        return state.advanced(**found, velocities=velocities)

    def densities(self, state: State) -> Tensor:
        """Return the density [n] at each particle, in kg/m^2; 0 where a particle is inactive."""
        work = _Work.of(state, self)
        work.find_densities()
        return work.moving["densities"].to(state.positions.dtype)


_MOVING = ("positions", "fluid_velocities", "transport_velocities")
_SUMS = ("densities", "pressures", "volumes2")
_STILL = ("masses", "kinematic", "boundaries", "periodic", "gravity", "batch", "active")


@dataclass(frozen=True)
class _Still:
    """What no step changes: tensors of float64 and int32, and how many cells there are."""

    scenes: Mapping[str, Tensor]
    particles: Mapping[str, Tensor]
    num_cells: int
    spacing: float

    @staticmethod
    def of(state: State, engine: SPHEngine) -> _Still:
        _check(state)
        corners = state.boundaries.double()
        width = corners[:, 1] - corners[:, 0]
        cells = (width / (SUPPORT * engine.spacing)).floor().long()
        if int(cells.min()) < 3:
            raise ValueError(
                f"SPHEngine needs a box of {3 * SUPPORT * engine.spacing:.3g} m or more along each axis, three "
                f"supports of its kernel; got {float(width.min()):.3g} m."
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
        return _Still(scenes=scenes, particles=particles, num_cells=int(ends[-1]), spacing=engine.spacing)


def _check(state: State) -> None:
    for name in ("masses", "boundaries", "periodic"):
        if name not in state:
            raise ValueError(f"SPHEngine needs {name} of the state; give them with state.replace({name}=...).")
    if state.positions.shape[1] != 2 or not bool(state.periodic.all()):
        raise ValueError(
            f"SPHEngine steps particles of the plane in boxes periodic on both axes; got positions of "
            f"{state.positions.shape[1]} coordinates and periodic={state.periodic.tolist()}."
        )
    if "kinematic" in state and bool(state.kinematic.any()):
        raise ValueError("SPHEngine knows no kinematic particles; let all of them be liquid.")


class _Work:
    """The tensors of one step and the kernels that change them."""

    def __init__(self, engine: SPHEngine, still: _Still, moving: dict[str, Tensor]) -> None:
        import warp as wp

        from simworld.physics import sph_kernels as kernels

        self.moving, self.num_sub_steps = moving, engine.num_sub_steps
        self.scenes, self.particles, self.cells = kernels.Scenes(), kernels.Particles(), kernels.Cells()
        device, count = moving["positions"].device, len(moving["positions"])
        whole = torch.zeros(3, max(count, still.num_cells), dtype=torch.int32, device=device)
        lists = {
            "counts": whole[0, : still.num_cells],
            "ends": whole[1, : still.num_cells],
            "members": whole[2, :count],
        }
        inner = {
            "changes": moving["positions"].new_zeros(count, 4),
            "cells": torch.zeros_like(still.particles["scenes"]),
        }
        given = ((self.scenes, still.scenes), (self.particles, {**still.particles, **moving, **inner}))
        names = {"fluid_velocities": "fluid", "transport_velocities": "transport"}
        self._kept = (still, lists, inner)  # Warp arrays do not own the memory of tensors
        for target, values in (*given, (self.cells, lists)):
            for name, value in values.items():
                setattr(target, names.get(name, name), wp.from_torch(value, dtype=_kind_of(value)))
        self.sizes = {"particles": count, "cells": still.num_cells}
        self.where = wp.device_from_torch(device)
        streams: Any = wp.stream_from_torch
        self.stream = streams(torch.cuda.current_stream(device)) if device.type == "cuda" else None
        self.setting = _setting(engine)

    @staticmethod
    def of(state: State, engine: SPHEngine) -> _Work:
        still = state.derived("sph", _STILL, lambda s: _Still.of(s, engine))
        if still.spacing != engine.spacing:
            still = _Still.of(state, engine)
        moving = {name: state[name].double().clone() for name in _MOVING}
        return _Work(engine, still, {**moving, **{name: torch.zeros_like(still.particles["masses"]) for name in _SUMS}})

    def run(self) -> None:
        """Take the particles `num_sub_steps` further."""
        from simworld.physics import sph_kernels as kernels

        inner = (self.setting, self.scenes, self.particles, self.cells)
        forces = [self._launch(kernels.accelerate, "particles", *inner)]
        forces.append(self._launch(kernels.move, "particles", *inner[:-1]))
        density = self._density()
        for _ in range(self.num_sub_steps):
            for launch in density + forces:
                launch()

    def find_densities(self) -> None:
        """Write densities where the particles are."""
        for launch in self._density():
            launch()

    def _density(self) -> list[Any]:
        import warp as wp

        from simworld.physics import sph_kernels as kernels

        return [
            self._launch(kernels.clear, "cells", self.cells),
            self._launch(kernels.locate, "particles", self.scenes, self.particles, self.cells),
            lambda: wp.utils.array_scan(self.cells.counts, self.cells.ends, inclusive=True),
            self._launch(kernels.reset, "cells", self.cells),
            self._launch(kernels.fill, "particles", self.particles, self.cells),
            self._launch(kernels.sort, "cells", self.cells),
            self._launch(kernels.sum_density, "particles", self.setting, self.scenes, self.particles, self.cells),
        ]

    def _launch(self, kernel: Any, per: str, *given: Any) -> Any:
        """Return a call that runs a kernel; packing its arguments takes longer than a small scene's work."""
        import warp as wp

        made = wp.launch(kernel, self.sizes[per], inputs=list(given), device=self.where, record_cmd=True)
        return lambda: made.launch(self.stream)


def _kind_of(value: Tensor) -> Any:
    import warp as wp

    if value.ndim == 1:
        return {torch.float64: wp.float64, torch.int32: wp.int32}[value.dtype]
    return {(torch.float64, 2): wp.vec2d, (torch.float64, 4): wp.vec4d, (torch.int32, 2): wp.vec2i}[
        value.dtype, value.shape[1]
    ]


def _setting(engine: SPHEngine) -> Any:
    from simworld.physics import sph_kernels as kernels

    s: Any = kernels.Setting()
    s.dt, s.length = engine.dt / engine.num_sub_steps, engine.spacing
    s.density, s.viscosity, s.transport = engine.density, engine.viscosity, engine.transport
    s.stiffness = engine.density * engine.sound_speed**2
    return s
