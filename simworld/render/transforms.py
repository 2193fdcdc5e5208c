"""transforms.json: posed photographs as Blender's NeRF scenes, nerfstudio and instant-ngp describe them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.render.files import read_cloud
from simworld.render.shots import LENS, Album, Shot, inside

SPLITS = ("train", "val", "test")
ENDINGS = (".png", ".jpg", ".jpeg")  # tried in turn where a name has none
STRAIGHT = ("PERSPECTIVE", "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
"""Values of `camera_model` that are a pinhole behind a lens of the coefficients in `LENS`."""
BENT = ("is_fisheye", "latlong", "equirectangular", "ftheta_p0")
FLIP = (1.0, -1.0, -1.0, 1.0)
"""Axes of cameras in OpenGL, y up and z backwards, in those of OpenCV."""


def read_transforms(file: Path) -> Album:
    """Return the photographs that a transforms.json describes, in its order, and its points if their file is there.

    Depths and masks are left out.

    Raises:
        ValueError: the file is no JSON, a value is missing or of another type, or a path leaves the scene's folder.
    """
    try:
        told = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); copy or write it again.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{file} must hold a JSON object with frames; got {_short(told)}.")
    frames = told.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{file}: frames must be a list of photographs, one or more; got {_short(frames)}.")
    shots = [_shot(file, number, frame, told) for number, frame in enumerate(frames)]
    splits = {split: _listed(file, f"{split}_filenames", told) for split in SPLITS if f"{split}_filenames" in told}
    points, colors = None, None
    if told.get("ply_file_path") is not None:
        cloud = inside(file.parent, _text(told, "ply_file_path", str(file)), str(file))[1]
        points, colors = read_cloud(cloud) if os.path.isfile(cloud) else (None, None)
    return Album(shots=shots, splits=splits, points=points, colors=colors)


def _shot(file: Path, number: int, frame: Any, told: dict[str, Any]) -> Shot:
    origin = f"{file}, frame {number}"
    if not isinstance(frame, dict):
        raise ValueError(f"{origin} must be an object with file_path and transform_matrix; got {_short(frame)}.")
    both = {**told, **{key: value for key, value in frame.items() if value is not None}}
    model = both.get("camera_model") or "PERSPECTIVE"
    bent = [key for key in BENT if both.get(key)]
    if model not in STRAIGHT or bent:
        raise ValueError(
            f"{origin}: photographs by the camera {bent[0] if bent else _short(model)} cannot be undistorted; "
            f"camera_model may be {', '.join(STRAIGHT)}. Undistort them first."
        )
    name, path = inside(file.parent, _text(frame, "file_path", origin), origin)
    if not os.path.isfile(path):  # unlike Path.is_file, false for names that are too long
        path = next((p for p in (path.with_name(path.name + end) for end in ENDINGS) if os.path.isfile(p)), path)
    sides = [_number(both, key, origin) for key in ("w", "h") if both.get(key) is not None]
    if len(sides) == 1 or any(side != round(side) for side in sides):
        raise ValueError(f"{origin} needs both w and h, in whole pixels, or neither; got {sides}.")
    return Shot(
        name=name,
        file=path,
        origin=origin,
        viewmat=_world_to_camera(frame, origin),
        size=(round(sides[0]), round(sides[1])) if sides else None,
        lens={key: _number(both, key, origin) for key in LENS if both.get(key) is not None},
    )


def _world_to_camera(frame: dict[str, Any], origin: str) -> Tensor:
    """Return the viewmat [4, 4] float64 of a frame's transform_matrix, camera to world with OpenGL's axes."""
    rows = frame.get("transform_matrix")
    whole = isinstance(rows, list) and len(rows) in (3, 4)
    if not whole or not all(isinstance(r, list) and len(r) == 4 and all(map(_is_number, r)) for r in rows):  # type: ignore[union-attr]
        raise ValueError(f"{origin}: transform_matrix must be 4 rows of 4 finite numbers; got {_short(rows)}.")
    camera_to_world = torch.eye(4, dtype=torch.float64)
    camera_to_world[: len(rows)] = torch.tensor(rows, dtype=torch.float64)  # type: ignore[arg-type]
    if not torch.allclose(camera_to_world[3], torch.eye(4, dtype=torch.float64)[3], atol=1e-6):
        raise ValueError(f"{origin}: the last row of transform_matrix must be 0, 0, 0, 1; got {_short(rows)}.")
    inverse: Tensor
    inverse, failed = torch.linalg.inv_ex(camera_to_world * torch.tensor(FLIP, dtype=torch.float64))
    if failed:
        raise ValueError(f"{origin}: transform_matrix must turn and shift; it has no inverse.")
    return inverse


def _listed(file: Path, key: str, told: dict[str, Any]) -> frozenset[str]:
    names = told[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: {key} must be a list of file_paths; got {_short(names)}.")
    return frozenset(inside(file.parent, name, f"{file}, {key},")[0] for name in names)


def _text(entry: dict[str, Any], key: str, origin: str) -> str:
    if not isinstance(entry.get(key), str) or not entry[key]:
        raise ValueError(f"{origin}: {key} must be the path of a file; got {_short(entry.get(key))}.")
    return str(entry[key])


def _number(entry: dict[str, Any], key: str, origin: str) -> float:
    if not _is_number(entry[key]):
        raise ValueError(f"{origin}: {key} must be a finite number; got {_short(entry[key])}.")
    return float(entry[key])


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _short(value: Any) -> str:
    """Return a value as an error can show it."""
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
