"""Rotations in space: unit quaternions (w, x, y, z), matrices and rotation vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def product(first: Tensor, second: Tensor) -> Tensor:
    """Return the product [..., 4] of quaternions (w, x, y, z): the rotation by `second`, then by `first`."""
    a, b, c, d = first.unbind(-1)
    w, x, y, z = second.unbind(-1)
    rows = (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )
    return torch.stack(rows, -1)


def inverse(quats: Tensor) -> Tensor:
    """Return the unit quaternions [..., 4] of the rotations back."""
    return quats * quats.new_tensor([1.0, -1.0, -1.0, -1.0])


def rotations(quats: Tensor) -> Tensor:
    """Return the rotation matrices [..., 3, 3] of quaternions [..., 4] (w, x, y, z), of any length but 0."""
    w, x, y, z = normalize(quats, dim=-1).unbind(-1)
    rows = [
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion(rotation: Tensor) -> Tensor:
    """Return the unit quaternions [..., 4] (w, x, y, z) of rotation matrices [..., 3, 3]."""
    m = rotation.movedim((-2, -1), (0, 1))
    # The largest of the four is found by a root, the others by division through it.
    squares = torch.stack(
        [
            1 + m[0, 0] + m[1, 1] + m[2, 2],
            1 + m[0, 0] - m[1, 1] - m[2, 2],
            1 - m[0, 0] + m[1, 1] - m[2, 2],
            1 - m[0, 0] - m[1, 1] + m[2, 2],
        ],
        -1,
    )
    w = torch.stack([squares[..., 0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]], -1)
    x = torch.stack([m[2, 1] - m[1, 2], squares[..., 1], m[1, 0] + m[0, 1], m[0, 2] + m[2, 0]], -1)
    y = torch.stack([m[0, 2] - m[2, 0], m[1, 0] + m[0, 1], squares[..., 2], m[2, 1] + m[1, 2]], -1)
    z = torch.stack([m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[2, 1] + m[1, 2], squares[..., 3]], -1)
    rows = torch.stack([w, x, y, z], -2)
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    return normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)


def exponential(rotations: Tensor) -> Tensor:
    """Return the unit quaternions of rotation vectors [..., 3] [rad]."""
    half = _length(rotations) / 2
    return torch.cat([half.cos(), rotations * (half.sin() / (2 * half))], -1)


def logarithm(quats: Tensor) -> Tensor:
    """Return the rotation vectors, of at most half a turn, of quaternions [..., 4]."""
    quats = torch.where(quats[..., :1] < 0, -quats, quats)
    size = _length(quats[..., 1:])
    return quats[..., 1:] * (2 * torch.atan2(size, quats[..., :1]) / size)


def _length(vectors: Tensor) -> Tensor:
    """Return lengths [..., 1], never 0, so that dividing by them and differentiating is safe."""
    return (vectors.square().sum(-1, keepdim=True) + 1e-18).sqrt()
