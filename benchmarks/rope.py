"""Measures the shipped rope model, and the engine restarted at every frame, and records the figures.

python benchmarks/rope.py --recorded Rope_valid.npz --test data/rope/test.h5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from simworld import bench, evaluate, load_checkpoint
from simworld.bench import read_rope, result
from simworld.physics import PlanarEngine

RESULTS = Path(__file__).with_name("results")


def record(name: str, rows) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(result(rows), indent=1) + "\n")
    for row in rows:
        print(f"{name:22} {row.model:20} {row.dataset:16} {row.horizon!s:4} {row.value:.4g} {row.unit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, required=True, help="PropNet's Rope_valid.npz")
    parser.add_argument("--test", type=Path, required=True, help="test.h5 of datasets/rope/recipe.toml")
    given = parser.parse_args()
    model = load_checkpoint("rope")
    record("rope_shipped", bench.rope())
    record("rope_recorded", bench.rope(given.recorded))
    late = [path.to(torch.float32).window(5, len(path)) for path in read_rope(given.recorded)]
    name = given.recorded.name
    record("rope_recorded_from_5", evaluate({"simworld": model}, late, dataset=f"{name}, from frame 5"))
    rows = evaluate({"simworld": model}, read_rope(given.test), dataset="test.h5")
    for path in (given.test, given.recorded):
        episodes = (episode.to(torch.float64) for episode in read_rope(path))
        engine = {"engine, restarted": PlanarEngine(dt=1 / 50)}
        rows += evaluate(engine, episodes, dataset=path.name, baselines=False)
    record("rope_test", rows)


if __name__ == "__main__":
    main()
