"""Warp, started without a word: standard output is for results, and a machine without CUDA is no cause for alarm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import warp as wp  # noqa: TID253 (only modules that are themselves imported late import this one)

__all__ = ["wp"]


@contextmanager
def _silent() -> Iterator[None]:
    """Send what is written to standard error, by native code too, nowhere."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


wp.config.quiet, wp.config.log_level = True, 30  # type: ignore[attr-defined]  # as older and newer releases say it
if torch.cuda.is_available():
    wp.init()  # type: ignore[no-untyped-call]
else:
    with _silent():
        wp.init()  # type: ignore[no-untyped-call]
