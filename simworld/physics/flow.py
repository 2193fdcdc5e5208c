"""Incompressible flow round an obstacle in a channel, by finite elements.

Taylor-Hood elements (velocities quadratic, pressures linear on triangles) and the incremental pressure correction in
rotational form (Guermond, Minev & Shen 2006, doi 10.1016/j.cma.2005.10.010) with second-order backward differences;
the convecting velocity is extrapolated, so that every step solves linear systems. Lengths in m, time in s, pressures
over the density.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simworld.extras import needed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
INFLOW, OUTFLOW, WALL, OBSTACLE = "inflow", "outflow", "wall", "obstacle"


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel with a cylinder across it, and how finely it is cut into triangles.

    The origin is its lower left corner. `size` [m] is about the length of edges at the walls and `obstacle_size` at the
    cylinder. Without a `radius` there is no cylinder.
    """

    length: float = 2.2
    height: float = 0.41
    centre: tuple[float, float] = (0.2, 0.2)
    radius: float | None = 0.05
    size: float = 0.04
    obstacle_size: float = 0.012

    def __post_init__(self) -> None:
        (x, y), r = self.centre, self.radius or 0.0
        room = min(x, y, self.length - x, self.height - y)
        if self.radius is not None and not 0 < r < room:
            raise ValueError(
                f"The cylinder must lie in the channel, {self.length} by {self.height}, and touch no wall; got the "
                f"centre {self.centre} and the radius {self.radius}."
            )

    def triangulated(self) -> tuple[Floats, Ints]:
        """Return nodes [n, 2] and triangles [t, 3], counter-clockwise, by gmsh."""
        gmsh = needed("gmsh", "Meshing a channel", "mesh")
        _started(gmsh)
        try:
            gmsh.option.setNumber("General.Terminal", 0)
            gmsh.option.setNumber("General.NumThreads", 1)  # the same mesh wherever it is made
            gmsh.model.add("channel")
            self._draw(gmsh)
            gmsh.model.mesh.generate(2)
            tags, places, _ = gmsh.model.mesh.getNodes()
            _, nodes = gmsh.model.mesh.getElementsByType(2)
        finally:
            gmsh.finalize()
        points = places.reshape(-1, 3)[:, :2]
        rows = np.empty(int(tags.max()) + 1, dtype=np.int64)
        rows[tags.astype(np.int64)] = np.arange(len(tags))
        return _tidied(points, rows[nodes.astype(np.int64)].reshape(-1, 3))

    def _draw(self, gmsh: Any) -> None:
        """Draw the rectangle and the circle, and say how long edges shall be: longer away from the cylinder."""
        drawn = gmsh.model.occ
        plane = drawn.addRectangle(0, 0, 0, self.length, self.height)
        if self.radius is not None:
            hole = drawn.addDisk(*self.centre, 0, self.radius, self.radius)
            drawn.cut([(2, plane)], [(2, hole)])
        drawn.synchronize()
        gmsh.option.setNumber("Mesh.MeshSizeMax", self.size)
        gmsh.option.setNumber("Mesh.MeshSizeExtendFromBoundary", 0)
        if self.radius is None:
            return
        x, y, r = *self.centre, self.radius
        # Fine at the cylinder, coarser with the distance, and less so behind it, where its wake is.
        along = f"(x-{x})*(1-0.75*Step(x-{x}))"
        growth = (self.size - self.obstacle_size) / (4 * r)
        field = gmsh.model.mesh.field
        number = field.add("MathEval")
        field.setString(number, "F", f"{self.obstacle_size}+{growth}*max(0,Sqrt(({along})^2+(y-{y})^2)-{r})")
        field.setAsBackgroundMesh(number)

    def parts(self, points: Floats) -> dict[str, NDArray[np.bool_]]:
        """Return by name which points [n, 2] of the boundary lie on each part of it; corners are the walls'."""
        near = 1e-6 * self.height
        x, y = points.T
        wall = (y < near) | (y > self.height - near)
        inflow, outflow = (x < near) & ~wall, (x > self.length - near) & ~wall
        return {WALL: wall, INFLOW: inflow, OUTFLOW: outflow, OBSTACLE: ~(wall | inflow | outflow)}


def _started(gmsh: Any) -> None:
    """Let gmsh begin, and undo that it lets a pipe which another program closes end this one without a word."""
    before = signal.getsignal(signal.SIGPIPE) if hasattr(signal, "SIGPIPE") else None
    gmsh.initialize(interruptible=False)
    if before is not None:
        with suppress(ValueError):  # the main thread alone may set it
            signal.signal(signal.SIGPIPE, before)


