"""When a run has to stop early: a signal, the wall-time budget, or a failure that one rank alone knows.

Every rank notes its own reason; at each step boundary the most serious is agreed upon over a gloo group of their own,
so all ranks stop after the same step. The exchange of one boundary is read at the next: no rank waits for the network,
and the GPU is not involved.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from unite_fast.parallel.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE = 1.0  # seconds in which a repeated Ctrl-C is the same one: a terminal and torchrun both deliver it
NONE, TIME_LIMIT, PREEMPTED, FAILED = range(4)
STATES = ("running", "time_limit", "preempted", "failed")
FIELD = 1 << 24  # more than there are ranks or signals


def encode(code: int, number: int, rank: int) -> int:
    """One integer, of which the largest over ranks is one rank's: the most serious reason, and its first rank."""
    return (code * FIELD + (FIELD - 1 - rank)) * FIELD + number if code else 0


def decode(word: int) -> tuple[int, int, int]:
    """(code, signal, rank) of ``encode``."""
    rest, number = divmod(word, FIELD)
    code, behind = divmod(rest, FIELD)
    return code, number, FIELD - 1 - behind if code else 0


class Stop:
    """``requested`` is this rank's own view, at any time; ``agreed`` is everyone's, at a step boundary."""

    def __init__(self, ranks: Ranks, max_minutes: float, started: float) -> None:
        self.ranks = ranks
        self.deadline = started + 60 * max_minutes if max_minutes else float("inf")
        self.code, self.signal = NONE, 0
        self.problem = ""
        self.interrupted_at = float("-inf")
        self.pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self.previous: dict[int, object] = {}

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT, SIGUSR1 and SIGHUP until ``remove``; SIGHUP not under nohup, which ignores it."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.code == PREEMPTED and now - self.interrupted_at > GRACE:
                os.write(2, b"interrupted twice: leaving at once, the last checkpoint stays\n")
                os._exit(130)  # an unfinished save is a folder *.incomplete, which nothing reads
            self.interrupted_at = min(now, self.interrupted_at) if self.code == PREEMPTED else now
        if self.code < PREEMPTED:
            self.code, self.signal = PREEMPTED, int(number)

    def fail(self, problem: str) -> None:
        """This rank cannot go on; the others learn it at the next boundary."""
        self.code, self.problem = FAILED, problem

    def requested(self) -> bool:
        if self.code == NONE and time.monotonic() >= self.deadline:
            self.code = TIME_LIMIT
        return self.code != NONE

    def agreed(self) -> tuple[str, str]:
        """(state, reason) in which all ranks stop now, or ("running", ""). All ranks must call it after each step."""
        self.requested()
        mine = torch.tensor(encode(self.code, self.signal, self.ranks.rank))
        if self.ranks.world_size == 1:
            return self._explain(mine)
        combined = self._finish()
        self.pending = (dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True), mine)
        return self._explain(combined) if combined is not None else ("running", "")

    def _finish(self) -> torch.Tensor | None:
        if self.pending is None:
            return None
        work, combined = self.pending
        self.pending = None
        if work is not None:
            work.wait()
        return combined

    def close(self) -> None:
        """Reads the exchange that is still on its way. All ranks of a run that ended well must call it."""
        self._finish()

    def _explain(self, combined: torch.Tensor) -> tuple[str, str]:
        code, number, rank = decode(int(combined))
        if code == PREEMPTED:
            return STATES[code], f"{signal.Signals(number).name} on rank {rank}"
        failed = self.problem or f"rank {rank} cannot go on; its own line says why"
        return STATES[code], {NONE: "", TIME_LIMIT: "train.max_minutes is over", FAILED: failed}[code]
