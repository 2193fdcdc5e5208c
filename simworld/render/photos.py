"""Photographs with the cameras that took them, as Blender, nerfstudio, instant-ngp and COLMAP leave them."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.render.camera import Camera
from simworld.render.colmap import model_folder, read_model
from simworld.render.shots import Album, Shot, exposed
from simworld.render.transforms import FLIP, SPLITS, read_transforms
from simworld.saving import replacing

EVERY = 8  # of how many photographs, by name, one is for tests where no file says which
SHOWN = 8  # files that an error names


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


def read_photos(path: str | Path, *, split: str | None = None, skip_missing: bool = False) -> Photos:
    """Return the photographs of a scene: of a transforms.json, or a folder with such files or a model of COLMAP.

    A folder holds transforms.json, transforms_train.json and others as Blender's, or COLMAP's cameras, images and
    points3D in `sparse/0`, `sparse` or itself beside the photographs in `images`. `split` takes a part: that of
    transforms_<split>.json, or of the lists in transforms.json, or else every eighth photograph by name for "test" and
    the others for "train". Without it all are taken, of Blender's files those of "train". The distortion of lenses is
    undone; a photograph of another size than its camera's has its camera resized. Masks and depths are left out.
    `skip_missing` goes on without photographs that are not there.

    Raises:
        ValueError: no scene is there, a file is damaged or leaves the folder, photographs are missing, are of another
            shape than stated or by a fisheye, or the split is not known or empty.
    """
    album, left = _album(Path(path), split)
    shots = album.shots if left is None else _of_split(Path(path), album, left)
    missing = [shot for shot in shots if not os.path.isfile(shot.file)]
    if missing and (not skip_missing or len(missing) == len(shots)):
        first = str(missing[0].file)
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        way = ", or go on without them by skip_missing=True." if len(missing) < len(shots) else "."
        raise ValueError(
            f"{len(missing)} of {len(shots)} photographs of '{path}' are not there, '{first[:200]}' to begin with: "
            f"{', '.join(shot.name[:80] for shot in missing[:SHOWN])}{more}. Copy them there{way}"
        )
    shots = [shot for shot in shots if os.path.isfile(shot.file)]
    taken = [exposed(shot) for shot in shots]
    return Photos(
        images=tuple(image for image, _ in taken),
        cameras=tuple(camera for _, camera in taken),
        names=tuple(shot.name for shot in shots),
        points=album.points,
        colors=album.colors,
    )


def _album(path: Path, split: str | None) -> tuple[Album, str | None]:
    """Return what a scene's files tell, and the split that is still to be taken of it."""
    if os.path.isfile(path):
        if path.suffix != ".json":
            raise ValueError(f"Photographs are read from a transforms.json or a folder with one; got '{path}'.")
        own = next((s for s in SPLITS if path.name == f"transforms_{s}.json"), None)
        if own and split not in (None, own):
            raise ValueError(f"'{path}' has the photographs for {own}, not for {split}; give the folder it is in.")
        return read_transforms(path), None if own else split
    if not os.path.isdir(path):
        raise ValueError(f"There is no folder or file '{path}'; give the folder of a scene.")
    if split is not None and (path / f"transforms_{split}.json").is_file():
        return read_transforms(path / f"transforms_{split}.json"), None
    if (path / "transforms.json").is_file():
        return read_transforms(path / "transforms.json"), split
    if split is None and (path / "transforms_train.json").is_file():
        return read_transforms(path / "transforms_train.json"), None
    model = model_folder(path)
    if model is not None:
        return read_model(model, path / "images"), split
    there = sorted(file.name for file in path.glob("transforms*.json"))
    raise ValueError(
        f"'{path}' must hold transforms.json, transforms_{split or SPLITS[0]}.json or COLMAP's model in sparse/0; of "
        f"these it has {', '.join(there[:SHOWN]) or 'none'}. Give the folder of a scene, or another split."
    )


def _of_split(path: Path, album: Album, split: str) -> list[Shot]:
    """Return the photographs of a split, as listed, or every eighth by name for tests."""
    if split not in (album.splits or ("train", "test")):
        known = ", ".join(album.splits or ("train", "test"))
        raise ValueError(f"'{path}' has the splits {known}; got '{split}'.")
    if album.splits:
        chosen = [shot for shot in album.shots if shot.name in album.splits[split]]
        unknown = sorted(album.splits[split] - {shot.name for shot in chosen})
        if unknown:
            raise ValueError(
                f"'{path}' lists {len(unknown)} photographs for {split} that no frame describes: "
                f"{', '.join(unknown[:SHOWN])}. Correct {split}_filenames."
            )
    else:
        order = sorted(range(len(album.shots)), key=lambda row: album.shots[row].name)
        tests = set(order[::EVERY])
        chosen = [shot for row, shot in enumerate(album.shots) if (row in tests) == (split == "test")]
    if not chosen:
        raise ValueError(f"'{path}' has no photograph for {split}, of {len(album.shots)}; take another split, or all.")
    return chosen


def write_transforms(folder: str | Path, photos: Photos) -> Path:
    """Write photographs as nerfstudio has them, images/00000.png and on, and return the path of their transforms.json.

    `read_photos` reads them again as they are, but for their names; points are written beside them, colours rounded.

    Raises:
        ValueError: there is no photograph.
    """
    if not len(photos):
        raise ValueError("write_transforms needs a photograph or more; got none.")
    folder = Path(folder)
    frames = [_frame(number, camera) for number, camera in enumerate(photos.cameras)]
    pillow = needed("PIL.Image", "Writing photographs", "view", "pillow")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for frame, image in zip(frames, photos.images, strict=True):
        raw = io.BytesIO()
        pillow.fromarray(image.cpu().numpy()).save(raw, format="png")
        _put(folder / frame["file_path"], raw.getvalue())
    told: dict[str, Any] = {"camera_model": "PINHOLE", "frames": frames}
    if photos.points is not None:
        told["ply_file_path"] = "points.ply"
        _put(folder / "points.ply", _cloud(photos.points, photos.colors))
    return _put(folder / "transforms.json", json.dumps(told, indent=1).encode())


def _frame(number: int, camera: Camera) -> dict[str, Any]:
    K, viewmat = (value.detach().cpu().double() for value in (camera.K, camera.viewmat))
    fx, fy, cx, cy = (float(K[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return {
        "file_path": f"images/{number:05d}.png",
        "w": camera.width,
        "h": camera.height,
        "fl_x": fx,
        "fl_y": fy,
        "cx": cx,
        "cy": cy,
        "transform_matrix": (viewmat.inverse() * viewmat.new_tensor(FLIP)).tolist(),
    }


def _cloud(points: Tensor, colors: Tensor | None) -> bytes:
    """Return a .ply of points, with their colours in whole numbers up to 255."""
    kinds = [(name, "float", "<f4") for name in "xyz"]
    kinds += [(name, "uchar", "u1") for name in ("red", "green", "blue")] if colors is not None else []
    rows = np.empty(len(points), dtype=[(name, kind) for name, _, kind in kinds])
    columns = points if colors is None else torch.cat([points, (colors * 255).round()], 1)
    for (name, _, _), column in zip(kinds, columns.detach().cpu().unbind(1), strict=True):
        rows[name] = column.numpy()
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    head += [*(f"property {kind} {name}" for name, kind, _ in kinds), "end_header", ""]
    return "\n".join(head).encode() + rows.tobytes()


def _put(path: Path, raw: bytes) -> Path:
    with replacing(path) as partial:
        partial.write_bytes(raw)
    return path
