"""COLMAP's sparse models: cameras, images and points3D, as .bin or as .txt."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simworld.quaternions import rotations
from simworld.render.shots import Album, Shot, inside

MODELS: dict[str, tuple[str, ...]] = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fl_x", "fl_y", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2"),
    "FULL_OPENCV": ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
}
"""Parameters of the cameras whose photographs can be undistorted."""
NUMBERED = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV", "FOV",
            "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE")  # fmt: skip
"""COLMAP's cameras, by their numbers in .bin."""
LONGEST_NAME = 2**12


class _Lens(NamedTuple):
    size: tuple[int, int]
    values: dict[str, float]


class _Pose(NamedTuple):
    name: str
    camera: int
    values: tuple[float, ...]  # quaternion (w, x, y, z) and shift, world to camera


def model_folder(folder: Path) -> Path | None:
    """Return where in a scene's folder COLMAP's model lies, if it has one."""
    places = (folder / "sparse/0", folder / "sparse", folder)
    return next((p for p in places if os.path.isfile(p / "cameras.bin") or os.path.isfile(p / "cameras.txt")), None)


def read_model(model: Path, images: Path) -> Album:
    """Return the photographs in `images` that a model describes, by name, and its points with their colours.

    Raises:
        ValueError: a file is missing or damaged, a camera is not among `MODELS`, or a name leaves the folder.
    """
    ending = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    binary = ending == ".bin"
    cameras, poses, points = (model / (name + ending) for name in ("cameras", "images", "points3D"))
    if not poses.is_file():
        raise ValueError(f"There is no file '{poses}' beside '{cameras}'; copy all of COLMAP's model.")
    lenses = _read_cameras(cameras) if binary else _parse_cameras(cameras)
    found = _read_images(poses) if binary else _parse_images(poses)
    shots = [_shot(poses, pose, lenses, images) for pose in sorted(found)]
    if not shots:
        raise ValueError(f"{poses} holds no photograph; register some with COLMAP first.")
    where, colors = None, None
    if points.is_file():
        where, colors = _cloud(points, _read_points(points) if binary else _parse_points(points))
    return Album(shots=shots, points=where, colors=colors)


def _shot(file: Path, pose: _Pose, lenses: dict[int, _Lens], images: Path) -> Shot:
    origin = f"{file}, image {pose.name}"
    if pose.camera not in lenses:
        raise ValueError(f"{origin} is by the camera {pose.camera}, which the model does not have; copy it again.")
    turn = torch.tensor(pose.values[:4], dtype=torch.float64)
    if not bool(torch.isfinite(turn).all()) or not 1e-6 < float(turn.norm()) < 1e6:
        raise ValueError(f"{origin} must be turned by a quaternion of length 1; got {turn.tolist()}. Take it out.")
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = rotations(turn), torch.tensor(pose.values[4:], dtype=torch.float64)
    name, path = inside(images, pose.name, origin)
    lens = lenses[pose.camera]
    return Shot(name=name, file=path, origin=origin, viewmat=viewmat, size=lens.size, lens=lens.values)


def _lens(file: Path, model: str, size: tuple[int, int], values: tuple[float, ...]) -> _Lens:
    names = MODELS[model]
    if len(values) != len(names) or not np.isfinite(values).all():
        raise ValueError(f"{file}: a camera {model} has {len(names)} finite parameters; got {list(values)[:16]}.")
    known = dict(zip(names, values, strict=True))
    return _Lens(size, {"fl_x": known.pop("f"), **known} if "f" in known else known)


def _checked(file: Path, model: str) -> str:
    if model not in MODELS:
        raise ValueError(
            f"{file}: photographs by the camera {model[:40]} cannot be undistorted, only by {', '.join(MODELS)}. "
            "Undistort them with COLMAP first."
        )
    return model


def _cloud(file: Path, rows: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Tensor | None, Tensor | None]:
    """Return points and colours in 0 to 1 of rows (x, y, z, red, green, blue)."""
    if not len(rows):
        return None, None
    both = torch.from_numpy(rows).float()
    wrong = ~torch.isfinite(both).all(1)
    if bool(wrong.any()):
        raise ValueError(f"{file}: point {int(wrong.byte().argmax())} is not finite; take it out.")
    return both[:, :3], (both[:, 3:] / 255).clamp(0, 1)


