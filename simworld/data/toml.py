"""TOML files whose keys are arguments: read, and held against what the arguments are declared to be."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@contextmanager
def about(file: str, table: str) -> Iterator[None]:
    """Let messages of a block name the file and the table that they are about, where they do not name the file."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(file):
            raise
        raise ValueError(f"{file}, {table}: {error}") from error


def read_toml(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return what a TOML file says, and its text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'; give the path of a TOML file.")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def read_run_file(
    path: Path, known: Iterable[str], models: Iterable[str], **given: str | Path | None
) -> tuple[dict[str, Any], str]:
    """Return what a run file says, with what is `given` in its place, and its text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, lacks a key or has one that is not `known`, a name or path is no string, the model
            is none of `models`, or num_train is no count.
    """
    said, text = read_toml(path)
    check_keys(f"{path}", said, known, required=("model", "data", "out", "fit"))
    said |= {name: str(value) for name, value in given.items() if value is not None}
    for name in ("model", "data", "out", "initial"):
        if name in said and not (isinstance(said[name], str) and said[name]):
            raise ValueError(f"{path}: {name} must be a string, not empty; got {said[name]!r}.")
    if said["model"] not in list(models):
        raise ValueError(f"{path}: model must be one of {', '.join(models)}; got {said['model']!r}.")
    count = said.get("num_train")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"{path}: num_train must be a whole number, 1 or more; got {count!r}.")
    return said, text


def check_keys(where: str, said: object, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raise a ValueError that names an unknown or missing key and lists the known ones."""
    if not isinstance(said, Mapping):
        raise ValueError(f"{where} must be a table of keys; got {said!r}.")
    known, required = list(known), list(required)
    unknown = [key for key in said if key not in known]
    if unknown:
        raise ValueError(f"{where} has an unknown key '{unknown[0]}'; the known ones are {', '.join(known)}.")
    missing = [key for key in required if key not in said]
    if missing:
        raise ValueError(f"{where} lacks the key '{missing[0]}'; it needs {', '.join(required)}.")


def check_arguments(
    where: str,
    said: object,
    function: Callable[..., Any],
    *,
    leave: Iterable[str] = (),
    required: Iterable[str] = (),
) -> None:
    """Raise a ValueError unless `said` holds arguments of `function` of the types it declares.

    `leave` are those that do not come from a file.
    """
    declared = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = {k: v for k, v in get_type_hints(declared).items() if k not in (*leave, "return", "self")}
    check_keys(where, said, hints, required)
    assert isinstance(said, Mapping)
    for key, value in said.items():
        if not _is(value, hints[key]):
            raise ValueError(f"{where}: {key} must be {_words(hints[key])}; got {value!r}.")


def _is(value: object, wanted: Any) -> bool:
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (tuple, Sequence):
        return isinstance(value, list) and all(_is(item, inner[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_is(item, inner[1]) for item in value.values())
    if isinstance(value, bool) and wanted in (float, int):
        return False
    return isinstance(value, int | float) and math.isfinite(value) if wanted is float else isinstance(value, wanted)


def _words(wanted: Any) -> str:
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (tuple, Sequence):
        return f"a list, each {_words(inner[0])}"
    if origin is Mapping:
        return f"a table, each {_words(inner[1])}"
    words = {float: "a finite number", int: "a whole number", str: "a string", bool: "true or false"}
    return words.get(wanted, str(wanted))
