"""Warp, started without a word: standard output is for results, and a machine without CUDA is no cause for alarm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import warp as wp  # noqa: TID253 (only modules that are themselves imported late import this one)
from torch import Tensor

__all__ = ["filled", "stream_of", "wp"]


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


def stream_of(device: torch.device) -> Any:
    """Return the stream of Warp's that keeps torch's order of work on a device; None on a CPU."""
    known: Any = wp.stream_from_torch
    return known(torch.cuda.current_stream(device)) if device.type == "cuda" else None


def filled(kind: Any, values: Mapping[str, Tensor], names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """Return a struct of Warp's whose members are the tensors, sharing their memory; no gradient is kept of them.

    `names` says what members are called where it is not what the tensors are called.
    """
    struct = kind()
    for name, value in values.items():
        member = names.get(name, name)
        rows = wp.from_torch(value.detach(), dtype=kind.vars[member].type.dtype, requires_grad=False)
        setattr(struct, member, rows)
    return struct
