"""Splat states: rendered, moved as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simworld.kinds import SplatState
from simworld.render.camera import Camera
from simworld.render.harmonics import degree_of, turn_harmonics
from simworld.render.rasterize import RenderMode, covariances, rasterization


def render_splats(
    splats: SplatState,
    cameras: Camera | Sequence[Camera],
    *,
    background: Tensor | Sequence[float] | None = None,
    render_mode: RenderMode = "RGB",
    backend: str | None = None,
) -> Tensor:
    """Return the picture [h, w, c] of a camera, or those [b, h, w, c] of several of one size; differentiable.

    Splats that are not active are not drawn. `background` [c] is what shows where there is none, black by default.

    Raises:
        ValueError: there is no camera, their pictures differ in size, or the state holds several scenes.
    """
    return render_with_alpha(splats, cameras, background=background, render_mode=render_mode, backend=backend)[0]


def render_with_alpha(
    splats: SplatState,
    cameras: Camera | Sequence[Camera],
    *,
    background: Tensor | Sequence[float] | None = None,
    render_mode: RenderMode = "RGB",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `render_splats` does, and the opacities [h, w, 1] or [b, h, w, 1] of the pictures.

    Raises:
        ValueError: as `render_splats`.
    """
    several = [cameras] if isinstance(cameras, Camera) else list(cameras)
    sizes = {(one.width, one.height) for one in several}
    if len(sizes) != 1:
        raise ValueError(f"render takes a camera, or several of one size; got sizes {sorted(sizes)}.")
    if splats.num_scenes != 1:
        raise ValueError(f"render draws one scene; the state has {splats.num_scenes}. Take scene(i) of it.")
    viewmats, Ks = (torch.stack([getattr(one, name) for one in several]).to(splats.means) for name in ("viewmat", "K"))
    (width, height), there = sizes.pop(), splats.active
    shape: dict[str, Any] = {"covars": splats.covars[there]} if "covars" in splats else {}
    made, alphas, _ = rasterization(
        splats.means[there],
        None if shape else splats.quats[there],
        None if shape else splats.scales[there],
        splats.opacities[there],
        splats.harmonics[there],
        viewmats,
        Ks,
        width,
        height,
        sh_degree=degree_of(splats.harmonics),
        backgrounds=None
        if background is None
        else torch.as_tensor(background).to(splats.means).expand(len(several), -1),
        render_mode=render_mode,
        backend=backend,
        **shape,
    )
    return (made[0], alphas[0]) if isinstance(cameras, Camera) else (made, alphas)


def moved(splats: SplatState, rotation: Tensor, translation: Tensor | None = None, scale: float = 1.0) -> SplatState:
    """Return splats at scale R x + t, their shapes and harmonics turned with them; `rotation` is [3, 3].

    Raises:
        ValueError: the matrix is no rotation, or the scale is not positive.
    """
    turn = rotation.to(splats.means)
    eye = torch.eye(3, dtype=turn.dtype, device=turn.device)
    if turn.shape != (3, 3) or float((turn @ turn.T - eye).abs().max()) > 1e-4 or float(torch.linalg.det(turn)) < 0:
        raise ValueError(f"rotation must be a rotation matrix [3, 3]; got {rotation.tolist()}.")
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}.")
    shift = torch.zeros_like(splats.means[0]) if translation is None else translation.to(splats.means)
    changes = {"means": scale * splats.means @ turn.T + shift, "harmonics": turn_harmonics(splats.harmonics, turn)}
    if "covars" in splats:
        changes["covars"] = scale**2 * turn @ splats.covars @ turn.T
    if "quats" in splats:
        changes["quats"] = product(quaternion(turn), splats.quats)
    if "scales" in splats:
        changes["scales"] = scale * splats.scales
    return splats.replace(**changes)


def quaternion(rotation: Tensor) -> Tensor:
    """Return the unit quaternion [4] (w, x, y, z) of a rotation matrix [3, 3]."""
    m = rotation
    # The largest of the four is found by a root, the others by division through it.
    squares = torch.stack(
        [
            1 + m[0, 0] + m[1, 1] + m[2, 2],
            1 + m[0, 0] - m[1, 1] - m[2, 2],
            1 - m[0, 0] + m[1, 1] - m[2, 2],
            1 - m[0, 0] - m[1, 1] + m[2, 2],
        ]
    )
    w = torch.stack([squares[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    x = torch.stack([m[2, 1] - m[1, 2], squares[1], m[1, 0] + m[0, 1], m[0, 2] + m[2, 0]])
    y = torch.stack([m[0, 2] - m[2, 0], m[1, 0] + m[0, 1], squares[2], m[2, 1] + m[1, 2]])
    z = torch.stack([m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[2, 1] + m[1, 2], squares[3]])
    rows = torch.stack([w, x, y, z])
    return torch.nn.functional.normalize(rows[int(squares.argmax())], dim=0)


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


def with_covariances(splats: SplatState) -> SplatState:
    """Return the same splats by their covariances, in place of scales and quaternions."""
    kept = {name: splats[name] for name in ("means", "opacities", "harmonics")}
    made: dict[str, Any] = {**kept, "covars": covariances(splats.quats, splats.scales)}
    return SplatState(**made, batch=splats.batch, active=splats.active)
