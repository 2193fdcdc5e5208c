"""Photographs with the cameras that took them, as Blender, nerfstudio, instant-ngp and COLMAP leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simworld.render.camera import Camera

MOST_ROUNDS, FEW, ENOUGH = 20, 100, 0.95  # of drawing points; how many will do; the share of silhouettes they are in


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Photographs of one scene: `images` uint8 [h, w, 3] or, with opacities, [h, w, 4], a camera and a name for each.

    `points` [p, 3] in the scene's unit, with `colors` [p, 3] in 0 to 1, where the structure of the scene is known.
    Colours of images with opacities are not multiplied by them.

    Raises:
        ValueError: images, cameras and names differ in number, or an image is not of its camera's size.
    """

    images: tuple[Tensor, ...]
    cameras: tuple[Camera, ...]
    names: tuple[str, ...]
    points: Tensor | None = None
    colors: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.cameras) == len(self.names):
            raise ValueError(
                f"Photos need a camera and a name for each image; got {len(self.images)} images, {len(self.cameras)} "
                f"cameras and {len(self.names)} names."
            )
        for image, camera, name in zip(self.images, self.cameras, self.names, strict=True):
            size = (camera.height, camera.width)
            wrong = image.ndim != 3 or image.shape[:2] != size or image.shape[-1] not in (3, 4)
            if wrong or image.dtype != torch.uint8:
                raise ValueError(
                    f"The image {name} must be uint8 [{size[0]}, {size[1]}, 3 or 4], as its camera's; got "
                    f"{image.dtype} {list(image.shape)}. Resize it, or give the camera of that size."
                )

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int, background: Tensor) -> Tensor:
        """Return an image as floats [h, w, 3] in 0 to 1, before a `background` [3] where it has opacities."""
        image = self.images[index].to(background) / 255
        if image.shape[-1] == 3:
            return image
        return image[..., :3] * image[..., 3:] + background * (1 - image[..., 3:])

    def chosen(self, rows: list[int]) -> Photos:
        """Return the photographs of these numbers."""
        kept = {name: tuple(getattr(self, name)[row] for row in rows) for name in ("images", "cameras", "names")}
        return replace(self, **kept)  # type: ignore[arg-type]


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
