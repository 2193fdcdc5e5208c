"""The unsteady DFG benchmark 2D-2 (Schaefer & Turek 1996) with `ChannelFlow`: drag, lift and Strouhal number.

Flow past a cylinder at Reynolds number 100, from rest until vortices are shed evenly; coefficients of the last second.
The published bounds are those of the benchmark's own Table 4.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from simworld.bench import environment
from simworld.physics.flow import Channel, ChannelFlow, parabola

MEAN, DIAMETER, VISCOSITY = 1.0, 0.1, 1e-3
BOUNDS = {"largest drag": (3.22, 3.24), "largest lift": (0.99, 1.01), "Strouhal number": (0.295, 0.305)}


def measure(size: float, obstacle_size: float, dt: float, until: float) -> dict:
    solver = ChannelFlow(
        Channel(size=size, obstacle_size=obstacle_size), viscosity=VISCOSITY, inflow=parabola(0.41, MEAN), dt=dt
    )
    begun, found = time.perf_counter(), []
    while solver.time < until:
        solver.advance()
        if solver.time > until - 1.0:
            found.append((solver.time, *(2 * solver.force() / (MEAN**2 * DIAMETER))))
    times, drag, lift = np.array(found).T
    up = lift - lift.mean()
    rising = np.flatnonzero((up[:-1] < 0) & (up[1:] >= 0))
    crossings = times[rising] + dt * up[rising] / (up[rising] - up[rising + 1])
    return {
        "nodes": len(solver.nodes),
        "dt": dt,
        "seconds": time.perf_counter() - begun,
        "largest drag": float(drag.max()),
        "largest lift": float(lift.max()),
        "Strouhal number": float(DIAMETER / np.diff(crossings).mean() / MEAN),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=float, default=7.0, help="s")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    meshes = ((0.06, 0.016, 0.005), (0.04, 0.01, 0.004), (0.03, 0.007, 0.0025))
    rows = [measure(*mesh, given.until) for mesh in meshes]
    rows.append({"nodes": "published", "dt": "", "seconds": "", **{k: f"{a} to {b}" for k, (a, b) in BOUNDS.items()}})
    found = {"schema": 1, "environment": environment(), "rows": rows}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
