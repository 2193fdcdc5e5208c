"""A hyperelastic solid that a rigid ball is pressed into, by finite elements: linear tetrahedra, quasi-static.

Compressible neo-Hookean material, energy mu/2 (I_1 - 3) - mu ln J + lambda/2 (ln J)^2 per volume at rest (Bonet & Wood
2008, section 6.4.3). Nodes inside the ball are pushed out by a penalty. Lengths in m, stresses in Pa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simworld.extras import needed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROUNDING = 1e-9  # of Young's modulus: less is no stress
MOST_ITERATIONS = 60
TOLERANCE = 1e-8  # of the forces that a strain of one would cause


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """A material by its Young's modulus [Pa] and Poisson's ratio."""

    young: float = 1e5
    poisson: float = 0.3

    def __post_init__(self) -> None:
        if not (self.young > 0 and -1 < self.poisson < 0.5):
            raise ValueError(
                f"young must be positive and poisson between -1 and 0.5; got {self.young} and {self.poisson}."
            )

    @property
    def lame(self) -> tuple[float, float]:
        """Lame's lambda and mu [Pa]."""
        return self.young * self.poisson / ((1 + self.poisson) * (1 - 2 * self.poisson)), self.young / (
            2 * (1 + self.poisson)
        )


class Solid:
    """A body of tetrahedra, some of whose nodes are held, which `press` brings to rest against a ball.

    `positions` [n, 3] are where its nodes are: as it lies at rest, `nodes`, if not given.
    """

    def __init__(
        self,
        nodes: Floats,
        tetrahedra: Ints,
        held: NDArray[np.bool_],
        material: Elastic,
        positions: Floats | None = None,
    ) -> None:
        """Take a body.

        Raises:
            ValueError: a tetrahedron has no inside or is inverted, at rest or now, or no node is held.
        """
        edges = np.swapaxes(nodes[tetrahedra[:, 1:]] - nodes[tetrahedra[:, :1]], 1, 2)
        volumes = np.linalg.det(edges) / 6
        if not (volumes > 0).all():
            raise ValueError(f"Tetrahedra must have an inside and turn alike; {int((volumes <= 0).sum())} do not.")
        if not held.any():
            raise ValueError("A solid that a ball pushes needs nodes that are held; got none.")
        self.nodes, self.tetrahedra, self.held, self.material = nodes, tetrahedra, held, material
        self.positions = (nodes if positions is None else positions).copy()
        self._volumes = volumes
        inverse = np.linalg.inv(edges)
        # Slopes of the four linear functions of each tetrahedron: [t, 4, 3].
        self._slopes = np.concatenate([-inverse.sum(1, keepdims=True), inverse], 1)
        self._free = np.repeat(~held, 3)
        size = float(volumes.mean()) ** (1 / 3)
        self._stiffness = 10 * material.young * size  # of a node against the ball [N/m]
        self._scale = material.young * size**2
        self._rounding = 1e-15 * material.young * float(volumes.sum())  # of the energy
        if turned := int((np.linalg.det(self._gradients(self.positions)) <= 0).sum()):
            raise ValueError(f"Held nodes were moved so far that {turned} tetrahedra turn over; move them by less.")

    def press(self, centre: Floats, radius: float) -> int:
        """Move the nodes to where all forces cancel with a ball at `centre`, and return how many iterations it took.

        Raises:
            ArithmeticError: no such place was found; press in smaller steps.
        """
        spsolve = needed("scipy.sparse.linalg", "The solver of solids", "mesh").spsolve
        energy = self._energy(self.positions, centre, radius)
        for iteration in range(MOST_ITERATIONS):
            forces = np.where(self.held[:, None], 0.0, self._forces(self.positions, centre, radius))
            if np.abs(forces).max() < TOLERANCE * self._scale:
                return iteration
            matrix = self._matrix(self.positions, centre, radius)[self._free][:, self._free]
            step = np.zeros(self.positions.size)
            step[self._free] = spsolve(matrix.tocsc(), forces.ravel()[self._free])
            way = step.reshape(-1, 3)
            gain = float((forces * way).sum())
            if gain <= 0:  # the matrix bends energy down somewhere: go where forces pull
                way = forces / self._stiffness
                gain = float((forces * way).sum())
            energy = self._along(way, gain, energy, centre, radius)
        raise ArithmeticError("The solid found no rest against the ball; press in smaller steps.")

    def stresses(self) -> Floats:
        """Return the von Mises stress at nodes [n], the mean of those of their tetrahedra by volume.

        Of what is at rest it is 0: rounding is left out.
        """
        gradient = self._gradients(self.positions)
        jacobian = np.linalg.det(gradient)
        lam, mu = self.material.lame
        left = gradient @ np.swapaxes(gradient, 1, 2)
        eye = np.eye(3)
        cauchy = (mu * (left - eye) + lam * np.log(jacobian)[:, None, None] * eye) / jacobian[:, None, None]
        deviator = cauchy - np.trace(cauchy, axis1=1, axis2=2)[:, None, None] / 3 * eye
        mises = np.sqrt(1.5 * (deviator**2).sum((1, 2)))
        rows, weights = self.tetrahedra.ravel(), np.repeat(self._volumes, 4)
        total = np.bincount(rows, weights * np.repeat(mises, 4), len(self.nodes))
        found = np.asarray(total / np.bincount(rows, weights, len(self.nodes)))
        return np.where(found > ROUNDING * self.material.young, found, 0.0)

    def _along(self, way: Floats, gain: float, energy: float, centre: Floats, radius: float) -> float:
        """Go along a direction as far as energy falls, and return it; a tetrahedron that turns over has none."""
        share = 1.0
        while share > 1e-6:
            there = self.positions + share * way
            found = self._energy(there, centre, radius)
            if found <= energy - 1e-4 * share * gain + self._rounding:
                self.positions = there
                return found
            share /= 2
        raise ArithmeticError("The solid found no rest against the ball; press in smaller steps.")

    def _gradients(self, positions: Floats) -> Floats:
        return np.asarray(np.einsum("tka,tkb->tab", positions[self.tetrahedra], self._slopes))

    def _depths(self, positions: Floats, centre: Floats, radius: float) -> tuple[Floats, Floats]:
        """Return how deep nodes are in the ball [n], zero outside, and the ways out [n, 3]."""
        out = positions - centre
        lengths = np.linalg.norm(out, axis=1)
        return np.maximum(radius - lengths, 0), out / lengths[:, None]

    def _energy(self, positions: Floats, centre: Floats, radius: float) -> float:
        gradient = self._gradients(positions)
        jacobian = np.linalg.det(gradient)
        if (jacobian <= 0).any():
            return np.inf
        lam, mu = self.material.lame
        logs = np.log(jacobian)
        density = mu / 2 * ((gradient**2).sum((1, 2)) - 3) - mu * logs + lam / 2 * logs**2
        depths, _ = self._depths(positions, centre, radius)
        return float(density @ self._volumes + 0.5 * self._stiffness * (depths**2).sum())

    def _forces(self, positions: Floats, centre: Floats, radius: float) -> Floats:
        """Return the forces on nodes [n, 3]: of the material and of the ball."""
        gradient = self._gradients(positions)
        lam, mu = self.material.lame
        inverse = np.swapaxes(np.linalg.inv(gradient), 1, 2)
        logs = np.log(np.linalg.det(gradient))[:, None, None]
        stress = mu * (gradient - inverse) + lam * logs * inverse  # first Piola-Kirchhoff
        pulls = -np.einsum("tab,tkb,t->tka", stress, self._slopes, self._volumes).reshape(-1, 3)
        rows = self.tetrahedra.ravel()
        forces = np.stack([np.bincount(rows, pulls[:, axis], len(positions)) for axis in range(3)], 1)
        depths, ways = self._depths(positions, centre, radius)
        return np.asarray(forces + self._stiffness * depths[:, None] * ways)

    def _matrix(self, positions: Floats, centre: Floats, radius: float) -> Any:
        """Return the sparse matrix [3 n, 3 n] of what forces lose as nodes move."""
        from scipy.sparse import csr_matrix

        gradient = self._gradients(positions)
        lam, mu = self.material.lame
        inverse = np.linalg.inv(gradient)
        logs = np.log(np.linalg.det(gradient))
        eye, slopes = np.eye(3), self._slopes
        moved = np.einsum("tkb,tba->tka", slopes, inverse)  # slopes in the present positions
        same = mu * np.einsum("tkb,tlb->tkl", slopes, slopes)
        local = np.einsum("tkl,ac->tkalc", same, eye)
        local += lam * np.einsum("tka,tlc->tkalc", moved, moved)
        local += np.einsum("t,tkc,tla->tkalc", mu - lam * logs, moved, moved)
        local *= self._volumes[:, None, None, None, None]
        dofs = (3 * self.tetrahedra[:, :, None] + np.arange(3)).reshape(len(slopes), 12)
        rows, columns = np.repeat(dofs, 12, 1), np.tile(dofs, (1, 12))
        depths, ways = self._depths(positions, centre, radius)
        inside = np.flatnonzero(depths > 0)
        turn = depths[inside] / (radius - depths[inside])
        outer = np.einsum("na,nb->nab", ways[inside], ways[inside])
        blocks = self._stiffness * (outer - turn[:, None, None] * (eye - outer))
        at = 3 * inside[:, None] + np.arange(3)
        values = np.concatenate([local.ravel(), blocks.ravel()])
        rows = np.concatenate([rows.ravel(), np.repeat(at, 3, 1).ravel()])
        columns = np.concatenate([columns.ravel(), np.tile(at, (1, 3)).ravel()])
        return csr_matrix((values, (rows, columns)), shape=(positions.size, positions.size))
