"""How fast a MeshGraphNet steps a mesh of the size of DeepMind's cylinder flow.

15 rounds, latents of 128, 2 hidden layers, on a triangulated strip of 1,890 nodes and 10,970 directed edges: the whole
step from state to state, beside its matrix products alone, whole and in the blocks that are used, all in turn.
"""

from __future__ import annotations

import torch
from timing import Products, medians, products_alone

from simworld import MeshGraphNet, MeshState, Trajectory
from simworld.graph import mesh_edges

SIDES = (63, 30)


def mesh_steps(repeats: int) -> dict:
    """Return rows of medians by threads."""
    model, state = network()
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = medians(repeats, **jobs(model, state))
        size = {"threads": threads, "nodes": len(state), "edges": len(mesh_edges(state).senders)}
        ratio = found["step"] / found["products"]
        rows.append(size | {f"{name} [ms]": value for name, value in found.items()} | {"step per products": ratio})
    return {"network": f"MeshGraphNet, {model.num_parameters} parameters", "rows": rows}


def jobs(model: MeshGraphNet, state: MeshState) -> dict:
    shapes = {}
    for name, edges in (("products", len(mesh_edges(state).senders)), ("products in blocks", None)):
        model.network.edges_at_once = edges
        with torch.inference_mode(), Products() as noted:
            model.step(state)
        shapes[name] = noted.shapes

    @torch.inference_mode()
    def step():
        model.step(state)

    return {"step": step} | {name: products_alone(each, shared=True) for name, each in shapes.items()}


def network() -> tuple[MeshGraphNet, MeshState]:
    """Return a network of random weights and a state of random velocities and pressures."""
    torch.manual_seed(0)
    columns, rows = SIDES
    corner = (torch.arange(columns - 1)[:, None] * rows + torch.arange(rows - 1)).flatten()
    cells = torch.cat(
        [corner[:, None] + torch.tensor([0, rows, 1]), corner[:, None] + torch.tensor([rows, rows + 1, 1])]
    )
    rest = torch.cartesian_prod(torch.arange(columns) / rows, torch.arange(rows) / rows)
    count = len(rest)
    state = MeshState(
        rest_positions=rest,
        velocities=torch.randn(count, 2),
        pressures=torch.randn(count),
        node_types=torch.zeros(count, dtype=torch.long),
        cells=cells,
    )
    frames = {name: torch.stack([state[name], torch.randn_like(state[name])]) for name in state.dynamic_fields}
    path = Trajectory(initial=state, frames=frames, active=torch.ones(2, count, dtype=torch.bool), dt=0.01)
    model = MeshGraphNet(
        dt=0.01,
        statistics=MeshGraphNet.measure([path]),
        outputs={"velocities": 1, "pressures": 0},
        inputs=["velocities"],
        num_node_types=9,
        num_dimensions=0,
    )
    return model, state
