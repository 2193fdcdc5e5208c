"""Splats in space onto pictures: projected and composited by `kernels`, after gsplat's names and rules."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kernels.projection import Lens, covariances, of_each, project
from simworld.kernels.splats import Projected, composite
from simworld.render.harmonics import FLAT, evaluate_harmonics

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
RasterizeMode = Literal["classic", "antialiased"]
NEAR, FAR = 0.01, 1e10  # planes, in the unit of means: gsplat's


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = NEAR,
    far_plane: float = FAR,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: RenderMode = "RGB",
    rasterize_mode: RasterizeMode = "classic",
    covars: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return pictures [c, h, w, x] of splats, their opacities [c, h, w, 1], and what was projected.

    `means` [n, 3]; `quats` [n, 4] (w, x, y, z), of any length but 0, and `scales` [n, 3], or in their stead `covars`
    [n, 3, 3]; `opacities` [n] in 0 to 1; `colors` [n, d], any number of channels, or [n, k, 3] harmonics where
    `sh_degree` is given. `viewmats` [c, 4, 4] are world to camera, `Ks` [c, 3, 3] in pixels (see `Camera`). Nearer than
    `near_plane`, beyond `far_plane`, or reaching no farther than `radius_clip` pixels, splats are left out; `eps2d`
    [pixels^2] widens all. Mode "D" is the depth along the view, "ED" that of what is seen, "RGB+D" both.
    "antialiased" takes from the opacity what `eps2d` adds in area. `backgrounds` [c, x] shows through. `backend` is
    `composite`'s, or "gsplat": all is left to that package, on CUDA. Names and rules are those of gsplat 1.5.3;
    differentiable in all tensors but `Ks`.

    Raises:
        ValueError: shapes do not fit, a choice is not among those named, or gsplat is asked for without CUDA.
        ImportError: gsplat is asked for and not there.
    """
    _check(means, quats, scales, opacities, colors, viewmats, Ks, covars, sh_degree, render_mode, rasterize_mode)
    if backend == "gsplat":
        given = (means, quats, scales, opacities, colors, viewmats, Ks, width, height)
        planes: dict[str, Any] = {"near_plane": near_plane, "far_plane": far_plane, "eps2d": eps2d}
        modes: dict[str, Any] = {"sh_degree": sh_degree, "render_mode": render_mode, "rasterize_mode": rasterize_mode}
        shapes: dict[str, Any] = {"covars": covars, "backgrounds": backgrounds, "radius_clip": radius_clip}
        return _by_gsplat(given, {**planes, **modes, **shapes})
    if covars is None:
        assert quats is not None
        assert scales is not None
        covars = covariances(quats, scales, backend=backend)
    lens = Lens(
        viewmats=viewmats,
        Ks=Ks,
        width=width,
        height=height,
        near=near_plane,
        far=far_plane,
        clip=radius_clip,
        widened=eps2d,
        antialiased=rasterize_mode == "antialiased",
    )
    flat = project(means, covars, opacities, lens, backend=backend)
    shown = _shades(colors, means, flat.rows, of_each(viewmats, flat.pictures), sh_degree)
    if render_mode != "RGB":
        depths = flat.depths[:, None]
        shown = depths if render_mode in ("D", "ED") else torch.cat([shown, depths], 1)
    splats = Projected(
        means=flat.means,
        conics=flat.conics,
        opacities=flat.opacities,
        colors=shown,
        radii=flat.radii,
        pictures=flat.pictures,
        num_pictures=len(viewmats),
        width=width,
        height=height,
    )
    made, alphas = composite(splats, backend=backend)
    if render_mode in ("ED", "RGB+ED"):
        made = torch.cat([made[..., :-1], made[..., -1:] / alphas.clamp(min=1e-10)], -1)
    if backgrounds is not None:
        made = torch.addcmul(made, 1 - alphas, _behind(backgrounds, made, render_mode))
    told = {"gaussian_ids": flat.rows, "camera_ids": flat.pictures, "means2d": flat.means, "radii": flat.radii}
    return made, alphas, {**told, "depths": flat.depths, "conics": flat.conics, "opacities": flat.opacities}


def _behind(backgrounds: Tensor, made: Tensor, render_mode: RenderMode) -> Tensor:
    """Return what is behind each channel [c, 1, 1, x] of pictures [c, h, w, x]; of depths, as in gsplat, 0."""
    if render_mode in ("RGB+D", "RGB+ED") and backgrounds.shape[-1] + 1 == made.shape[-1]:
        backgrounds = torch.nn.functional.pad(backgrounds, (0, 1))
    if backgrounds.shape != (len(made), made.shape[-1]):
        raise ValueError(
            f"backgrounds must be [{len(made)}, {made.shape[-1]}], a value for each channel; got "
            f"{list(backgrounds.shape)}."
        )
    return backgrounds[:, None, None]


def _by_gsplat(given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    if given[0].device.type != "cuda":
        raise ValueError(f"gsplat renders on CUDA alone; these splats are on {given[0].device}. Leave backend out.")
    gsplat = needed("gsplat", "The gsplat backend", "render")
    found: tuple[Tensor, Tensor, dict[str, Any]] = gsplat.rasterization(*given, **options)
    return found


def _shades(colors: Tensor, means: Tensor, rows: Tensor, viewmats: Tensor, sh_degree: int | None) -> Tensor:
    """Return the colours [m, d] of splats as their cameras see them."""
    if sh_degree is None:
        return colors[rows]
    if sh_degree == 0:  # the same from everywhere
        return (FLAT * colors[rows, 0] + 0.5).clamp(min=0.0)
    places = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    return (evaluate_harmonics(colors[rows], means[rows] - places, sh_degree) + 0.5).clamp(min=0.0)


def _check(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    covars: Tensor | None,
    sh_degree: int | None,
    render_mode: str,
    rasterize_mode: str,
) -> None:
    count, cameras = len(means), len(viewmats)
    wanted: dict[str, tuple[Tensor | None, list[int | None]]] = {
        "means": (means, [count, 3]),
        "opacities": (opacities, [count]),
        "colors": (colors, [count, None] if sh_degree is None else [count, None, 3]),
        "viewmats": (viewmats, [cameras, 4, 4]),
        "Ks": (Ks, [cameras, 3, 3]),
    }
    wanted |= (
        {"covars": (covars, [count, 3, 3])}
        if covars is not None
        else {
            "quats": (quats, [count, 4]),
            "scales": (scales, [count, 3]),
        }
    )
    for name, (value, shape) in wanted.items():
        got = None if value is None else list(value.shape)
        if got is None or len(got) != len(shape) or any(w not in (None, g) for g, w in zip(got, shape, strict=True)):
            said = ["any" if size is None else size for size in shape]
            raise ValueError(f"rasterization takes {name} of shape {said}; got {got}.")
    if render_mode not in get_args(RenderMode) or rasterize_mode not in get_args(RasterizeMode):
        raise ValueError(
            f"render_mode must be one of {', '.join(get_args(RenderMode))} and rasterize_mode one of "
            f"{', '.join(get_args(RasterizeMode))}; got {render_mode!r} and {rasterize_mode!r}."
        )
