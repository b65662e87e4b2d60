"""Results computed ahead of their use, in order, by one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from unite_fast.data.source import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")
WAKE = 0.2  # seconds between looks at whether the consumer has gone


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int,
    timeout: float,
    waiting_for: Callable[[], str],
) -> Iterator[Result]:
    """function(item) for every item, at most ``depth`` results waiting. An exception is raised in its place.

    Raises WorkerError when a result takes longer than ``timeout`` seconds, with what ``waiting_for()`` says is being
    read. The thread ends soon after the iterator is closed; one that hangs in a system call is left behind (it is a
    daemon and does not keep the program from ending).
    """
    results: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                results.put((kind, value), timeout=WAKE)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("result", function(item)):
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer
            put("error", error)

    threading.Thread(target=work, name="unite_fast.data", daemon=True).start()
    try:
        while True:
            try:
                kind, value = results.get(timeout=timeout)
            except queue.Empty:
                raise WorkerError(
                    f"data: no images for {timeout:g} s (data.timeout) while reading {waiting_for()}; "
                    "check that storage, or raise data.timeout"
                ) from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()


def spread(function: Callable[[Item], Result], items: list[Item], threads: int) -> list[Result]:
    """function(item) for every item, in order, over ``threads`` threads that live for this call.

    They are daemons: one that hangs does not keep the program from ending. The first exception is raised.
    """
    results: list[Any] = [None] * len(items)
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for i in range(first, len(items), threads):
                results[i] = function(items[i])
        except BaseException as error:  # handed to the caller
            errors.append(error)

    started = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(1, min(threads, len(items)))]
    for thread in started:
        thread.start()
    work(0)
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return results
