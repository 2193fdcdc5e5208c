"""Run files: what to train on what, as TOML."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from simworld.data import TrajectoryFile, open_trajectories
from simworld.data.generate import PRECISIONS
from simworld.data.toml import check_arguments, read_run_file
from simworld.encode import encoder_said
from simworld.losses import LOSSES, Loss
from simworld.models import MODELS, LearnedSimulator, TrueSlots, load_checkpoint
from simworld.models.base import told_to_measure
from simworld.render.filmed import filmed
from simworld.train import Fit, Progress, fit, weights_checksum
from simworld.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: `data` holds train.h5 and perhaps valid.h5; `initial` is a checkpoint to go on from.

    Of the folders `also`, train.h5 is trained on besides: more of the same world, made in another way.
    With `initial`, `arguments` may change what leaves the weights' shapes as they are, such as sub-steps.
    `precision` is that of the model and what it sees in training. With `mean_velocities` it sees means over a step in
    place of recorded velocities. With `slots`, the arguments of `TrueSlots.measure`,
    recorded bodies are encoded as slots on reading, and the checkpoint carries the encoder.
    """

    model: str
    data: Path
    out: Path
    fit: Fit
    loss: Loss
    arguments: Mapping[str, Any]
    also: Sequence[Path] = ()
    initial: str | None = None
    num_train: int | None = None
    precision: str = "float32"
    mean_velocities: bool = False
    slots: Mapping[str, Any] | None = None
    text: str = ""


def read_run(
    path: str | Path, *, seed: int | None = None, out: str | Path | None = None, initial: str | None = None
) -> Run:
    """Return the run in a TOML file; paths in it are relative to where the command runs.

    `seed`, `out` and `initial` are put in the place of what the file says, as in runs over several seeds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, lacks a key, or has one that nothing reads.
    """
    path = Path(path)
    known = [f.name for f in fields(Run) if f.name != "text"]
    said, text = read_run_file(path, known, MODELS, out=out, initial=initial)
    if said.get("precision", "float32") not in list(PRECISIONS):
        raise ValueError(f"{path}: precision must be one of {', '.join(PRECISIONS)}; got {said['precision']!r}.")
    if not isinstance(said.get("mean_velocities", False), bool):
        raise ValueError(f"{path}: mean_velocities must be true or false; got {said['mean_velocities']!r}.")
    also = said.get("also", [])
    if not isinstance(also, list) or not all(isinstance(folder, str) for folder in also):
        raise ValueError(f"{path}: also must be a list of folders with a train.h5 each; got {also!r}.")
    if "slots" in said:
        if said["model"] != "CausalJEPA":
            raise ValueError(f"{path}: [slots] makes slots for a CausalJEPA; leave it out for a {said['model']}.")
        check_arguments(f"{path} [slots]", said["slots"], TrueSlots.measure, leave=("trajectories",))
    arguments = said.get("arguments", {})
    check_arguments(f"{path} [arguments]", arguments, MODELS[said["model"]], leave=("dt", "statistics"))
    check_arguments(f"{path} [fit]", said["fit"], Fit, required=("num_steps",))
    if seed is not None:
        said["fit"]["seed"] = seed
    return Run(
        model=said["model"],
        data=Path(said["data"]),
        out=Path(said["out"]),
        fit=Fit(**said["fit"]),
        loss=_read_loss(f"{path} [loss]", said.get("loss", {"name": "one_step"})),
        arguments=arguments,
        also=[Path(folder) for folder in also],
        initial=said.get("initial"),
        num_train=said.get("num_train"),
        precision=said.get("precision", "float32"),
        mean_velocities=said.get("mean_velocities", False),
        slots=said.get("slots"),
        text=text,
    )


def _read_loss(where: str, said: object) -> Loss:
    if not isinstance(said, dict):
        raise ValueError(f"{where} must be a table of keys; got {said!r}.")
    name = said.get("name")
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"{where}: name must be one of {', '.join(LOSSES)}; got {name!r}.")
    rest = {k: v for k, v in said.items() if k != "name"}
    needed = [k for k, v in inspect.signature(LOSSES[name]).parameters.items() if v.default is v.empty]
    check_arguments(where, rest, LOSSES[name], required=needed)
    return LOSSES[name](**rest)


