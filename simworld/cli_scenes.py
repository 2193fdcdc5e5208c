"""The commands for 3D scenes: fit-scene, render, view; they parse, call the public API and print."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from simworld.render.fit_fields import FieldReport
from simworld.render.fit_splats import FitReport, Strategy
from simworld.screen import JsonOption, check_json, print_rows, screen, write_json, wrote

FIELD_STEPS = 20_000  # of a radiance field, where neither steps nor minutes are said


def fit_scene(
    photos: Annotated[Path, typer.Argument(help="transforms.json, or a folder with one or with a COLMAP model.")],
    out: Annotated[Path, typer.Option(help="File for the scene: .ply, .splat, .spz; of a nerf .safetensors.")],
    kind: Annotated[str, typer.Option(help="splats or nerf.")] = "splats",
    minutes: Annotated[float | None, typer.Option(help="End after so long, instead of after --steps.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Photographs, or batches of rays, to learn from.")] = None,
    splats: Annotated[int, typer.Option(min=1, help="The most splats there may be.")] = 20_000,
    degree: Annotated[int, typer.Option(min=0, max=3, help="Of splats' harmonics.")] = 2,
    strategy: Annotated[str, typer.Option(help="How splats come and go: mcmc or densify.")] = "mcmc",
    background: Annotated[
        str, typer.Option(help="Behind photographs with opacities: white, black or R,G,B.")
    ] = "white",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    learn_all: Annotated[bool, typer.Option("--all", help="Learn from all photographs and hold none out.")] = False,
    skip_missing: Annotated[bool, typer.Option(help="Go on without photographs that are not there.")] = False,
    json_to: JsonOption = None,
) -> None:
    """Fit Gaussian splats or a radiance field to posed photographs; run it again after an interruption and it goes on.

    Example: simworld fit-scene photos/lego --out lego.ply --minutes 10
    """
    from simworld import bench
    from simworld.render.fit_splats import SplatFit
    from simworld.render.photos import read_photos
    from simworld.scene_fits import check_out, fit_field_file, fit_splat_file, photo_rows

    if kind not in ("splats", "nerf"):
        raise ValueError(f"--kind must be splats or nerf; got '{kind}'.")
    behind = _color(background)
    check_json(json_to)
    check_out(out, kind)
    given = {} if steps is None else {"num_steps": steps}
    begin, way = min(splats, SplatFit.initial), _strategy(strategy)
    how = SplatFit(minutes=minutes, most=splats, initial=begin, degree=degree, strategy=way, seed=seed, **given)
    known = read_photos(photos, split=None if learn_all else "train", skip_missing=skip_missing)
    held = None if learn_all else read_photos(photos, split="test", skip_missing=skip_missing)
    screen.print(f"{len(known)} photographs to learn from, {len(held or ())} held out", highlight=False)
    if kind == "nerf":
        count = None if minutes else steps or FIELD_STEPS
        fit_field_file(
            known, out, held=held, minutes=minutes, num_steps=count, seed=seed, background=behind, watch=_told
        )
    else:
        fit_splat_file(known, out, how, held=held, background=behind, watch=_told)
    rows = [] if held is None else photo_rows(kind, out, known, held, dataset=photos.name, background=behind)
    if rows:
        print_rows(f"{photos.name}: photographs held out", rows)
    wrote(out if rows else f"{out}; nothing was held out to judge it by")
    write_json(json_to, bench.result(rows))


def _told(report: FitReport | FieldReport) -> None:
    held = "" if report.psnr is None else f", held out {report.psnr:.2f} dB, SSIM {report.ssim:.4f}"
    screen.print(f"step {report.step}, {report.seconds:.0f} s: loss {report.loss:.4f}{held}", highlight=False)


def _strategy(said: str) -> Strategy:
    known = get_args(Strategy)
    if said not in known:
        raise ValueError(f"--strategy must be one of {', '.join(known)}; got '{said}'.")
    return cast(Strategy, said)


def _color(said: str) -> tuple[float, float, float]:
    named = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
    if said in named:
        return named[said]
    try:
        parts = [float(part) for part in said.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part <= 1 for part in parts):
        raise ValueError(f"--background must be white, black or R,G,B from 0 to 1; got '{said}'.")
    return parts[0], parts[1], parts[2]


def render(
    file: Annotated[
        Path, typer.Argument(help="Trajectories (.h5), splats (.ply, .splat, .spz, .usd) or a field (.safetensors).")
    ],
    out: Annotated[Path, typer.Option(help="Film or picture: .mp4, .gif, .png, .html, .usd; of the first frame .ply.")],
    compare: Annotated[Path | None, typer.Option(help="Recorded trajectories (.h5), drawn beside with errors.")] = None,
    episode: Annotated[int, typer.Option(min=0, help="Which episode, from 0.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Draw each so many frames.")] = 1,
    field: Annotated[str | None, typer.Option(help="Colour entities by this field.")] = None,
    camera: Annotated[str, typer.Option(help="AZIMUTH,ELEVATION in degrees, round the scene.")] = "-60,20",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels of a panel.")] = "480x360",
    splats: Annotated[Path | None, typer.Option(help="Splats of the scene at its first frame, to be posed.")] = None,
    mode: Annotated[str, typer.Option(help="How splats follow: particle, knn, mesh, tet or rigid.")] = "knn",
    json_to: JsonOption = None,
) -> None:
    """Draw a rollout, beside the recorded one if it is given, or a scene that was fitted to photographs.

    Example: simworld render predicted.h5 --out film.mp4 --compare data/rope/test.h5
    """
    from simworld import bench
    from simworld.view_scene import Shot, draw_scene

    check_json(json_to)
    shot = Shot(size=_size(size), angles=_angles(camera), field=field, every=every, splats=splats, mode=mode)
    with screen.status("drawing"):
        rows = draw_scene(file, out, shot, compare=compare, episode=episode)
    if rows:
        print_rows(f"{file.name} against {compare.name if compare else ''}", rows)
    wrote(out)
    write_json(json_to, bench.result(rows))


def view(
    file: Annotated[
        Path, typer.Argument(help="Trajectories (.h5), splats (.ply, .splat, .spz, .usd) or a field (.safetensors).")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page, on this machine only.")] = 8080,
    episode: Annotated[int, typer.Option(min=0, help="Which episode, from 0.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Show each so many frames.")] = 1,
    field: Annotated[str | None, typer.Option(help="Colour entities by this field.")] = None,
    splats: Annotated[Path | None, typer.Option(help="Splats of the scene at its first frame, to be posed.")] = None,
    mode: Annotated[str, typer.Option(help="How splats follow: particle, knn, mesh, tet or rigid.")] = "knn",
) -> None:
    """Show a rollout or a scene in the browser, to walk round it and scrub through time; Ctrl-C ends it.

    Example: simworld view predicted.h5 --port 8080
    """
    from simworld.render.web import serve
    from simworld.view_scene import Shot, playing_speed, scene_frames

    shot = Shot(size=(640, 480), angles=(-60.0, 20.0), field=field, every=every, splats=splats, mode=mode)
    frames, dt, camera = scene_frames(file, shot, episode=episode)
    serve(
        frames,
        dt=dt,
        camera=camera,
        port=port,
        title=file.stem,
        speed=playing_speed(dt, every),
        announce=lambda address: screen.print(f"{address} shows {file}; Ctrl-C ends it", markup=False),
    )


def _size(said: str) -> tuple[int, int]:
    parts = said.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 16 <= int(part) <= 8192 for part in parts):
        raise ValueError(f"--size must be WIDTHxHEIGHT, each 16 to 8192 pixels; got '{said}'.")
    return int(parts[0]), int(parts[1])


def _angles(said: str) -> tuple[float, float]:
    try:
        turn, rise = (float(part) for part in said.split(","))
    except ValueError:
        turn = rise = math.nan
    if not (math.isfinite(turn) and -89 <= rise <= 89):
        raise ValueError(f"--camera must be AZIMUTH,ELEVATION in degrees, the latter -89 to 89; got '{said}'.")
    return turn, rise
