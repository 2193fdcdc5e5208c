"""Pictures of what slots have found: a film, who owns which pixel, and what the slots show again."""

from __future__ import annotations

from collections.abc import Sequence
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
    slots = encoder.encode(view.rgb)["slots"]
    chosen = torch.linspace(0, len(view) - 1, min(SHOWN, len(view))).round().long()
    rows = [view.rgb[chosen], _tinted(view.rgb[chosen], encoder.owners(slots[chosen]))]
    if encoder.reconstruct == "pixels":
        rows.append(_drawn(encoder, slots[chosen], view))
    return _write(rows, path)


@torch.no_grad()
def draw_rollouts(encoder: SlotAttention, view: View, rollouts: Sequence[Tensor], path: str | Path) -> Path:
    """Write a picture of a film: a row of frames, and for each of some rollouts a row of what its slots show.

    Slots are [T, k, s], their frame 0 the film's; frames are as many as the shortest rollout has.

    Raises:
        ValueError: the encoder shows features, which are no pictures, or there are no rollouts.
        ImportError: Pillow is missing.
    """
    if encoder.reconstruct != "pixels" or not rollouts:
        raise ValueError(
            f"Rollouts are drawn, one or more, of slots that show pixels; got {len(rollouts)} of slots that show "
            f"{encoder.reconstruct}."
        )
    length = min(len(view), *(len(slots) for slots in rollouts))
    chosen = torch.linspace(0, length - 1, min(SHOWN, length)).round().long()
    return _write([view.rgb[chosen], *(_drawn(encoder, slots[chosen], view) for slots in rollouts)], path)


def _drawn(encoder: SlotAttention, slots: Tensor, view: View) -> Tensor:
    """Return what slots [k, n, s] show, as pictures of a film's size."""
    shown = (encoder.shown_again(slots.float()) + 1) / 2
    shown = functional.interpolate(shown, view.rgb.shape[1:3], mode="bilinear").clamp(0, 1)
    return (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _write(rows: Sequence[Tensor], path: str | Path) -> Path:
    """Write rows of pictures [k, h, w, 3] below each other."""
    image, path = needed("PIL.Image", "A picture of slots", "view", "pillow"), Path(path)
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