def _tidied(points: Floats, triangles: Ints) -> tuple[Floats, Ints]:
    """Return nodes that are in triangles, from left to right, and triangles turned counter-clockwise."""
    used = np.unique(triangles)
    order = used[np.lexsort((points[used, 1], points[used, 0]))]
    rows = np.full(len(points), -1)
    rows[order] = np.arange(len(order))
    points, triangles = points[order], rows[triangles]
    a, b, c = (points[triangles[:, k]] for k in range(3))
    clockwise = (b - a)[:, 0] * (c - a)[:, 1] < (b - a)[:, 1] * (c - a)[:, 0]
    triangles[clockwise] = triangles[clockwise][:, ::-1]
    return points, triangles


class ChannelFlow:
    """A flow in a channel, from rest, which `advance` takes forward in time.

    `velocities` [n, 2] and `pressures` [n] (over the density) are at the nodes of the mesh. `inflow` tells the
    velocity along the channel at heights y; the outflow is free of stress.
    """

    def __init__(self, channel: Channel, *, viscosity: float, inflow: Callable[[Floats], Floats], dt: float) -> None:
        """Cut the channel into triangles, assemble and factorize.

        Raises:
            ValueError: viscosity or dt is not positive.
            ImportError: scikit-fem or gmsh is missing.
        """
        if not (viscosity > 0 and dt > 0):
            raise ValueError(f"viscosity and dt must be positive; got {viscosity} and {dt}.")
        splu = needed("scipy.sparse.linalg", "The flow solver", "mesh").splu
        self.channel, self.viscosity, self.dt, self.time = channel, viscosity, dt, 0.0
        self.nodes, self.triangles = channel.triangulated()
        self._forms = _Forms(self.nodes, self.triangles)
        forms, on = self._forms, self._parts()
        self._obstacle = on[OBSTACLE]
        self._free = ~(on[WALL] | on[INFLOW] | on[OBSTACLE])
        self._open = self.nodes[:, 0] < channel.length * (1 - 1e-9)  # the pressure is held all along the outflow
        self._poisson = splu(forms.laplace[self._open][:, self._open].tocsc())
        self._mass = splu(forms.mass[self._free][:, self._free].tocsc())
        self._pressure_mass = splu(forms.pressure_mass.tocsc())
        self._speeds = np.zeros((len(forms.places), 2))
        self._given = np.zeros_like(self._speeds)
        self._given[on[INFLOW], 0] = inflow(forms.places[on[INFLOW], 1])
        self._pressures = np.zeros(len(self.nodes))
        self._before: Floats | None = None  # velocities one step ago
        self._acceleration = np.zeros_like(self._speeds)

    def _parts(self) -> dict[str, NDArray[np.bool_]]:
        """Return by name which functions' places lie on each part of the boundary."""
        edge = self._forms.boundary
        found = {name: np.zeros(len(self._forms.places), dtype=bool) for name in (WALL, INFLOW, OUTFLOW, OBSTACLE)}
        for name, where in self.channel.parts(self._forms.places[edge]).items():
            found[name][edge] = where
        return found

    @property
    def parts(self) -> dict[str, NDArray[np.bool_]]:
        """Which nodes [n] lie on each part of the boundary, by its name."""
        return {name: where[: len(self.nodes)] for name, where in self._parts().items()}

    @property
    def velocities(self) -> Floats:
        """Velocities [n, 2] at the nodes of the mesh [m/s]."""
        return self._speeds[: len(self.nodes)]

    @property
    def pressures(self) -> Floats:
        """Pressures over the density [n] at the nodes of the mesh [m^2/s^2]."""
        return self._pressures

    def advance(self, num_steps: int = 1) -> None:
        """Take the flow `num_steps` times `dt` forward."""
        for _ in range(num_steps):
            self._step()

    def _step(self) -> None:
        from scipy.sparse.linalg import splu

        forms, free, now = self._forms, self._free, self._speeds
        # The first step is by first-order differences, for want of a velocity before it.
        before = now if self._before is None else self._before
        rate = (1.0 if self._before is None else 1.5) / self.dt
        past = now / self.dt if self._before is None else (2 * now - 0.5 * before) / self.dt
        matrix = rate * forms.mass + self.viscosity * forms.stiffness + forms.convection(2 * now - before)
        guess = self._given.copy()
        known = forms.mass @ past + forms.pull(self._pressures) - matrix @ guess
        guess[free] = splu(matrix[free][:, free].tocsc()).solve(known[free])
        # What diverges is taken out by a pressure, and the pressure corrected by it.
        source = forms.divergence_of(guess)
        push = np.zeros_like(self._pressures)
        push[self._open] = self._poisson.solve(-rate * source[self._open])
        after = guess.copy()
        after[free] += self._mass.solve(forms.pull(push)[free]) / rate
        self._pressures = self._pressures + push - self.viscosity * self._pressure_mass.solve(source)
        self._acceleration = rate * after - past
        self._before, self._speeds = now, after
        self.time += self.dt

    def changed(self, change: Floats) -> ChannelFlow:
        """Return the flow that goes on where velocities at the nodes are changed by `change` [n, 2].

        Changes at the inflow, the walls and the cylinder stay: an inflow times a number is its profile times that
        number. Between nodes changes are linear. The past is changed alike, so that nothing but the change accelerates;
        the pressure of the next step or two is that of the jolt.
        """
        forms, on = self._forms, self._parts()
        wide = np.concatenate([change, change[forms.edges].mean(1)])
        known = on[INFLOW][: len(change)]
        before, added = self._given[: len(change)][known], change[known]
        share = float((added * before).sum() / max(float((before**2).sum()), 1e-300))
        if np.allclose(added, share * before, rtol=0, atol=1e-9 * np.abs(before).max(initial=0)):
            wide[on[INFLOW]] = share * self._given[on[INFLOW]]
        wide[: len(change)] = change
        made = copy.copy(self)  # no step writes into an array
        made._speeds = self._speeds + wide
        made._before = None if self._before is None else self._before + wide
        made._given = self._given + np.where(self._free[:, None], 0.0, wide)
        return made

    def force(self) -> Floats:
        """Return the force [2] of the flow on the obstacle, over density and depth [m^3/s^2].

        From the residual of the momentum equation at the obstacle, which converges faster than the stress there
        (Babuska & Miller 1984).
        """
        forms, speeds = self._forms, self._speeds
        flux = (self.viscosity * forms.stiffness + forms.convection(speeds)) @ speeds
        balance = forms.mass @ self._acceleration + flux - forms.pull(self._pressures)
        return np.asarray(-balance[self._obstacle].sum(0))


