"""How fast a GNS steps on a CUDA GPU, and how near that is to what its memory and its matrix units allow.

A whole step of the published size on jittered lattices of about 15 neighbours each (see large.py), the neighbour search
included, with the fused kernels, with these recorded as one CUDA graph, and with the plain form, which lays what an
edge sees side by side; in each precision of matrix products. What a GPU can do is measured in the same run: bytes per
second by copying a large buffer, operations per second by a large product in the same precision. The network's own
least work over these, as a share of the time that a step takes, is its fraction of either roofline.
"""

from __future__ import annotations

import torch
from large import RADIUS, STATISTICS, lattice
from timing import medians

from simworld import GNS
from simworld.graph import particle_edges
from simworld.models.graph_network import Perceptron

SIZES = (1000, 10_000, 100_000, 1_000_000)
FORMS = {
    "triton": ("triton", False),
    "triton, recorded": ("triton", True),
    "warp": ("warp", False),
    "warp, recorded": ("warp", True),
    "plain": ("torch", False),
}  # backend, and whether passes are recorded (of up to 2^18 edges)
PRECISIONS = ("highest", "high", "medium")
SIDE, COPIED = 8192, 2**28  # of the large product, and numbers in the large buffer


def accelerator(repeats: int, device: str = "cuda", sizes: tuple[int, ...] = SIZES, side: int = SIDE) -> dict:
    """Return a row for each size, precision and form; where memory is short, the form has no time."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This table is of a CUDA GPU; torch finds none here.")
    rows = []
    before = torch.get_float32_matmul_precision()
    for size in sizes:
        torch.manual_seed(0)
        model = GNS(dt=2.5e-3, statistics=STATISTICS, connectivity_radius=RADIUS).eval().to(device)
        state = lattice(size).to(device)
        edges = len(particle_edges(state, RADIUS).senders)
        for precision in PRECISIONS:
            torch.set_float32_matmul_precision(precision)
            limits = peaks(device, side, repeats)
            for form, (backend, capture) in FORMS.items():
                model.network.backend, model.network.capture = backend, capture
                found = row(model, state, work(model, len(state), edges), limits, repeats)
                rows.append({"particles": len(state), "edges": edges, "products": precision, "form": form} | found)
    torch.set_float32_matmul_precision(before)
    return {"network": f"GNS, {model.num_parameters} parameters", "rows": rows}


def row(model: GNS, state, least: dict[str, float], limits: dict[str, float], repeats: int) -> dict:
    """Return the median time of a step, the search's part of it, and what share the least work would take."""

    @torch.no_grad()
    def step():
        model.step(state)

    try:
        found = measured(repeats, step=step, search=lambda: particle_edges(state, RADIUS))
    except torch.OutOfMemoryError:
        return {"step [ms]": None}
    shares = {f"share of {name}": 1e3 * least[name] / limits[name] / found["step"] for name in limits}
    return {"step [ms]": found["step"], "search [ms]": found["search"], **shares}


def peaks(device: str, side: int, repeats: int) -> dict[str, float]:
    """Return bytes per second of a copy, read and written, and operations per second of a large product."""
    a, b, out = (torch.randn(side, side, device=device) for _ in range(3))
    source = torch.zeros(min(COPIED, side * side), device=device)
    target = torch.empty_like(source)
    found = measured(repeats, memory=lambda: target.copy_(source), matrix=lambda: torch.mm(a, b, out=out))
    amounts = {"memory": 2 * source.nbytes, "matrix": 2 * side**3}
    return {name: 1e3 * amounts[name] / found[name] for name in amounts}


def work(model: GNS, nodes: int, edges: int) -> dict[str, float]:
    """Return the least bytes to be moved and operations of matrix products in a step of the network.

    First layers of edges go through the nodes. Each array outside the kernels is written once and read once: features,
    latents of edges and nodes, terms and sums at nodes; what is looked up again is taken to come from a cache.
    """
    network, size = model.network, model.latent_size
    operations = _operations(network.node_encoder, nodes) + _operations(network.decoder, nodes)
    operations += sum(_operations(encoder, edges) for encoder in network.edge_encoders)
    numbers = 2 * size * (nodes + edges)
    for block in network.blocks:
        (edge_network,) = block.edge_networks
        hidden = len(edge_network.weights().weights[0])
        operations += _operations(edge_network, edges) + 2 * 2 * size * hidden * (nodes - edges)
        operations += _operations(block.node_network, nodes)
        numbers += 2 * size * edges + 2 * (2 * hidden + 2 * size) * nodes
    return {"memory": 4 * numbers, "matrix": operations}


def measured(repeats: int, **jobs) -> dict[str, float]:
    """Return the median milliseconds of each job, waiting for the GPU after each."""

    def whole(job):
        def run():
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return run

    return medians(repeats, **{name: whole(job) for name, job in jobs.items()})


def _operations(network: Perceptron, rows: int) -> int:
    return sum(2 * weight.numel() * rows for weight in network.weights().weights)
