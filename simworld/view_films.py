"""Films of predictions beside the truth, as strips of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from simworld.view import _figure


def plot_strips(films: Mapping[str, Tensor], *, frames: Sequence[int], path: str | Path) -> Path:
    """Write a picture with a row for each film, uint8 [T, h, w, 3], and a column for each of some frames.

    Raises:
        ValueError: there are no films or frames, or a film is too short.
    """
    if not films or not frames:
        raise ValueError("plot_strips needs a film and a frame of it or more; got none.")
    short = [name for name, pictures in films.items() if len(pictures) <= max(frames)]
    if short:
        raise ValueError(f"The film '{short[0]}' has {len(films[short[0]])} frames; choose frames below that.")
    rows, columns = len(films), len(frames)
    figure, all_axes = _figure(1.1 * columns + 1.4, 1.15 * rows + 0.3, (rows, columns))
    for row, (name, pictures) in enumerate(films.items()):
        for column, frame in enumerate(frames):
            axes = all_axes[row * columns + column]
            axes.imshow(pictures[frame].cpu().numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if not row:
                axes.set_title(f"{frame:+d}", fontsize=8)
            if not column:
                axes.set_ylabel(name.replace(" ", "\n", 1), fontsize=8, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    return Path(path)
