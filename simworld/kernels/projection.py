"""Splats in space onto pictures, before they are composited: the PyTorch definition, and which version takes it.

A splat's covariance is carried onto its picture by the projection linearized at its place (Zwicker et al. 2001, as in
3D Gaussian splatting, Kerbl et al. 2023), with gsplat's rules for what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simworld.kernels.splats import LEAST_OPAQUE
from simworld.quaternions import rotations

FARTHEST = 3.33  # standard deviations at which a splat as opaque as can be has faded to 1/255
MARGIN = 0.3  # of the field of view, to each side, beyond which the projection is not linearized


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What cameras see: `viewmats` [c, 4, 4] world to camera, `Ks` [c, 3, 3] in pixels, and gsplat's options.

    Planes `near` and `far` in the unit of means, `clip` [pixels] the reach up to which splats are left out, `widened`
    [pixels^2] what is added to covariances on both axes.
    """

    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int
    near: float
    far: float
    clip: float
    widened: float
    antialiased: bool


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Splats on pictures, sorted by picture, then front to back; those that no picture shows are left out.

    `means` [m, 2] in pixels, `conics` [m, 3] (xx, xy, yy of the inverse covariance), `opacities` [m], `depths` [m],
    `radii` [m, 2] in whole pixels, without gradient; `pictures` and `rows` [m] say where and which.
    """

    means: Tensor
    conics: Tensor
    opacities: Tensor
    depths: Tensor
    radii: Tensor
    pictures: Tensor
    rows: Tensor


def project(means: Tensor, covars: Tensor, opacities: Tensor, lens: Lens, *, backend: str | None = None) -> Flat:
    """Return splats of `means` [n, 3], `covars` [n, 3, 3] and `opacities` [n] on the pictures of a lens.

    `backend` as in `splats.composite`; where cameras ask for gradients it is the definition.

    Raises:
        ValueError: a splat's place or shape is NaN, or there are not as many of each.
    """
    if not len(means) == len(covars) == len(opacities):
        raise ValueError(
            f"Splats have as many means, covars and opacities; got {[*map(len, (means, covars, opacities))]}."
        )
    if _compiled(means, backend) and not lens.viewmats.requires_grad:
        from simworld.kernels.projection_warp import project_compiled

        return project_compiled(means, covars, opacities, lens)
    return project_reference(means, covars, opacities, lens)


def covariances(quats: Tensor, scales: Tensor, *, backend: str | None = None) -> Tensor:
    """Return R diag(scales)^2 R^T [n, 3, 3] of `quats` [n, 4] (w, x, y, z; any length but 0) and `scales` [n, 3]."""
    if _compiled(scales, backend) and quats.dtype == torch.float32 and len(quats) == len(scales):
        from simworld.kernels.projection_warp import covariances_compiled

        return covariances_compiled(quats, scales)
    sides = rotations(quats) * scales[:, None]
    return sides @ sides.transpose(1, 2)


def _compiled(values: Tensor, backend: str | None) -> bool:
    return backend != "torch" and values.dtype == torch.float32


def project_reference(means: Tensor, covars: Tensor, opacities: Tensor, lens: Lens) -> Flat:
    """Define `project`: all splats before each camera, one formula after the other."""
    pictures, rows, here = _in_sight(means, lens)
    (centres, spread), depths = _linearized(here, covars[rows], pictures, lens)
    plain = _det(spread)
    spread = spread + spread.new_tensor([lens.widened, 0.0, lens.widened])
    area = _det(spread)
    refuse_nan(torch.isnan(area.detach()), rows)
    faint = opacities[rows]
    if lens.antialiased:
        faint = faint * (plain / area).clamp(min=0).sqrt()
    radii = _reach(spread.detach(), faint.detach())
    kept = (_on_picture(centres.detach(), radii, lens) & (area.detach() > 0)).nonzero()[:, 0]
    kept = kept[torch.argsort(depths.detach()[kept], stable=True)]
    if len(lens.viewmats) > 1:
        kept = kept[torch.argsort(pictures[kept], stable=True)]
    conics = torch.stack([spread[:, 2], -spread[:, 1], spread[:, 0]], 1) / area[:, None]
    return Flat(
        means=centres[kept],
        conics=conics[kept],
        opacities=faint[kept],
        depths=depths[kept],
        radii=radii[kept],
        pictures=pictures[kept],
        rows=rows[kept],
    )


def refuse_nan(wrong: Tensor, rows: Tensor | None = None) -> None:
    """Raise a ValueError that names the first splat that is `wrong` [m], of all or of the splats `rows` [m]."""
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        first = first if rows is None else int(rows[first])
        raise ValueError(f"Splat {first} has a place or shape that is NaN; take it out, or find its cause.")


def _in_sight(means: Tensor, lens: Lens) -> tuple[Tensor, Tensor, Tensor]:
    """Return picture and splat of each pair [m] between the planes, and where the splat is from the camera [m, 3]."""
    away = means @ lens.viewmats[:, :3, :3].transpose(1, 2) + lens.viewmats[:, None, :3, 3]
    pictures, rows = ((away[..., 2] > lens.near) & (away[..., 2] < lens.far)).nonzero().unbind(1)
    return pictures, rows, away[pictures, rows]


def of_each(matrices: Tensor, pictures: Tensor) -> Tensor:
    """Return the matrices of each splat's picture; of a single picture its own, which fits all."""
    return matrices if len(matrices) == 1 else matrices[pictures]


