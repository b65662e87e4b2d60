"""A function over many items in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from unite_fast.base.errors import RunError
from unite_fast.base.parent import end_with_parent


def processes(wanted: int = 0) -> int:
    """``wanted``, or as many as this process has cores."""
    return wanted or len(os.sched_getaffinity(0))


def mapped(function: Callable[[Any], Any], items: Sequence[Any], workers: int = 0, chunk: int = 64) -> Iterator[Any]:
    """``function`` of each item, in order. ``workers`` processes, 0 for one per core; 1 stays in this process.

    The processes are forks, as those of torch's DataLoader are: ``function`` must not use torch. Raises RunError when
    one of them dies, and what ``function`` raises.
    """
    count = min(processes(workers), -(-len(items) // chunk))
    if count <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, initializer=end_with_parent) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        except BrokenProcessPool:
            raise RunError(f"one of {count} processes died; out of memory? use fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)
