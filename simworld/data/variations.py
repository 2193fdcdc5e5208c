"""Training on intervened episodes: each has changes drawn anew, so that a model sees what it will be asked.

A table of a recipe's `[[variations]]` is one of `interventions_from`, but for numbers that are drawn: of `scale` from
[low, high] by their logarithm, of `shift`, `set` and `rotate` evenly, and the frame `at` which it is done (0 where
nothing is said) evenly from [first, last]. `entities = "one"` is an entity that moves, drawn anew; `share` is how many
of the episodes are changed so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from simworld.intervene import Do
from simworld.intervention_tables import interventions_from
from simworld.simulate import Intervention
from simworld.state import State

Table = Mapping[str, Any]
_DRAWN = ("scale", "shift", "set", "rotate")


def check_variations(said: object, where: str) -> tuple[Table, ...]:
    """Return the tables of variations.

    Raises:
        ValueError: they are not a list of tables, a share is not from 0 to 1, a range is not two numbers that rise,
            `at` is no frame or range of frames, or a table is no intervention.
    """
    if not isinstance(said, Sequence) or isinstance(said, str) or not all(isinstance(t, Mapping) for t in said):
        raise ValueError(f"{where} must be a list of tables, each headed [[variations]]; got {said!r}.")
    for table in said:
        share = table.get("share", 1.0)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{where}: share must be a number from 0 to 1; got {share!r}.")
        for verb in _DRAWN:
            for name, ends in _ranges(table, verb):
                rising = len(ends) == 2 and all(_is_number(end) for end in ends) and ends[0] <= ends[1]
                if not rising or (verb == "scale" and ends[0] <= 0):
                    raise ValueError(
                        f"{where}: {verb}.{name} is drawn from [low, high], two numbers that rise"
                        f"{', above 0' if verb == 'scale' else ''}; got {ends!r}."
                    )
        if "once" in table:
            raise ValueError(f"{where}: a variation is done at one frame, so it needs no once; leave it out.")
        if not _is_when(table.get("at", 0)):
            raise ValueError(
                f"{where}: at is a frame, or [first, last] to draw one from, whole numbers from 0 on that rise; "
                f"got {table['at']!r}."
            )
        interventions_from([_drawn(table, np.random.default_rng(0))], where)
    return tuple(said)


def vary(tables: Sequence[Table], seed: Sequence[int]) -> tuple[Intervention, ...]:
    """Return the changes of one episode: the same for the same seed."""
    rng = np.random.default_rng([*seed, 0x76617279])  # a stream of its own beside the episode's
    made: list[Intervention] = []
    for table in tables:
        chance, one = rng.random(), rng.random()
        drawn = _drawn(table, rng)
        if chance >= table.get("share", 1.0):
            continue
        (edit,) = interventions_from([drawn], "variations")
        made.append(_OfOne(edit, one) if table.get("entities") == "one" else edit)
    return tuple(made)


class _OfOne:
    """A change of one entity that moves: that at a `place` from 0 to 1 among them."""

    def __init__(self, edit: Do, place: float) -> None:
        self.edit, self.place = edit, place

    def __call__(self, state: State, step: int) -> State:
        if step != self.edit.at:
            return state
        movers = state.free.nonzero()[:, 0]
        chosen = movers[torch.tensor([int(self.place * len(movers))])]
        return Do(at=step, entities=chosen, changes=self.edit.changes)(state, step)


def _ranges(table: Table, verb: str) -> list[tuple[str, Sequence[Any]]]:
    said = table.get(verb, {})
    return [(k, v) for k, v in said.items() if isinstance(v, list)] if isinstance(said, Mapping) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_when(value: Any) -> bool:
    """Return whether a value is a frame or a range of frames to draw from."""
    ends = value if isinstance(value, list) and len(value) == 2 else [value, value]
    return all(isinstance(end, int) and not isinstance(end, bool) for end in ends) and 0 <= ends[0] <= ends[1]


def _drawn(table: Table, rng: np.random.Generator) -> dict[str, Any]:
    """Return a table of `interventions_from`, its ranges drawn from."""
    made = {k: v for k, v in table.items() if k not in ("share", *_DRAWN)}
    if made.get("entities") == "one":
        del made["entities"]
    for verb in _DRAWN:
        if isinstance(table.get(verb), Mapping):
            made[verb] = {k: _draw(verb, v, rng) if isinstance(v, list) else v for k, v in table[verb].items()}
    if isinstance(table.get("at"), list):
        made["at"] = int(rng.integers(table["at"][0], table["at"][1] + 1))
    return made


def _draw(verb: str, ends: Sequence[float], rng: np.random.Generator) -> float:
    if verb == "scale":
        return math.exp(rng.uniform(math.log(ends[0]), math.log(ends[1])))
    return float(rng.uniform(ends[0], ends[1]))
