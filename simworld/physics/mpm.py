"""Water, sand and goop by the material point method, in the plane and in space.

Moving least squares MPM (Hu et al. 2018, "A Moving Least Squares Material Point Method") with the affine
transfers of APIC (Jiang et al. 2015), quadratic B-splines and symplectic Euler steps, in Warp kernels of float32,
on CPU and CUDA. On a CPU results are the same bit for bit each time; CUDA adds in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from simworld.fields import Field, index_field
from simworld.kinds import GOOP, KINEMATIC, SAND, WATER, ParticleState
from simworld.physics.replay import changed_names
from simworld.space import outside
from simworld.state import State

MOST_NODES = 2**28  # 4 GiB of grid

MaterialState = ParticleState.with_fields(
    material_velocities=Field(unit="m/s", shape=("d",), required=True),
    affine=Field(unit="1/s", shape=("d", "d"), required=True),
    strains=Field(unit="1", shape=("d", "d"), required=True),
    log_volumes=Field(unit="1", required=True),
    obstacles=index_field(2),
    obstacle_radii=Field(unit="m", per="obstacles", static=True, limits="positive"),
)
"""Particles with all that the method remembers of them, so that a step depends on the state alone.

`material_velocities` are those at the instant, not over the interval; `affine` is the gradient of velocity,
`strains` the elastic left Cauchy-Green tensor, `log_volumes` the logarithm of water's volume over that at rest, or of
the volume that sand gained as it came apart. `obstacles` are rods of `obstacle_radii` between two kinematic
particles (a ball where both are the same one).
"""


@dataclass(frozen=True, kw_only=True)
class Water:
    """Weakly compressible water: Tait's equation p = rho c^2 / g ((V0 / V)^g - 1), without tension.

    `sound_speed` c [m/s] about ten times the speeds of the flow leaves volume within 1 %. `viscosity` [Pa s].
    `shock_viscosity` q adds q rho c h times the rate of compression to the pressure, h a cell of the grid, so
    that fronts are a few cells wide and the grid does not ring behind them (Landshoff 1955, LA-1930).
    """

    density: float = 1000.0
    sound_speed: float = 20.0
    exponent: float = 7.0
    viscosity: float = 0.0
    shock_viscosity: float = 1.0
    friction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sand:
    """Drucker and Prager's sand, elastic in the logarithmic strain, with volume correction (Klar et al. 2016).

    `youngs_modulus` [Pa], `friction_angle` [degrees] between grains; `friction` is that with walls.
    """

    density: float = 1600.0
    youngs_modulus: float = 3.5e5
    poisson_ratio: float = 0.3
    friction_angle: float = 35.0
    friction: float = 0.5

    @property
    def sound_speed(self) -> float:
        """Speed of sound at rest [m/s]."""
        return _sound_speed(self)


@dataclass(frozen=True, kw_only=True)
class Goop:
    """A viscous, plastically deformable paste: elastic in the logarithmic strain up to a yield stress, then Bingham.

    `yield_stress` and `youngs_modulus` [Pa], `viscosity` [Pa s] of what flows beyond the yield stress.
    """

    density: float = 1000.0
    youngs_modulus: float = 1e5
    poisson_ratio: float = 0.3
    yield_stress: float = 500.0
    viscosity: float = 20.0
    friction: float = 1e3

    @property
    def sound_speed(self) -> float:
        """Speed of sound at rest [m/s]."""
        return _sound_speed(self)


@dataclass(frozen=True, kw_only=True)
class MPMEngine:
    """Steps a `MaterialState` of water (particle type 5), sand (6) and goop (7) in a box, round obstacles.

    A step of `dt` seconds is `num_sub_steps` of the method, on a grid of `cell_size` [m]; the box should be a whole
    number of cells wide. What meets a wall or an obstacle does not go into it, may leave it, and is slowed along
    it by Coulomb's friction with the coefficient of its material: none for water, so much for goop that it sticks.
    `kinematic` particles follow their `velocities`, and obstacles follow them. An intervention on the speed of other
    particles changes their `material_velocities`. Computes in float32 whatever the state holds.

    Raises:
        ValueError: a number is not positive.
    """

    dt: float
    cell_size: float
    num_sub_steps: int
    water: Water = field(default_factory=Water)
    sand: Sand = field(default_factory=Sand)
    goop: Goop = field(default_factory=Goop)
    READS: ClassVar = ("positions", "velocities", "particle_types", "kinematic", "gravity", "boundaries", "active")

    def __post_init__(self) -> None:
        for name in ("dt", "cell_size", "num_sub_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"MPMEngine needs a positive {name}; got {getattr(self, name)}.")

    @torch.no_grad()
    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state `dt` seconds later; no gradients pass through it.

        Raises:
            ValueError: an action is given, the state lacks boundaries, masses or particle types, some axis is periodic,
                a particle is of another type or outside the box, or sound crosses more than a cell in a sub-step.
        """
        if action is not None:
            raise ValueError("MPMEngine takes no actions; move kinematic particles by an intervention instead.")
        still = state.derived("mpm", _STILL, lambda s: _Still.of(s, self))
        if still.engine != self:
            still = _Still.of(state, self)
        _check_inside(state)
        dim, dtype = state.positions.shape[1], state.positions.dtype
        moving = {name: _in_space(state[name]) for name in _MOVING}
        if "kinematic" in state:
            scripted = torch.where(state.kinematic[:, None], state.velocities, state.material_velocities)
            moving["material_velocities"] = _in_space(scripted)
        still.run(moving, dim)
        found = {name: value[(slice(None), *[slice(dim)] * (value.ndim - 1))] for name, value in moving.items()}
        found = {name: value.to(dtype).contiguous() for name, value in found.items()}
        velocities = (found["positions"] - state.positions) / self.dt
        return state.advanced(**found, velocities=torch.where(state.free[:, None], velocities, state.velocities))

    def rebuilt(self, full: State, record: State) -> State:
        """Return the full state of a changed `record`, positions, velocities and the like, of what was `full` before.

        `material_velocities` change by as much as velocities. Strains, volumes and gradients stay with their particles,
        but those of a type that was changed begin unstrained, with the mass of the new material in the same volume.
        """
        changes = {name: record[name] for name in changed_names(full, record) if name in self.READS[:-1]}
        if "velocities" in changes:
            changes["material_velocities"] = full.material_velocities + record.velocities - full.velocities
        if "particle_types" in changes:
            before, after = (self._densities(s.particle_types) for s in (full, record))
            other = full.particle_types != record.particle_types
            changes["masses"] = torch.where((before > 0) & (after > 0), full.masses * after / before, full.masses)
            eye = torch.eye(full.strains.shape[1]).to(full.strains)
            changes["strains"] = torch.where(other[:, None, None], eye, full.strains)
            changes["log_volumes"] = torch.where(other, 0.0, full.log_volumes)
        return full.replace(active=record.active, **changes)

    def _densities(self, types: Tensor) -> Tensor:
        """Return the density [n] of each type of material, 0 for others."""
        found = torch.zeros(types.shape, device=types.device)
        for number, material in ((WATER, self.water), (SAND, self.sand), (GOOP, self.goop)):
            found[types == number] = material.density
        return found


