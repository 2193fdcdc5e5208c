"""How fast a particle network passes messages, with each backend, and in how much memory.

The network is GNS's: latents of 128, 10 rounds, 2 hidden layers, on random graphs of 15 edges for each node. Beside
it stand the matrix products alone of the plain form, which lays what an edge sees side by side, and of the split form,
whose first layers go through the nodes; the latter whole and in the blocks that are used. Both are
recorded as the network runs, and all jobs of a size are timed in turn in one run. What others do to the
machine meanwhile falls on all of them, so ratios are what counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from timing import Products, medians, products_alone

from simworld.kernels.graph_block import Connections
from simworld.models.graph_network import EncodeProcessDecode

EDGES_PER_NODE = 15
SIZES = (1000, 5000)
MANY = 100_000
FORMS = {
    "blocks": {"backend": "blocks"},
    "recomputing": {"backend": "blocks", "recompute": True},
    "plain": {"backend": "torch"},
}
MEMORY = [
    *((form, size, way) for size in SIZES for form in FORMS for way in ("forward", "both")),
    ("blocks", MANY, "forward"),
]


def particles(repeats: int) -> dict:
    """Return times by threads and size, and peak memory by form and size."""
    rows = [
        {"threads": threads, "nodes": size, "edges": EDGES_PER_NODE * size, **times(size, threads, repeats)}
        for threads in (1, 2)
        for size in SIZES
    ]
    return {"network": "GNS, 1591682 parameters", "times": rows, "memory": [memory(*case) for case in MEMORY]}


def times(size: int, threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    models = {form: (network(**how), inputs(size)) for form, how in FORMS.items()}
    models |= physicsnemo(size)
    recorded = {
        "products_plain": shapes(network(backend="torch"), size),
        "products_split": shapes(network(edges_at_once=EDGES_PER_NODE * size), size),
        "products_in_blocks": shapes(network(), size),
    }
    jobs = {name: products_alone(each, shared=True) for name, each in recorded.items()}
    for form, (model, given) in models.items():
        jobs[f"{form}_forward"] = lambda model=model, given=given: forward(model, given)
        if size == SIZES[0] or form == "blocks":
            jobs[f"{form}_both"] = lambda model=model, given=given: both(model, given)
    del jobs["recomputing_forward"]  # differs in the gradient only
    found = medians(repeats, **jobs)
    ours = found["blocks_forward"]
    return {
        "milliseconds": found,
        "flops": {name: sum(2 * a[0] * a[1] * b[1] for a, b in each) for name, each in recorded.items()},
        "forward_per_products_split": ours / found["products_split"],
        "forward_per_products_in_blocks": ours / found["products_in_blocks"],
        "forward_per_products_plain": ours / found["products_plain"],
        "plain_forward_per_products_split": found["plain_forward"] / found["products_split"],
        "plain_forward_per_products_plain": found["plain_forward"] / found["products_plain"],
        "both_per_forward": found["blocks_both"] / ours,
    }


def network(**how) -> EncodeProcessDecode:
    torch.manual_seed(0)
    return EncodeProcessDecode(30, 3, 2, latent_size=128, num_message_passing_steps=10, num_hidden_layers=2, **how)


def inputs(size: int):
    torch.manual_seed(0)
    receivers = torch.randint(size, (EDGES_PER_NODE * size,)).sort().values
    starts = torch.searchsorted(receivers, torch.arange(size))
    graph = Connections(senders=torch.randint(size, receivers.shape), receivers=receivers, starts=starts)
    return torch.randn(size, 30), torch.randn(len(receivers), 3), graph


@torch.no_grad()
def forward(model, given) -> None:
    model(*given)


def both(model, given) -> None:
    model.zero_grad()
    model(*given).square().sum().backward()


def shapes(model, size: int):
    with Products() as noted:
        forward(model, inputs(size))
    return noted.shapes


def physicsnemo(size: int) -> dict:
    """Return NVIDIA PhysicsNeMo's MeshGraphNet of the same sizes and its inputs, where it is installed."""
    try:
        from physicsnemo.models.meshgraphnet import MeshGraphNet
        from torch_geometric.data import Data
    except ImportError:
        return {}
    parts = {f"hidden_dim_{name}": 128 for name in ("processor", "node_encoder", "edge_encoder", "node_decoder")}
    layers = ("node_processor", "edge_processor", "node_encoder", "edge_encoder", "node_decoder")
    parts |= {f"num_layers_{name}": 2 for name in layers}
    model = MeshGraphNet(30, 3, 2, processor_size=10, mlp_activation_fn="relu", aggregation="sum", **parts)
    nodes, edges, graph = inputs(size)
    data = Data(edge_index=torch.stack([graph.senders, graph.receivers]), num_nodes=size)
    return {"physicsnemo": (model, (nodes, edges, data))}


def memory(form: str, size: int, way: str) -> dict:
    """Return the peak memory of one pass in a process of its own, and what of it the inputs and libraries take."""
    code = f"import message_passing; message_passing.report_memory({form!r}, {size}, {way!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return {"form": form, "nodes": size, "edges": EDGES_PER_NODE * size, "pass": way, **json.loads(done.stdout)}


def report_memory(form: str, size: int, way: str) -> None:
    model, given = network(**FORMS[form]), inputs(size)
    before = peak_mebibytes()
    (forward if way == "forward" else both)(model, given)
    print(json.dumps({"before_mib": before, "peak_mib": peak_mebibytes()}))


def peak_mebibytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()  # Linux; getrusage would count the parent's
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
