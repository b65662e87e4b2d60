"""The parts of gpu_check.py: each a function of a ``Bench``, run in a process of its own."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_MEMORY = 3  # exit status
LARGE = 100e9  # bytes of a GPU that takes the larger batches
OFFICIAL = (
    0.95 * 78.7 / 64 * 2**30
)  # bytes per image that the official code keeps, counted on fake tensors at 64, less 5 %


@dataclass
class Bench:
    """What a part is given. toy: a rehearsal, on the CPU, whose rows are marked and mean nothing."""

    part: str
    settings: dict[str, Any]
    prepared: Any = None
    turn: Any = None

    @property
    def toy(self) -> bool:
        return self.settings["rehearse"]

    @property
    def device(self):
        import torch

        return torch.device("cpu" if self.toy else "cuda")

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    @property
    def official(self) -> Path | None:
        """The clone of the official code."""
        return Path(self.settings["official"]) if self.settings["official"] else None

    def batches(self) -> tuple[int, ...]:
        """Images of a micro-batch, the most wanted first."""
        if self.toy:
            return 2, 1
        return (128, 64, 48, 32) if self.memory() > LARGE else (32, 16)

    def official_batches(self) -> tuple[int, ...]:
        """Those of them that the official code can hope for: each that it tries costs a minute of compiling."""
        return self.batches()[-1:] if self.toy else tuple(b for b in self.batches() if b * OFFICIAL < self.memory())

    def memory(self) -> int:
        """Bytes of the GPU."""
        import torch

        return torch.cuda.get_device_properties(self.device).total_memory

    def left(self) -> float:
        """Real seconds until the deadline of the whole command."""
        return self.settings["deadline"] - time.monotonic()

    def row(self, kind: str, /, **facts: object) -> None:
        import harness

        harness.record(kind, self.device, [facts])

    def check(self, name: str, why: str, /, **facts: object) -> bool:
        """A row that is red unless ``why`` is empty. Nothing stops for it."""
        if self.settings["fault"] == "red":
            why = why or "made to fail"
        self.row("check", check=name, ok=not why, why=why, **facts)
        return not why

    def wait(self) -> None:
        """For the turn of a part that was started early."""
        self.prepared.set()
        self.turn.wait()


def enter(name: str, function: str, settings: dict[str, Any], log: Path, prepared: Any, turn: Any) -> None:
    """The process of one part: its own session, its own log, rows into the common file, its fault if it has one."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays on the GPU when the command is ended
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    bench = Bench(name, settings, prepared, turn)
    status = 1
    try:
        import harness

        harness.Target.file = bench.out / "rows.jsonl"
        harness.Target.facts = {"part": name, "rehearsal": bench.toy}
        harness.Target.written = staticmethod(lambda: strike(settings["fault"], log))
        module, call = function.split(".")
        getattr(importlib.import_module(f"gpu_parts.{module}"), call)(bench)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        status = NO_MEMORY if type(error).__name__ == "OutOfMemoryError" else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no waiting for threads or compilers that a failed part leaves behind


def strike(kind: str, log: Path) -> None:
    """The injected fault, after a row of the part is there."""
    if kind == "hang":
        log.with_suffix(".hangs").touch()  # a rehearsal's clock then jumps to the part's limit
        time.sleep(1e6)
    elif kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory (made to happen)")
