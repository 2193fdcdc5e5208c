"""Splat states: rendered, moved as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.quaternions import product, quaternion, rotations
from simworld.render.camera import Camera
from simworld.render.harmonics import degree_of, turn_harmonics
from simworld.render.rasterize import FAR, NEAR, RenderMode, rasterization

SAMPLED = 1000  # splats of which the middle is taken
ALIKE = 1.2e-6  # of the largest variance: variances that differ by less have no axes of their own


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
    width, height = sizes.pop()
    there: Tensor | slice = slice(None) if bool(splats.active.all()) else splats.active
    near, far = planes(splats.means[there], viewmats)
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
        near_plane=near,
        far_plane=far,
        backgrounds=None
        if background is None
        else torch.as_tensor(background).to(splats.means).expand(len(several), -1),
        render_mode=render_mode,
        backend=backend,
        **shape,
    )
    return (made[0], alphas[0]) if isinstance(cameras, Camera) else (made, alphas)


@torch.no_grad()
def planes(means: Tensor, viewmats: Tensor) -> tuple[float, float]:
    """Return how near and how far cameras see, in the scene's unit: gsplat's planes, or wider for tiny and vast scenes.

    A thousandth of the way from the nearest camera to the middle of the splats is near enough.
    """
    if not len(means):
        return NEAR, FAR
    middle = means[:: -(-len(means) // SAMPLED)].median(0).values
    away = (viewmats[:, :3, :3] @ middle + viewmats[:, :3, 3]).norm(dim=1)
    return min(NEAR, max(1e-3 * float(away.min()), 1e-30)), max(FAR, 1e3 * float(away.max()))


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


def with_covariances(splats: SplatState) -> SplatState:
    """Return the same splats by their covariances, in place of scales and quaternions."""
    kept = {name: splats[name] for name in ("means", "opacities", "harmonics")}
    made: dict[str, Any] = {**kept, "covars": covariances(splats.quats, splats.scales)}
    return SplatState(**made, batch=splats.batch, active=splats.active)


@torch.no_grad()
def decomposed(splats: SplatState, like: SplatState | None = None) -> SplatState:
    """Return the same splats by quaternions and scales, in place of covariances; itself where it has none.

    A splat's axes may be named and pointed in many ways: they are those nearest to its axes in `like`, such as the
    frame before, or to the axes of space. Where its variances agree, and any axes would do, they are those of `like`.

    Raises:
        ValueError: the splats have no shape, a covariance is not finite, or `like` has another number of splats.
    """
    if "covars" not in splats:
        if "quats" not in splats or "scales" not in splats:
            raise ValueError("Splats have covars, or quats and scales; these have neither. Give them a shape.")
        return splats
    wrong = ~splats.covars.isfinite().flatten(1).all(1)
    if bool(wrong.any()):
        raise ValueError(f"The covariance of splat {int(wrong.int().argmax())} is not finite; take the splat out.")
    if like is not None and len(like) != len(splats):
        raise ValueError(f"decomposed needs a like of as many splats, {len(splats)}; it has {len(like)}.")
    known = None if like is None else decomposed(like).quats.to(splats.covars).double()
    covars = splats.covars.double()
    covars = (covars + covars.transpose(1, 2)) / 2
    before = torch.eye(3).to(covars).expand_as(covars) if known is None else rotations(known)
    # So slight a difference along the axes of before decides only where the splat's own variances do not.
    largest = covars.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-300)
    hint = before * covars.new_tensor([-0.5 * ALIKE, 0.0, 0.5 * ALIKE]) @ before.transpose(1, 2)
    axes = torch.linalg.eigh(covars / largest[:, None, None] + hint)[1]
    axes = axes * torch.linalg.det(axes).sign()[:, None, None]
    ways = quarter_turns().to(axes)
    nearest = torch.einsum("nji,njk,wki->nw", before, axes, ways).argmax(1)
    axes = axes @ ways[nearest]
    quats = quaternion(axes)
    if known is not None:
        quats = torch.where((quats * known).sum(1, keepdim=True) < 0, -quats, quats)
    variances = (axes * (covars @ axes)).sum(1).clamp(min=0)
    kept: dict[str, Any] = {name: splats[name] for name in ("means", "opacities", "harmonics")}
    kept |= {"quats": quats.to(splats.means), "scales": variances.sqrt().to(splats.means)}
    return SplatState(**kept, batch=splats.batch, active=splats.active)


@cache
def quarter_turns() -> Tensor:
    """Return the rotations [24, 3, 3] that take the axes of space to each other."""
    eye = torch.eye(3, dtype=torch.float64)
    flips = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 3)
    found = torch.stack([eye[list(order)] * signs for order in permutations(range(3)) for signs in flips])
    return found[torch.linalg.det(found) > 0]


def splats_of(values: Mapping[str, np.ndarray[Any, Any]], where: str) -> SplatState:
    """Return a state of arrays as a file holds them: `quats` of any length but 0, all rounded to float32.

    Raises:
        ValueError: there is no splat, or one has NaN, infinity, a zero quaternion, a negative scale or an opacity that
            is not 0 to 1. The sentence begins with `where`.
    """
    found = {name: np.asarray(value) for name, value in values.items()}
    if not len(found["means"]):
        raise ValueError(f"{where} holds no splat; give another file.")
    with np.errstate(all="ignore"):
        largest = np.abs(found["quats"]).max(1, keepdims=True).astype(np.float64)
        quats = found["quats"] / np.where(largest > 0, largest, 1)
        found["quats"] = quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1)
        found = {name: np.array(value, dtype=np.float32) for name, value in found.items()}
    for name, value in found.items():
        wrong = ~np.isfinite(value).reshape(len(value), -1).all(1)
        if wrong.any():
            raise ValueError(f"{where}: {name} of splat {int(wrong.argmax())} are not finite; take it out.")
    faults = {
        "the quaternion of splat {} is zero": (found["quats"] == 0).all(1),
        "a scale of splat {} is negative": (found["scales"] < 0).any(1),
        "the opacity of splat {} is not 0 to 1": (found["opacities"] < 0) | (found["opacities"] > 1),
    }
    for fault, wrong in faults.items():
        if wrong.any():
            raise ValueError(f"{where}: {fault.format(int(wrong.argmax()))}; take the splat out.")
    made: dict[str, Any] = {name: torch.from_numpy(value) for name, value in found.items()}
    return SplatState(**made)
