"""Writes checkpoints while training goes on.

A save copies what this rank will write to host memory, in stream order, so that it is one step's state whatever
happens next. A thread then writes it through torch.distributed.checkpoint, whose ranks talk over a gloo group of their
own: files to ``step-N.incomplete``, synced, their sizes and sha256 in a manifest. When all ranks have written, rank 0
renames the folder. At most one save is in flight. Removal renames first, too: a folder called step-N is always whole.

A disk that refuses costs a warning: what is superfluous is removed, the save is tried once more, and the run goes on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast import checkpoint
from unite_fast.base import faults, files
from unite_fast.config import Config
from unite_fast.config.yaml_text import to_dict
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import local
from unite_fast.training.state import STEPS, TrainState, tensors_of

log = logging.getLogger("unite_fast.checkpoint.saving")
MAX_FAILURES = 3  # saves in a row, then the run stops
KEPT_AT_LEAST = 2
LAST_WAIT = 10.0  # seconds for the save in flight when the run ends by an error


def share(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What ``rank`` writes: its shards of DTensors, and of what all ranks have an equal part of the bytes."""
    mine = {name: t for name, t in tensors.items() if hasattr(t, "to_local")}
    loads = [0] * world_size
    whole = {name: t for name, t in tensors.items() if name not in mine}
    for name in sorted(whole, key=lambda n: (-whole[n].numel() * whole[n].element_size(), n)):
        owner = loads.index(min(loads))
        loads[owner] += whole[name].numel() * whole[name].element_size()
        if owner == rank:
            mine[name] = whole[name]
    return {name: mine[name] for name in tensors if name in mine}


