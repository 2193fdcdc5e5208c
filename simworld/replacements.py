"""Slots made those of others: what `do` leaves of a slot, its speed, is replaced, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simworld.intervene import chosen_rows
from simworld.simulate import Edit
from simworld.state import State


@dataclass(frozen=True, kw_only=True)
class ReplaceSlots(Edit):
    """What `replace_slots` returns."""

    entities: Tensor
    by: Tensor
    at: int
    of: State | None = None

    @property
    def changes_past(self) -> bool:  # type: ignore[override]
        """Whether it changes history after frame 0."""
        return self.at != 0

    @property
    def first(self) -> int:  # type: ignore[override]
        """The step at which it acts."""
        return self.at

    def applies(self, state: State, step: int) -> bool:
        """Return whether this is the step."""
        return step == self.at

    def __call__(self, state: State, step: int) -> State:
        """Return the state with slots replaced; the state itself at other steps."""
        if step != self.at:
            return state
        donor = state if self.of is None else self.of
        for rows, count in ((self.entities, len(state)), (self.by, len(donor))):
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
                raise ValueError(f"replace_slots() takes slots 0 to {count - 1}; got {rows.tolist()}.")
        here, there = self.entities.to(state.device), self.by.to(donor.device)
        names = [*state.moving_fields, *(name for name in state.past_fields if state.fields[name].per == "entity")]
        for name in names:
            if name not in donor or donor[name].shape[1:] != state[name].shape[1:]:
                got = list(donor[name].shape[1:]) if name in donor else "none"
                raise ValueError(
                    f"replace_slots() takes rows of {name} {list(state[name].shape[1:])}; got {got}. Take slots of the "
                    "same encoder, with as long a history."
                )
        return state.replace(
            **{name: state[name].index_put((here,), donor[name][there].to(state[name])) for name in names}
        )

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values; of another state, that it was another."""
        said = {"replace_slots": self.entities.tolist(), "by": self.by.tolist(), "at": self.at}
        return said if self.of is None else {**said, "of": "another state"}


def replace_slots(
    entities: Sequence[int] | int, *, by: Sequence[int] | int, of: State | None = None, at: int = 0
) -> ReplaceSlots:
    """Return the intervention that makes some slots those of others at step `at`, with history, and so speed.

    `by` are as many slots of the same state as it is then, or of the state `of`. All that a slot has of its own is
    taken, the memory of an LSTM, too.

    Raises:
        ValueError: there are not as many slots, or one is replaced twice; when applied, there is no such slot, or `of`
            has slots of another size or history.
    """
    if isinstance(at, bool) or not isinstance(at, int) or at < 0:
        raise ValueError(f"replace_slots() acts at one step, 0 or more; got {at!r}.")
    rows, others = numbered(entities, "replace_slots"), numbered(by, "replace_slots")
    if len(rows) != len(others):
        raise ValueError(f"replace_slots() takes one slot for each; got {rows.tolist()} by {others.tolist()}.")
    if len(set(rows.tolist())) != len(rows):
        raise ValueError(f"replace_slots() replaces different slots; got {rows.tolist()}.")
    return ReplaceSlots(entities=rows, by=others, at=at, of=of)


def numbered(entities: Sequence[int] | int, verb: str) -> Tensor:
    """Return entity numbers [k] that were given as such, one or several.

    Raises:
        ValueError: they are no whole numbers.
    """
    rows, mask_size = chosen_rows(entities, verb)
    if not isinstance(rows, Tensor) or mask_size is not None:
        raise ValueError(f"{verb}() takes slots by number; got {entities!r}.")
    return rows
