"""Films of splats for a browser: one page that needs nothing else, and a viewer that is served."""

from __future__ import annotations

import html
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.quaternions import quaternion
from simworld.render.camera import Camera
from simworld.render.harmonics import FLAT
from simworld.saving import replacing

HOST = "127.0.0.1"  # nobody else is shown what is simulated here
LEAST_HALF, MOST_HALF = 2.0**-14, 2.0**15  # between these 16 bits hold a number to 11 digits of two
SMALL = 0.05  # share of splats that may be smaller than what 16 bits hold well
ROUNDED = 5e-4  # of a covariance: what 16 bits round, too, so that a turned one is as good as a new one
AWAY = 3.0  # how far the viewer's camera is from what it looks at: its planes and limits suit such lengths
BYTES = 32  # of a splat in the viewer
MOST_BYTES = 2**30  # of a page's frames, before they are packed: browsers open no larger page
LONGEST = 3600.0  # s, of a frame
POLL = 1 / 30  # s, between looks at the buttons; faster films leave out frames
# Chromium refuses a page that is opened as a file the module that sorts splats by depth: it gets it as a plain script.
SORTS = """<script>
if (location.protocol === "file:") {
  const Plain = window.Worker;
  window.Worker = function (url, options) {
    if (options?.type !== "module" || !String(url).startsWith("blob:")) return new Plain(url, options);
    const asked = new XMLHttpRequest();
    asked.open("GET", url, false);
    asked.send();
    const code = asked.responseText.replaceAll("import.meta.url", "self.location.href");
    return new Plain(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  };
}
</script>"""


def write_html(
    path: str | Path,
    frames: Sequence[SplatState],
    *,
    dt: float,
    camera: Camera | None = None,
    title: str = "",
    speed: float = 1.0,
) -> Path:
    """Write a film of splats as a page with a scrubber, which any browser opens without a server, and return its path.

    Frames are `dt` seconds apart and play at `speed`; their numbers of splats may differ. The page opens on the view of
    `camera`, or on all splats, and is turned with the mouse. Splats have the colour of their harmonic of degree 0, from
    all sides. Frames in which all splats move as one body are stored as that motion, in some bytes.

    Raises:
        ImportError: viser is not there.
        ValueError: there is no frame or no splat in any, a frame is not a scene of finite splats, a time is not
            positive, the film is too large for a page, or the file is no .html in a folder that is there.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm") or not path.parent.is_dir():
        raise ValueError(f"A page is written to a .html in a folder that is there; got '{path}'.")
    pause = _pause(dt, speed)
    survey = _survey(frames)
    with _server(0, title) as server:
        stage = _Stage(server, survey, camera)
        recorder = server.get_scene_serializer()
        for frame in frames:
            stage.show(frame)
            if stage.sent > MOST_BYTES:
                raise ValueError(
                    f"A page holds at most {MOST_BYTES // BYTES:,} splats over all frames; these {len(frames)} frames "
                    "hold more. Take every k-th frame, or fewer splats."
                )
            recorder.insert_sleep(pause)
        page = recorder.as_html()
    head = f"<title>{html.escape(title or path.stem)}</title>{SORTS}"
    page = re.sub("<title>[^<]*</title>", lambda _: head, page, count=1)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def serve(
    frames: Sequence[SplatState],
    *,
    dt: float,
    camera: Camera | None = None,
    port: int = 8080,
    title: str = "",
    speed: float = 1.0,
    announce: Callable[[str], object] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Show a film of splats at http://127.0.0.1:port, with buttons to play and scrub, until Ctrl-C or `stop` is set.

    Frames, times and the camera are as in `write_html`; frames are gone through once, then asked for as they are shown.
    `announce` is called with the address once it answers; port 0 is any that is free.

    Raises:
        ImportError: viser is not there.
        ValueError: as in `write_html`, or the port is taken or none.
    """
    pause = _pause(dt, speed)
    survey = _survey(frames)
    _check_port(port)
    with suppress(KeyboardInterrupt), _server(port, title) as server:
        if port not in (0, server.get_port()):
            raise ValueError(_taken(port))
        stage = _Stage(server, survey, camera)
        stage.show(frames[0])
        if announce is not None:
            announce(f"http://{HOST}:{server.get_port()}")
        _play(server, stage, frames, dt, pause, stop or threading.Event())


