"""How long a thousand counterfactual rollouts of the rope take, beside their matrix products alone.

    OMP_NUM_THREADS=1 python benchmarks/branches.py --json benchmarks/results/branches.json

Each world has impulses of its own strength and lacks one of the cylinders or none. The products are those that a step
of the same scenes makes, repeated as often as the rollouts have steps; both are run in turn, and times are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from timing import Products, medians, products_alone

from simworld import branches, do, load_checkpoint, open_trajectories, remove
from simworld.bench import environment
from simworld.intervene import scale
from simworld.models.checkpoint import shipped


def asked(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    strengths = (0.5 + 1.5 * torch.rand(count, generator=generator)).tolist()
    always = range(0, sys.maxsize)
    gone = torch.randint(14, 17, (count,), generator=generator).tolist()  # 14 stands for none
    return [
        [do(at=always, actions=scale(strength)), *([remove([body])] if body > 14 else [])]
        for strength, body in zip(strengths, gone, strict=True)
    ]


def measure(count: int, num_steps: int, max_scenes: int, repeats: int) -> dict:
    model = load_checkpoint("rope")
    with open_trajectories(shipped(".h5")["rope_test"]) as file:
        paths = [path.to(torch.float32) for path in file]
    starts, edits = [paths[k % len(paths)] for k in range(count)], asked(count)
    batch = paths[0].initial.repeat(max_scenes)
    action = paths[0].actions[0].repeat(max_scenes, 1)
    with torch.inference_mode():
        with Products() as noted:
            model.step(batch, action)
        alone = products_alone(noted.shapes)
        found = medians(
            repeats,
            rollouts=lambda: branches(starts, edits, simulator=model, num_steps=num_steps, max_scenes=max_scenes),
            products=lambda: [alone() for _ in range(num_steps * -(-count // max_scenes))],
        )
    return {"worlds": count, "steps": num_steps, "max_scenes": max_scenes, **found,
            "rollouts_per_products": found["rollouts"] / found["products"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=99)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [measure(given.worlds, given.steps, most, given.repeats) for most in (250, given.worlds)]
    found = {"schema": 1, "environment": environment(), "unit": "ms", "rows": rows}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
