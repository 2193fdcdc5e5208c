"""States from films: bodies of our own engine are filmed, found again from the pictures, and rolled on.

    python benchmarks/recover.py --json benchmarks/results/recover.json

Episodes of push_3d's engine (seeded, not those of its data), from their twentieth step on: eight frames seen by two
cameras of 160 by 120 pixels. The film shows splats of the bodies as `to_splats` draws them, bound to the bodies as they
are at the start; `recover` is given the first frame put off by two centimetres. Rows: how far the found places, turns
and velocities are from the true ones, those of the guess (nothing moves) beside them; and the places after twenty
further steps of the shipped model, rolled on from the found and from the true state.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import torch

import simworld
from simworld.bench import result
from simworld.metrics import Row
from simworld.physics import push_episode
from simworld.render import Look, bind, orbit, pose, recover, render_splats, to_splats

START, FRAMES, AHEAD, SIZE, OFF = 20, 8, 20, (160, 120), 0.02


def film(path, look):
    first = path.initial
    binding = bind(to_splats(first, look), first, mode="rigid")
    centre = (look.low + look.high) / 2
    cameras = orbit(centre, distance=2.2 * look.size, count=2, elevation=40, width=SIZE[0], height=SIZE[1])
    with torch.no_grad():
        frames = [pose(binding, path.frame(t)) for t in range(FRAMES)]
        pictures = [render_splats(frame, cameras, background=(1.0, 1.0, 1.0)) for frame in frames]
    return binding, cameras, torch.stack(pictures)


def angles(found, true):
    """Return the mean angle [degree] between turns [..., 4]."""
    cosines = (found * true).sum(-1).abs().clamp(max=1).double()
    return float(torch.rad2deg(2 * torch.acos(cosines)).mean())


def measure(seed: int, model) -> dict[tuple[str, str], float]:
    path = push_episode([10_000, seed]).to(torch.float32)
    path = path.window(START, len(path))
    look = Look.of(path.window(0, FRAMES))
    binding, cameras, pictures = film(path, look)
    drawn = torch.Generator().manual_seed(seed)
    off = torch.randn(path.initial.positions.shape, generator=drawn).to(path.initial.positions) * OFF / math.sqrt(3)
    guess = path.initial.replace(positions=path.initial.positions + off)
    found = recover(binding, guess, pictures, cameras, dt=path.dt)
    true = path.window(0, FRAMES)
    values = {}
    for name, places, turns in (
        ("recovered", found["positions"], found["quats"]),
        ("guess, standing still", guess.positions.expand_as(true["positions"]), guess.quats.expand_as(true["quats"])),
    ):
        values[name, "position_error"] = float((places - true["positions"]).norm(dim=2).mean())
        values[name, "angle_error"] = angles(turns, true["quats"])
    speeds = true["velocities"][1:]
    values["recovered", "velocity_error"] = float((found["velocities"][1:] - speeds).norm(dim=2).mean())
    values["guess, standing still", "velocity_error"] = float(speeds.norm(dim=2).mean())
    last, actions = FRAMES - 1, path.actions[FRAMES - 1 : FRAMES - 1 + AHEAD]
    starts = {"recovered, rolled on": found.frame(last), "true, rolled on": path.frame(last)}
    ends = path["positions"][last + AHEAD]
    for name, state in starts.items():
        dynamic = {name: state[name] for name in ("positions", "quats", "velocities", "angular_velocities")}
        with torch.no_grad():
            rolled = simworld.rollout(path.frame(last).replace(**dynamic), actions, simulator=model)
        values[name, "position_error_ahead"] = float((rolled["positions"][-1] - ends).norm(dim=1).mean())
    values["standing still", "position_error_ahead"] = float((path["positions"][last] - ends).norm(dim=1).mean())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = simworld.load_checkpoint("push_3d_0")
    found = [measure(k, model) for k in range(given.episodes)]
    rows = []
    for name, metric in found[0]:
        value = fmean(one[name, metric] for one in found)
        unit = {"angle_error": "degree", "velocity_error": "m/s"}.get(metric, "m")
        horizon = AHEAD if metric.endswith("ahead") else FRAMES
        print(f"{name}: {metric} {value:.4g} {unit}")
        rows.append(
            Row(
                model=name,
                dataset="push_3d engine",
                metric=metric,
                horizon=horizon,
                value=value,
                unit=unit,
                trajectories=len(found),
            )
        )
    if given.json:
        given.json.write_text(json.dumps(result(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
