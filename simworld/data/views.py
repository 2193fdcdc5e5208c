"""Films beside the states of an episode in HDF5: pictures, which body shows in each pixel, and the camera."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from simworld.render.filming import View

if TYPE_CHECKING:
    import h5py


def write_views(group: h5py.Group, views: Sequence[View], num_frames: int) -> None:
    """Write the films of an episode of `num_frames` frames into its group.

    Raises:
        ValueError: a film has another number of frames.
    """
    for number, view in enumerate(views):
        if len(view) != num_frames:
            raise ValueError(
                f"View {number} has {len(view)} frames where its trajectory has {num_frames}; film the whole of it."
            )
        made = group.create_group(f"views/{number:04d}")
        for name, value in (("rgb", view.rgb), ("masks", view.masks)):
            made.create_dataset(name, data=value.numpy(force=True), compression="gzip").attrs["unit"] = "1"
        for name, matrix in (("viewmat", view.viewmat), ("K", view.K)):
            made.attrs[name] = matrix.numpy(force=True)


def read_views(group: h5py.Group, num_frames: int, num_bodies: int) -> list[View]:
    """Return the films in an episode's group, in their order; none if it holds none.

    Raises:
        ValueError: one is not a film of as many frames, or shows bodies that are not there. It does not name the file.
    """
    views = group.get("views", {})
    return [_read(f"view {name}", views[name], num_frames, num_bodies) for name in sorted(views)]


def _read(name: str, group: h5py.Group, num_frames: int, num_bodies: int) -> View:
    lacking = [key for key in ("rgb", "masks") if key not in group]
    lacking += [key for key in ("viewmat", "K") if key not in group.attrs]
    if lacking:
        raise ValueError(f"{name} lacks {', '.join(lacking)}, where a view has rgb, masks, viewmat and K")
    view = View(
        viewmat=_matrix(name, "viewmat", group.attrs["viewmat"], 4),
        K=_matrix(name, "K", group.attrs["K"], 3),
        rgb=_bytes(group["rgb"]),
        masks=_bytes(group["masks"]),
    )
    if len(view) != num_frames:
        raise ValueError(f"{name} has {len(view)} frames where the states have {num_frames}")
    if view.masks.numel() and int(view.masks.max()) > num_bodies:
        raise ValueError(f"{name} shows body {int(view.masks.max()) - 1}, of {num_bodies} that are there")
    return view


def _bytes(dataset: Any) -> Tensor:
    array = np.asarray(dataset[()])
    if array.dtype != np.uint8:
        raise ValueError(f"{dataset.name} must be uint8; got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array)


def _matrix(view: str, name: str, value: Any, size: int) -> Tensor:
    array = np.asarray(value)
    if array.shape != (size, size) or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{view} has a {name} that is not {size} x {size} finite numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