def start(run: Run, *, watch: Callable[[Progress], None] | None = None) -> LearnedSimulator:
    """Train as a run says, or go on where it was interrupted, and return the model."""
    with open_trajectories(run.data / "train.h5") as data:
        trajectories = _episodes(data, run, run.num_train)
        said = {
            "dataset": data.dataset,
            "dataset_seed": data.seed,
            "units": data.units,
            "run": run.text,
            "seed": run.fit.seed,
        }
        said |= {"slots": made} if (made := encoder_said(data)) else {}
        likewise = [_more(folder / "train.h5", data, run) for folder in run.also]
    trajectories += [path for paths, _ in likewise for path in paths]
    said |= {"also": [origin for _, origin in likewise]} if likewise else {}
    valid_path = run.data / "valid.h5"
    valid = []
    if valid_path.is_file():
        with open_trajectories(valid_path) as data:
            valid = _episodes(data, run, run.fit.num_valid if run.loss.of_films else None)
    if run.slots is not None:
        encoder = TrueSlots.measure(trajectories[:500], **run.slots)
        trajectories, valid = ([encoder.encode(path) for path in paths] for paths in (trajectories, valid))
        said["slots"] = encoder.to_json()
    torch.manual_seed(run.fit.seed)
    if run.initial is not None:
        model = _continued(load_checkpoint(run.initial), run, trajectories)
        said["initial"] = model.provenance
        said["initial_checksum"] = weights_checksum(model)
    else:
        kind: Callable[..., LearnedSimulator] = MODELS[run.model]
        model = kind(dt=trajectories[0].dt, statistics=_measured(run, trajectories), **run.arguments)
    model.provenance = said
    model = model.to(PRECISIONS[run.precision])
    return fit(model.train(), trajectories, run.loss, run.fit, out=run.out, valid=valid, watch=watch)


def _more(path: Path, data: TrajectoryFile, run: Run) -> tuple[list[Trajectory], dict[str, Any]]:
    """Return the episodes of a further file, and where they are from, if they are of the same kind of states."""
    with open_trajectories(path) as more:
        if more.units != data.units or not math.isclose(more.dt, data.dt, rel_tol=1e-6):
            raise ValueError(
                f"{more.path} has dt {more.dt} and {more.units}, {data.path} dt {data.dt} and {data.units}; a model is "
                "trained on one of these."
            )
        return _episodes(more, run, None), {"dataset": more.dataset, "dataset_seed": more.seed}


def _episodes(data: TrajectoryFile, run: Run, count: int | None) -> list[Trajectory]:
    """Return the first episodes of a file in a run's precision, with their films where its loss is of films."""
    episodes = [path.to(PRECISIONS[run.precision]) for path in data[:count]]
    if run.mean_velocities:
        episodes = [path.with_mean_velocities() for path in episodes]
    if not run.loss.of_films:
        return episodes
    films = [data.views(number) for number in range(len(episodes))]
    if not all(films):
        raise ValueError(
            f"The loss {run.loss.name} is of films, and {data.path} has episodes without; generate them from a recipe "
            "with a [film] table."
        )
    return [filmed(path, views[0]) for path, views in zip(episodes, films, strict=True)]


def _measured(run: Run, trajectories: Sequence[Trajectory]) -> Mapping[str, Any]:
    kind = MODELS[run.model]
    count = 1 if run.arguments.get("normalizer") == "online" else 500
    return kind.measure(trajectories[:count], noise_std=run.loss.noise_std, **told_to_measure(kind, run.arguments))


def _continued(model: LearnedSimulator, run: Run, trajectories: Sequence[Trajectory]) -> LearnedSimulator:
    """Return a checkpoint's model with the arguments that the run changes, as far as the weights still fit.

    Statistics stay as they are, which the weights know; those that were not measured then are measured now.
    """
    if type(model).__name__ != run.model:
        raise ValueError(f"'{run.initial}' holds a {type(model).__name__}; say model = '{type(model).__name__}'.")
    if not run.arguments:
        return model
    statistics = {**_measured(run, trajectories), **model.arguments["statistics"]}
    kind: Callable[..., LearnedSimulator] = type(model)
    changed = kind(**{**model.arguments, "statistics": statistics, **run.arguments}).to(next(model.parameters()).dtype)
    try:
        # Contexts begin as nothing: a model that was trained without goes on with them.
        # So do online normalizers, and where the run wants none, they are left.
        mine, theirs = changed.state_dict(), model.state_dict()
        idle = {k: v for k, v in mine.items() if k.startswith(("network.contexts.", "moments."))}
        changed.load_state_dict(idle | {k: v for k, v in theirs.items() if k in mine or not k.startswith("moments.")})
    except RuntimeError as error:
        raise ValueError(
            f"The weights in '{run.initial}' do not fit a {run.model} with {dict(run.arguments)}; "
            "leave out of [arguments] what changes their shapes."
        ) from error
    changed.provenance = model.provenance
    return changed
