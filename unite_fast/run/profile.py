"""A profile of a few training steps (``train.profile=10-12``), of rank 0.

    profile/trace.json.gz   for chrome://tracing or Perfetto, with ranges named after the parts of a step
    profile/table.txt       time by part, then by operation
    profile/memory.pickle   on a GPU: every allocation of these steps, for pytorch.org/memory_viz

The ranges are NVTX ranges, too, which Nsight Systems shows. A traced step is slower; no number changes.
"""

from __future__ import annotations

import functools
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.data import Batch
from unite_fast.training.step import TrainStep

ROWS = 40  # operations of the table
PARTS = ("data", "tokenize", "denoise", "decode", "losses", "update")


def steps_of(text: str) -> tuple[int, int] | None:
    """ "10-12" -> (10, 12); None for an empty text. Raises UserError."""
    if not text:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"train.profile={text}: write the first and the last step to trace, as 10-12")
    return int(first), int(last)


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` within a range of the profiler, and of NVTX on a GPU."""

    @functools.wraps(function)
    def within(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function(name):
            if not torch.cuda.is_available():
                return function(*arguments, **named)
            with torch.cuda.nvtx.range(name):
                return function(*arguments, **named)

    return within


class Profile:
    """Called in place of the training step, which it calls; nothing else happens outside the steps to be traced."""

    def __init__(self, steps: str, folder: Path, device: torch.device) -> None:
        """steps: ``train.profile``; empty: nothing is traced."""
        self.first, self.last = steps_of(steps) or (0, 0)
        self.folder, self.device = folder / "profile", device
        self.named: list[tuple[Any, str, str]] = []  # whose method is in which range
        self.profiler: torch.profiler.profile | None = None

    def __call__(self, step: TrainStep, batch: Batch) -> dict[str, Tensor]:
        """What ``step`` returns. Raises OSError where the profile cannot be written."""
        number = step.state.step + 1
        if number == self.first:
            self._begin(step)
        metrics = step(batch)
        if self.profiler is not None and number >= self.last:
            self._end(self.profiler, number)
        return metrics

    def _begin(self, step: TrainStep) -> None:
        model, optimizer = step.state.model, step.state.optimizer
        self.named = [(model, name, name) for name in ("tokenize", "denoise", "decode")]
        self.named += [(step.objective.losses, "forward", "losses"), (optimizer, "step", "update")]
        for owner, method, name in self.named:
            object.__setattr__(owner, method, ranged(name, getattr(owner, method)))
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
        self.profiler.start()

    def _end(self, profiler: torch.profiler.profile, step: int) -> None:
        """Writes the profile, and says so."""
        profiler.stop()
        for owner, method, _ in self.named:
            object.__delattr__(owner, method)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        profiler.export_chrome_trace(str(trace))  # which would compress line by line, at half the speed
        with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb", compresslevel=6) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        trace.unlink()
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        files.write(self.folder / "table.txt", table(profiler, self.device, step - self.first + 1))
        self.profiler = None
        print(f"profile of steps {self.first} to {step} in {self.folder}: trace.json.gz, table.txt", flush=True)


def table(profiler: torch.profiler.profile, device: torch.device, steps: int) -> str:
    """Milliseconds per step of each part, on the host and on the device, then the costliest operations."""
    averages = profiler.key_averages()
    kind = "device" if device.type == "cuda" else "cpu"
    lines = [f"{'part':12}{'calls/step':>12}{'host ms/step':>14}{'device ms/step':>16}"]
    for row in sorted((r for r in averages if r.key in PARTS), key=lambda r: PARTS.index(r.key)):
        host, there = row.cpu_time_total / 1e3 / steps, row.device_time_total / 1e3 / steps
        lines.append(f"{row.key:12}{row.count / steps:>12.1f}{host:>14.2f}{there:>16.2f}")
    return "\n".join([*lines, "", averages.table(sort_by=f"self_{kind}_time_total", row_limit=ROWS), ""])
