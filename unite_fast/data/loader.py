"""Batches of a FileSource: images are read by worker processes in chunks and land on the device in order.

The plan is cut into chunks of at most CHUNK images. torch's DataLoader hands them to the workers round-robin and
returns them in order, so the result does not depend on the number of workers. Each chunk goes straight into its
place in the batch's device tensor (from pinned memory when that is a GPU).

Unreadable images. Workers report them instead of raising; the policy is applied here, in the training process:
``fail`` stops with the path and the reason. ``skip`` puts the next readable image of the source (and its label) in
the place, logs each path once, and stops when more than 0.1 % of the source's images (but at least MIN_SKIPPED)
have turned out unreadable: distinct ones, which each process counts here, and a run over its ranks and starts
(``run.health``). The replacement is a function of the index, so runs repeat.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unite_fast.base.errors import UserError
from unite_fast.base.parent import end_with_parent
from unite_fast.data.batch import Batch, batch_of_images
from unite_fast.data.source import BadImage, Request, Source, WorkerError, to_device

CHUNK = 32  # images; bounds shared memory to 2 * workers * CHUNK images
MAX_SKIPPED_SHARE, MIN_SKIPPED = 0.001, 5
log = logging.getLogger("unite_fast.data")

# images (B, C, H, W), the indices really used, and (index, reason) of unreadable ones
Chunk = tuple[Tensor, Tensor, list[tuple[int, str]]]


def skip_limit(n: int) -> int:
    """How many distinct images of a source of ``n`` may be unreadable under on_error=skip."""
    return max(MIN_SKIPPED, int(n * MAX_SKIPPED_SHARE))


class _Chunks(Dataset):
    """Runs in the workers: a request to a chunk."""

    def __init__(self, source: Source, seed: int, progress: Tensor) -> None:
        self.source, self.seed = source, seed
        self.progress = progress  # (workers, 2) int64 in shared memory: each worker's pid and the index it is reading

    def _read(self, index: int, draw: Tensor | None, bad: list[tuple[int, str]]) -> tuple[Tensor | None, int]:
        """The image of ``index`` or, when that is unreadable and may be skipped, of the next readable one."""
        attempts = 1 if self.source.on_error == "fail" else skip_limit(len(self.source)) + 1
        for used in range(index, index + attempts):
            used %= len(self.source)
            info = get_worker_info()
            if info is not None:
                self.progress[info.id, 1] = used
            try:
                return self.source.read(used, draw, self.seed), used
            except BadImage as error:
                bad.append((used, str(error)))
        return None, index

    def __getitem__(self, request: Request) -> Chunk:
        draws = self.source.uniforms(self.seed, request.positions) if request.augment else None
        images: Tensor | None = None
        used, bad = request.indices.clone(), []
        for i, index in enumerate(request.indices.tolist()):
            image, used_index = self._read(index, None if draws is None else draws[i], bad)
            if image is None:  # the training process stops on what is in ``bad``
                return torch.empty(0), used, bad
            if images is None:
                images = torch.empty(len(used), *image.shape, dtype=image.dtype)
            images[i], used[i] = image, used_index
        assert images is not None, "a request is never empty"
        return images, used, bad


class _StartWorker:
    """Runs first in each worker. Signals for the training process are not for its workers."""

    def __init__(self, progress: Tensor) -> None:
        self.progress = progress
        self.lasting = threading.current_thread() is threading.main_thread()  # another thread may end before its work

    def __call__(self, worker: int) -> None:
        if self.lasting:
            end_with_parent()  # one that hangs in a read does not look after its parent
        os.setpgid(0, 0)  # torchrun ends a rank by SIGTERM to its group: the rank still trains a step and needs batches
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler inherited from the training process
        self.progress[worker, 0] = os.getpid()


def _as_is(item: Any) -> Any:
    return item


def apply_policy(source: Source, bad: list[tuple[int, str]]) -> None:
    """Stops, or logs and counts. Raises UserError."""
    for index, reason in bad:
        path = source.name(index)
        if source.on_error == "fail":
            raise UserError(f"{path}: {reason}; mend or remove it, or set data.on_error=skip")
        if index in source.skipped:
            continue
        source.skipped[index] = reason
        log.warning("unreadable image replaced by the next one: %s: %s", path, reason)
        check_skipped(source)


def check_skipped(source: Source) -> None:
    """Raises UserError when more images are unreadable than on_error=skip allows; names the last one found."""
    limit = skip_limit(len(source))
    if len(source.skipped) > limit:
        index, reason = list(source.skipped.items())[-1]
        raise UserError(
            f"{len(source.skipped)} of {len(source)} images are unreadable, more than the {limit} that "
            f"data.on_error=skip allows; the last is {source.name(index)}: {reason}"
        )


def _dead(error: Exception) -> list[int]:
    """The pids that DataLoader's RuntimeError tells of; empty for another error."""
    told = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    return [int(pid) for pid in told[1].split(",")] if told else []


def _workers(iterator: object) -> Sequence[BaseProcess]:
    """A DataLoader's iterator's; none where it reads in this process."""
    return getattr(iterator, "_workers", ())


