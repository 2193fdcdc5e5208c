"""How fast and in how much memory neighbours are found: particles at random in a periodic box, about 15 each.

    OMP_NUM_THREADS=1 python benchmarks/neighbors.py --json benchmarks/results/neighbors.json

Each row is measured in a process of its own: medians of wall time and of processor time, and the peak of resident
memory over what the process took when it had imported everything and had searched among 100 particles. "held" is
a search with a skin of a fifth of the radius whose candidates still serve. scipy's k-d tree is measured, too,
where scipy is installed; it gives unordered pairs, each once. The load of the machine is recorded before and after:
over the number of its cores, wall times say little, and processor times are too long as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from simworld.bench import environment
from simworld.kernels import NeighborSearch, neighbor_pairs

NEIGHBORS = 15
COUNTS = (1000, 10000, 100000, 1000000)


def fluid(count: int, dimensions: int, device: str):
    """Return positions in the unit box, the radius and the box."""
    ball = math.pi if dimensions == 2 else 4 / 3 * math.pi
    positions = torch.rand(count, dimensions, generator=torch.Generator().manual_seed(0)).to(device)
    corners = torch.tensor([[[0.0] * dimensions, [1.0] * dimensions]], device=device)
    periodic = torch.ones(1, dimensions, dtype=torch.bool, device=device)
    return positions, (NEIGHBORS / ball / count) ** (1 / dimensions), {"boundaries": corners, "periodic": periodic}


def searcher(method: str, count: int, dimensions: int, device: str) -> Callable[[], int]:
    """Return a call that searches once and returns the number of edges."""
    positions, radius, box = fluid(count, dimensions, device)
    if method == "kdtree":
        from scipy.spatial import cKDTree

        places = positions.double().numpy() % 1.0
        return lambda: 2 * len(cKDTree(places, boxsize=1.0).query_pairs(radius, output_type="ndarray"))
    if method == "held":
        search = NeighborSearch(radius, skin=0.2 * radius)
        search(positions, **box)
        moved = positions + 0.02 * radius
        return lambda: len(search(moved, **box).senders)
    return lambda: len(neighbor_pairs(positions, radius, **box).senders)


def measure(method: str, count: int, dimensions: int, device: str) -> dict[str, object]:
    searcher(method, 100, dimensions, device)()
    before = peak(device)
    search = searcher(method, count, dimensions, device)
    wall, processor = [], []
    for _ in range(max(4, min(200, 300000 // count))):
        starts = time.perf_counter(), time.process_time()
        edges = search()
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(1e3 * (time.perf_counter() - starts[0]))
        processor.append(1e3 * (time.process_time() - starts[1]))
    return {
        "method": method,
        "dimensions": dimensions,
        "particles": count,
        "edges": edges,
        "wall_ms": statistics.median(wall[1:]),
        "least_wall_ms": min(wall),
        "processor_ms": statistics.median(processor[1:]),
        "peak_MiB": (peak(device) - before) / 2**20,
        "edges_MiB": 16 * edges / 2**20,
    }


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_own_process(row: list[str]) -> dict[str, object]:
    done = subprocess.run([sys.executable, __file__, "--row", *row], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def methods(device: str) -> list[str]:
    try:
        import scipy.spatial  # noqa: F401
    except ImportError:
        return ["fresh", "held"]
    return ["fresh", "held"] + ["kdtree"] * (device == "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="particles of the largest case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=3, metavar=("METHOD", "COUNT", "DIMENSIONS"), help="measure one, print its JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given.row[0], int(given.row[1]), int(given.row[2]), given.device)))
        return
    rows, tried, loads = [], methods(given.device), [os.getloadavg()[0]]
    print("method   d  particles      edges   wall ms    cpu ms  peak MiB edges MiB")
    for dimensions in (2, 3):
        for count in (count for count in COUNTS if count <= given.most):
            for method in tried:
                row = in_own_process([method, str(count), str(dimensions), "--device", given.device])
                rows.append(row)
                print(
                    f"{method:8}{dimensions:2}{count:11}{row['edges']:11}{row['wall_ms']:10.3g}"
                    f"{row['processor_ms']:10.3g}{row['peak_MiB']:10.4g}{row['edges_MiB']:10.4g}",
                    flush=True,
                )
    if given.json:
        loads.append(os.getloadavg()[0])
        machine = {**environment(), "device": given.device, "cores": os.cpu_count(), "load_before_and_after": loads}
        found = {"schema": 1, "environment": machine, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
