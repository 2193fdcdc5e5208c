"""Times jobs in turn, and the matrix products that a job makes alone."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Notes the shapes of every matrix product while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = arguments[-2:]
            self.shapes.append((tuple(a.shape), tuple(b.shape)))
        elif name == "linear":  # in inference mode it comes whole
            inputs, weight = arguments[:2]
            self.shapes.append((tuple(inputs.shape), tuple(weight.t().shape)))
        return function(*arguments, **(keywords or {}))


def products_alone(shapes, *, shared: bool = False):
    """Return a job that makes products of these shapes, into buffers that exist.

    With `shared`, products of one shape use the same operands: less memory, and if anything faster.
    """

    def operands(a, b):
        return torch.randn(a), torch.randn(b), torch.empty(a[0], b[1])

    make = cache(operands) if shared else operands
    jobs = [make(a, b) for a, b in shapes]

    def run():
        for a, b, out in jobs:
            torch.mm(a, b, out=out)

    return run


def medians(repeats: int, **jobs) -> dict[str, float]:
    """Return the median milliseconds of each job, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 3):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