def _explain(
    error: Exception, source: Source, progress: Tensor, chunk: int, timeout: float, workers: Sequence[BaseProcess]
) -> WorkerError | None:
    """The WorkerError for a DataLoader failure, or None when the error is something else."""
    if str(error).startswith("DataLoader timed out"):
        path = source.name(int(progress[chunk % len(progress), 1]))
        return WorkerError(
            f"data: no images for {timeout:g} s (data.timeout); a worker is still reading {path}; "
            "check that storage, or raise data.timeout"
        )
    died = _dead(error)
    if isinstance(error, (OSError, EOFError)):  # it died while it handed a tensor over: the connection broke first
        ended = connection.wait([worker.sentinel for worker in workers], timeout=1)
        died = [worker.pid or 0 for worker in workers if worker.sentinel in ended]
    if not died:
        return None
    reading = [source.name(int(index)) for pid, index in progress.tolist() if pid in died]
    where = f" while reading {', '.join(reading)}" if reading else ""
    return WorkerError(
        f"data: a decoding worker (pid {', '.join(map(str, died))}) died{where}; out of memory? "
        "lower data.workers, or free memory and /dev/shm"
    )


class _Deaths:
    """Keeps the news of a dead worker until a batch is asked for; one for all loaders of the process.

    DataLoader raises it from its SIGCHLD handler, wherever the training program happens to be: in the middle of a
    step, of writing a checkpoint, or of stopping the dead worker's siblings. While a batch is waited for, it is raised
    at once.
    """

    def __init__(self) -> None:
        self._loaders = 0
        self._waiting: set[int | None] = set()  # pids of the loader that is waited for
        self._news: list[RuntimeError] = []
        self._before: Any = None

    def watch(self) -> bool:
        """For a loader that has started its workers: puts a handler in front of DataLoader's. True: ``unwatch`` it."""
        if threading.current_thread() is not threading.main_thread():
            return False  # only the main thread handles signals, and DataLoader sets no handler either
        if self._loaders == 0 and signal.getsignal(signal.SIGCHLD) != self._on_signal:
            self._before = signal.signal(signal.SIGCHLD, self._on_signal)
        self._loaders += 1
        return True

    def unwatch(self, workers: Sequence[BaseProcess]) -> None:
        """For a loader whose ``workers`` have ended: DataLoader tells no more of them, and what it told is no news."""
        self._loaders -= 1
        ended = {worker.pid for worker in workers}
        self._news = [error for error in self._news if not ended & set(_dead(error))]
        main = threading.current_thread() is threading.main_thread()
        if main and self._loaders == 0 and signal.getsignal(signal.SIGCHLD) == self._on_signal:
            signal.signal(signal.SIGCHLD, self._before)

    def _on_signal(self, number: int, frame: Any) -> None:
        try:
            if callable(self._before):
                self._before(number, frame)
        except RuntimeError as error:
            if self._waiting & set(_dead(error)):
                self._waiting = set()
                raise
            self._news.append(error)

    def wait(self, iterator: Iterator[Chunk]) -> Chunk:
        """next(iterator). Raises RuntimeError for one of its workers that has died by now."""
        try:
            self._waiting = {worker.pid for worker in _workers(iterator)}
            for error in self._news:
                if self._waiting & set(_dead(error)):
                    self._news.remove(error)
                    raise error
            return next(iterator)
        finally:
            self._waiting = set()


_deaths = _Deaths()


def _stop_workers(iterator: object) -> None:
    """Ends the workers now. Left to the garbage collector, a dead worker's siblings would be reported once more."""
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is not None:
        stop()
        for worker in _workers(iterator):
            if worker.is_alive():  # hung: it did not heed SIGTERM, and this process could not exit before it
                worker.kill()


def load_batches(
    source: Source, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
) -> Iterator[Batch]:
    """One Batch on ``device`` per request of ``plan``; see the top of this file.

    ``workers=0`` reads in this process (then ``timeout``, in seconds per chunk, cannot act). Raises UserError for
    unreadable images, WorkerError for a worker that dies or hangs.
    """
    pending: deque[Request] = deque()

    def chunks() -> Iterator[Request]:
        for request in plan:
            pending.append(request)
            for low in range(0, len(request.indices), CHUNK):
                part = slice(low, low + CHUNK)
                yield Request(request.indices[part], request.positions[part], request.augment)

    progress = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()
    with warnings.catch_warnings():  # of more workers than cores, in four lines; the doctor says it in one
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Chunk] = DataLoader(
            _Chunks(source, seed, progress),
            batch_size=None,
            sampler=chunks(),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else DataLoader would advance the global one
            timeout=timeout if workers else 0,
            worker_init_fn=_StartWorker(progress) if workers else None,
            prefetch_factor=2 if workers else None,
        )
        try:
            iterator = iter(loader)  # which warns once more
            watched = workers > 0 and _deaths.watch()
        except RuntimeError as error:  # a worker that died before all had started
            raise _explain(error, source, progress, 0, timeout, ()) or error from None
    count = 0

    def next_chunk() -> Chunk | None:
        nonlocal count
        try:
            images, used, bad = _deaths.wait(iterator)
        except StopIteration:
            return None
        except (RuntimeError, OSError, EOFError) as error:
            explained = _explain(error, source, progress, count, timeout, _workers(iterator))
            if explained is None:
                raise
            raise explained from None
        count += 1
        apply_policy(source, bad)
        return images, used, bad

    try:
        while (chunk := next_chunk()) is not None:
            request = pending.popleft()
            n = len(request.indices)
            images = torch.empty(n, *chunk[0].shape[1:], dtype=chunk[0].dtype, device=device)
            used = torch.empty(n, dtype=torch.int64)
            filled = 0
            while chunk is not None:
                high = filled + len(chunk[1])
                images[filled:high].copy_(chunk[0], non_blocking=True)
                used[filled:high] = chunk[1]
                filled = high
                chunk = next_chunk() if filled < n else None
            yield batch_of_images(images, to_device(source.labels[used], device), to_device(request.positions, device))
    finally:
        try:
            _stop_workers(iterator)
        finally:
            if watched:  # until here: a death may be told of at any moment before DataLoader forgets its workers
                _deaths.unwatch(_workers(iterator))
