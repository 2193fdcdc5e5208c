"""Threads for many small jobs: a job each, with one thread of torch's in each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Give as many workers as torch has threads, while torch itself takes one.

    Torch's threads wait for each other at every operation; of short ones, or beside other programs, that is many times
    slower than one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, thread_name_prefix="worker") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
