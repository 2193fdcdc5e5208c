"""Photographs as files describe them, before they are read: which file, from where, through which lens."""

from __future__ import annotations

import math
import posixpath
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.render.camera import Camera

MOST_PIXELS = 2**28  # of a photograph
SAME_SHAPE = 0.01  # how far the quotient of sides may be from the one that is stated
BENDS = ("k1", "k2", "k3", "p1", "p2")
"""Coefficients of a lens's distortion that are undone: radial and tangential, as OpenCV and COLMAP number them."""
REFUSED_BENDS = ("k4", "k5", "k6")
LENS = ("fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", *BENDS, *REFUSED_BENDS)
"""What can be known of a lens; nerfstudio's names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shot:
    """A photograph that is not read yet: its `file`, the `viewmat` [4, 4] of its camera, and what is known of the lens.

    `name` tells it from others, `origin` says where it is described. The `lens` holds pixels of a picture of `size`
    (width, height), or of the picture as it is where `size` is None.
    """

    name: str
    file: Path
    origin: str
    viewmat: Tensor
    size: tuple[int, int] | None
    lens: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Album:
    """All photographs of a scene; the names in its `splits`, where they are listed; points [p, 3], colors [p, 3]."""

    shots: list[Shot]
    splits: Mapping[str, frozenset[str]] = field(default_factory=dict)
    points: Tensor | None = None
    colors: Tensor | None = None


def inside(folder: Path, named: str, origin: str) -> tuple[str, Path]:
    """Return the name, relative to a folder, and the path of a file that `origin` names.

    Raises:
        ValueError: the file lies outside of the folder.
    """
    name = posixpath.normpath(named.replace("\\", "/"))
    if PureWindowsPath(name).anchor or name.split("/")[0] == "..":
        raise ValueError(
            f"{origin} names '{named}', which leaves the scene's folder '{folder}'. Move the file into it, and name it "
            "from there."
        )
    return name, folder / name


def exposed(shot: Shot) -> tuple[Tensor, Camera]:
    """Return a photograph uint8 [h, w, 3 or 4], the lens's distortion undone, and the pinhole camera that takes it.

    Raises:
        ValueError: the file is no image, or of another shape than stated, or the camera or its lens is none of ours.
    """
    refused = [name for name in REFUSED_BENDS if shot.lens.get(name)]
    if refused:
        raise ValueError(
            f"{shot.origin}: distortion by {', '.join(refused)} cannot be undone, only by {', '.join(BENDS)}. "
            "Undistort the photographs first."
        )
    image = _read_image(shot.file)
    height, width = image.shape[:2]
    stated = shot.size or (width, height)
    if min(stated) < 1 or stated[0] * stated[1] > MOST_PIXELS:
        raise ValueError(
            f"{shot.origin}: a photograph has 1 to {MOST_PIXELS} pixels; got {stated[0]} x {stated[1]}. "
            "Correct its size."
        )
    try:
        K = _intrinsics(shot.lens, *stated)
        camera = Camera(viewmat=shot.viewmat.float(), K=K.float(), width=stated[0], height=stated[1])
    except ValueError as error:
        raise ValueError(f"{shot.origin}: {error}") from error
    if abs(width * stated[1] - height * stated[0]) > SAME_SHAPE * height * stated[0]:
        raise ValueError(
            f"{shot.origin}: '{shot.file}' must have the shape of {stated[0]} x {stated[1]} pixels; it has "
            f"{width} x {height}. Give the size it was calibrated at, or the photograph uncropped."
        )
    camera = camera.resized(width, height)
    bends = [shot.lens.get(name, 0.0) for name in BENDS]
    if any(bends):
        image = _straightened(image, camera, *bends, origin=shot.origin)
    return image, camera


def _intrinsics(lens: Mapping[str, float], width: int, height: int) -> Tensor:
    """Return K [3, 3] float64, of focal lengths, or else of angles of view."""
    focal = [lens.get("fl_x"), lens.get("fl_y")]
    for axis, (name, size) in enumerate((("camera_angle_x", width), ("camera_angle_y", height))):
        if focal[axis] is None and name in lens:
            if not 0 < lens[name] < math.pi:
                raise ValueError(f"{name} must be between 0 and pi, in radians; got {lens[name]:g}.")
            focal[axis] = 0.5 * size / math.tan(0.5 * lens[name])
    known = [length for length in focal if length is not None]
    if not known:
        raise ValueError("a camera needs fl_x in pixels, or camera_angle_x in radians; neither is given.")
    cx, cy = lens.get("cx", 0.5 * width), lens.get("cy", 0.5 * height)
    return torch.tensor([[known[0], 0, cx], [0, known[-1], cy], [0, 0, 1]], dtype=torch.float64)


def _read_image(file: Path) -> Tensor:
    """Return an image uint8 [h, w, 3], or [h, w, 4] where it has opacities."""
    pillow = needed("PIL.Image", "Reading photographs", "view", "pillow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        try:
            with pillow.open(file) as opened:
                return torch.from_numpy(_pixels(opened))
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, pillow.DecompressionBombError) as error:
            raise ValueError(f"'{file}' cannot be read as a photograph ({error}); copy or convert it again.") from error


def _pixels(opened: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if opened.width * opened.height > MOST_PIXELS:
        raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than {MOST_PIXELS}")
    if opened.mode[0] in "IF":
        raise ValueError(f"its channels must have 8 bits, its pixels are of Pillow's mode {opened.mode}")
    return np.array(opened.convert("RGBA" if opened.has_transparency_data else "RGB"))


def _straightened(
    image: Tensor, camera: Camera, k1: float, k2: float, k3: float, p1: float, p2: float, *, origin: str
) -> Tensor:
    """Return an image as the pinhole camera would have taken it (Brown-Conrady); beyond the edge, the edge's colours.

    Raises:
        ValueError: a straight line on the photograph would be seen twice.
    """
    height, width = image.shape[:2]
    fx, fy, cx, cy = (float(camera.K[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x = ((torch.arange(width) + 0.5 - cx) / fx)[None]
    y = ((torch.arange(height) + 0.5 - cy) / fy)[:, None]
    squared = x * x + y * y
    radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
    across = fx * (x * radial + 2 * p1 * x * y + p2 * (squared + 2 * x * x)) + cx
    down = fy * (y * radial + p1 * (squared + 2 * y * y) + 2 * p2 * x * y) + cy
    if not bool((across.diff(dim=1) > 0).all() and (down.diff(dim=0) > 0).all()):
        raise ValueError(
            f"{origin}: the distortion k1={k1:g}, k2={k2:g}, k3={k3:g}, p1={p1:g}, p2={p2:g} folds the picture over "
            "itself. Calibrate the camera again, or undistort the photographs first."
        )
    grid = torch.stack([2 * across / width - 1, 2 * down / height - 1], -1)
    seen = image.float()
    if image.shape[2] == 4:  # what is not there has no colour to mix in
        seen = torch.cat([seen[..., :3] * seen[..., 3:] / 255, seen[..., 3:]], -1)
    seen = torch.nn.functional.grid_sample(
        seen.permute(2, 0, 1)[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0].permute(1, 2, 0)
    if image.shape[2] == 4:
        seen = torch.cat([seen[..., :3] * 255 / seen[..., 3:].clamp(min=0.5), seen[..., 3:]], -1)
    return seen.round().clamp(0, 255).to(torch.uint8)
