from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from simworld.render.film import write_film

Image = pytest.importorskip("PIL.Image", reason="Pillow is not here; it comes with simworld[view]")


def pictures(count, height=24, width=32):
    """Return frames of one colour each with a white square that moves from left to right."""
    shades = torch.linspace(0.1, 0.9, count)
    made = torch.stack([shades, 1 - shades, torch.full((count,), 0.4)], 1)[:, None, None].repeat(1, height, width, 1)
    for t in range(count):
        left = (width - 8) * t // max(count - 1, 1)
        made[t, 4:12, left : left + 8] = 1.0
    return made


def gif(path):
    """Return the frames [t, h, w, 3] of a .gif and how long each is shown, in ms."""
    frames, durations = [], []
    with Image.open(path) as film:
        for t in range(film.n_frames):
            film.seek(t)
            frames.append(np.asarray(film.convert("RGB")).astype(float) / 255)
            durations.append(film.info["duration"])
    return np.stack(frames), durations


@pytest.mark.parametrize(("count", "dt", "every"), [(10, 0.1, 1), (10, 0.04, 1), (30, 1 / 60, 3), (31, 1 / 30, 2)])
def test_gifs_play_at_real_speed_with_25_pictures_a_second_or_fewer(tmp_path, count, dt, every):
    given = pictures(count)
    frames, durations = gif(write_film(tmp_path / "a.gif", given, dt=dt))
    kept = given[::every]
    assert len(frames) == len(kept)
    assert np.abs(frames - kept.numpy()).max() < 0.02
    assert sum(durations) == pytest.approx(1000 * dt * every * len(kept), abs=5.001)
    assert min(durations) >= 40
    assert not list(tmp_path.glob("*.partial"))


def test_bytes_are_what_floats_are(tmp_path):
    given = pictures(3)
    given[0, 0, 0] = torch.tensor([-1.0, 1.5, 0.5])  # beyond what is shown
    a = write_film(tmp_path / "a.png", given.requires_grad_(True), dt=0.1)
    b = write_film(tmp_path / "b.png", (given.detach().clamp(0, 1) * 255).round().byte(), dt=0.1)
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 1, 2]), (15, [0, 2, 4, 6, 8, 10, 12, 14])])
def test_a_png_is_a_strip_of_eight_or_fewer(tmp_path, count, chosen):
    given = (pictures(count) * 255).round().byte()
    strip = np.asarray(Image.open(write_film(tmp_path / "a.png", given, dt=0.1)))
    assert np.array_equal(strip, np.concatenate([given[t].numpy() for t in chosen], 1))


@pytest.mark.parametrize(("size", "dt", "every"), [((24, 32), 0.1, 1), ((25, 33), 0.1, 1), ((24, 32), 1 / 240, 4)])
def test_mp4_holds_the_pictures(tmp_path, size, dt, every):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not here; it comes with simworld[view]")
    given = pictures(13, *size)
    path = write_film(tmp_path / "a.mp4", given, dt=dt)
    command = [ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    height, width = size[0] + size[0] % 2, size[1] + size[1] % 2
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3) / 255
    kept = given[::every].numpy()
    assert len(frames) == len(kept)
    assert np.abs(frames[:, : size[0], : size[1]].mean((1, 2)) - kept.mean((1, 2))).max() < 0.02
    said = done.stderr.decode()
    assert "h264" in said
    assert "yuv420p(tv, bt709" in said
    assert float(re.search(r"([\d.]+) fps", said)[1]) == pytest.approx(1 / (dt * every), rel=0.01)


@pytest.mark.parametrize(
    ("given", "dt", "says"),
    [
        (torch.zeros(0, 8, 8, 3), 0.1, r"got \[0, 8, 8, 3\]"),
        (torch.zeros(2, 8, 8, 4), 0.1, r"got \[2, 8, 8, 4\]"),
        (torch.zeros(8, 8, 3), 0.1, r"got \[8, 8, 3\]"),
        (torch.full((2, 8, 8, 3), math.nan), 0.1, "Picture 0 .* not finite"),
        (torch.full((2, 8, 8, 3), 128.0), 0.1, "is 128 on average"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.long), 0.1, "got torch.int64"),
        (torch.zeros(2, 8, 8, 3), 0.0, "dt 0.0 s"),
        (torch.zeros(2, 8, 8, 3), math.nan, "dt nan s"),
        (torch.zeros(2, 8, 8, 3), 86400.0, "at most 60 s"),
    ],
)
def test_what_is_refused(tmp_path, given, dt, says):
    for name in ("a.gif", "a.png", "a.mp4"):
        with pytest.raises(ValueError, match=says):
            write_film(tmp_path / name, given, dt=dt)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_and_what_is_missing_is_named(tmp_path, monkeypatch):
    for name in ("a.avi", "nowhere/a.gif"):
        with pytest.raises(ValueError, match=r"written to \.gif, \.mp4, \.png in a folder that is there"):
            write_film(tmp_path / name, pictures(2), dt=0.1)
    for name, module, package in (("a.mp4", "imageio_ffmpeg", "imageio-ffmpeg"), ("a.gif", "PIL.Image", "pillow")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"needs {package}; install it with: pip install 'simworld\[view\]'"):
                write_film(tmp_path / name, pictures(2), dt=0.1)


def test_what_ffmpeg_says_is_passed_on(tmp_path, monkeypatch):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not here; it comes with simworld[view]")
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho 'no room is left' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(RuntimeError, match="no room is left"):
        write_film(tmp_path / "a.mp4", pictures(60, 200, 200), dt=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["ffmpeg"]
