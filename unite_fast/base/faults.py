"""Faults on demand, for tests alone: what a cluster does to a run, at a chosen rank, step and phase.

    UNITE_FAST_TESTING=1 UNITE_FAST_FAULT="kill@rank=1,step=7,phase=bwd;nan@step=9,steps=3,phase=fwd" python ...

Without UNITE_FAST_TESTING=1 nothing is read and ``strike`` returns at once. Conditions left out match everything;
``step`` is the number of the step in progress, ``steps`` how many steps from there are struck (default 1), ``times``
how often at most. A fault
strikes the first start of a job only, not what torchrun restarts.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}
NAMES = (*SIGNALS, "raise", "oom", "enospc", "sleep", "nan", "inf", "perturb")
PHASES = ("load", "fwd", "bwd", "opt", "ema", "ckpt.write", "ckpt.commit", "ckpt.prune", "eval")


@dataclass(frozen=True)
class Fault:
    name: str
    rank: int | None = None
    step: int | None = None
    steps: int = 1
    phase: str = "load"
    seconds: float = 3600.0  # of "sleep"
    times: int = 1 << 30  # strikes at most


_armed: list[Fault] = []
_struck: list[Fault] = []
_rank = 0


def parse(text: str) -> list[Fault]:
    """The faults of the environment variable. Raises ValueError for a name, phase or condition that does not exist."""
    faults = []
    for part in text.split(";"):
        name, _, conditions = part.strip().partition("@")
        values: dict[str, str] = dict(c.split("=", 1) for c in conditions.split(",") if c)  # type: ignore[misc]
        fault = Fault(
            name,
            int(values.pop("rank")) if "rank" in values else None,
            int(values.pop("step")) if "step" in values else None,
            int(values.pop("steps", 1)),
            values.pop("phase", "load"),
            float(values.pop("seconds", 3600)),
            int(values.pop("times", 1 << 30)),
        )
        if values or fault.name not in NAMES or fault.phase not in PHASES:
            raise ValueError(f"no such fault: {part}")
        faults.append(fault)
    return faults


def arm(rank: int) -> None:
    """Reads the environment, once per process."""
    global _armed, _rank
    _rank, _armed = rank, []
    if os.environ.get("UNITE_FAST_TESTING") != "1" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if text := os.environ.get("UNITE_FAST_FAULT", ""):
        _armed = parse(text)


def strike(phase: str, step: int, tensors: Sequence[Tensor] = ()) -> None:
    """Does what was armed for this place: a signal, an exception, a pause, or damage to ``tensors[0]``."""
    if not _armed:
        return
    for fault in _armed:
        here = fault.phase == phase and fault.rank in (None, _rank) and _struck.count(fault) < fault.times
        if here and (fault.step is None or fault.step <= step < fault.step + fault.steps):
            _struck.append(fault)
            _do(fault, tensors)


@torch.no_grad()
def _do(fault: Fault, tensors: Sequence[Tensor]) -> None:
    if fault.name in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.name])
        if fault.name == "stop":
            time.sleep(0.5)  # a thread may run on for a moment until the process has stopped
    elif fault.name == "raise":
        raise RuntimeError("injected fault")
    elif fault.name == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. (injected fault)")
    elif fault.name == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.name == "sleep":
        time.sleep(fault.seconds)
    elif fault.name == "perturb":
        tensors[0].add_(1e-3)
    else:
        tensors[0].fill_(float(fault.name))