def _play(
    server: Any, stage: _Stage, frames: Sequence[SplatState], dt: float, pause: float, stop: threading.Event
) -> None:
    """Show the frame that the scrubber is at, and move it while the film plays, until told to stop."""
    server.gui.configure_theme(show_logo=False, show_share_button=False)
    playing = server.gui.add_checkbox("Play", initial_value=len(frames) > 1)
    scrubber = server.gui.add_slider("Frame", min=0, max=max(len(frames) - 1, 1), step=1, initial_value=0)
    clock = server.gui.add_text("Time [s]", initial_value="0", disabled=True)
    ahead = max(1, round(POLL / pause))
    tick, shown = ahead * pause, 0
    due = time.monotonic() + tick
    while not stop.wait(min(POLL, max(0.0, due - time.monotonic()))):
        now = time.monotonic()
        if now >= due:
            due = max(due + tick, now)
            if playing.value:
                scrubber.value = (scrubber.value + ahead) % len(frames)
        if scrubber.value != shown and scrubber.value < len(frames):
            shown = scrubber.value
            stage.show(frames[shown])
            clock.value = f"{shown * dt:.4g}"


@contextmanager
def _server(port: int, title: str) -> Iterator[Any]:
    """Give a server of viser, which says nothing and is stopped whatever happens."""
    viser = needed("viser", "A view of splats in a browser", "view")
    with _quiet():
        server = viser.ViserServer(host=HOST, port=port, label=title or None, verbose=False)
    try:
        yield server
    finally:
        with _quiet():
            server.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what viser prints as it starts and ends, which no option of its own does, off the terminal."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class _Stage:
    """What a viewer shows: `show` sends a frame, or how the splats that were sent last have moved since."""

    def __init__(self, server: Any, survey: _Survey, camera: Camera | None) -> None:
        self.sent = 0
        """Bytes of splats sent so far."""
        self._server, self._scale, self._middle = server, survey.scale, survey.middle
        self._unit = _aim(server, survey, camera)
        self._handle: Any = None
        self._last: _Cloud | None = None

    def show(self, splats: SplatState) -> None:
        cloud = _cloud(splats)
        motion = None if self._last is None else _motion(self._last, cloud)
        with self._server.atomic():
            if motion is None:
                self._send(cloud)
                motion = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
            turn, shift = motion
            self._handle.wxyz = quaternion(turn).numpy()
            self._handle.position = (self._unit * (turn @ self._middle + shift - self._middle)).numpy()

    def _send(self, cloud: _Cloud) -> None:
        values = {
            "centers": (self._scale * (cloud.means - self._middle)).numpy(),
            "covariances": (self._scale**2 * cloud.covars).numpy(),
            "rgbs": cloud.colours.numpy(),
            "opacities": cloud.opacities[:, None].numpy(),
        }
        if self._handle is None:
            self._handle = self._server.scene.add_gaussian_splats("/splats", scale=self._unit / self._scale, **values)
        else:
            self._handle.set_gaussians(**values)
        self._last = cloud
        self.sent += BYTES * len(cloud.means)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cloud:
    """Splats as a viewer takes them: means [n, 3], covars [n, 3, 3]; colours [n, 3] and opacities [n] in bytes."""

    means: Tensor
    covars: Tensor
    colours: Tensor
    opacities: Tensor


def _cloud(splats: SplatState) -> _Cloud:
    there = splats.active
    if not bool(there.any()):  # the viewer takes no empty cloud: one splat that is not seen stands for it
        one = torch.zeros(1, 3, dtype=torch.float64)
        unseen = torch.zeros(1, 3, dtype=torch.uint8)
        return _Cloud(means=one, covars=torch.eye(3).double()[None], colours=unseen, opacities=unseen[:, 0])

    def rows(name: str) -> Tensor:
        return splats[name].detach()[there].cpu().double()

    return _Cloud(
        means=rows("means"),
        covars=rows("covars") if "covars" in splats else covariances(rows("quats"), rows("scales")),
        colours=_bytes(rows("harmonics")[:, 0] * FLAT + 0.5),
        opacities=_bytes(rows("opacities")),
    )


def _bytes(values: Tensor) -> Tensor:
    return (255 * values).round().clamp(0, 255).byte()


def _motion(before: _Cloud, after: _Cloud) -> tuple[Tensor, Tensor] | None:
    """Return the rotation [3, 3] and shift [3] that take one cloud to another, or None if none does (Kabsch 1976)."""
    if not torch.equal(before.colours, after.colours) or not torch.equal(before.opacities, after.opacities):
        return None
    here, there = before.means.mean(0), after.means.mean(0)
    one, other = before.means - here, after.means - there
    u, _, vt = torch.linalg.svd(one.T @ other)
    flip = torch.ones(3, dtype=u.dtype)
    flip[2] = torch.linalg.det(u @ vt).sign()
    turn = (u * flip @ vt).T
    farthest = torch.cat([before.means, after.means]).abs().max()
    off = (one @ turn.T - other).abs().max()
    if off > 1e-5 * one.abs().max() + 5e-7 * farthest:  # the second: what means of 32 bits are rounded by
        return None
    off = (turn @ before.covars @ turn.T - after.covars).abs().amax((1, 2))
    if bool((off > ROUNDED * after.covars.diagonal(dim1=1, dim2=2).amax(1)).any()):
        return None
    return turn, there - turn @ here


