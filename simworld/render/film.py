"""Pictures as a film: .gif and .mp4 that play at the speed of what they show, or a strip of them as .png."""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.saving import replacing

Array = np.ndarray[Any, np.dtype[np.uint8]]
GIF_RATE, MP4_RATE = 25, 60  # most pictures a second: what browsers play of a .gif, and screens show
MOST_IN_STRIP = 8
WIDE = 2  # times as wide as high: such pictures stand below each other in a strip
LONGEST = 60.0  # s: what the 16 bits of a .gif's delays hold, nearly a tenth of it


def write_film(path: str | Path, pictures: Tensor, *, dt: float) -> Path:
    """Write pictures [t, h, w, 3], `dt` seconds apart, to a .gif, .mp4 or .png, and return its path.

    Values are bytes, or floats, of which 0 to 1 is shown. Films play at real speed: where pictures come faster than 25
    a second in a .gif, or 60 in an .mp4, each k-th is kept. A .png holds at most eight, evenly spaced, side by side, or
    below each other where they are wide.

    Raises:
        ImportError: Pillow, or for .mp4 imageio-ffmpeg, is not there.
        ValueError: the file is of another kind or its folder is not there, there is no picture, values are of another
            type, not finite, or not on the scale of 0 to 1, or dt is not above 0 and at most 60 s.
        RuntimeError: ffmpeg did not make the .mp4.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix)
    if writer is None or not path.parent.is_dir():
        raise ValueError(f"Films are written to {', '.join(WRITERS)} in a folder that is there; got '{path}'.")
    if not 0 < dt <= LONGEST:
        raise ValueError(f"Pictures must be shown for more than 0 s and at most {LONGEST:g} s each; got dt {dt} s.")
    pictures = pictures.detach()
    _check(pictures)
    with replacing(path) as partial:
        writer(partial, pictures, dt)
    return path


def _check(pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[3] != 3 or not pictures.numel():
        raise ValueError(f"Pictures of a film must be [t, h, w, 3], one or more; got {list(pictures.shape)}.")
    if pictures.dtype == torch.uint8:
        return
    if not pictures.is_floating_point():
        raise ValueError(f"Pictures of a film must be uint8 or floats from 0 to 1; got {pictures.dtype}.")
    for number, picture in enumerate(pictures):
        mean = float(picture.mean())
        if not math.isfinite(mean):
            raise ValueError(f"Picture {number} of the film has values that are not finite; take it out.")
        if mean > 2:  # a few may be brighter than white, but not all
            raise ValueError(
                f"Picture {number} of the film is {mean:g} on average; floats go from 0 to 1. Divide them."
            )


def _shown(pictures: Tensor, every: int = 1) -> Iterator[Array]:
    """Give each k-th picture as bytes [h, w, 3], one after another: a long film is not held twice."""
    for picture in pictures[::every]:
        values = picture if picture.dtype == torch.uint8 else (picture * 255).round().clamp(0, 255).byte()
        yield np.ascontiguousarray(values.cpu().numpy())


def _every(dt: float, rate: float) -> int:
    return max(1, math.ceil(1 / (rate * dt) - 1e-9))


def _write_gif(path: Path, pictures: Tensor, dt: float) -> None:
    image = needed("PIL.Image", "A film as .gif", "view", "pillow")
    every = _every(dt, GIF_RATE)
    frames = (
        image.fromarray(shown).convert("P", palette=image.Palette.ADAPTIVE, colors=256)
        for shown in _shown(pictures, every)
    )
    # Delays are whole hundredths of a second; each makes good what those before it were rounded by.
    ends = [round(100 * dt * every * k) for k in range(math.ceil(len(pictures) / every) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    if len(durations) == 1:  # of a single picture Pillow takes no list
        next(frames).save(path, format="GIF", duration=durations[0])
        return
    first = next(frames)
    first.save(
        path, format="GIF", save_all=True, append_images=frames, duration=durations, loop=0, disposal=1, optimize=False
    )


def _write_png(path: Path, pictures: Tensor, dt: float) -> None:
    image = needed("PIL.Image", "A strip of pictures", "view", "pillow")
    count = min(len(pictures), MOST_IN_STRIP)
    rows = torch.linspace(0, len(pictures) - 1, count).round().long().tolist()
    wide = pictures.shape[2] > WIDE * pictures.shape[1]
    strip = np.concatenate(list(_shown(pictures[rows])), axis=0 if wide else 1)
    image.fromarray(strip).save(path, format="PNG")


def _write_mp4(path: Path, pictures: Tensor, dt: float) -> None:
    ffmpeg = needed("imageio_ffmpeg", "A film as .mp4", "view", "imageio-ffmpeg")
    try:
        program = ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ImportError("A film as .mp4 needs the program ffmpeg, which is not here; install it.") from error
    every = _every(dt, MP4_RATE)
    _, height, width, _ = pictures.shape
    odd = ((0, height % 2), (0, width % 2), (0, 0))  # H.264 halves the resolution of colours
    command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pixel_format", "rgb24"]
    command += ["-video_size", f"{width + width % 2}x{height + height % 2}", "-framerate", f"{1 / (dt * every):.9g}"]
    command += ["-i", "pipe:0", "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709"]
    command += ["-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv", "-c:v", "libx264"]
    command += ["-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4", str(path)]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said) as run:
            assert run.stdin is not None
            try:
                with suppress(BrokenPipeError):  # why it ended, it says
                    for shown in _shown(pictures, every):
                        run.stdin.write(np.pad(shown, odd, mode="edge").tobytes())
                with suppress(BrokenPipeError):
                    run.stdin.close()
            except BaseException:
                run.kill()
                raise
        if run.returncode:
            said.seek(0)
            why = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise RuntimeError(f"ffmpeg made no film, and said: {why[0]}")


WRITERS: dict[str, Callable[[Path, Tensor, float], None]] = {".gif": _write_gif, ".mp4": _write_mp4, ".png": _write_png}
