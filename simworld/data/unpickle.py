"""Arrays out of pickles without running what is in them.

A pickle is a program: it may name any function and call it. Here every name but those that numpy's own
arrays are made of is refused, and those are made by the stand-ins below, which check what they are given.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

_DEPTH = 20


def load_pickle(file: BinaryIO, where: str) -> Any:
    """Return what a pickle of arrays, numbers, text, lists, tuples and dicts holds.

    Raises:
        ValueError: it names anything else (which is then not run), or is damaged; `where` says which file.
    """
    try:
        return _plain(_Reader(file).load(), {})
    except _ForeignError as error:
        raise ValueError(f"{where} holds a pickle with {error}; nothing of it was run. Give arrays only.") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{where} is not a whole pickle of arrays ({error}); write or copy it again.") from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"{where} is not a pickle of arrays: it is too deep or too large.") from error


def opened(path: str | Path) -> BinaryIO:
    """Return a file opened to be read; a ValueError says that there is none."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    return open(path, "rb")


def load_npz(path: str | Path) -> dict[str, Any]:
    """Return the arrays of an .npz file by name; of those that are pickles, what they hold.

    Raises:
        ValueError: there is no such file, it is damaged, or a pickle in it holds other things than arrays.
    """
    with opened(path) as raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                return {name.removesuffix(".npy"): _member(archive, name, f"{path}, '{name}'") for name in names}
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{path} is not a whole .npz file ({error}); write or copy it again.") from error


def _member(archive: zipfile.ZipFile, name: str, where: str) -> Any:
    with archive.open(name) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{where} is not a whole array ({error}); write or copy it again.") from error
        if dtype.hasobject:
            found = load_pickle(file, where)  # type: ignore[arg-type]
            if not isinstance(found, np.ndarray) or found.shape != shape:
                raise ValueError(f"{where} should be an array {list(shape)}; its pickle holds something else.")
            return found
    with archive.open(name) as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{where} is not a whole array ({error}); write or copy it again.") from error


class _ForeignError(Exception):
    """A pickle asks for what no array needs."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        home = module.replace("numpy._core.", "numpy.core.")
        if (home, name) not in _MAKERS:
            raise _ForeignError(f"'{module}.{name}' in it")
        return _Maker(_MAKERS[home, name])

    def persistent_load(self, key: Any) -> NoReturn:
        raise _ForeignError("a reference to things outside it")


class _Maker:
    """A function that a pickle may call but not change."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> NoReturn:
        raise _ForeignError("a state for a function in it")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _ForeignError("a state for a function in it")


class _Dtype:
    """A stand-in for numpy.dtype: numbers, flags, text and objects, no fields."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code[:1] not in "fiubOSU" or not (code[1:].isdecimal() or code in "O?"):
            raise _ForeignError(f"the dtype {code!r} in it")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, size, *_ = state
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise _ForeignError("a dtype with fields in it")
        if self.dtype.kind in "SU" and isinstance(size, int) and 0 < size < 1 << 20:
            self.dtype = np.dtype(f"{self.dtype.kind}{size // (4 if self.dtype.kind == 'U' else 1)}")
        self.dtype = self.dtype if order == "|" else self.dtype.newbyteorder(order)


class _Array:
    """A stand-in for numpy.ndarray, whose contents come as its state."""

    def __init__(self, *_: Any) -> None:
        self.parts: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, contents = state
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
            raise _ForeignError("an array without dtype or shape in it")
        self.parts = (shape, dtype.dtype, bool(column_major), contents)

    def build(self, known: dict[int, Any], depth: int) -> np.ndarray[Any, Any]:
        if self.parts is None:
            raise ValueError("an array has no contents")
        shape, dtype, column_major, contents = self.parts
        if dtype.hasobject:
            if not isinstance(contents, list):
                raise ValueError("an array of objects has no list of them")
            flat: np.ndarray[Any, Any] = np.empty(len(contents), dtype=object)
            for k, one in enumerate(contents):
                flat[k] = _plain(one, known, depth)
        else:
            flat = _from_buffer(contents, dtype)
        return flat.reshape(shape, order="F" if column_major else "C")


def _from_buffer(contents: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if not isinstance(contents, bytes | bytearray):
        raise ValueError("an array has no bytes")
    return np.frombuffer(bytes(contents), dtype=dtype) if len(contents) else np.empty(0, dtype=dtype)


def _buffer(contents: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.__setstate__((1, shape, dtype, order == "F", contents))
    return made


def _scalar(dtype: Any, contents: Any) -> Any:
    if not isinstance(dtype, _Dtype) or dtype.dtype.hasobject:
        raise _ForeignError("a number without dtype in it")
    return _from_buffer(contents, dtype.dtype).reshape(())[()]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise _ForeignError(f"text in the encoding {encoding!r} in it")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """Return the empty bytes, which old pickles call a function for."""
    return b""


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
}


def _plain(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Return the value with numpy's arrays in place of their stand-ins; what occurs often is made once."""
    if depth > _DEPTH:
        raise RecursionError
    if isinstance(value, _Dtype | _Maker):
        raise ValueError("it holds a dtype or a function where a value is expected")
    if not isinstance(value, _Array | list | tuple | dict):
        return value
    if id(value) not in known:
        if isinstance(value, _Array):
            known[id(value)] = value.build(known, depth + 1)
        elif isinstance(value, dict):
            known[id(value)] = {_key(k): _plain(v, known, depth + 1) for k, v in value.items()}
        else:
            known[id(value)] = type(value)(_plain(one, known, depth + 1) for one in value)
    return known[id(value)]


def _key(value: Any) -> Any:
    if not isinstance(value, str | bytes | int | float):
        raise ValueError("a dict in it has keys that are no text or numbers")
    return value
