"""Run files: what to train on what, as TOML."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from simworld.data import open_trajectories
from simworld.data.generate import check_keys
from simworld.models import MODELS, LearnedSimulator, load_checkpoint
from simworld.train import LOSSES, Fit, Loss, Progress, fit


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: `data` holds train.h5 and perhaps valid.h5; `initial` is a checkpoint to go on from."""

    model: str
    data: Path
    out: Path
    fit: Fit
    loss: Loss
    arguments: Mapping[str, Any]
    initial: str | None = None
    num_train: int | None = None
    text: str = ""


def read_run(path: str | Path) -> Run:
    """Return the run in a TOML file; paths in it are relative to where the command runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, lacks a key, or has one that nothing reads.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    known = [f.name for f in fields(Run) if f.name != "text"]
    check_keys(f"{path}", said, known, required=("model", "data", "out", "fit"))
    if said["model"] not in MODELS:
        raise ValueError(f"{path}: model must be one of {', '.join(MODELS)}; got {said['model']!r}.")
    chosen = dict(said.get("loss", {"name": "one_step"}))
    name = chosen.pop("name", None)
    if name not in LOSSES:
        raise ValueError(f"{path} [loss]: name must be one of {', '.join(LOSSES)}; got {name!r}.")
    check_keys(f"{path} [loss]", chosen, list(inspect.signature(LOSSES[name]).parameters))
    check_keys(f"{path} [fit]", said["fit"], [f.name for f in fields(Fit)], required=("num_steps",))
    arguments = said.get("arguments", {})
    own = [k for k in inspect.signature(MODELS[said["model"]]).parameters if k not in ("dt", "statistics")]
    check_keys(f"{path} [arguments]", arguments, own)
    try:
        loss, how = LOSSES[name](**chosen), Fit(**said["fit"])
    except TypeError as error:
        raise ValueError(
            f"{path}: [loss] or [fit] has a missing key or a value of the wrong type ({error})."
        ) from error
    return Run(
        model=said["model"],
        data=Path(said["data"]),
        out=Path(said["out"]),
        fit=how,
        loss=loss,
        arguments=arguments,
        initial=said.get("initial"),
        num_train=said.get("num_train"),
        text=text,
    )


def start(run: Run, *, watch: Callable[[Progress], None] | None = None) -> LearnedSimulator:
    """Train as a run says, or go on where it was interrupted, and return the model."""
    with open_trajectories(run.data / "train.h5") as data:
        trajectories = data[: run.num_train]
        said = {"dataset": data.dataset, "dataset_seed": data.seed, "units": data.units, "run": run.text}
    valid_path = run.data / "valid.h5"
    valid = open_trajectories(valid_path)[:] if valid_path.is_file() else []
    torch.manual_seed(run.fit.seed)
    if run.initial is not None:
        model = load_checkpoint(run.initial)
        if type(model).__name__ != run.model or run.arguments:
            raise ValueError(
                f"'{run.initial}' brings a {type(model).__name__} with its own arguments; "
                f"say model = '{type(model).__name__}' and leave [arguments] out."
            )
        said["initial"] = model.provenance
    else:
        kind: Callable[..., LearnedSimulator] = MODELS[run.model]
        chosen = {k: run.arguments[k] for k in ("actions",) if k in run.arguments}
        statistics = MODELS[run.model].measure(trajectories[:500], noise_std=run.loss.noise_std, **chosen)
        model = kind(dt=trajectories[0].dt, statistics=statistics, **run.arguments)
    model.provenance = said
    return fit(model.train(), trajectories, run.loss, run.fit, out=run.out, valid=valid, watch=watch)
