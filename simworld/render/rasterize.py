"""Splats in space onto pictures: projected in PyTorch, composited by `kernels.splats`; gsplat's names and rules."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kernels.splats import LEAST_OPAQUE, Projected, composite
from simworld.quaternions import rotations
from simworld.render.harmonics import evaluate_harmonics

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
RasterizeMode = Literal["classic", "antialiased"]
NEAR, FAR = 0.01, 1e10  # planes, in the unit of means: gsplat's
FARTHEST = 3.33  # standard deviations at which a splat as opaque as can be has faded to 1/255
MARGIN = 0.3  # of the field of view, to each side, beyond which the projection is not linearized


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
    covars = covariances(quats, scales) if covars is None else covars
    count = len(viewmats)
    pictures, rows, here = _in_sight(means, viewmats, near_plane, far_plane)
    flat, depths = _project(here, covars[rows], _of_each(viewmats, pictures), _of_each(Ks, pictures), width, height)
    centres, spread = flat
    plain = _det(spread)
    spread = spread + spread.new_tensor([eps2d, 0.0, eps2d])
    area = _det(spread)
    _refuse_nan(area.detach(), rows)
    faint = opacities[rows]
    if rasterize_mode == "antialiased":
        faint = faint * (plain / area).clamp(min=0).sqrt()
    radii = _reach(spread.detach(), faint.detach())
    kept = _on_picture(centres.detach(), radii, width, height, radius_clip) & (area.detach() > 0)
    kept = kept.nonzero()[:, 0]
    kept = kept[torch.argsort(depths.detach()[kept], stable=True)]
    if count > 1:
        kept = kept[torch.argsort(pictures[kept], stable=True)]
    conics = torch.stack([spread[:, 2], -spread[:, 1], spread[:, 0]], 1) / area[:, None]
    shown = _shades(colors, means, rows[kept], _of_each(viewmats, pictures[kept]), sh_degree)
    if render_mode != "RGB":
        shown = depths[kept, None] if render_mode in ("D", "ED") else torch.cat([shown, depths[kept, None]], 1)
    splats = Projected(
        means=centres[kept],
        conics=conics[kept],
        opacities=faint[kept],
        colors=shown,
        radii=radii[kept],
        pictures=pictures[kept],
        num_pictures=count,
        width=width,
        height=height,
    )
    made, alphas = composite(splats, backend=backend)
    if render_mode in ("ED", "RGB+ED"):
        made = torch.cat([made[..., :-1], made[..., -1:] / alphas.clamp(min=1e-10)], -1)
    if backgrounds is not None:
        made = made + (1 - alphas) * _behind(backgrounds, made, render_mode)
    told = {"gaussian_ids": rows[kept], "camera_ids": pictures[kept], "means2d": splats.means, "radii": radii[kept]}
    return made, alphas, {**told, "depths": depths[kept], "conics": splats.conics, "opacities": splats.opacities}


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


def _refuse_nan(area: Tensor, rows: Tensor) -> None:
    if bool(torch.isnan(area).any()):
        wrong = int(rows[torch.isnan(area).nonzero()[0, 0]])
        raise ValueError(f"Splat {wrong} has a place or shape that is NaN; take it out, or find its cause.")


def _by_gsplat(given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    if given[0].device.type != "cuda":
        raise ValueError(f"gsplat renders on CUDA alone; these splats are on {given[0].device}. Leave backend out.")
    gsplat = needed("gsplat", "The gsplat backend", "render")
    found: tuple[Tensor, Tensor, dict[str, Any]] = gsplat.rasterization(*given, **options)
    return found


def covariances(quats: Tensor | None, scales: Tensor | None) -> Tensor:
    """Return R diag(scales)^2 R^T [n, 3, 3] of `quats` [n, 4] (w, x, y, z; any length but 0) and `scales` [n, 3]."""
    assert quats is not None
    assert scales is not None
    sides = rotations(quats) * scales[:, None]
    return sides @ sides.transpose(1, 2)


def _in_sight(means: Tensor, viewmats: Tensor, near: float, far: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return picture and splat of each pair [m] between the planes, and where the splat is from the camera [m, 3]."""
    away = means @ viewmats[:, :3, :3].transpose(1, 2) + viewmats[:, None, :3, 3]
    pictures, rows = ((away[..., 2] > near) & (away[..., 2] < far)).nonzero().unbind(1)
    return pictures, rows, away[pictures, rows]


def _of_each(matrices: Tensor, pictures: Tensor) -> Tensor:
    """Return the matrices of each splat's picture; of a single picture its own, which fits all."""
    return matrices if len(matrices) == 1 else matrices[pictures]


def _project(
    here: Tensor, covars: Tensor, viewmats: Tensor, Ks: Tensor, width: int, height: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return where splats are on their pictures [m, 2], their covariance there [m, 3] (xx, xy, yy), and depths [m]."""
    x, y, z = here.unbind(1)
    fx, fy, cx, cy = Ks[:, 0, 0], Ks[:, 1, 1], Ks[:, 0, 2], Ks[:, 1, 2]
    centres = torch.stack([fx * x / z + cx, fy * y / z + cy], 1)
    # Far outside the picture the linearized projection would make giants of splats: it is taken nearer by.
    aside, below = MARGIN * 0.5 * width / fx, MARGIN * 0.5 * height / fy
    tx = z * torch.minimum(torch.maximum(x / z, -cx / fx - aside), (width - cx) / fx + aside)
    ty = z * torch.minimum(torch.maximum(y / z, -cy / fy - below), (height - cy) / fy + below)
    none = torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, none, -fx * tx / z**2], 1), torch.stack([none, fy / z, -fy * ty / z**2], 1)], 1
    )
    turns = viewmats[:, :3, :3]
    onto = jacobian @ (turns[0] if len(turns) == 1 else turns)
    spread = onto @ covars @ onto.transpose(1, 2)
    return (centres, torch.stack([spread[:, 0, 0], spread[:, 0, 1], spread[:, 1, 1]], 1)), z


def _det(spread: Tensor) -> Tensor:
    return spread[:, 0] * spread[:, 2] - spread[:, 1] ** 2


def _reach(spread: Tensor, opacities: Tensor) -> Tensor:
    """Return how far [m, 2] splats reach across and down, in whole pixels, before they fade to 1/255."""
    far = (2 * torch.log((opacities / LEAST_OPAQUE).clamp(min=1.0))).sqrt().clamp(max=FARTHEST)
    return (far[:, None] * spread[:, ::2].clamp(min=0).sqrt()).ceil()


def _on_picture(centres: Tensor, radii: Tensor, width: int, height: int, clip: float) -> Tensor:
    size = centres.new_tensor([width, height])
    return ((radii > 0) & (centres + radii > 0) & (centres - radii < size)).all(1) & (radii > clip).any(1)


def _shades(colors: Tensor, means: Tensor, rows: Tensor, viewmats: Tensor, sh_degree: int | None) -> Tensor:
    """Return the colours [m, d] of splats as their cameras see them."""
    if sh_degree is None:
        return colors[rows]
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