def material_state(
    *, positions: Tensor, particle_types: Tensor, boundaries: Tensor, gravity: Tensor, velocities: Tensor, **fields: Any
) -> ParticleState:
    """Return particles unstrained and at their rest volume, moving at `velocities`; `fields` are further ones.

    Give `masses` that are the material's density times the volume of a particle.
    """
    count, dim = positions.shape
    return MaterialState(
        positions=positions,
        velocities=velocities,
        particle_types=particle_types,
        boundaries=boundaries,
        gravity=gravity,
        material_velocities=velocities,
        affine=positions.new_zeros(count, dim, dim),
        strains=torch.eye(dim, dtype=positions.dtype, device=positions.device).repeat(count, 1, 1),
        log_volumes=positions.new_zeros(count),
        **fields,
    )


def _check_inside(state: State) -> None:
    gone = (outside(state, state.positions) & state.free).nonzero()
    if len(gone):
        entity = int(gone[0])
        raise ValueError(
            f"MPMEngine keeps particles in their box; particle {entity} is outside it, at "
            f"{state.positions[entity].tolist()}. Move it, or give wider boundaries."
        )


_MOVING = ("positions", "material_velocities", "affine", "strains", "log_volumes")
_STILL = (
    *("particle_types", "kinematic", "masses", "boundaries", "gravity", "periodic"),
    *("obstacles", "obstacle_radii", "batch", "active"),
)


