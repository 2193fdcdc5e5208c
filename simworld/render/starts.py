"""Where a fit to photographs begins: points, and the sphere that cameras look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simworld.render.camera import Camera
from simworld.render.photos import Photos

MOST_ROUNDS, FEW, ENOUGH = 20, 100, 0.95  # of drawing points; how many will do; the share of silhouettes they are in


def starting_points(photos: Photos, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points [n, 3] from which a fit can begin, and their colours [n, 3].

    The known points, as many as are wanted; else random ones in the sphere that all cameras see, those within the
    silhouettes where photographs have opacities.
    """
    generator = torch.Generator().manual_seed(seed)
    if photos.points is not None and photos.colors is not None:
        rows = torch.randperm(len(photos.points), generator=generator)[:count]
        return photos.points[rows], photos.colors[rows]
    centre, radius = seen_sphere(photos.cameras)
    cut = any(image.shape[-1] == 4 for image in photos.images)
    inside = torch.zeros(0, 3)
    for _ in range(MOST_ROUNDS):
        more = centre + radius * (2 * torch.rand(4 * count, 3, generator=generator) - 1)
        more = more[(more - centre).norm(dim=1) < radius]
        inside = torch.cat([inside, more[_in_silhouettes(photos, more)] if cut else more])
        if len(inside) >= count:
            break
    points = inside[:count] if len(inside) >= min(count, FEW) else more[:count]
    return points, torch.full_like(points, 0.5)


def seen_sphere(cameras: Sequence[Camera]) -> tuple[Tensor, float]:
    """Return the point [3] that is nearest to all lines of view, and how far about it pictures reach, typically."""
    places = torch.stack([camera.position for camera in cameras]).double()
    ahead = torch.stack([camera.viewmat[2, :3] for camera in cameras]).double()
    across = torch.eye(3, dtype=torch.float64) - ahead[:, :, None] * ahead[:, None]
    # A little weight on the places themselves decides where lines of view are parallel.
    whole = across.sum(0) + 1e-6 * torch.eye(3, dtype=torch.float64)
    centre = torch.linalg.solve(whole, (across @ places[..., None]).sum(0)[:, 0] + 1e-6 * places.mean(0))
    wide = torch.stack([min(c.width / c.K[0, 0], c.height / c.K[1, 1]) / 2 for c in cameras]).double()
    reach = ((centre - places) * ahead).sum(1).clamp(min=0) * wide
    radius = float(reach.median())
    return centre.float(), radius if radius > 0 else 1.0


def _in_silhouettes(photos: Photos, points: Tensor) -> Tensor:
    """Return which points [n] are opaque in all but one in twenty of the photographs on which they are."""
    opaque, shown = torch.zeros(len(points)), torch.zeros(len(points))
    for image, camera in zip(photos.images, photos.cameras, strict=True):
        if image.shape[-1] != 4:
            continue
        away = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        x, y = ((away @ camera.K.T)[:, :2] / away[:, 2:].clamp(min=1e-6)).unbind(1)
        on = (away[:, 2] > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
        rows = on.nonzero()[:, 0]
        shown[rows] += 1
        opaque[rows] += (image[y[rows].long(), x[rows].long(), 3] > 0).float()
    return (shown > 0) & (opaque >= ENOUGH * shown)
