"""Draws drag and lift of rollouts over the solver's: the first three test episodes of cylinder_flow_small.

python benchmarks/forces.py --out datasets/cylinder_flow_small/forces.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from simworld import load_checkpoint, rollout
from simworld.bench.meshes import SEEDS, SMALL_CYLINDER
from simworld.bench.rows import episodes_of
from simworld.physics.flow_worlds import force_on_obstacle
from simworld.view import plot_series

WORLD, COUNT = "cylinder_flow_small", 3
UNIT = "[m$^3$/s$^2$]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=f"{WORLD}_0")
    parser.add_argument("--data", type=Path, help="trajectories (.h5) instead of the test episodes")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = load_checkpoint(given.checkpoint)
    rows = []
    episodes = episodes_of(WORLD, SEEDS[WORLD], COUNT, given.data, **SMALL_CYLINDER)
    for number, path in enumerate(one.to(torch.float32) for one in episodes[:COUNT]):
        with torch.no_grad():
            made = rollout(path.initial, simulator=model, num_steps=path.num_steps)
        forces = {"solver": force_on_obstacle(path), "simworld": force_on_obstacle(made)}
        row = {}
        for axis, name in enumerate(("drag", "lift")):
            row[f"{name} {number} {UNIT}"] = {who: force[:, axis] for who, force in forces.items()}
        rows.append(row)
    print(f"wrote {plot_series(rows, dt=model.dt, path=given.out)}")


if __name__ == "__main__":
    main()