def _moduli(solid: Sand | Goop) -> tuple[float, float]:
    """Return Lame's constants, mu and lambda [Pa]."""
    e, nu = solid.youngs_modulus, solid.poisson_ratio
    return e / (2 * (1 + nu)), e * nu / ((1 + nu) * (1 - 2 * nu))


def _sound_speed(solid: Sand | Goop) -> float:
    shear, bulk = _moduli(solid)
    return math.sqrt((bulk + 2 * shear) / solid.density)


def _in_space(value: Tensor) -> Tensor:
    """Return a float32 copy with rows as space has them; what a plane lacks is 0."""
    missing = [3 - value.shape[1] if value.ndim > 1 else 0] * (value.ndim - 1)
    grown = value.new_zeros([len(value), *[3] * (value.ndim - 1)], dtype=torch.float32)
    grown[(slice(None), *[slice(3 - m) for m in missing])] = value
    return grown


@dataclass(frozen=True)
class _Still:
    """What the kernels need in each sub-step and no step changes: tensors of float32 and int32."""

    engine: MPMEngine
    size: tuple[int, int, int]
    scenes: Mapping[str, Tensor]
    particles: Mapping[str, Tensor]

    @staticmethod
    def of(state: State, engine: MPMEngine) -> _Still:
        for name in ("boundaries", "particle_types", "masses"):
            if name not in state:
                raise ValueError(f"MPMEngine needs {name} of the state; give them with state.replace({name}=...).")
        if lacking := [name for name in _MOVING if name not in state]:
            raise ValueError(f"MPMEngine needs {', '.join(lacking)} of the state; make the state by material_state.")
        if "periodic" in state and bool(state.periodic.any()):
            raise ValueError("MPMEngine knows no periodic axes; give walls on every axis.")
        size = _grid_size(state, engine.cell_size)
        return _Still(engine=engine, size=size, scenes=_of_scenes(state), particles=_of_particles(state, engine))

    def run(self, moving: Mapping[str, Tensor], dim: int) -> None:
        """Take the particles `num_sub_steps` further, in place."""
        from simworld.kernels.warp_start import filled, stream_of, wp
        from simworld.physics import mpm_kernels as kernels

        particles = filled(kernels.Particles, {**self.particles, **moving}, {"material_velocities": "velocities"})
        scenes = filled(kernels.Scenes, self.scenes)
        setting = _setting(self.engine, self.size, dim)
        device = moving["positions"].device
        count, num_nodes = len(moving["positions"]), math.prod(self.size) * len(self.scenes["lower"])
        grid = wp.from_torch(torch.empty(num_nodes, 4, device=device), dtype=wp.vec4)
        drag = wp.from_torch(torch.empty(num_nodes, device=device))
        work = (
            (kernels.clear, num_nodes, [grid, drag]),
            (kernels.scatter, count, [setting, scenes, particles, grid, drag]),
            (kernels.push, num_nodes, [setting, scenes, particles, grid, drag]),
            (kernels.script, count, [setting, particles]),
            (kernels.gather, count, [setting, scenes, particles, grid]),
        )
        # Packing the arguments of a launch takes longer than a small scene's work, so it is done once.
        where, stream = wp.device_from_torch(device), stream_of(device)
        launches = [wp.launch(k, size, inputs=given, device=where, record_cmd=True) for k, size, given in work]
        for _ in range(self.engine.num_sub_steps):
            for launch in launches:
                launch.launch(stream)


def _grid_size(state: State, cell: float) -> tuple[int, int, int]:
    """Return how many nodes the grid of a scene has along each axis, three cells more on either side of the box."""
    widths = (state.boundaries[:, 1] - state.boundaries[:, 0]).amax(0).tolist()
    if min(widths) <= 0:
        raise ValueError(f"boundaries must be lower and upper corners of boxes; got a box of sides {widths}.")
    x, y, *z = (math.ceil(width / cell - 1e-3) + 7 for width in widths)
    size = (x, y, z[0] if z else 1)
    if math.prod(size) * state.num_scenes > MOST_NODES:
        raise ValueError(
            f"A grid of {size} nodes for each of {state.num_scenes} scenes is beyond {MOST_NODES} nodes; "
            f"make cell_size={cell} larger or the box smaller, or step fewer scenes at once."
        )
    return size


