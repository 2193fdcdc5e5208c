"""Memory and time of rolling many particles forward with a GNS of the published size.

python benchmarks/large.py --particles 100000 --json benchmarks/results/large.json

The scene is a jittered square lattice with about 15 neighbours each; weights are random, which changes neither. The
process is measured as a whole: the interpreter and its libraries alone are printed beside. Processor time is told
beside the time that passed, which other work on the machine makes longer.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from simworld import GNS, ParticleState, rollout
from simworld.bench import environment
from simworld.graph import particle_edges

RADIUS, NEIGHBOURS = 0.015, 15
STATISTICS = {
    "velocity_mean": [0.0, 0.0],
    "velocity_std": [1.0, 1.0],
    "change_mean": [0.0, 0.0],
    "change_std": [1e-3, 1e-3],
}


def lattice(num: int) -> ParticleState:
    side = round(num**0.5)
    spacing = RADIUS * (torch.pi / (NEIGHBOURS + 1)) ** 0.5
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)) * spacing
    positions = grid + 0.2 * spacing * torch.rand(side * side, 2, generator=generator)
    velocities = 0.1 * torch.randn(side * side, 2, generator=generator)
    return ParticleState(
        positions=positions,
        velocities=velocities,
        history=velocities[:, None].repeat(1, 4, 1),
        particle_types=torch.full((side * side,), 5),
        boundaries=torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]) * (side + 1) * spacing,
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    asked = parser.parse_args()
    alone = peak()
    state = lattice(asked.particles)
    torch.manual_seed(0)
    model = GNS(dt=2.5e-3, statistics=STATISTICS, connectivity_radius=RADIUS).eval()
    edges = len(particle_edges(state, RADIUS).senders)
    start, busy = time.perf_counter(), time.process_time()
    with torch.no_grad():
        path = rollout(state, simulator=model, num_steps=asked.steps, observe=lambda s: {"mean": s.positions.mean(0)})
    seconds, busy = (time.perf_counter() - start) / asked.steps, (time.process_time() - busy) / asked.steps
    found = {
        "particles": state.num_entities,
        "edges": edges,
        "parameters": model.num_parameters,
        "seconds_per_step": seconds,
        "processor_seconds_per_step": busy,
        "peak_MiB": peak(),
        "libraries_MiB": alone,
        "mean_position": path["mean"][-1].tolist(),
        "environment": environment(),
    }
    print(json.dumps(found, indent=2))
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