class Snapshot:
    """Host copies of what this rank holds of tensors. The buffers (pinned for a GPU) are made once and used again."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = {name: local(tensor.detach()) for name, tensor in tensors.items()}
        for name, tensor in held.items():
            if name not in self.buffers or self.buffers[name].shape != tensor.shape:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if any(t.is_cuda for t in held.values()):
            self.events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self.events[0].record()
        for name, tensor in held.items():
            self.buffers[name].copy_(tensor, non_blocking=True)
        if self.events is not None:
            self.events[1].record()
        return {name: self.buffers[name] for name in held}

    def wait(self) -> float:
        """Until the copies have arrived, for the writing thread; seconds for which they held the GPU's stream."""
        if self.events is None:
            return 0.0
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def commit(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    state: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """folder/step-N with these tensors and counters: written aside by all ranks of ``group``, then renamed.

    copies: the content of ``tensors`` (this rank's ``share``) on the CPU. Raises OSError, on all ranks alike.
    """
    from unite_fast.checkpoint import dcp

    final = folder / f"step-{step:07d}"
    temporary = folder / f"{final.name}.incomplete"
    writer = dcp.Writer(temporary, step, functools.partial(_finish, temporary, final, step, state))
    try:
        dcp.save(tensors, copies, writer, group)
    except OSError:
        if group is None or dist.get_rank(group) == 0:
            files.remove_folder(temporary)
        raise


def _finish(temporary: Path, final: Path, step: int, state: Mapping[str, Any], manifest: dict[str, Any]) -> None:
    """On rank 0, when the files of ``manifest`` are all on disk."""
    manifest = manifest | {"state.json": _write_text(temporary / "state.json", json.dumps(state, indent=1))}
    _write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _sync(temporary)
    faults.strike("ckpt.commit", step)
    if final.exists():  # an earlier life of the run saved the same step, perhaps damaged
        _remove(final)
    os.replace(temporary, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Not half a checkpoint under its name, even if this process ends in the middle."""
    doomed = path.with_name(f"{path.name}.removed.incomplete")
    files.remove_folder(doomed)
    os.replace(path, doomed)
    faults.strike("ckpt.prune", checkpoint.step_of(path) or 0)
    files.remove_folder(doomed)


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all but the newest ``keep_last`` whole checkpoints and those at multiples of ``keep_every`` steps.

    Whole means that every file has the recorded size. What is damaged is removed as well once it is older.
    """
    whole = 0
    for path in checkpoint.newest_first(folder):
        if whole >= keep_last:
            step = checkpoint.step_of(path) or 0
            if not (keep_every and step % keep_every == 0):
                _remove(path)
        elif not checkpoint.verify(path, content=False):
            whole += 1


def clean(folder: Path) -> None:
    """Removes unfinished saves and removals. Only for the holder of the run folder's lock."""
    for path in folder.glob("step-*.incomplete"):
        files.remove_folder(path)


class Writer:
    """Saves in the background. ``failures`` counts the saves in a row that the disk refused, the same on all ranks."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks, images: Mapping[str, Any] | None = None) -> None:
        """All ranks together. images: what checkpoints keep of the images (``Source.identity``)."""
        importlib.import_module("unite_fast.checkpoint.dcp")  # before training, since it takes most of a second
        self.folder, self.config, self.ranks, self.images = folder, config, ranks, dict(images or {})
        self.group: Any = None  # of the writing threads
        if ranks.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.comm.train_timeout))
        self.snapshot = Snapshot()
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.error: BaseException | None = None
        self.held: deque[float] = deque()  # seconds that ``stall`` has not yet told; both threads add to it

    def save(self, state: TrainState, means: dict[str, float]) -> None:
        """Starts writing ``state`` as it is now, after the save before it has ended. All ranks together."""
        started = time.perf_counter()
        self.wait()
        tensors = tensors_of(state)
        steps = {name: tensors.pop(name) for name in list(tensors) if name.endswith(STEPS)}
        mine = share(tensors, self.ranks.rank, self.ranks.world_size)
        copies = self.snapshot.take(mine | steps)
        content = checkpoint.counters_of(state) | {"means": means, "config": to_dict(self.config)}
        content["data"] = self.images
        held = time.perf_counter() - started
        self.held.append(held)
        arguments = (state.step, mine, copies, content, held)
        self.thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.thread.start()

    def stall(self) -> float:
        """Seconds for which saving held the training loop since the last call: waiting for the save before, and the
        copies to host memory."""
        return sum(self.held.popleft() for _ in range(len(self.held)))

    def _run(
        self, step: int, mine: dict[str, Tensor], copies: dict[str, Tensor], content: dict[str, Any], held: float
    ) -> None:
        complain = log.warning if self.ranks.is_main else log.info
        started = time.perf_counter()
        try:
            copying = self.snapshot.wait()
            self.held.append(copying)
            content |= {name: int(copies.pop(name)) for name in list(copies) if name.endswith(STEPS)}
            try:
                commit(self.folder, step, mine, copies, content, self.group)
            except OSError as error:
                complain("checkpoint of step %d: %s; trying again after removing old ones", step, error)
                self._prune(KEPT_AT_LEAST)
                commit(self.folder, step, mine, copies, content, self.group)
            self.failures = 0
            seconds = time.perf_counter() - started
            log.info("checkpoint of step %d held the loop for %.3f s, took %.3f s", step, held + copying, seconds)
            self._prune(self.config.train.keep_last)
        except OSError as error:
            self.failures += 1
            complain("checkpoint of step %d is not saved (%s); training goes on with the one before", step, error)
        except BaseException as error:
            self.error = error

    def _prune(self, keep_last: int) -> None:
        """On rank 0. What cannot be removed is no reason to stop, nor to leave the other ranks alone in a save."""
        if self.ranks.is_main:
            try:
                prune(self.folder, keep_last, self.config.train.keep_every)
            except OSError as error:
                log.warning("old checkpoints cannot be removed (%s)", error)

    def wait(self) -> None:
        """Until the save in flight has ended. Raises what it raised, unless the disk refused: see ``failures``."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def abandon(self) -> None:
        """When the run ends by an error: lets the save in flight end if it can do so soon."""
        if self.thread is not None:
            self.thread.join(LAST_WAIT)
