"""Warp, started without a word: standard output is for results, and a machine without CUDA is no cause for alarm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
import warp as wp  # noqa: TID253 (only modules that are themselves imported late import this one)
from torch import Tensor

__all__ = ["evenly", "filled", "in_bands", "stream_of", "wp"]

_LOADING = Lock()
_LOADED: set[tuple[int, str]] = set()


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


def in_bands(
    kernel: Any,
    cuts: Sequence[int],
    inputs: Sequence[Any],
    device: torch.device,
    gradients: Sequence[Any] | None = None,
    *,
    threads: int | None = None,
) -> None:
    """Run a kernel over the tasks from each cut to the next, by `threads`, or a thread for each band.

    Warp's own launch on a CPU has one thread. The kernel's first input is the number of a band's first task. With
    `gradients` of the other inputs its adjoint runs, which adds to them.
    """
    backward: dict[str, Any] = {} if gradients is None else {"adj_inputs": [0, *gradients], "adjoint": True}

    def band(number: int) -> None:
        dim, first = cuts[number + 1] - cuts[number], cuts[number]
        stream = stream_of(device)
        place = wp.device_from_torch(device)
        wp.launch(kernel, dim=dim, inputs=[first, *inputs], device=place, stream=stream, **backward)

    rest = range(len(cuts) - 1)
    with _LOADING:  # threads that load one kernel at once would compile it several times
        if (id(kernel), device.type) not in _LOADED and cuts[1] > cuts[0]:  # nothing to do loads nothing
            band(0)
            _LOADED.add((id(kernel), device.type))
            rest = rest[1:]
    left = iter(rest)  # shared: whoever is free takes the next band

    def work() -> None:
        for number in left:
            band(number)

    others = min(threads or len(rest), len(rest)) - 1
    helping = [_pool(others).submit(work) for _ in range(others)]
    work()
    for helper in helping:
        helper.result()


def evenly(count: int, bands: int) -> list[int]:
    """Return the cuts of `count` tasks into bands as long as each other, to within one."""
    return [count * number // bands for number in range(bands + 1)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bands")


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