def _scripted(state: State) -> Tensor:
    return state.kinematic if "kinematic" in state else torch.zeros_like(state.active)


def _of_scenes(state: State) -> dict[str, Tensor]:
    corners = state.boundaries
    gravity = state.gravity if "gravity" in state else torch.zeros_like(corners[:, 0])
    ends = state.obstacles if "obstacles" in state else state.batch.new_zeros(0, 2)
    radii = state.obstacle_radii if "obstacles" in state else corners.new_zeros(0)
    if not bool(_scripted(state)[ends].all()):
        raise ValueError("obstacles lie between kinematic particles; say kinematic=True of all that they name.")
    ends, radii = (rows[state.active[ends].all(1)] for rows in (ends, radii))
    owners, order = state.batch[ends[:, 0]].sort(stable=True)
    starts = torch.searchsorted(owners, torch.arange(state.num_scenes + 1, device=owners.device))
    return {
        "lower": _in_space(corners[:, 0]),
        "upper": _in_space(corners[:, 1]),
        "gravity": _in_space(gravity),
        "starts": starts.int(),
        "ends": ends[order].int().contiguous(),
        "radii": radii[order].float().contiguous(),
    }


def _of_particles(state: State, engine: MPMEngine) -> dict[str, Tensor]:
    types = state.particle_types
    scripted = _scripted(state)
    materials: dict[int, Water | Sand | Goop] = {WATER: engine.water, SAND: engine.sand, GOOP: engine.goop}
    known = torch.isin(types, torch.tensor(list(materials), device=types.device)) | scripted
    if not bool(known.all()):
        odd = int((~known).nonzero()[0, 0])
        raise ValueError(
            f"MPMEngine knows water (5), sand (6) and goop (7), and kinematic particles; particle {odd} is of type "
            f"{int(types[odd])}. Say kinematic=True of those that follow a script."
        )
    densities, frictions = (torch.ones(len(types), device=types.device) for _ in range(2))
    for number, material in materials.items():
        crossed = engine.dt / engine.num_sub_steps * material.sound_speed / engine.cell_size
        if crossed > 1 and bool((types == number).any()):
            raise ValueError(
                f"Sound in {type(material).__name__.lower()} crosses {crossed:.3g} cells in a sub-step, which is "
                f"unstable; use num_sub_steps={math.ceil(2.5 * crossed * engine.num_sub_steps)} or so."
            )
        densities[types == number] = material.density
        frictions[types == number] = material.friction
    masses = state.masses.float()
    return {
        "materials": torch.where(scripted, KINEMATIC, types).where(state.active, 0).int(),
        "scenes": state.batch.int(),
        "masses": masses,
        "volumes": masses / densities,
        "frictions": frictions,
    }


def _setting(engine: MPMEngine, size: tuple[int, int, int], dim: int) -> Any:
    from simworld.physics import mpm_kernels as kernels

    s: Any = kernels.Setting()
    s.dt, s.cell = engine.dt / engine.num_sub_steps, engine.cell_size
    s.dim, s.depth, s.size = dim, 3 if dim == 3 else 1, size
    s.water_stiffness = engine.water.density * engine.water.sound_speed**2
    s.water_exponent, s.water_viscosity = engine.water.exponent, engine.water.viscosity
    s.water_shock = engine.water.shock_viscosity * engine.water.density * engine.water.sound_speed * engine.cell_size
    s.sand_shear, s.sand_bulk = _moduli(engine.sand)
    sine = math.sin(math.radians(engine.sand.friction_angle))
    s.sand_slope = math.sqrt(2 / 3) * 2 * sine / (3 - sine)
    s.goop_shear, s.goop_bulk = _moduli(engine.goop)
    s.goop_yield = engine.goop.yield_stress
    s.goop_decay = math.exp(-s.dt * s.goop_shear / engine.goop.viscosity) if engine.goop.viscosity else 0.0
    return s
