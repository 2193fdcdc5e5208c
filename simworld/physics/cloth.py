"""Cloth by newton's vertex block descent solver (Chen et al. 2024, arXiv 2403.06321) on the CPU or an accelerator.

Lengths in m, times in s; the third axis points up. Wind pushes each triangle along its normal, as a flat plate, in
proportion to its area and the square of the difference of speeds along the normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simworld.extras import needed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
AIR = 1.2  # kg/m^3
DRAG = 0.6  # half of a flat plate's coefficient of about 1.2
GRAVITY = (0.0, 0.0, -9.81)
ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """What a cloth is made of: density [kg/m^2], stiffness in its plane [N/m], of bending [N m], thickness [m]."""

    density: float = 0.15
    stiffness: float = 100.0
    bending: float = 1e-4
    damping: float = 1e-4
    thickness: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Ball:
    """A rigid ball that moves as `Cloth.advance` is told."""

    radius: float
    centre: tuple[float, float, float]


class Cloth:
    """A cloth from rest, some of whose nodes are held, that `advance` takes forward in time.

    `positions` and `velocities` are [n, 3].
    """

    def __init__(
        self,
        nodes: Floats,
        triangles: Ints,
        held: NDArray[np.bool_],
        *,
        fabric: Fabric,
        dt: float,
        ball: Ball | None = None,
        now: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Hand a cloth, and perhaps a ball, to newton; `now` are positions and velocities if not at rest at `nodes`.

        Raises:
            ImportError: newton is missing.
        """
        import warp as wp

        newton = needed("newton", "The cloth solver", "cloth")
        self.triangles, self.dt, self._wp, self._ball = triangles, dt, wp, ball
        unturned: Any = wp.quat_identity()
        builder = newton.ModelBuilder(gravity=GRAVITY)
        builder.add_cloth_mesh(
            pos=wp.vec3(0.0),
            rot=unturned,
            scale=1.0,
            vel=wp.vec3(0.0),
            vertices=[wp.vec3(*place) for place in nodes.tolist()],
            indices=triangles.ravel().tolist(),
            density=fabric.density,
            tri_ke=fabric.stiffness,
            tri_ka=fabric.stiffness,
            tri_kd=fabric.damping,
            edge_ke=fabric.bending,
            edge_kd=fabric.damping,
            particle_radius=fabric.thickness,
        )
        for number in np.flatnonzero(held).tolist():
            builder.particle_mass[number] = 0.0
            builder.particle_flags[number] = builder.particle_flags[number] & ~int(newton.ParticleFlags.ACTIVE)
        if ball is not None:
            body = builder.add_body(xform=wp.transform(wp.vec3(*ball.centre), unturned), is_kinematic=True)
            builder.add_shape_sphere(body, radius=ball.radius)
        builder.color(include_bending=True)
        self._model = builder.finalize()
        self._model.soft_contact_ke, self._model.soft_contact_kd, self._model.soft_contact_mu = 1e3, 1e-2, 0.3
        known: dict[str, Any] = {} if ball is None else {"collision_pipeline": newton.CollisionPipeline(self._model)}
        self._solver = newton.solvers.SolverVBD(self._model, iterations=ITERATIONS, **known)
        self._control: Any = self._model.control()
        self._now: Any = self._model.state()
        self._next: Any = self._model.state()
        if now is not None:
            self._now.particle_q.assign(now[0].astype(np.float32))
            self._now.particle_qd.assign(now[1].astype(np.float32))

    @property
    def positions(self) -> Floats:
        """Where nodes are [n, 3]."""
        return np.asarray(self._now.particle_q.numpy(), dtype=np.float64)

    @property
    def velocities(self) -> Floats:
        """Velocities of nodes [n, 3]."""
        return np.asarray(self._now.particle_qd.numpy(), dtype=np.float64)

    def advance(self, num_steps: int = 1, *, wind: Floats | None = None, ball_velocity: Floats | None = None) -> None:
        """Go `num_steps` times `dt` forward, in a `wind` [3] and with the ball at a velocity [3]."""
        for _ in range(num_steps):
            self._now.clear_forces()
            if wind is not None:
                self._now.particle_f.assign(self._wind_forces(wind).astype(np.float32))
            if self._ball is not None and ball_velocity is not None:
                self._move_ball(ball_velocity)
            self._solver.step(self._now, self._next, self._control, None, self.dt)
            self._now, self._next = self._next, self._now

    def _wind_forces(self, wind: Floats) -> Floats:
        corners, speeds = self.positions[self.triangles], self.velocities[self.triangles].mean(1)
        normals = 0.5 * np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # as long as the area
        areas = np.linalg.norm(normals, axis=1, keepdims=True)
        along = ((wind - speeds) * normals).sum(1, keepdims=True) / np.maximum(areas, 1e-12)
        pushes = AIR * DRAG * np.abs(along) * along * normals / 3
        rows = self.triangles.ravel()
        each = np.repeat(pushes, 3, 0)
        return np.stack([np.bincount(rows, each[:, axis], len(self.positions)) for axis in range(3)], 1)

    def _move_ball(self, velocity: Floats) -> None:
        centre = self.centre + velocity * self.dt
        for state in (self._now, self._next):
            place, speed = state.body_q.numpy(), state.body_qd.numpy()
            place[0, :3] = centre
            speed[0, :3] = velocity
            state.body_q.assign(place)
            state.body_qd.assign(speed)

    @property
    def centre(self) -> Floats:
        """Where the ball is [3]."""
        return np.asarray(self._now.body_q.numpy()[0, :3], dtype=np.float64)
