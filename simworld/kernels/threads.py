"""One thread of torch's at a time, and threads for many small jobs instead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch take one thread, and give how many it took before.

    Torch's threads wait for each other at every operation; of short ones, or beside other programs, that is many times
    slower than one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextmanager
def workers(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Give `count` workers, by default as many as torch has threads, while torch itself takes one."""
    with one_thread() as before, ThreadPoolExecutor(count or before, thread_name_prefix="worker") as pool:
        yield pool
