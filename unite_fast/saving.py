"""Writes checkpoints while training goes on.

A save copies the training state to host memory, in stream order, so that it is one step's state whatever happens next;
a thread then writes the files to ``step-N.incomplete``, with sizes and sha256 in a manifest, syncs them, and renames
the folder. At most one save is in flight. Removal renames first, too: a folder called step-N is always whole.

A disk that refuses costs a warning: what is superfluous is removed, the save is tried once more, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast import checkpoint
from unite_fast.checkpoint import TrainState
from unite_fast.config import Config
from unite_fast.config_io import to_dict
from unite_fast.runtime import faults

log = logging.getLogger("unite_fast.saving")
MAX_FAILURES = 3  # saves in a row, then the run stops
KEPT_AT_LEAST = 2
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 1 << 24  # bytes written and hashed at a time; Python's lock is free meanwhile


class Snapshot:
    """Host copies of a state's tensors. The buffers (pinned for a GPU) are made once and used again."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_gpu = any(t.is_cuda for t in tensors.values())
        for name, tensor in tensors.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[name].copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            self.copied = torch.cuda.Event()
            self.copied.record()
        return {name: self.buffers[name] for name in tensors}

    def wait(self) -> None:
        """Until the copies have arrived; for the writing thread."""
        if self.copied is not None:
            self.copied.synchronize()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a safetensors file of CPU tensors, synced to disk; {"bytes", "sha256"} of it.

    The library's own writer would hold Python's lock for the whole file and need a second pass for the hash.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            for low in range(0, len(data), PIECE):
                piece = data[low : low + PIECE]
                digest.update(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            if tensor.numel():
                put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def commit(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """folder/step-N with these tensors and counters: written aside, then renamed. Raises OSError."""
    final = folder / f"step-{step:07d}"
    temporary = folder / f"{final.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = {"training.safetensors": write_tensors(temporary / "training.safetensors", tensors)}
        faults.strike("ckpt.write", step)
        manifest["state.json"] = _write_text(temporary / "state.json", json.dumps(state, indent=1))
        _write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _sync(temporary)
        faults.strike("ckpt.commit", step)
        if final.exists():  # an earlier life of the run saved the same step, perhaps damaged
            _remove(final)
        os.replace(temporary, final)
        _sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Not half a checkpoint under its name, even if this process ends in the middle."""
    doomed = path.with_name(f"{path.name}.removed.incomplete")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    faults.strike("ckpt.prune", checkpoint.step_of(path) or 0)
    shutil.rmtree(doomed, ignore_errors=True)


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
        shutil.rmtree(path, ignore_errors=True)


class Writer:
    """Saves in the background, on the rank that writes. ``failures`` counts those in a row that the disk refused."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.snapshot = Snapshot()
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.error: BaseException | None = None

    def save(self, state: TrainState, means: dict[str, float], whole: Mapping[str, Tensor] | None = None) -> None:
        """Starts writing ``state`` as it is now, after the save before it has ended. whole: its tensors if sharded."""
        self.wait()
        tensors = self.snapshot.take(whole or checkpoint.tensors_of(state))
        content = checkpoint.counters_of(state) | {"means": means, "config": to_dict(self.config)}
        self.thread = threading.Thread(target=self._run, args=(state.step, tensors, content), daemon=True)
        self.thread.start()

    def _run(self, step: int, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        train = self.config.train
        try:
            self.snapshot.wait()
            content["optimizer_steps"] = int(tensors[checkpoint.STEPS])
            saved = {name: tensor for name, tensor in tensors.items() if name != checkpoint.STEPS}
            try:
                commit(self.folder, step, saved, content)
            except OSError as error:
                log.warning("checkpoint of step %d: %s; trying again after removing old ones", step, error)
                prune(self.folder, KEPT_AT_LEAST, train.keep_every)
                commit(self.folder, step, saved, content)
            self.failures = 0
            prune(self.folder, train.keep_last, train.keep_every)
        except OSError as error:
            self.failures += 1
            log.warning("checkpoint of step %d is not saved (%s); training goes on with the one before", step, error)
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Until the save in flight has ended. Raises what it raised, unless the disk refused: see ``failures``."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
