"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, suffix: str = ".partial") -> Iterator[Path]:
    """Lend a name beside `path` to write to; at the end it becomes `path`, and what was there stays if anything failed.

    `suffix` comes after the whole name, for writers that ask the name what to write.
    """
    path = Path(path)
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder(path: str | Path) -> Iterator[Path]:
    """Lend a folder, made with its parents where it is not there; what was made for it and is empty goes on failure."""
    path = Path(path)
    made = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # not empty, and so are its parents
            for one in made:
                one.rmdir()
        raise
