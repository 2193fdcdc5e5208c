"""How long splats take on a CPU: a real scene, and as pixels, splats and how many of them overlap grow.

    OMP_NUM_THREADS=1 python benchmarks/rasterizer.py gs_dynamics_rope --json benchmarks/results/rasterizer.json

Medians of CPU time in milliseconds, one thread, and of the wall's with one and two threads for tiles; "backward" is
forward and backward together. The last rows are of random splats in a cube. Timings on a machine that others use are
noisy: their quotients, measured in turn, are less so. "most_of_two" is what the machine allows: how many times as much
two threads get done as one where each composites by itself, which has nothing to wait for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rope_photos import read

from simworld.bench import environment
from simworld.kernels.splats import Projected, composite, tile_threads
from simworld.kinds import SplatState
from simworld.render import Camera, rasterization, render_splats


def job(splats: SplatState, camera: Camera, backward: bool):
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                render_splats(splats, camera)

        return forward
    names = ("means", "opacities", "harmonics", "scales", "quats")
    given = splats.replace(**{name: splats[name].clone().requires_grad_() for name in names})

    def both() -> None:
        render_splats(given, camera).sum().backward()
        for name in names:
            given[name].grad = None

    return both


def most_of_two(splats: SplatState, camera: Camera, repeats: int) -> float:
    """Return how much faster two compositions are on two threads, each by itself, than one after the other."""
    with torch.no_grad():
        viewmats, Ks = camera.viewmat[None].to(splats.means), camera.K[None].to(splats.means)
        _, _, told = rasterization(
            splats.means, splats.quats, splats.scales, splats.opacities, splats.harmonics, viewmats, Ks,
            camera.width, camera.height, sh_degree=0,
        )  # fmt: skip
    flat = Projected(
        means=told["means2d"],
        conics=told["conics"],
        opacities=told["opacities"],
        colors=torch.rand(len(told["means2d"]), 3),
        radii=told["radii"],
        pictures=told["camera_ids"],
        num_pictures=1,
        width=camera.width,
        height=camera.height,
    )
    one, both = [], []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(repeats + 2):
            start = time.perf_counter()
            composite(flat)
            between = time.perf_counter()
            list(pool.map(composite, [flat, flat]))
            one.append(between - start)
            both.append(time.perf_counter() - between)
    return 2 * statistics.median(one[2:]) / statistics.median(both[2:])


def measure(splats: SplatState, camera: Camera, repeats: int) -> dict[str, float]:
    """Return medians [ms], measured in turn."""
    jobs = {"forward": (False, 1), "backward": (True, 1), "forward_two": (False, 2), "backward_two": (True, 2)}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    made = {name: job(splats, camera, backward) for name, (backward, _) in jobs.items()}
    for number in range(repeats + 2):
        for name, (_, threads) in jobs.items():
            with tile_threads(threads):
                start = time.process_time(), time.perf_counter()
                made[name]()
                ends = time.process_time(), time.perf_counter()
            if number >= 2:
                cpu[name].append(1e3 * (ends[0] - start[0]))
                wall[name].append(1e3 * (ends[1] - start[1]))
    found = {f"{name}_cpu": statistics.median(values) for name, values in cpu.items()}
    found |= {f"{name}_wall": statistics.median(values) for name, values in wall.items()}
    found["backward_per_forward"] = found["backward_cpu"] / found["forward_cpu"]
    found["speedup_of_two"] = found["forward_wall"] / found["forward_two_wall"]
    found["speedup_of_two_backward"] = found["backward_wall"] / found["backward_two_wall"]
    found["most_of_two"] = most_of_two(splats, camera, repeats)
    return found


def random_scene(count: int, width: float) -> SplatState:
    drawn = torch.Generator().manual_seed(0)
    return SplatState(
        means=2 * torch.rand(count, 3, generator=drawn) - 1,
        quats=torch.randn(count, 4, generator=drawn),
        scales=width * (0.5 + torch.rand(count, 3, generator=drawn)),
        opacities=torch.rand(count, generator=drawn),
        harmonics=torch.randn(count, 1, 3, generator=drawn),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gs_dynamics_rope")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    splats, photos = read(given.folder)
    rows = [{"scene": "gs_dynamics_rope", "splats": len(splats), "width": 640, "height": 480}]
    rows[0] |= measure(splats, photos.cameras[0], 15)
    camera = Camera.look_at((3.0, 2.0, 2.0), (0.0, 0.0, 0.0), width=640, height=480)
    sizes = [(count, 0.3 / count ** (1 / 3), 640, 480) for count in (1_000, 10_000, 100_000, 1_000_000)]
    sizes += [(10_000, 0.3 / 10_000 ** (1 / 3), w, h) for w, h in ((160, 120), (320, 240), (1280, 960))]
    sizes += [(10_000, wide * 0.3 / 10_000 ** (1 / 3), 640, 480) for wide in (0.25, 4.0)]
    for count, width, across, down in sizes:
        found = measure(random_scene(count, width), camera.resized(across, down), 3 if count > 100_000 else 7)
        rows.append({"scene": "random", "splats": count, "scale": width, "width": across, "height": down, **found})
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if given.json:
        given.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
