"""Interventions as tables of plain values, the form that TOML and JSON files hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simworld.expressions import Expression, Names
from simworld.intervene import FUNCTION, Change, Do, Rule, When, do

_WITH_VALUES, _PLAIN, _FLAGS = ("set", "scale", "shift", "rotate"), ("negate", "hold"), ("remove", "add")


def interventions_from(said: object, where: str, *, names: Names | None = None) -> tuple[Do, ...]:
    """Return the interventions in a list of tables, as TOML and JSON files hold them and `Do.to_json` writes them.

    A table has `at` (a step; [from, before] or [from]; a condition) and `once`, `entities` (numbers, a condition, or
    one of `names`), and what is done: `set`, `scale`, `shift` and `rotate` map fields to values, `negate` and `hold`
    list fields, `remove` or `add` is true. `where` is what messages say of the place.

    Raises:
        ValueError: a table has an unknown key or value, a condition that cannot be read, or does nothing.
    """
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise ValueError(f"{where} must be a list of tables; got {said!r}.")
    return tuple(_one_from(table, f"{where}, table {k}", names or {}) for k, table in enumerate(said))


def _one_from(table: object, where: str, names: Names) -> Do:
    keys = ("at", "once", "entities", *_WITH_VALUES, *_PLAIN, *_FLAGS)
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table of {', '.join(keys)}; got {table!r}.")
    unknown = [key for key in table if key not in (*keys, "came")]
    if unknown:
        raise ValueError(f"{where} has an unknown key '{unknown[0]}'; the known ones are {', '.join(keys)}.")
    changes: dict[str, Change] = {}
    given = [(verb, k, v) for verb in _WITH_VALUES for k, v in _fields_of(table, verb, where).items()]
    given += [(verb, name, None) for verb in _PLAIN for name in _list_of(table, verb, where)]
    given += [("set", "active", verb == "add") for verb in _FLAGS if _flag_of(table, verb, where)]
    for verb, name, value in given:
        if name in changes:
            raise ValueError(f"{where} changes '{name}' twice; give each change a table of its own.")
        changes[name] = Rule(verb, _numbers(value, f"{where}, {verb}.{name}"))
    if not changes:
        raise ValueError(f"{where} does nothing; give one of {', '.join(keys[3:])}.")
    entities = table.get("entities")
    if not isinstance(entities, str) and entities is not None and not _whole(entities):
        raise ValueError(f"{where}: entities must be numbers of entities, a name or a condition; got {entities!r}.")
    try:
        at = _at_from(table.get("at", 0), where, names)
        entities = Expression(entities, names) if isinstance(entities, str) else entities
        return do(at=at, entities=entities, once=_flag_of(table, "once", where), **changes)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error


def _whole(value: object) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _at_from(said: object, where: str, names: Names) -> When:
    if isinstance(said, str):
        _refuse_function(said, f"{where}, at")
        return Expression(said, names)
    if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
        return said
    if isinstance(said, Sequence) and 1 <= len(said) <= 3 and _whole(said) and 0 not in said[2:]:
        return range(said[0], *(said[1:] or (sys.maxsize,)))
    raise ValueError(
        f"{where}: at must be a step, [from, before] or [from, before, every], or a condition as text; got {said!r}."
    )


def _fields_of(table: Mapping[str, Any], verb: str, where: str) -> Mapping[str, Any]:
    said = table.get(verb, {})
    if not isinstance(said, Mapping):
        raise ValueError(f"{where}: {verb} must be a table of fields and values; got {said!r}.")
    return said


def _list_of(table: Mapping[str, Any], verb: str, where: str) -> Iterable[str]:
    said = table.get(verb, [])
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise ValueError(f"{where}: {verb} must be a list of fields; got {said!r}.")
    return said


def _flag_of(table: Mapping[str, Any], key: str, where: str) -> bool:
    said = table.get(key, False)
    if not isinstance(said, bool):
        raise ValueError(f"{where}: {key} must be true or false; got {said!r}.")
    return said


def _refuse_function(said: object, where: str) -> None:
    if isinstance(said, str) and said.startswith(f"{FUNCTION} "):
        raise ValueError(
            f"{where} was a {said}() of Python, and none is read from a file; say it by values and conditions."
        )


def _numbers(value: Any, where: str) -> Any:
    _refuse_function(value, where)
    rows = [value]
    while rows and isinstance(rows[0], list):
        rows = [item for row in rows for item in (row if isinstance(row, list) else [row])]
    if value is not None and not all(isinstance(item, int | float) and math.isfinite(item) for item in rows):
        raise ValueError(f"{where} must be a finite number, true or false, or rows of them; got {value!r}.")
    return value
