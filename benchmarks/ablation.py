"""What the parts of the shipped rope network buy: variants of it, trained alike.

    python benchmarks/ablation.py data/rope --json benchmarks/results/rope_ablation.json

`one_frame` is the shipped form. `two_frames` also tells every edge the closing speed of the frame before: the
engine caches contact impulses between steps, which a single frame does not show. `scalar_8` is the paper's
form, coordinates as features, with eight rounds of messages; `scalar_1` has one, as the paper.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from simworld import Field, Fit, InteractionNetwork, Trajectory, evaluate, fit, one_step, open_trajectories
from simworld.bench import read_rope, result
from simworld.models.interaction_network import EDGE_FEATURES
from simworld.physics import RopeState

RopeWithPast = RopeState.with_fields(previous_velocities=Field(unit="px/s", shape=("d",)))


class NetworkWithPast(InteractionNetwork):
    """Told the closing speed of the frame before; a first frame is told its own twice."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        size = arguments["latent_size"]
        self.edge_encoder[0] = torch.nn.Linear(EDGE_FEATURES + 1, size)

    def _edge_features(self, state, edges, distances):
        normals = (state.positions[edges.receivers] - state.positions[edges.senders]) / distances
        before = state.previous_velocities
        closing = ((before[edges.receivers] - before[edges.senders]) * normals).sum(1, keepdim=True)
        return [*super()._edge_features(state, edges, distances), closing / self.scales["velocity"]]

    def integrate(self, state, change, action=None):
        return super().integrate(state, change, action).replace(previous_velocities=state.velocities)


def with_past(path: Trajectory) -> Trajectory:
    before = torch.cat([path["velocities"][:1], path["velocities"][:-1]])
    values = {name: path.initial[name] for name in path.initial}
    initial = RopeWithPast(active=path.initial.active, previous_velocities=before[0], **values)
    frames = {**path.frames, "previous_velocities": before}
    return Trajectory(initial=initial, frames=frames, active=path.active, dt=path.dt, actions=path.actions)


def as_it_is(path: Trajectory) -> Trajectory:
    return path


VARIANTS = {
    "one_frame": (InteractionNetwork, as_it_is, {}),
    "two_frames": (NetworkWithPast, with_past, {}),
    "scalar_8": (InteractionNetwork, as_it_is, {"messages": "scalar"}),
    "scalar_1": (InteractionNetwork, as_it_is, {"messages": "scalar", "num_message_passing_steps": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.h5 and test.h5")
    parser.add_argument("--recorded", type=Path, help="PropNet's Rope_valid.npz")
    parser.add_argument("--num-steps", type=int, default=8000)
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="rows of variants that are not trained now are kept")
    given = parser.parse_args()
    paths = open_trajectories(given.data / "train.h5")[: given.num_train]
    sets = {"test.h5": open_trajectories(given.data / "test.h5")[:]}
    if given.recorded:
        sets[given.recorded.name] = [t.to(torch.float32) for t in read_rope(given.recorded)]
    how = Fit(num_steps=given.num_steps, learning_rate=2e-3, evaluate_every=1000, accelerator="cpu")
    rows = []
    for name in given.only:
        kind, prepare, changes = VARIANTS[name]
        torch.manual_seed(0)
        statistics = InteractionNetwork.measure(paths[:500])
        arguments = {"margin": 2.0, "latent_size": 48, "num_message_passing_steps": 8, **changes}
        model = kind(dt=paths[0].dt, statistics=statistics, **arguments)
        train = [prepare(path) for path in paths]
        model = fit(model, train, one_step(), how, out=given.out / name, watch=print)
        for dataset, episodes in sets.items():
            rows += evaluate({name: model}, map(prepare, episodes), dataset=dataset, baselines=name == "one_frame")
    for row in rows:
        print(f"{row.model:18} {row.dataset:16} {row.horizon!s:4} {row.value:.4g} {row.unit}")
    if given.json:
        found = result(rows)
        models = {row.model for row in rows}
        if given.json.is_file():
            known = json.loads(given.json.read_text())["rows"]
            found["rows"] = [row for row in known if row["model"] not in models] + found["rows"]
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
