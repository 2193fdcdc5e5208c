"""A scene in TOML: the values of a state and the simulator that steps it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.data.toml import check_keys, read_toml
from simworld.kinds import KINDS
from simworld.models import load_checkpoint
from simworld.simulate import Simulator
from simworld.state import State


def load_scene(path: str | Path, *, simulator: Simulator | None = None) -> State:
    """Return the state in a scene file, tied to its simulator: ready for `rollout(state, actions)`.

    Keys: `state`, the kind; `[fields]`, rows of numbers or one value for all entities; `[units]`, where they
    are not the declared ones; `checkpoint`, the name or file of the simulator, unless `simulator` is given.

    Raises:
        FileNotFoundError: there is no such file, or no such checkpoint.
        ValueError: the file is not TOML, has an unknown key, or its values do not make a state.
    """
    path = Path(path)
    said, _ = read_toml(path)
    known = ("state", "checkpoint", "fields", "units", "about")
    check_keys(f"{path}", said, known, required=("state", "fields"))
    _check_strings(f"{path}", {k: v for k, v in said.items() if k not in ("fields", "units")})
    if said["state"] not in KINDS:
        raise ValueError(f"{path}: state must be one of {', '.join(KINDS)}; got {said['state']!r}.")
    kind, units = KINDS[said["state"]], said.get("units", {})
    check_keys(f"{path} [units]", units, list(kind.fields))
    _check_strings(f"{path} [units]", units)
    needed = tuple(name for name, field in kind.fields.items() if field.required)
    check_keys(f"{path} [fields]", said["fields"], list(kind.fields), required=needed)
    try:
        state = kind.with_units(**units)(**_values(kind, said["fields"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if simulator is None and "checkpoint" in said:
        simulator = load_checkpoint(said["checkpoint"])
    return state.using(simulator)


def _check_strings(where: str, said: Mapping[str, object]) -> None:
    for name, value in said.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a string; got {value!r}.")


def _values(kind: type[State], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors of the declared dtypes; one number where a row per entity belongs is given to all."""
    values = {name: _tensor(name, kind.fields[name].kind, value) for name, value in fields.items()}
    counts = {"entity": len(values["positions"]) if values["positions"].ndim else 0, "scene": 1}
    counts |= {name: len(value) for name, value in values.items() if kind.fields[name].per == "index" and value.ndim}
    return {name: _spread(value, counts.get(kind.fields[name].per)) for name, value in values.items()}


def _tensor(name: str, kind: str, value: object) -> Tensor:
    """Return rows of numbers as a tensor, unless they are not of the declared kind."""
    wanted = {"float": (int, float), "int": (int,), "bool": (bool,)}[kind]
    rows = [value]
    while rows and isinstance(rows[0], list):
        rows = [item for row in rows for item in (row if isinstance(row, list) else [row])]
    for item in rows:
        if not isinstance(item, wanted) or (isinstance(item, bool) and kind != "bool"):
            raise ValueError(f"{name} must hold {kind} values; got {item!r}.")
    dtype = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}[kind]
    try:
        return torch.tensor(value, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must have rows of equal length ({error}).") from error


def _spread(value: Tensor, count: int | None) -> Tensor:
    return value.expand(count).clone() if value.ndim == 0 and count is not None else value
