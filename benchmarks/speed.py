"""How fast the shipped rope model steps: one scene, and many at once beside their matrix products alone.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --json benchmarks/results/speed.json

Times are medians. The matrix products are those that the step itself makes, recorded as it runs and then
repeated on operands of the same shapes, into buffers that exist; all is measured in alternation in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simworld import load_checkpoint, open_trajectories, rollout
from simworld.bench import environment
from simworld.graph import object_edges
from simworld.models.checkpoint import shipped


class Products(TorchDispatchMode):
    """Notes the shapes of every matrix product while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = arguments[-2:]
            self.shapes.append((tuple(a.shape), tuple(b.shape)))
        return function(*arguments, **(keywords or {}))


def products_alone(shapes):
    jobs = [(torch.randn(a), torch.randn(b), torch.empty(a[0], b[1])) for a, b in shapes]

    def run():
        for a, b, out in jobs:
            torch.mm(a, b, out=out)

    return run


def medians(repeats: int, **jobs) -> dict[str, float]:
    """Return the median milliseconds of each job, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 3):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="rope")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load_checkpoint(given.checkpoint)
    path = open_trajectories(shipped(".h5")["rope_test"])[0]
    state, action = path.frame(10), path.actions[10]
    many = path.window(0, 64).as_scenes(64).repeat(-(-given.scenes // 64))
    actions = path.actions[:64].repeat(-(-given.scenes // 64), 1, 1).flatten(0, 1)
    found = {"schema": 1, "environment": environment(), "unit": "ms", "checkpoint": given.checkpoint}
    with torch.inference_mode():
        found["one_scene"] = measure(model, state, action, 300)
        found["many_scenes"] = {"scenes": many.num_scenes, **measure(model, many, actions, 15)}
        rolled = medians(5, rollout=lambda: rollout(path.initial, path.actions, simulator=model))
        found["rollout_step"] = rolled["rollout"] / path.num_steps
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
