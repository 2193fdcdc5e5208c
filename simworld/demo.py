"""The main job in one call: a shipped model, rolled out, measured, asked a question and filmed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from simworld import bench
from simworld.data import open_trajectories
from simworld.intervention_tables import interventions_from
from simworld.metrics import ConstantVelocity, Row, Static, position_mse
from simworld.models import load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.simulate import Simulator, rollout
from simworld.trajectory import Trajectory
from simworld.view import film, plot_errors

DATASET = "rope_test.h5"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demonstration found: error rows, the rows of its question, and the files it wrote."""

    errors: list[Row]
    question: str
    answers: list[Row]
    files: list[Path]


@torch.no_grad()
def run(out: str | Path, *, episode: int = 0) -> Demo:
    """Run the shipped rope model on shipped test episodes, and write a film and two plots into `out`.

    The question is what would have happened without the first cylinder and under doubled impulses; the
    recorded answer is the engine's, run again from the same start.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = load_checkpoint("rope")
    with open_trajectories(shipped(".h5")["rope_test"]) as episodes:
        truth = episodes[episode].to(torch.float32)
        asked = [(said, branch.to(torch.float32)) for said, branch in episodes.counterfactuals(episode)]
    errors = bench.rope()
    state = truth.initial.using(model)
    predicted = rollout(state, truth.actions)
    said, answer = asked[-1]
    naive: dict[str, Simulator] = {"static": Static(dt=truth.dt), "constant_velocity": ConstantVelocity(dt=truth.dt)}
    edits = interventions_from(said["interventions"], DATASET)
    candidates = {"simworld": rollout(state, truth.actions, interventions=edits)}
    candidates |= {k: rollout(answer.initial, answer.actions, simulator=v) for k, v in naive.items()}
    candidates["factual"] = _rest(truth, answer)
    curves = {name: position_mse(path, answer) for name, path in candidates.items()}
    constant = rollout(truth.initial, truth.actions, simulator=naive["constant_velocity"])
    files = [
        film({"engine": truth, "simworld": predicted}, path=out / "rope.gif", every=2),
        film({"engine, asked": answer, "simworld, asked": candidates["simworld"]}, path=out / "what_if.gif", every=2),
        plot_errors(
            {"simworld": position_mse(predicted, truth), "constant velocity": position_mse(constant, truth)},
            dt=truth.dt,
            unit="px²",
            path=out / "error_over_time.png",
        ),
        plot_errors(curves, dt=truth.dt, unit="px²", path=out / "what_if_error.png"),
    ]
    removed = ", ".join(map(str, (~answer.active[0]).nonzero()[:, 0].tolist()))
    assert truth.actions is not None
    assert answer.actions is not None, "the shipped episodes carry actions"
    stronger = float(answer.actions.norm() / truth.actions.norm())
    question = f"What if body {removed} (a cylinder) were gone and the impulses {stronger:g} times as strong?"
    answers = [
        Row(
            model=name,
            dataset=f"{DATASET}, episode {episode}",
            metric="rollout_position_mse",
            horizon=horizon,
            value=float(curve[1 : None if horizon == "all" else 21].mean()),
            unit="px^2",
            trajectories=1,
        )
        for name, curve in curves.items()
        for horizon in (20, "all")
    ]
    return Demo(errors=errors, question=question, answers=answers, files=files)


def _rest(truth: Trajectory, answer: Trajectory) -> Trajectory:
    """Return the factual path as a guess at the asked one: the assumption that the change has no effect."""
    return Trajectory(initial=answer.initial, frames=truth.frames, active=answer.active, dt=truth.dt)
