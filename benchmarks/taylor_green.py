"""How the Taylor-Green vortex of `tgv_2d` fades, beside the exact one, and what an episode costs.

    OMP_NUM_THREADS=1 python benchmarks/taylor_green.py --json benchmarks/results/taylor_green.json

Energy is LagrangeBench's, the mean square of the displacement from frame to frame over their time, against the exact
one in the middle of the interval; the largest speed likewise. Density is that of the particles of a frame.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from simworld.bench import environment
from simworld.data.generate import read_recipe
from simworld.physics.sph import LiquidState, SPHEngine
from simworld.physics.sph_worlds import VISCOSITY, tgv_2d

DATASETS = Path(__file__).parents[1] / "datasets"
TIMES = (0.4, 1.0, 2.0, 3.0, 4.0, 5.0)


def density_deviation(engine: SPHEngine, state) -> float:
    still = {"fluid_velocities": state.velocities, "transport_velocities": state.velocities}
    return float((engine.densities(LiquidState(**{k: state[k] for k in state}, **still)) - 1).abs().max())


def measure(name: str, transport: float) -> dict:
    plan = read_recipe(DATASETS / name / "recipe.toml")
    given = {**plan.episode, "transport": transport}
    tgv_2d([[0]], **{**given, "num_relax_steps": 0, "num_steps": 1})  # compiles kernels
    start = time.process_time()
    (path,) = tgv_2d([[plan.seed, 0, 0]], **given)
    seconds = time.process_time() - start
    engine = SPHEngine(dt=path.dt, num_sub_steps=given["num_sub_steps"], spacing=1 / given["num_per_side"])
    momentum = path["velocities"].mean(1)
    rows = []
    for passed in TIMES:
        frame = round(passed / path.dt) - path.initial.history.shape[1] - 1
        speeds = path["velocities"][frame].norm(dim=-1)
        left = math.exp(-8 * math.pi**2 * VISCOSITY * (passed - path.dt / 2))
        rows.append(
            {
                "time": passed,
                "energy_over_exact": float(speeds.square().mean()) / (0.5 * left**2),
                "largest_speed_over_exact": float(speeds.max()) / left,
                "density_deviation": density_deviation(replace(engine, transport=transport), path.frame(frame)),
            }
        )
    return {
        "recipe": name,
        "transport": transport,
        "processor_seconds": seconds,
        "particles": len(path.initial),
        "largest_mean_velocity_change": float((momentum - momentum[0]).abs().max()),
        "rows": rows,
    }


def table(found: list[dict]) -> str:
    """Return energies over the exact ones as a table, a row for each run."""
    lines = ["| recipe | transport | " + " | ".join(f"t = {t:g}" for t in TIMES) + " |"]
    lines.append("|---" * (2 + len(TIMES)) + "|")
    for run in found:
        shares = " | ".join(f"{row['energy_over_exact']:.3f}" for row in run["rows"])
        lines.append(f"| {run['recipe']} | {run['transport']:g} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(name, transport) for name in ("tgv_2d_small", "tgv_2d") for transport in (1.0, 0.0)]
    given.json.write_text(json.dumps({"schema": 1, "environment": environment(), "runs": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