@dataclass(frozen=True, kw_only=True, eq=False)
class _Survey:
    """What all frames have in common: the box most splats are in, by middle and reach, and the scale for 16 bits.

    The viewer's lengths are counted from the middle: its 32 bits could not tell small things far from nought apart.
    """

    middle: Tensor
    reach: float
    scale: float


def _survey(frames: Sequence[SplatState]) -> _Survey:
    """Return the survey of frames, each of which is checked."""
    if not len(frames):
        raise ValueError("A film needs frames; got none.")
    lows, highs, least, most = [], [], math.inf, 0.0
    for number, frame in enumerate(frames):
        _check_frame(frame, number)
        there = frame.active
        if not bool(there.any()):
            continue
        means = frame.means.detach()[there].cpu().double().sort(dim=0).values
        spare = int(0.02 * len(means))
        lows.append(means[spare])
        highs.append(means[-1 - spare])
        variances = (
            torch.linalg.eigvalsh(frame.covars.detach()[there].double()).clamp(min=0)
            if "covars" in frame
            else frame.scales.detach()[there].double().square()
        )
        smallest = variances.amin(1).sort().values
        small = float(smallest[int(SMALL * len(smallest))])
        least = min(least, small) if small > 0 else least
        most = max(most, float(variances.max()))
    if not lows:
        raise ValueError(f"A film needs splats that are active; there is none in {len(frames)} frames.")
    scale = max(1.0, math.sqrt(LEAST_HALF / least)) if least < math.inf else 1.0
    scale = min(scale, math.sqrt(MOST_HALF / most)) if most > 0 else scale
    low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    return _Survey(middle=(low + high) / 2, reach=float((high - low).norm()) / 2 or 1.0, scale=scale)


def _check_frame(frame: SplatState, number: int) -> None:
    if not isinstance(frame, SplatState):
        raise ValueError(f"Frames must be SplatStates; frame {number} is a {type(frame).__name__}. Bind splats to it.")
    if frame.num_scenes != 1:
        raise ValueError(f"A film shows one scene; frame {number} has {frame.num_scenes}. Take scene(i) of it.")
    shape = ("covars",) if "covars" in frame else ("quats", "scales")
    for name in ("means", *shape, "opacities", "harmonics"):
        if name not in frame:
            raise ValueError(f"Splats need {name}, or covars; frame {number} has none.")
        if not bool(torch.isfinite(frame[name][frame.active]).all()):
            raise ValueError(f"{name} of frame {number} are not finite; take those splats, or the frame, out.")


def _pause(dt: float, speed: float) -> float:
    """Return the seconds from frame to frame as they are shown."""
    if not (0 < dt < math.inf and 0 < speed < math.inf and dt / speed <= LONGEST):
        raise ValueError(
            f"dt and speed must be above 0, and a frame last at most {LONGEST:g} s; got dt {dt} s, speed {speed}."
        )
    return dt / speed


def _aim(server: Any, survey: _Survey, camera: Camera | None) -> float:
    """Make a camera the viewer's first; return the viewer's length of one of the scene's."""
    middle, reach = survey.middle, survey.reach
    if camera is None:
        camera = Camera.look_at(middle + 3 * reach * middle.new_tensor([0.65, -0.65, 0.39]), middle, field_of_view=45.0)
    pose, K = camera.viewmat.detach().cpu().double(), camera.K.detach().cpu().double()
    eye = -pose[:3, :3].T @ pose[:3, 3] - middle
    right, down, ahead = pose[:3, :3]
    depth = -float(eye @ ahead)
    depth = depth if depth > 0.1 * reach else reach  # within the splats, or turned away from them
    unit = AWAY / depth
    first = server.initial_camera
    first.position = (unit * eye).tolist()
    first.look_at = (unit * (eye + depth * ahead)).tolist()
    first.up = _upwards(right, down).tolist()
    first.fov = 2 * math.atan(0.5 * camera.height / float(K[1, 1]))
    return unit


def _upwards(right: Tensor, down: Tensor) -> Tensor:
    """Return the axis round which the mouse turns: the scene's third or second if it is upright in the picture."""
    for axis in torch.eye(3, dtype=down.dtype)[[2, 1]].unbind():
        if abs(float(right @ axis)) < 1e-3 and float(down @ axis) < -0.1:
            return axis
    return -down


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"A port is a number from 0 to 65535; got {port}.")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise ValueError(_taken(port)) from error


def _taken(port: int) -> str:
    return f"Port {port} is taken or not allowed; give another, or 0 for any that is free."