def _linearized(here: Tensor, covars: Tensor, pictures: Tensor, lens: Lens) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return where splats are on their pictures [m, 2], their covariance there [m, 3] (xx, xy, yy), and depths [m]."""
    Ks, turns = of_each(lens.Ks, pictures), of_each(lens.viewmats, pictures)[:, :3, :3]
    x, y, z = here.unbind(1)
    fx, fy, cx, cy = Ks[:, 0, 0], Ks[:, 1, 1], Ks[:, 0, 2], Ks[:, 1, 2]
    centres = torch.stack([fx * x / z + cx, fy * y / z + cy], 1)
    # Far outside the picture the linearized projection would make giants of splats: it is taken nearer by.
    aside, below = MARGIN * 0.5 * lens.width / fx, MARGIN * 0.5 * lens.height / fy
    tx = z * torch.minimum(torch.maximum(x / z, -cx / fx - aside), (lens.width - cx) / fx + aside)
    ty = z * torch.minimum(torch.maximum(y / z, -cy / fy - below), (lens.height - cy) / fy + below)
    none = torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, none, -fx * tx / z**2], 1), torch.stack([none, fy / z, -fy * ty / z**2], 1)], 1
    )
    onto = jacobian @ (turns[0] if len(turns) == 1 else turns)
    spread = onto @ covars @ onto.transpose(1, 2)
    return (centres, torch.stack([spread[:, 0, 0], spread[:, 0, 1], spread[:, 1, 1]], 1)), z


def _det(spread: Tensor) -> Tensor:
    return spread[:, 0] * spread[:, 2] - spread[:, 1] ** 2


def _reach(spread: Tensor, opacities: Tensor) -> Tensor:
    """Return how far [m, 2] splats reach across and down, in whole pixels, before they fade to 1/255."""
    far = (2 * torch.log((opacities / LEAST_OPAQUE).clamp(min=1.0))).sqrt().clamp(max=FARTHEST)
    return (far[:, None] * spread[:, ::2].clamp(min=0).sqrt()).ceil()


def _on_picture(centres: Tensor, radii: Tensor, lens: Lens) -> Tensor:
    size = centres.new_tensor([lens.width, lens.height])
    return ((radii > 0) & (centres + radii > 0) & (centres - radii < size)).all(1) & (radii > lens.clip).any(1)
