"""The commands for scenes, as a user calls them: fit-scene, render, view."""

from __future__ import annotations

import json
import socket
import sys
import threading

import pytest
import torch
from PIL import Image
from test_scenes import ball, frames_of, rolling

from simworld import view_scene, write_trajectories
from simworld.cli import main
from simworld.render.camera import orbit
from simworld.render.field_shapes import field_to_splats
from simworld.render.fields import PositionalField, load_field, save_field
from simworld.render.files import read_splats, write_splats
from simworld.render.photos import Photos, write_transforms
from simworld.render.splats import render_with_alpha


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line and return its exit code, standard output and error."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["simworld", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capfd.readouterr()
        return end.value.code or 0, out, " ".join(error.split())

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with twelve photographs, with opacities, of a ball of splats."""
    cameras = [*orbit((0, 0, 0), distance=3, count=8, width=24, height=20)]
    cameras += orbit((0, 0, 0), distance=3, count=4, elevation=60, width=24, height=20)
    images = []
    for camera in cameras:
        made, alpha = render_with_alpha(ball(), camera)
        images.append((torch.cat([made / alpha.clamp(min=1e-3), alpha], 2).clamp(0, 1) * 255).round().byte())
    names = tuple(str(k) for k in range(12))
    folder = tmp_path_factory.mktemp("photos") / "ball"
    write_transforms(folder, Photos(images=tuple(images), cameras=tuple(cameras), names=names))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with trajectories, splats and a field."""
    folder = tmp_path_factory.mktemp("files")
    write_trajectories(folder / "recorded.h5", [rolling(), rolling(2.0)], dataset="balls")
    write_trajectories(folder / "predicted.h5", [rolling(0.5), rolling(1.5)], dataset="balls")
    write_trajectories(folder / "short.h5", [rolling(0.5, frames=3)], dataset="balls")
    write_trajectories(folder / "fewer.h5", [rolling(count=3)], dataset="balls")
    write_trajectories(folder / "slower.h5", [rolling(dt=0.2)], dataset="balls")
    write_splats(folder / "ball.ply", ball())
    torch.manual_seed(0)
    save_field(folder / "field.safetensors", PositionalField([[-1.0] * 3, [1.0] * 3], width=8, num_layers=1))
    (folder / "text.h5").write_text("no trajectories")
    (folder / "text.ply").write_text("no splats")
    (folder / "text.safetensors").write_text("no field")
    return folder


def fit(call, photos, out, *more):
    return call("fit-scene", photos, "--out", out, "--steps", 8, "--splats", 60, "--degree", 0, *more)


def test_splats_are_fitted_to_photographs_and_judged_beside_what_needs_no_fit(call, photos, tmp_path):
    code, out, said = fit(call, photos, tmp_path / "ball.ply", "--json", "-")
    assert code == 0, said
    assert "10 photographs to learn from, 2 held out" in said
    assert "step 8" in said
    rows = {(row["model"], row["metric"]): row for row in json.loads(out)["rows"]}
    assert set(rows) == {(m, k) for m in ("splats", "mean_photo", "nearest_photo") for k in ("psnr", "ssim")}
    assert all(row["trajectories"] == 2 and row["dataset"] == "ball" for row in rows.values())
    assert rows["splats", "psnr"]["unit"] == "dB"
    assert len(read_splats(tmp_path / "ball.ply")) == 60


