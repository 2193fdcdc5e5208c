"""Photographs with the cameras that took them, as Blender, nerfstudio, instant-ngp and COLMAP leave them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simworld.render.camera import Camera


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
