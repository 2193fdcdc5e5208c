"""Scenes fitted to photographs, judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from simworld.bench.rows import published
from simworld.metrics import Row
from simworld.render.photos import read_photos
from simworld.scene_fits import BASELINES, photo_rows


def photos(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Return PSNR [dB] and SSIM of fitted scenes' pictures of photographs held out, on white.

    `data` is a folder that `read_photos` knows, `checkpoints` are files that `simworld fit-scene` wrote. Published
    figures are of the Lego of NeRF's synthetic scenes at 800 by 800 pixels: beside others they are a reference.

    Raises:
        ValueError: data or checkpoints are missing or cannot be read.
    """
    if data is None or not checkpoints:
        raise ValueError("photos measures your own: give --data FOLDER and --checkpoint FILE of simworld fit-scene.")
    known, held = (read_photos(data, split=split) for split in ("train", "test"))
    rows: list[Row] = []
    for number, checkpoint in enumerate(checkpoints):
        file = Path(checkpoint)
        found = photo_rows(file.stem, file, known, held, dataset=Path(data).name, background=(1.0, 1.0, 1.0))
        rows += [row for row in found if not number or row.model not in BASELINES]
        if progress:
            progress(number + 1)
    return rows + published("photos")
