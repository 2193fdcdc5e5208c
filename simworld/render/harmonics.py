"""Real spherical harmonics of splats' colours, degrees 0 to 3: their values, and how they turn with what they sit on.

Coefficients are ordered and signed as in 3D Gaussian splatting (Kerbl et al. 2023) and gsplat.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

MOST_DEGREE = 3
FLAT = 0.5 / math.sqrt(math.pi)
"""The harmonic of degree 0, by which a coefficient becomes a colour."""


def bases(directions: Tensor, degree: int) -> Tensor:
    """Return the values [..., (degree + 1)^2] of the harmonics along unit `directions` [..., 3].

    Raises:
        ValueError: the degree is not 0 to 3.
    """
    if degree not in range(MOST_DEGREE + 1):
        raise ValueError(f"Spherical harmonics are of degree 0 to {MOST_DEGREE}; got {degree}.")
    x, y, z = directions.unbind(-1)
    pi = math.pi
    found = [torch.full_like(x, FLAT)]
    if degree > 0:
        found += [math.sqrt(3 / (4 * pi)) * term for term in (-y, z, -x)]
    if degree > 1:
        half, whole, least = math.sqrt(15 / pi) / 2, math.sqrt(5 / pi) / 4, math.sqrt(15 / pi) / 4
        found += [half * x * y, -half * y * z, whole * (3 * z * z - 1), -half * x * z, least * (x * x - y * y)]
    if degree > 2:
        a, b, c = math.sqrt(35 / (2 * pi)) / 4, math.sqrt(105 / pi) / 2, math.sqrt(21 / (2 * pi)) / 4
        found += [
            -a * y * (3 * x * x - y * y),
            b * x * y * z,
            -c * y * (5 * z * z - 1),
            math.sqrt(7 / pi) / 4 * z * (5 * z * z - 3),
            -c * x * (5 * z * z - 1),
            b / 2 * z * (x * x - y * y),
            -a * x * (x * x - 3 * y * y),
        ]
    return torch.stack(found, -1)


def evaluate_harmonics(coefficients: Tensor, directions: Tensor, degree: int | None = None) -> Tensor:
    """Return the sums [..., c] of `coefficients` [..., k, c] times the harmonics along `directions` [..., 3].

    Directions need not be of unit length. `degree` is the highest used, by default all that are there: k is 1, 4, 9
    or 16.

    Raises:
        ValueError: there are not as many coefficients, or fewer than the degree needs.
    """
    held = degree_of(coefficients)
    degree = held if degree is None else degree
    if degree > held:
        raise ValueError(f"Degree {degree} needs {(degree + 1) ** 2} coefficients; got {coefficients.shape[-2]}.")
    values = bases(torch.nn.functional.normalize(directions, dim=-1), degree)
    return (coefficients[..., : values.shape[-1], :] * values[..., None]).sum(-2)


def degree_of(coefficients: Tensor) -> int:
    """Return the degree of coefficients [..., k, c].

    Raises:
        ValueError: k is not 1, 4, 9 or 16.
    """
    count = coefficients.shape[-2]
    degree = math.isqrt(count) - 1
    if (degree + 1) ** 2 != count or not 0 <= degree <= MOST_DEGREE:
        raise ValueError(f"Spherical harmonics have 1, 4, 9 or 16 coefficients; got {count}.")
    return degree


def turn_harmonics(coefficients: Tensor, rotations: Tensor) -> Tensor:
    """Return the coefficients [..., k, c] of what is turned by `rotations` [..., 3, 3].

    Along R d they have the value that the given ones have along d. The harmonics of a degree span all their
    rotations, so the matrix that turns them (Wigner's) is found from their values along fixed directions.
    """
    degree, parts = degree_of(coefficients), [coefficients[..., :1, :]]
    for number in range(1, degree + 1):
        rows = slice(number**2, (number + 1) ** 2)
        directions, inverse = (value.to(rotations) for value in _fixed(number))
        held = coefficients[..., rows, :]
        # f(R^T d) must be b(d) c' for all d. Only the change is solved for, so that no rotation changes nothing at all.
        change = bases(directions @ rotations, number)[..., rows] - bases(directions, number)[..., rows]
        parts.append(held + inverse @ (change @ held))
    return torch.cat(parts, -2)


@cache
def _fixed(degree: int) -> tuple[Tensor, Tensor]:
    """Return directions [m, 3] that tell the harmonics of a degree apart, and the inverse of their values there."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * degree + 8, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1)
    return directions, torch.linalg.pinv(bases(directions, degree)[:, degree**2 :])
