"""Pinhole cameras, as OpenCV has them: x to the right, y down, z into the picture; a pixel's centre at +0.5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Camera:
    """Where a picture is taken from: `viewmat` [4, 4], world to camera, and `K` [3, 3] in pixels.

    `width` and `height` are the picture's, in pixels. Lengths are in the scene's unit.

    Raises:
        ValueError: a matrix is not of its shape or not finite, the rotation is none, or a size is not positive.
    """

    viewmat: Tensor
    K: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, size in (("viewmat", 4), ("K", 3)):
            value = getattr(self, name)
            if value.shape != (size, size) or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                got = f"{list(value.shape)}, {value.dtype}"
                raise ValueError(f"A camera's {name} must be finite numbers [{size}, {size}]; got {got}.")
        turn = self.viewmat[:3, :3].detach().double()
        off = float((turn @ turn.T - torch.eye(3, dtype=turn.dtype, device=turn.device)).abs().max())
        if off > 1e-3 or float(torch.linalg.det(turn)) < 0:
            raise ValueError(
                "A camera's viewmat must turn and shift, world to camera; its upper left 3 x 3 is no rotation. "
                "Take a scale out of it, or transpose it if it is stored by columns."
            )
        rest = self.K.detach().double().cpu() - torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        if bool(rest[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]].any()):
            raise ValueError(
                f"A camera's K must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], without skew; got {self.K.tolist()}. "
                "Undistort the picture."
            )
        if self.width < 1 or self.height < 1 or float(self.K[0, 0]) <= 0 or float(self.K[1, 1]) <= 0:
            raise ValueError(
                f"A camera needs a picture and focal lengths above 0; got {self.width} x {self.height} pixels, focal "
                f"lengths {float(self.K[0, 0]):g} and {float(self.K[1, 1]):g}."
            )

    @staticmethod
    def look_at(
        eye: Sequence[float] | Tensor,
        target: Sequence[float] | Tensor,
        *,
        up: Sequence[float] | Tensor = (0.0, 0.0, 1.0),
        width: int = 640,
        height: int = 480,
        field_of_view: float = 45.0,
        dtype: torch.dtype = torch.float32,
    ) -> Camera:
        """Return a camera at `eye` that looks at `target`, `up` upwards in the picture.

        `field_of_view` is the angle from the upper to the lower edge, in degrees.

        Raises:
            ValueError: eye and target coincide, up points along the view, or the angle is not between 0 and 180.
        """
        here, there, above = (torch.as_tensor(v, dtype=torch.float64) for v in (eye, target, up))
        if not 0 < field_of_view < 180:
            raise ValueError(f"field_of_view must be between 0 and 180 degrees; got {field_of_view}.")
        ahead = there - here
        right = torch.linalg.cross(ahead, above)
        if float(right.norm()) <= 1e-9 * float(ahead.norm() * above.norm()):
            raise ValueError(
                f"look_at needs a direction to look in, and up across it; got eye {here.tolist()}, target "
                f"{there.tolist()}, up {above.tolist()}."
            )
        ahead, right = ahead / ahead.norm(), right / right.norm()
        turn = torch.stack([right, torch.linalg.cross(ahead, right), ahead])
        viewmat = torch.eye(4, dtype=torch.float64)
        viewmat[:3, :3], viewmat[:3, 3] = turn, -turn @ here
        focal = 0.5 * height / math.tan(math.radians(field_of_view) / 2)
        K = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)
        return Camera(viewmat=viewmat.to(dtype), K=K.to(dtype), width=width, height=height)

    @property
    def position(self) -> Tensor:
        """Where the camera is [3]."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """Return the camera that takes the same picture in other pixels."""
        across, down = width / self.width, height / self.height
        scale = self.K.new_tensor([[across], [down], [1.0]])
        return replace(self, K=self.K * scale, width=width, height=height)

    def to(self, *args: Any) -> Camera:
        """Return the camera with its matrices on another device or of another type."""
        return replace(self, viewmat=self.viewmat.to(*args), K=self.K.to(*args))


def orbit(
    target: Sequence[float] | Tensor,
    *,
    distance: float,
    count: int,
    elevation: float = 20.0,
    width: int = 640,
    height: int = 480,
    field_of_view: float = 45.0,
) -> list[Camera]:
    """Return `count` cameras on a circle round `target`, `elevation` degrees above it, the third axis up.

    Raises:
        ValueError: there is no camera, no distance, or the elevation is straight up or down.
    """
    if count < 1 or not distance > 0 or not -90 < elevation < 90:
        raise ValueError(
            "orbit needs a camera or more, a distance above 0 and an elevation between -90 and 90 degrees; got "
            f"{count}, {distance}, {elevation}."
        )
    centre = torch.as_tensor(target, dtype=torch.float64)
    across, up = distance * math.cos(math.radians(elevation)), distance * math.sin(math.radians(elevation))
    angles = [2 * math.pi * number / count for number in range(count)]
    places = [centre + centre.new_tensor([across * math.cos(a), across * math.sin(a), up]) for a in angles]
    return [Camera.look_at(place, centre, width=width, height=height, field_of_view=field_of_view) for place in places]
