from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.kinds import ObjectState, SplatState
from simworld.quaternions import rotations
from simworld.render import web
from simworld.render.camera import Camera
from simworld.render.harmonics import FLAT
from simworld.render.splats import moved, render_splats, with_covariances
from simworld.render.web import serve, write_html

pytest.importorskip("viser", reason="viser is not here; it comes with simworld[view]")

RED, GREEN = (1.0, 0.0, 0.0), (0.0, 0.8, 0.0)


def ball(count=200, *, colour=RED, radius=1.0, at=(0.0, 0.0, 0.0), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ways = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    return SplatState(
        means=radius * ways * torch.rand(count, 1, generator=generator) ** (1 / 3) + torch.tensor(at),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=radius * (0.15 + 0.1 * torch.rand(count, 3, generator=generator)),
        opacities=0.9 + 0.1 * torch.rand(count, generator=generator),
        harmonics=((torch.tensor(colour) - 0.5) / FLAT).expand(count, 1, 3).clone(),
    )


def turned(splats, angle, shift):
    turn = rotations(torch.tensor([math.cos(angle / 2), 0.2, 0.3, math.sin(angle / 2)]))
    return moved(splats, turn, torch.tensor(shift))


def test_a_common_motion_is_found_and_nothing_else_is_taken_for_one():
    generator = torch.Generator().manual_seed(1)
    for given in (ball(), with_covariances(ball())):
        before = web._cloud(given)
        quat = torch.randn(4, generator=generator)
        found = web._motion(before, web._cloud(moved(given, rotations(quat), torch.tensor([3.0, -2.0, 500.0]))))
        assert found is not None
        assert torch.allclose(found[0], rotations(quat.double()), atol=1e-4)
        assert found[1].tolist() == pytest.approx([3.0, -2.0, 500.0], abs=1e-3)
        bent = given.means.clone()
        bent[0, 0] += 1e-3
        shape = {"covars": 1.01 * given.covars} if "covars" in given else {"scales": 1.01 * given.scales}
        for other in (
            given.replace(means=bent),
            given.replace(means=given.means * torch.tensor([1.0, 1.0, -1.0])),
            given.replace(opacities=given.opacities * 0.9),
            given.replace(harmonics=given.harmonics * 0.9),
            given.replace(active=torch.arange(len(given)) > 0),
            given.replace(**shape),
        ):
            assert web._motion(before, web._cloud(other)) is None


def test_one_body_is_stored_as_its_motion(tmp_path):
    given = ball(1500)
    camera = Camera.look_at((8, 0, 2), (0, 0, 0))
    rigid = [turned(given, 0.1 * t, (0.1 * t, 0.0, 0.0)) for t in range(20)]
    bent = [g.replace(means=g.means * (1 + 0.02 * t)) for t, g in enumerate(rigid)]
    sizes = {}
    for name, frames in (("alone", rigid[:1]), ("rigid", rigid), ("bent", bent)):
        path = write_html(tmp_path / f"{name}.html", frames, dt=0.1, camera=camera, title="<b> & co")
        page = path.read_text()
        assert "<title>&lt;b&gt; &amp; co</title>" in page
        assert not re.search(r"""(src|href)=["'](https?:)?//""", page[:10000])  # nothing is fetched
        sizes[name] = path.stat().st_size
    assert not list(tmp_path.glob("*.partial"))
    assert 0 < sizes["rigid"] - sizes["alone"] < 0.2 * (sizes["bent"] - sizes["alone"])


def test_half_floats_hold_splats_of_any_size():
    for size in (1e-7, 1e-3, 1.0, 1e6):
        given = [turned(ball(radius=size), 0.5, (size, 0.0, 0.0))]
        for frame in (given[0], with_covariances(given[0])):
            scale = web._survey([frame]).scale
            sent = scale**2 * web._cloud(frame).covars
            halved = sent.numpy().astype(np.float16).astype(np.float64)
            assert np.abs(halved - sent.numpy()).max() < 1e-3 * float(sent.abs().max())
            assert (np.linalg.eigvalsh(halved) > 6e-8).all()


def test_nothing_is_printed_and_nothing_is_left(tmp_path):
    code = f"""
import threading
from tests.test_web import ball
from simworld.render import web
web.write_html({str(tmp_path / "a.html")!r}, [ball()], dt=0.1)
try:
    web.MOST_BYTES = 1000
    web.write_html({str(tmp_path / "b.html")!r}, [ball()], dt=0.1)
except ValueError as error:
    assert "at most" in str(error), error
else:
    raise AssertionError
import time
for _ in range(100):
    if threading.active_count() == 1:
        break
    time.sleep(0.05)
assert threading.active_count() == 1, threading.enumerate()
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_frames_may_differ_in_number_and_be_empty(tmp_path):
    given = ball()
    none = given.replace(active=torch.zeros(len(given), dtype=torch.bool))
    write_html(tmp_path / "a.html", [none, given, ball(50), none, given], dt=0.1)
    with pytest.raises(ValueError, match="none in 2 frames"):
        write_html(tmp_path / "b.html", [none, none], dt=0.1)
    assert not (tmp_path / "b.html").exists()


def bad(name, value):
    """Return splats as a step that went wrong may leave them: `replace` looks at shapes alone."""
    values = ball(5)[name].clone()
    values[2] = value
    return ball(5).replace(**{name: values})


@pytest.mark.parametrize(
    ("frames", "given", "says"),
    [
        ([], {}, "got none"),
        ([ball(5), bad("means", math.nan)], {}, "means of frame 1 are not finite"),
        ([bad("scales", math.inf)], {}, "scales of frame 0 are not finite"),
        ([bad("harmonics", math.nan)], {}, "harmonics of frame 0 are not finite"),
        ([SplatState.cat([ball(5), ball(5)])], {}, "frame 0 has 2"),
        ([ObjectState(positions=torch.zeros(1, 2), velocities=torch.zeros(1, 2))], {}, "is a ObjectState"),
        ([ball(5)], {"dt": 0.0}, "above 0"),
        ([ball(5)], {"dt": -1.0}, "above 0"),
        ([ball(5)], {"dt": math.nan}, "above 0"),
        ([ball(5)], {"speed": 0.0}, "above 0"),
        ([ball(5)], {"dt": 1e6}, "at most 3600 s"),
    ],
)
def test_what_is_refused(tmp_path, frames, given, says):
    with pytest.raises(ValueError, match=says):
        write_html(tmp_path / "a.html", frames, **{"dt": 0.1, **given})
    with pytest.raises(ValueError, match=says):
        serve(frames, **{"dt": 0.1, "port": 0, **given})
    assert not list(tmp_path.iterdir())


def test_other_files_and_ports_are_refused(tmp_path):
    for name in ("a.gif", "nowhere/a.html"):
        with pytest.raises(ValueError, match=r"to a \.html in a folder that is there"):
            write_html(tmp_path / name, [ball()], dt=0.1)
    with pytest.raises(ValueError, match="from 0 to 65535; got 70000"):
        serve([ball()], dt=0.1, port=70000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Port {port} is taken"):
            serve([ball()], dt=0.1, port=port)


def test_without_viser_one_sentence_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ImportError, match=r"needs viser; install it with: pip install 'simworld\[view\]'"):
        write_html(tmp_path / "a.html", [ball()], dt=0.1)


class Asked(list):
    """Frames that tell which of them were asked for."""

    def __init__(self, frames):
        super().__init__(frames)
        self.played = threading.Event()

    def __getitem__(self, number):
        if number == len(self) - 1:
            self.played.set()
        return super().__getitem__(number)


def test_the_viewer_answers_plays_and_stops():
    frames = Asked([turned(ball(50), 0.1 * t, (0.0, 0.0, 0.0)) for t in range(5)])
    stop, ready, told = threading.Event(), threading.Event(), []

    def announce(address):
        told.append(address)
        ready.set()

    given = {"dt": 0.02, "port": 0, "announce": announce, "stop": stop, "title": "ball"}
    thread = threading.Thread(target=serve, args=(frames,), kwargs=given)
    thread.start()
    try:
        assert ready.wait(60)
        with urllib.request.urlopen(told[0], timeout=30) as answer:
            assert b"<title>" in answer.read()
        assert frames.played.wait(60)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(told[0], timeout=5)


def test_the_first_view_is_the_cameras():
    class First:
        initial_camera = type("Camera", (), {})()

    survey = web._survey([ball(radius=0.01)])
    for up, wanted in (((0, 0, 1), (0, 0, 1)), ((0, 1, 0), (0, 1, 0)), ((0.3, 0.2, 0.9), None)):
        camera = Camera.look_at((0.1, 0.02, 0.03), (0.0, 0.0, 0.0), up=up, field_of_view=30.0, dtype=torch.float64)
        unit = web._aim(First, survey, camera)
        view = First.initial_camera
        place, target = torch.tensor(view.position).double(), torch.tensor(view.look_at).double()
        again = Camera.look_at(place, target, up=view.up, dtype=torch.float64)
        assert torch.allclose(again.viewmat[:3, :3], camera.viewmat[:3, :3], atol=1e-6)
        assert torch.allclose(place, unit * (camera.position - survey.middle), atol=1e-6)
        assert math.degrees(view.fov) == pytest.approx(30.0)
        assert float((place - target).norm()) == pytest.approx(web.AWAY)
        assert wanted is None or tuple(view.up) == wanted


SIZE = (480, 400)


def screenshot(page: Path, after: float) -> np.ndarray:
    """Return the picture [h, w, 3] of a page `after` seconds of its own time."""
    from PIL import Image

    picture = page.with_suffix(f".{after}.png")
    command = ["chromium", "--headless=new", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    command += ["--enable-unsafe-swiftshader", "--window-size={},{}".format(*SIZE), "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--virtual-time-budget={round(1000 * after)}"]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=180, check=True)
    return np.asarray(Image.open(picture).convert("RGB")).astype(float)


def seen(picture: np.ndarray, colour: int) -> np.ndarray:
    """Return the pixels [m, 2] (row, column) in which one of red, green and blue is all there is."""
    others = np.delete(picture, colour, axis=2)
    return np.argwhere((picture[..., colour] > 140) & (others < 110).all(2))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here; Debian's package has it")
def test_a_browser_shows_the_ball_where_it_is(tmp_path):
    """In millimetres, 20 m off: it moves as one body, is sent anew half way, and hides a smaller one behind it."""
    dt, count, eye, target = 0.1, 80, torch.tensor([0.0, -5.0, 0.0]), torch.tensor([0.0, 0.0, 0.8])
    away = torch.tensor([20.0, -10.0, 5.0])
    large = Camera.look_at(eye, target, width=480, height=360)
    small = Camera.look_at(1e-3 * eye + away, 1e-3 * target + away, width=480, height=360, dtype=torch.float64)
    front, behind = ball(radius=0.35), ball(colour=GREEN, radius=0.14, at=(0.0, 1.2, 0.0), seed=1)
    both = SplatState(**{name: torch.cat([front[name], behind[name]]) for name in front if name in behind})
    frames = []
    for t in range(count):
        turn = rotations(torch.tensor([math.cos(0.02 * t), 0.0, math.sin(0.02 * t), 0.0]))  # in the picture's plane
        frame = moved(both, turn, torch.tensor([(t / count - 0.5) * 3, 0.0, 0.0]))
        frames.append(frame if t < count / 2 else frame.replace(active=torch.arange(len(both)) > 0))
    sent = [moved(frame, torch.eye(3), away, scale=1e-3) for frame in frames]
    page = write_html(tmp_path / "ball.html", sent, dt=dt, camera=small)
    times = range(0, count, 4)
    ours = [seen(255 * render_splats(frames[t], large, background=(1, 1, 1)).numpy(), 0) for t in times]
    high, columns = SIZE[1] - 40, []  # the rest is the bar
    for after in (1.5, 6.5):
        shown = screenshot(page, after)
        red = seen(shown, 0)
        assert len(red) > 500
        assert len(seen(shown, 1)) < 0.02 * len(red)
        columns.append((red[:, 1].mean() - 240) / high)
        # A busy machine shows frames late: which it is, is told by the column, and the rest must be that frame's.
        away = [abs((one[:, 1].mean() - 240) / 360 - columns[-1]) for one in ours]
        wanted = ours[int(np.argmin(away))]
        assert min(away) < 0.06
        assert times[int(np.argmin(away))] * dt == pytest.approx(after, abs=2.5)
        assert red[:, 0].mean() / high == pytest.approx(wanted[:, 0].mean() / 360, abs=0.06)
        assert math.sqrt(len(red)) / high == pytest.approx(math.sqrt(len(wanted)) / 360, rel=0.15)
    assert columns[1] - columns[0] > 0.2
