"""Pictures of what slots have found: a film, who owns which pixel, and what the slots show again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from simworld.extras import needed
from simworld.models.slot_attention import SlotAttention
from simworld.physics.video_worlds import HUES
from simworld.render.filming import View

SHOWN, GAP, ENLARGED = 10, 2, 2  # frames in a row, pixels between pictures, and how much larger they are drawn


@torch.no_grad()
def draw_slots(encoder: SlotAttention, view: View, path: str | Path) -> Path:
    """Write a picture of a film: a row of frames, a row of the slots' masks in colours, a row of what slots show.

    Encoders of features show no pictures again; then there is no third row.

    Raises:
        ValueError: the film does not fit the encoder.
        ImportError: Pillow is missing.
    """
    image, path = needed("PIL.Image", "A picture of slots", "view", "pillow"), Path(path)
    slots = encoder.encode(view.rgb)["slots"]
    chosen = torch.linspace(0, len(view) - 1, min(SHOWN, len(view))).round().long()
    rows = [view.rgb[chosen], _tinted(view.rgb[chosen], encoder.owners(slots[chosen]))]
    if encoder.reconstruct == "pixels":
        shown = (encoder.shown_again(slots[chosen]) + 1) / 2
        shown = functional.interpolate(shown, view.rgb.shape[1:3], mode="bilinear").clamp(0, 1)
        rows.append((shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    picture = torch.cat([_row(row) for row in rows])
    picture = picture.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(picture.numpy()).save(path)
    return path


def _tinted(rgb: Tensor, owners: Tensor) -> Tensor:
    """Return frames in grey under the colours of the slots that own their pixels."""
    colors = torch.tensor([*HUES, *(tuple(1 - part for part in hue) for hue in HUES)]) * 255
    grey = rgb.float().mean(-1, keepdim=True)
    return (0.25 * grey + 0.75 * colors[owners.long() % len(colors)]).round().to(torch.uint8)


def _row(pictures: Tensor) -> Tensor:
    """Return pictures [k, h, w, 3] side by side with white between them and below."""
    framed = functional.pad(pictures, (0, 0, 0, GAP, 0, GAP), value=255)
    return torch.cat(list(framed), 1)