class _Forms:
    """Matrices of the weak form on one mesh: quadratic functions at nodes and midpoints, linear ones at nodes."""

    def __init__(self, nodes: Floats, triangles: Ints) -> None:
        needed("skfem", "The flow solver", "mesh", "scikit-fem")
        from skfem import Basis, BilinearForm, ElementTriP1, ElementTriP2, MeshTri
        from skfem.helpers import dot, grad

        mesh = MeshTri(nodes.T.copy(), triangles.T.copy())
        quadratic = Basis(mesh, ElementTriP2(), intorder=5)
        linear = quadratic.with_element(ElementTriP1())
        self.places: Floats = quadratic.doflocs.T
        self.edges: Ints = mesh.facets.T  # in whose middle the places beyond the nodes are
        self.boundary: Ints = quadratic.get_dofs().flatten()
        mass = BilinearForm(lambda u, v, _: u * v)
        stiffness = BilinearForm(lambda u, v, _: dot(grad(u), grad(v)))
        self.mass, self.stiffness = mass.assemble(quadratic), stiffness.assemble(quadratic)
        self.laplace, self.pressure_mass = stiffness.assemble(linear), mass.assemble(linear)
        self._divergence = [
            BilinearForm(lambda u, q, _, axis=axis: grad(u)[axis] * q).assemble(quadratic, linear) for axis in (0, 1)
        ]
        self._dofs: Ints = quadratic.element_dofs  # [6, t]
        shapes = [quadratic.basis[k][0] for k in range(6)]
        self._values = np.stack(
            [np.broadcast_to(np.asarray(shape), quadratic.dx.shape) for shape in shapes]
        )  # [6, t, q]
        self._slopes = np.stack([shape.grad for shape in shapes])  # [6, 2, t, q]
        self._weights: Floats = quadratic.dx

    def convection(self, speeds: Floats) -> Any:
        """Return the sparse matrix of the integrals of v (speeds . grad u), for velocities `speeds` [m, 2]."""
        from scipy.sparse import csr_matrix

        here = np.einsum("ktq,ktc->ctq", self._values, speeds[self._dofs]) * self._weights
        along = np.einsum("ctq,kctq->ktq", here, self._slopes)
        local = np.einsum("itq,jtq->ijt", self._values, along)
        rows, columns = (np.broadcast_to(dofs, local.shape) for dofs in (self._dofs[:, None], self._dofs[None]))
        return csr_matrix((local.ravel(), (rows.ravel(), columns.ravel())), shape=self.mass.shape)

    def pull(self, pressures: Floats) -> Floats:
        """Return [m, 2]: the integral of the pressure times the divergence of each quadratic function."""
        return np.stack([part.T @ pressures for part in self._divergence], 1)

    def divergence_of(self, speeds: Floats) -> Floats:
        """Return [n]: the integral of the divergence of velocities [m, 2] times each linear function."""
        return np.asarray(sum(part @ speeds[:, axis] for axis, part in enumerate(self._divergence)))


def parabola(height: float, mean: float) -> Callable[[Floats], Floats]:
    """Return the profile of a developed flow between walls: 6 U y (H - y) / H^2, of the `mean` speed U."""
    return lambda y: 6 * mean * y * (height - y) / height**2
