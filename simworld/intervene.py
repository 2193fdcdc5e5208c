"""Interventions: functions `(state, step) -> state` that hold a world to something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simworld.simulate import Intervention
from simworld.state import State

When = int | range | Callable[[State, int], bool]
Change = Tensor | float | bool | Callable[[Tensor], Tensor]


def do(*, at: When = 0, entities: Tensor | list[int] | int | None = None, **changes: Change) -> Intervention:
    """Return the intervention that sets fields of some entities at some steps.

    `at` is a step, a range of steps, or an event `(state, step) -> bool`; `entities` are entity numbers
    (all, if None) and `changes` maps fields, or `active`, to a value or to a function of the current
    rows. `do(active=False, entities=[3])` removes body 3. A step at which `at` does not hold returns the
    state itself.

    Raises:
        ValueError: nothing is to be changed; when applied, an unknown field or rows of another shape.
    """
    if not changes:
        raise ValueError("do() changes nothing; name a field and its value, as in do(at=0, velocities=v).")
    rows = None if entities is None else torch.as_tensor(entities, dtype=torch.long).reshape(-1)

    def intervention(state: State, step: int) -> State:
        if not _applies(at, state, step):
            return state
        made = {name: _changed(state, name, change, rows) for name, change in changes.items()}
        return state.replace(**made)

    return intervention


def _applies(at: When, state: State, step: int) -> bool:
    if isinstance(at, int):
        return step == at
    return step in at if isinstance(at, range) else bool(at(state, step))


def _changed(state: State, name: str, change: Change, rows: Tensor | None) -> Tensor:
    if name != "active" and name not in state.fields:
        raise ValueError(
            f"do() cannot change '{name}': {type(state).__name__} has {', '.join(state.fields)} and active."
        )
    current = state.active if name == "active" else state[name]
    if rows is None:
        value = change(current) if callable(change) else torch.as_tensor(change, dtype=current.dtype)
        return value.to(current.device).expand_as(current).clone()
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(current)):
        raise ValueError(f"do() got entities {rows.tolist()}; '{name}' has rows 0 to {len(current) - 1}.")
    rows = rows.to(current.device)
    value = change(current[rows]) if callable(change) else torch.as_tensor(change, dtype=current.dtype)
    return current.index_put((rows,), value.to(current.device).expand_as(current[rows]))
