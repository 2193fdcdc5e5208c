"""Declarations of quantities: what a field of a state is, and which values it may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["float", "int", "bool"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """Declares one quantity of a state.

    `per` says what a row belongs to: an "entity", a "scene", or the row of an "index" table, whose rows
    are entity numbers (springs, cells). The name of an index field, as in `per="springs"`, declares one
    row for each row of that table. `shape` is the shape of one row; "d" is the dimension of space, the
    same throughout a state, and another letter any size. `past_of` names the field whose values at the
    instants before, the oldest first, this one holds, [n, h, ...]: trajectories and files keep it for their
    first frame alone.
    """

    unit: str
    shape: tuple[int | str, ...] = ()
    per: str = "entity"
    static: bool = False
    kind: Kind = "float"
    required: bool = False
    limits: Literal["none", "positive", "unit length"] = "none"
    past_of: str = ""

    def __post_init__(self) -> None:
        if self.per == "index" and not (self.static and self.kind == "int"):
            raise ValueError("A field of entity numbers must be static and of kind 'int'; declare it with index_field.")
        if self.past_of and (self.static or self.per != "entity"):
            raise ValueError("A field with past_of changes in time and has a row per entity; leave static and per out.")

    def to_json(self) -> dict[str, Any]:
        """Return the declaration as plain values, the form that files carry."""
        return {
            "unit": self.unit,
            "shape": list(self.shape),
            "per": self.per,
            "static": self.static,
            "kind": self.kind,
            "required": self.required,
            "limits": self.limits,
            "past_of": self.past_of,
        }

    @staticmethod
    def from_json(declared: Mapping[str, Any]) -> Field:
        """Return the field that `to_json` wrote."""
        return Field(**{**declared, "shape": tuple(declared["shape"])})


def index_field(size: int | str, *, unit: str = "1") -> Field:
    """Return the declaration of a table of entity numbers with `size` columns; static."""
    return Field(unit=unit, shape=(size,), per="index", static=True, kind="int")


def time_unit(units: Mapping[str, str]) -> str:
    """Return the unit of time among those of a state's fields, as velocities tell it: "d", if they are in au/d."""
    _, slash, unit = units.get("velocities", "m/s").partition("/")
    return unit if slash else "time units"


def check_values(field: Field, name: str, value: Tensor) -> None:
    """Raise a ValueError that names the first row whose values the declaration does not allow."""
    if field.kind == "float" and not bool(torch.isfinite(value).all()):
        row = int((~torch.isfinite(value)).nonzero()[0, 0])
        raise ValueError(f"{name} must be finite; row {row} holds {value[row].tolist()}. Repair or drop that row.")
    if field.limits == "positive" and not bool((value > 0).all()):
        row = int((value <= 0).nonzero()[0, 0])
        way = " Say fixed=True of bodies that never move." if name == "masses" else ""
        raise ValueError(f"{name} must be positive; row {row} holds {value[row].tolist()}.{way}")
    if field.limits == "unit length":
        lengths = value.norm(dim=-1)
        wrong = ((lengths - 1).abs() > 1e-3).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            raise ValueError(
                f"{name} must be of unit length; row {row}, {value[row].tolist()}, has length "
                f"{float(lengths[row]):.4g}. Divide each row by its length."
            )
