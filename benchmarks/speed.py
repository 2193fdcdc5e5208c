"""How fast models step, beside their matrix products alone.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --json benchmarks/results/speed.json
    python benchmarks/speed.py --table particles --json benchmarks/results/message_passing.json
    python benchmarks/speed.py --table mesh --json benchmarks/results/mesh_step.json
    python benchmarks/speed.py --table accelerator --json benchmarks/results/accelerator.json

The first table is the shipped rope model's: one scene, and many at once. The second is a particle network's, with
each way to pass messages (see message_passing.py), the third a mesh network's (see mesh_step.py), the last a
particle model's on a CUDA GPU (see accelerator.py). Times are medians.
The matrix products are those that the step itself makes, recorded as it runs and then repeated on operands of the same
shapes, into buffers that exist; all is measured in alternation in one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerator import accelerator
from mesh_step import mesh_steps
from message_passing import particles
from timing import Products, medians, products_alone

from simworld import load_checkpoint, open_trajectories, rollout
from simworld.bench import environment
from simworld.graph import object_edges
from simworld.models.checkpoint import shipped

TABLES = {"particles": particles, "mesh": mesh_steps, "accelerator": accelerator}


def measure(model, state, action, repeats: int) -> dict[str, float]:
    with Products() as noted:
        model.step(state, action)
    found = medians(
        repeats,
        step=lambda: model.step(state, action),
        edges=lambda: object_edges(state, margin=model.margin),
        products=products_alone(noted.shapes),
    )
    return {**found, "step_per_products": found["step"] / found["products"]}


def shipped_steps(checkpoint: str, scenes: int) -> dict:
    model = load_checkpoint(checkpoint)
    path = open_trajectories(shipped(".h5")["rope_test"])[0]
    state, action = path.frame(10), path.actions[10]
    many = path.window(0, 64).as_scenes(64).repeat(-(-scenes // 64))
    actions = path.actions[:64].repeat(-(-scenes // 64), 1, 1).flatten(0, 1)
    found: dict = {"checkpoint": checkpoint}
    with torch.inference_mode():
        found["one_scene"] = measure(model, state, action, 300)
        found["many_scenes"] = {"scenes": many.num_scenes, **measure(model, many, actions, 15)}
        rolled = medians(5, rollout=lambda: rollout(path.initial, path.actions, simulator=model))
        found["rollout_step"] = rolled["rollout"] / path.num_steps
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=["rope", *TABLES], default="rope")
    parser.add_argument("--checkpoint", default="rope")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10, help="of the other tables")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {"schema": 1, "environment": environment(), "unit": "ms"}
    rope = given.table == "rope"
    found |= shipped_steps(given.checkpoint, given.scenes) if rope else TABLES[given.table](given.repeats)
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