def test_all_photographs_may_be_learned_from_and_nothing_judges_then(call, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be wrapped
    for kind, name in (("splats", "ball.ply"), ("nerf", "ball.safetensors")):
        words = "--kind", kind, "--all", "--steps", 3, "--json", "-"
        code, found, said = call("fit-scene", photos, "--out", name, *words)
        assert code == 0, said
        assert "12 photographs to learn from, 0 held out" in said
        assert f"wrote {name}; nothing was held out to judge it by" in said
        assert "nan" not in said
        assert json.loads(found)["rows"] == []


def test_a_fit_made_again_is_the_same_and_leaves_nothing_beside_it(call, photos, tmp_path):
    out = tmp_path / "ball.ply"
    assert fit(call, photos, out)[0] == 0
    before = out.read_bytes()
    code, _, said = fit(call, photos, out)
    assert code == 0, said
    assert out.read_bytes() == before
    assert not list(tmp_path.glob("*.training"))
    code, _, said = fit(call, photos, out, "--seed", 3)
    assert code == 0, said
    assert out.read_bytes() != before


def test_a_field_is_fitted_and_gone_on_with(call, photos, tmp_path):
    out = tmp_path / "ball.safetensors"
    code, said_json, said = call("fit-scene", photos, "--out", out, "--kind", "nerf", "--steps", 2, "--json", "-")
    assert code == 0, said
    assert {row["model"] for row in json.loads(said_json)["rows"]} == {"nerf", "mean_photo", "nearest_photo"}
    assert "step 2" in said
    first = load_field(out).state_dict()
    code, _, said = call("fit-scene", photos, "--out", out, "--kind", "nerf", "--steps", 3)
    assert code == 0, said
    assert "step 3" in said
    assert "step 2" not in said
    assert any(not torch.equal(value, first[name]) for name, value in load_field(out).state_dict().items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kind", "mesh"], "--kind must be splats or nerf; got 'mesh'"),
        (["--out", "{tmp}/a.txt"], "splats are written to .ply"),
        (["--out", "{tmp}/none/a.ply"], "There is no folder"),
        (["--kind", "nerf"], "nerf are written to .safetensors"),
        (["--background", "grey"], "--background must be white, black or R,G,B from 0 to 1; got 'grey'"),
        (["--background", "0,0,2"], "--background must be"),
        (["--background", "nan,0,0"], "--background must be"),
        (["--strategy", "none"], "--strategy must be one of mcmc, densify; got 'none'"),
        (["--minutes", "-1"], "minutes must be above 0; got -1"),
        (["--minutes", "nan"], "minutes must be above 0; got nan"),
        (["--kind", "nerf", "--out", "{tmp}/a.safetensors", "--minutes", "0"], "above 0; got 0"),
        (["--kind", "nerf", "--out", "{tmp}/a.safetensors", "--minutes", "nan"], "above 0; got nan"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--degree", "4"], "Invalid value for '--degree'"),
        (["--json", "{tmp}/none/a.json"], "--json must be a file in a folder that is there"),
    ],
)
def test_fits_that_cannot_be_are_refused_in_a_sentence(call, photos, tmp_path, words, says):
    words = [word.format(tmp=tmp_path) for word in words]
    given = [] if "--out" in words else ["--out", tmp_path / "a.ply"]
    code, _, said = call("fit-scene", photos, *given, "--steps", 1, *words)
    assert code == 2
    assert says in said.replace("│", "").replace("  ", " ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_photographs_that_are_not_there_are_named(call, photos, tmp_path):
    code, _, said = fit(call, tmp_path / "none", tmp_path / "a.ply")
    assert (code, "There is no folder or file" in said) == (2, True)
    told = json.loads((photos / "transforms.json").read_text())
    for frame in told["frames"]:
        frame["file_path"] = str(photos / frame["file_path"])
    code, _, said = fit(call, tmp_path, tmp_path / "a.ply")
    assert (code, "transforms.json" in said) == (2, True)
    (tmp_path / "transforms.json").write_text(json.dumps({**told, "frames": told["frames"][:1]}))
    code, _, said = fit(call, tmp_path, tmp_path / "a.ply")
    assert code == 2
    assert "error:" in said


def test_render_writes_films_and_pictures(call, files, tmp_path):
    code, _, said = call("render", files / "recorded.h5", "--out", tmp_path / "a.gif", "--size", "80x60", "--every", 2)
    assert (code, said) == (0, f"wrote {tmp_path / 'a.gif'}")
    frames, times = frames_of(tmp_path / "a.gif")
    assert (len(frames), times) == (3, [200] * 3)
    assert frames[0].width == 80
    out = tmp_path / "a.png"
    code, _, said = call("render", files / "recorded.h5", "--out", out, "--size", "80x60", "--field", "velocities")
    assert code == 0, said
    with Image.open(out) as strip:
        assert strip.width == 5 * 80
    one = out.read_bytes()
    assert call("render", files / "recorded.h5", "--out", out, "--size", "80x60", "--episode", 1)[0] == 0
    assert out.read_bytes() != one


def test_render_beside_the_recorded_says_how_wrong_pictures_are(call, files, tmp_path):
    words = "--compare", files / "recorded.h5", "--size", "80x60", "--json", "-"
    code, out, said = call("render", files / "predicted.h5", "--out", tmp_path / "a.gif", *words)
    assert code == 0, said
    assert frames_of(tmp_path / "a.gif")[0][0].width == 3 * 80
    rows = {(row["model"], row["metric"], row["horizon"]): row for row in json.loads(out)["rows"]}
    assert rows["predicted", "psnr", "all"]["value"] > rows["static", "psnr", "all"]["value"] > 5
    assert rows["predicted", "chamfer", 1]["dataset"] == "recorded.h5"
    assert "predicted.h5 against recorded.h5: silhouette iou" in said
    code, _, said = call("render", files / "short.h5", "--out", tmp_path / "b.gif", *words[:4])
    assert code == 0, said
    assert len(frames_of(tmp_path / "b.gif")[0]) == 3, "as long as both are"


def test_render_writes_scenes_that_other_programs_read(call, files, tmp_path):
    pytest.importorskip("viser", reason="viser is not here; it comes with simworld[view]")
    pytest.importorskip("pxr", reason="usd-core is not here; it comes with simworld[render]")
    from simworld.render.usd import read_usd

    for name in ("a.html", "a.usda", "a.ply"):
        code, _, said = call("render", files / "recorded.h5", "--out", tmp_path / name, "--every", 2)
        assert code == 0, said
    assert len(read_usd(tmp_path / "a.usda").frames) == 3
    assert read_usd(tmp_path / "a.usda").dt == pytest.approx(0.2)
    assert len(read_splats(tmp_path / "a.ply")) == 4 * 200
    code, _, said = call("render", tmp_path / "a.usda", "--out", tmp_path / "a.gif", "--size", "40x30")
    assert code == 0, said
    frames, times = frames_of(tmp_path / "a.gif")
    assert times == [200] * 3
    assert frames[0].tobytes() != frames[2].tobytes(), "what moves in the stage moves in its film"
    code, _, said = call("render", tmp_path / "a.usda", "--out", tmp_path / "b.usda", "--every", 2)
    assert code == 0, said
    assert read_usd(tmp_path / "b.usda").dt == pytest.approx(0.4)
    assert "<title>recorded</title>" in (tmp_path / "a.html").read_text()


def test_render_draws_splats_from_where_it_is_told(call, files, tmp_path):
    made = []
    for view in ("0,0", "0,80", "90,0"):
        out = tmp_path / "a.png"
        code, _, said = call("render", files / "ball.ply", "--out", out, "--size", "40x30", "--camera", view)
        assert code == 0, said
        with Image.open(out) as picture:
            assert picture.size == (40, 30)
        made.append(out.read_bytes())
    assert len(set(made)) == 3
    code, _, said = call("render", files / "ball.ply", "--out", tmp_path / "a.spz")
    assert code == 0, said
    assert len(read_splats(tmp_path / "a.spz")) == 40
    code, _, said = call("render", files / "ball.ply", "--out", tmp_path / "a.gif", "--size", "16x16")
    assert code == 0, said
    assert len(frames_of(tmp_path / "a.gif")[0]) > 10


def test_render_draws_fields(call, files, tmp_path, monkeypatch):
    code, _, said = call("render", files / "field.safetensors", "--out", tmp_path / "a.png", "--size", "24x16")
    assert code == 0, said
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (24, 16)
        low, high = picture.convert("L").getextrema()
        assert high - low > 20
    monkeypatch.setattr(view_scene, "field_to_splats", lambda field: field_to_splats(field, count=50))
    code, _, said = call("render", files / "field.safetensors", "--out", tmp_path / "a.ply")
    assert code == 0, said
    assert len(read_splats(tmp_path / "a.ply")) == 50


def test_render_moves_the_splats_of_a_file(call, files, tmp_path):
    words = "--splats", files / "ball.ply", "--mode", "rigid", "--size", "40x30"
    code, _, said = call("render", files / "recorded.h5", "--out", tmp_path / "a.gif", *words)
    assert code == 0, said
    frames = frames_of(tmp_path / "a.gif")[0]
    pixels = [list(frame.tobytes()) for frame in (frames[0], frames[-1])]
    reds = [[red - blue > 60 for red, blue in zip(row[::3], row[2::3], strict=True)] for row in pixels]
    assert all(sum(row) > 5 for row in reds)
    assert reds[0] != reds[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recorded.h5", "--out", "a.avi"], "--out must be a .mp4, .gif"),
        (["recorded.h5", "--out", "none/a.gif"], "in a folder that is there; got"),
        (["none.h5", "--out", "a.gif"], "There is no file"),
        (["recorded.h5", "--out", "a.gif", "--compare", "none.h5"], "There is no file"),
        (["recorded.h5", "--out", "a.gif", "--json", "none/a.json"], "--json must be a file in a folder that is there"),
        (["text.h5", "--out", "a.gif"], "text.h5"),
        (["text.ply", "--out", "a.gif"], "text.ply"),
        (["text.safetensors", "--out", "a.png"], "text.safetensors"),
        (["notes.txt", "--out", "a.gif"], "What is drawn is a .h5"),
        (["recorded.h5", "--out", "a.gif", "--episode", "2"], "holds 2 episodes, from 0; got --episode 2"),
        (["recorded.h5", "--out", "a.gif", "--field", "nope"], "shows nope; the states have positions"),
        (["recorded.h5", "--out", "a.gif", "--camera", "0"], "--camera must be AZIMUTH,ELEVATION"),
        (["recorded.h5", "--out", "a.gif", "--camera", "0,95"], "the latter -89 to 89; got '0,95'"),
        (["recorded.h5", "--out", "a.gif", "--camera", "inf,0"], "--camera must be"),
        (["recorded.h5", "--out", "a.gif", "--size", "8x9"], "--size must be WIDTHxHEIGHT"),
        (["recorded.h5", "--out", "a.gif", "--size", "99999x9"], "each 16 to 8192 pixels"),
        (["recorded.h5", "--out", "a.gif", "--every", "0"], "Invalid value for '--every'"),
        (["recorded.h5", "--out", "a.html", "--compare", "recorded.h5"], "--compare draws panels beside each other"),
        (["ball.ply", "--out", "a.gif", "--compare", "recorded.h5"], "--compare is for trajectories"),
        (["recorded.h5", "--out", "a.gif", "--compare", "ball.ply"], "--compare is for trajectories"),
        (["recorded.h5", "--out", "a.gif", "--compare", "fewer.h5"], "of 4 and a ObjectState of 3"),
        (["recorded.h5", "--out", "a.gif", "--compare", "slower.h5"], "frames of one dt; got 0.1 and 0.2"),
        (["ball.ply", "--out", "a.gif", "--field", "means"], "--field is for trajectories (.h5)"),
        (["ball.ply", "--out", "a.gif", "--splats", "ball.ply"], "--splats is for trajectories (.h5)"),
        (["field.safetensors", "--out", "a.png", "--episode", "1"], "--episode is for trajectories (.h5)"),
        (["recorded.h5", "--out", "a.gif", "--splats", "ball.ply", "--mode", "glue"], "mode must be one of particle"),
        (["recorded.h5", "--out", "a.gif", "--splats", "ball.ply", "--mode", "mesh"], "needs"),
        (["recorded.h5", "--out", "a.gif", "--splats", "none.ply"], "There is no file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(call, files, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    given = [str(files / word) if (files / word).exists() else word for word in words]
    code, _, said = call("render", *given)
    assert code == 2
    assert says in said.replace("│", "").replace("  ", " ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("PIL", ["recorded.h5", "--out", "a.gif"], "pip install 'simworld[view]'"),
        ("imageio_ffmpeg", ["recorded.h5", "--out", "a.mp4", "--size", "32x32"], "needs imageio-ffmpeg; install it"),
        ("matplotlib", ["recorded.h5", "--out", "a.gif", "--field", "velocities"], "A colour scale needs matplotlib"),
        ("viser", ["recorded.h5", "--out", "a.html"], "needs viser; install it with: pip install 'simworld[view]'"),
        ("pxr", ["recorded.h5", "--out", "a.usd"], "pip install 'simworld["),
    ],
)
def test_packages_that_are_not_there_are_named(call, files, tmp_path, monkeypatch, module, words, says):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    code, _, said = call("render", files / words[0], *words[1:])
    assert code == 2
    assert says in said
    assert not list(tmp_path.iterdir())


def test_view_says_where_it_is_until_it_is_stopped(call, files, monkeypatch):
    pytest.importorskip("viser", reason="viser is not here; it comes with simworld[view]")
    from simworld.render import web

    stop = threading.Event()
    stop.set()
    served = web.serve
    monkeypatch.setattr(web, "serve", lambda frames, **given: served(frames, **given, stop=stop))
    for name in ("recorded.h5", "ball.ply"):
        code, _, said = call("view", files / name, "--port", 0)
        assert code == 0, said
        assert "http://127.0.0.1:" in said
        assert f"{name}; Ctrl-C ends it" in said


def test_view_refuses_a_port_that_is_taken_and_files_of_other_kinds(call, files):
    pytest.importorskip("viser", reason="viser is not here; it comes with simworld[view]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, said = call("view", files / "ball.ply", "--port", port)
    assert (code, said) == (2, f"error: Port {port} is taken or not allowed; give another, or 0 for any that is free.")
    for name, says in (("none.h5", "There is no file"), ("none.txt", "What is drawn is a .h5"), ("text.h5", "text.h5")):
        code, _, said = call("view", files / name)
        assert code == 2
        assert says in said
