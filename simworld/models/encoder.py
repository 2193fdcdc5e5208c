"""What every encoder of films keeps: it makes slots of frames, and learns from films alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simworld.kinds import SlotState
from simworld.trajectory import Trajectory


class Encoder(nn.Module, ABC):
    """An encoder of films [T, h, w, 3] whose frames are `dt` seconds apart, square and `image_size` pixels wide.

    `arguments` are the constructor's, as plain values; `provenance` says where the weights come from.
    """

    arguments: dict[str, Any]
    provenance: dict[str, Any]

    def __init__(self, *, dt: float, image_size: int, num_slots: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        if not (isinstance(dt, int | float) and 0 < dt < float("inf")):
            raise ValueError(f"dt must be a positive number of seconds; got {dt}.")
        self.dt, self.image_size, self.num_slots = float(dt), image_size, num_slots
        self.arguments, self.provenance = {**arguments, "dt": float(dt)}, {}

    @staticmethod
    @abstractmethod
    def measure_films(films: Sequence[Tensor], **arguments: Any) -> dict[str, list[float]] | None:
        """Return the `statistics` of films [T, h, w, 3] that the constructor takes beside these arguments."""

    @abstractmethod
    def loss(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Return what training makes small, of clips [b, T, h, w, 3]."""

    @abstractmethod
    def slots(self, rgb: Tensor, seed: int) -> Tensor:
        """Return the slots [T, k, s] of a film [T, h, w, 3]."""

    @torch.no_grad()
    def encode(self, rgb: Tensor, *, history: int = 0, seed: int = 0) -> Trajectory:
        """Return slots of a film [T, h, w, 3] as a trajectory; its frame 0 is frame `history` of the film.

        All slots are active. `seed` is that of a random start, where there is one: films that begin alike have the
        same slots as long as they are alike.

        Raises:
            ValueError: the film has another size, NaN, or fewer than history + 1 frames.
        """
        if not isinstance(rgb, Tensor):
            raise TypeError(f"A film is a tensor [T, h, w, 3], such as the rgb of a View; got a {type(rgb).__name__}.")
        if history < 0:
            raise ValueError(f"history counts frames before the first, 0 or more; got {history}.")
        if rgb.ndim != 4 or len(rgb) <= history:
            raise ValueError(
                f"A film [T, h, w, 3] with a history of {history} has {history + 1} frames or more; got "
                f"{list(rgb.shape)}. Give a longer one, or a shorter history."
            )
        slots = self.slots(rgb, seed)
        shown = slots[history:]
        first = SlotState(slots=shown[0])
        if history:
            first = SlotState(slots=shown[0], history=slots[:history].transpose(0, 1))
        active = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device)
        return Trajectory(initial=first, frames={"slots": shown}, active=active, dt=self.dt)

    def prepare(self, rgb: Tensor) -> Tensor:
        """Return films [..., T, h, w, 3], bytes or 0 to 1, at half their size: [..., T, 3, h/2, w/2], -1 to 1.

        Raises:
            ValueError: the film has another size, or as `check_pictures` does.
        """
        size, shape = self.image_size, list(rgb.shape)
        if rgb.ndim < 4 or shape[-3:] != [size, size, 3] or 0 in shape:
            raise ValueError(
                f"This encoder takes films [T, {size}, {size}, 3]; got {shape}. Film with a camera of {size} x {size} "
                "pixels, or train an encoder for this size."
            )
        check_pictures(rgb)
        weights = next(self.parameters())
        values = rgb.to(weights) / 127.5 - 1 if rgb.dtype == torch.uint8 else rgb.to(weights) * 2 - 1
        half = nn.functional.avg_pool2d(values.flatten(0, -4).permute(0, 3, 1, 2), 2)
        return half.view(*rgb.shape[:-3], *half.shape[1:])


def check_pictures(rgb: Tensor) -> None:
    """Raise a ValueError unless frames [..., T, h, w, 3] of films are bytes, or floats from 0 to 1."""
    if rgb.dtype == torch.uint8:
        return
    if not rgb.is_floating_point():
        raise ValueError(
            f"Frames of a film are bytes (torch.uint8) or floats from 0 to 1; got {rgb.dtype}. Convert bytes with "
            ".to(torch.uint8)."
        )
    if not bool(torch.isfinite(rgb).all()):
        frame = int((~torch.isfinite(rgb)).nonzero()[0, rgb.ndim - 4])
        raise ValueError(f"A film must be finite; frame {frame} holds NaN or infinity. Repair or drop it.")
    low, high = (float(end) for end in rgb.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"Floats in a film are from 0 to 1; got {low:.4g} to {high:.4g}. Divide those of 0 to 255 by 255."
        )
