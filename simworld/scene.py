"""A scene in TOML: the values of a state and the simulator that steps it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.data.generate import check_keys
from simworld.models import load_checkpoint
from simworld.simulate import Simulator
from simworld.state import KINDS, State


def load_scene(path: str | Path, *, simulator: Simulator | None = None) -> State:
    """Return the state in a scene file, tied to its simulator: ready for `rollout(state, actions)`.

    Keys: `state`, the kind; `[fields]`, rows of numbers or one value for all entities; `[units]`, where they
    are not the declared ones; `checkpoint`, the name or file of the simulator, unless `simulator` is given.

    Raises:
        FileNotFoundError: there is no such file, or no such checkpoint.
        ValueError: the file is not TOML, has an unknown key, or its values do not make a state.
    """
    path = Path(path)
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    known = ("state", "checkpoint", "fields", "units", "about")
    check_keys(f"{path}", said, known, required=("state", "fields"))
    if said["state"] not in KINDS:
        raise ValueError(f"{path}: state must be one of {', '.join(KINDS)}; got {said['state']!r}.")
    kind = KINDS[said["state"]]
    check_keys(f"{path} [units]", said.get("units", {}), list(kind.fields))
    needed = tuple(name for name, field in kind.fields.items() if field.required)
    check_keys(f"{path} [fields]", said["fields"], list(kind.fields), required=needed)
    try:
        state = kind.with_units(**said.get("units", {}))(**_values(kind, said["fields"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if simulator is None and "checkpoint" in said:
        simulator = load_checkpoint(said["checkpoint"])
    return state.using(simulator)


def _values(kind: type[State], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors of the declared dtypes; one number where a row per entity belongs is given to all."""
    dtypes = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
    values = {name: torch.tensor(value, dtype=dtypes[kind.fields[name].kind]) for name, value in fields.items()}
    counts = {"entity": len(values["positions"]) if values["positions"].ndim else 0, "scene": 1}
    counts |= {name: len(value) for name, value in values.items() if kind.fields[name].per == "index" and value.ndim}
    return {name: _spread(value, counts.get(kind.fields[name].per)) for name, value in values.items()}


def _spread(value: Tensor, count: int | None) -> Tensor:
    return value.expand(count).clone() if value.ndim == 0 and count is not None else value