class _Records:
    """The records of a .bin, one after the other, never beyond its end."""

    def __init__(self, file: Path) -> None:
        self.file, self.raw, self.at = file, file.read_bytes(), 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the values of the next record."""
        start = self.at
        self.skip(layout.size)
        return layout.unpack_from(self.raw, start)

    def skip(self, size: int) -> None:
        """Go on by so many bytes."""
        if size > len(self.raw) - self.at:
            raise ValueError(f"{self.file} ends within a record, at {len(self.raw)} bytes; copy it again.")
        self.at += size

    def text(self) -> str:
        """Return the text up to the next zero byte."""
        end = self.raw.find(b"\0", self.at, self.at + LONGEST_NAME)
        if end < 0:
            raise ValueError(f"{self.file}: the name at byte {self.at} has no end; copy the file again.")
        start, self.at = self.at, end + 1
        return self.raw[start:end].decode(errors="replace")

    def each(self, least: int) -> Iterator[int]:
        """Yield the numbers of the records, each of `least` bytes or more, that fill the rest of the file."""
        (count,) = self.take(COUNT)
        if count * least > len(self.raw) - self.at:
            raise ValueError(f"{self.file} says {count} records and has {len(self.raw)} bytes; copy it again.")
        yield from range(count)
        if self.at != len(self.raw):
            raise ValueError(f"{self.file} says {count} records, and goes on after them; copy it again.")


COUNT = struct.Struct("<Q")
CAMERA = struct.Struct("<iiQQ")  # number, model, width, height; then its parameters
IMAGE = struct.Struct("<i7di")  # number, quaternion and shift, camera; then its name and what it shows
POINT = struct.Struct("<Q3d3BdQ")  # number, place, colour, error, images that show it; then those
SEEN = 24  # bytes of a point on an image
SHOWN = 8  # bytes of an image that shows a point


def _read_cameras(file: Path) -> dict[int, _Lens]:
    records, lenses = _Records(file), {}
    for _ in records.each(CAMERA.size):
        number, kind, width, height = records.take(CAMERA)
        model = _checked(file, NUMBERED[kind] if 0 <= kind < len(NUMBERED) else f"number {kind}")
        values = records.take(struct.Struct(f"<{len(MODELS[model])}d"))
        lenses[number] = _lens(file, model, (width, height), values)
    return lenses


def _read_images(file: Path) -> list[_Pose]:
    records, poses = _Records(file), []
    for _ in records.each(IMAGE.size + 1 + COUNT.size):
        _, *values, camera = records.take(IMAGE)
        poses.append(_Pose(records.text(), camera, tuple(values)))
        records.skip(SEEN * records.take(COUNT)[0])
    return poses


def _read_points(file: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    records, rows = _Records(file), array("d")
    for _ in records.each(POINT.size):
        _, *row, _, shown = records.take(POINT)
        rows.extend(row)
        records.skip(SHOWN * shown)
    return np.array(rows).reshape(-1, 6)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return the lines of a .txt with their numbers, comments left out."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if not line.startswith("#")]


def _split(file: Path, number: int, line: str, kinds: tuple[type, ...]) -> list[Any]:
    """Return the first words of a line, of these kinds, and the rest of it."""
    words = line.split(maxsplit=len(kinds))
    try:
        return [kind(word) for kind, word in zip(kinds, words[: len(kinds)], strict=True)] + words[len(kinds) :]
    except ValueError as error:
        shown = line if len(line) <= 80 else line[:80] + "..."
        raise ValueError(f"{file}, line {number} is no line of COLMAP's: '{shown}'; copy the file again.") from error


def _parse_cameras(file: Path) -> dict[int, _Lens]:
    lenses = {}
    for number, line in _lines(file):
        if line:
            camera, model, width, height, *rest = _split(file, number, line, (int, str, int, int))
            words = " ".join(rest)
            values = _split(file, number, words, (float,) * len(MODELS[_checked(file, model)]))
            lenses[camera] = _lens(file, model, (width, height), tuple(values))
    return lenses


def _parse_images(file: Path) -> list[_Pose]:
    lines, poses = iter(_lines(file)), []
    for number, line in lines:
        if line:
            _, *values, camera, name = [*_split(file, number, line, (int, *(float,) * 7, int)), ""][:10]
            poses.append(_Pose(name, camera, tuple(values)))
            next(lines, None)  # what the image shows; may be empty
    return poses


def _parse_points(file: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = [_split(file, n, line, (int, *(float,) * 6))[1:7] for n, line in _lines(file) if line]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)
