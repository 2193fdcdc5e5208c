"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
