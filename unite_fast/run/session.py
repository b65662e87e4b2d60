"""What surrounds a training loop: the run folder with its lock, status and logs, and the ways in which a run ends.

status.json    {state, reason, step, last_good, rank, time}; state is running, finished, time_limit, preempted,
               failed or diverged
run.lock       held by rank 0 while the run lives; names its process and host
logs/          one file per rank
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from unite_fast import checkpoint
from unite_fast.base import files, locks, streams
from unite_fast.base.errors import RunError, Stopped, UserError, first_line
from unite_fast.checkpoint.saving import MAX_FAILURES, Writer
from unite_fast.config import Config
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import summary
from unite_fast.run.garbage import Collector
from unite_fast.run.rank_log import RankLog, redact
from unite_fast.run.stop import Stop
from unite_fast.training.state import TrainState


class Diverged(RunError):
    """The model or its gradients are not finite any more."""


class Session:
    """A context around the training loop. All ranks enter it; rank 0 owns the folder."""

    def __init__(self, config: Config, ranks: Ranks, started: float, images: Mapping[str, Any] | None = None) -> None:
        """started: time.monotonic() at which train.max_minutes began. images: ``Source.identity``, for checkpoints."""
        self.config, self.ranks, self.path = config, ranks, config.folder
        self.stop = Stop(ranks, config.train.max_minutes, started)
        self.step, self.started = 0, started
        self.begun = False
        self.outcome = ("finished", "")  # what status.json says at the end unless an exception does
        self.collector = Collector()
        self.writer = Writer(self.path / "checkpoints", config, ranks, images)
        self.lock: locks.Lock | None = None
        self.log: RankLog | None = None

    def __enter__(self) -> Session:
        self.ranks.decide(self._prepare)
        streams.unneeded()  # what is printed stands in metrics.csv, logs/ and status.json
        self.log = RankLog(self.path / "logs", self.ranks.rank, 0.8 * self.config.comm.train_timeout)
        self.log.logger.info("pid %d of %d ranks", os.getpid(), self.ranks.world_size)
        self.stop.install()
        self.log.alive()
        return self

    def _prepare(self) -> None:
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock = locks.take(self.path / "run.lock", self.path, "end it, or choose another name or run_dir")
        except OSError as error:
            raise UserError(f"run folder {self.path}: {error.strerror}; choose another with run_dir=PATH") from None

    def begin(self, step: int) -> None:
        self.step, self.begun = step, True
        self.collector.hold()
        if self.ranks.is_main:
            self.status("running")

    def boundary(self, step: int) -> str:
        """After each step, on all ranks: an empty string, or the state in which all of them stop now."""
        self.step = step
        if self.log is not None:
            self.log.alive()
        if not self.collector.begun or step % self.config.train.log_every == 0:
            self.collector.collect()
        state, reason = self.stop.agreed()
        if state == "running":
            return ""
        if state == "failed":
            raise RunError(reason)
        self.outcome = (state, reason)
        return state

    def stopping(self) -> bool:
        """For loops that run between steps: whether this rank was asked to stop. Also a sign of life."""
        if self.log is not None:
            self.log.alive()
        return self.stop.requested()

    def settle(self) -> str:
        """After Stopped, on all ranks: the state in which all of them end."""
        while not (state := self.boundary(self.step)):
            pass
        return state

    def save(self, state: TrainState, means: dict[str, float]) -> None:
        """Starts a save; what became of the one before may end the run. All ranks together."""
        self.writer.save(state, means)
        if self.writer.failures >= MAX_FAILURES:
            self.stop.fail(
                f"the disk refused {self.writer.failures} checkpoints in a row; free some space, then start again"
            )

    def finish_saving(self, total: int) -> None:
        """Waits for the save in flight, and says how the run of ``total`` steps ended. Raises RunError when the state
        could not be saved at the end."""
        self.writer.wait()
        if self.writer.failures:
            raise RunError(f"the last checkpoint could not be saved; the one before is of step {self.last_good()}")
        if self.ranks.is_main:
            seconds = time.monotonic() - self.started
            said = summary.ending(*self.outcome, self.step, total, self.path, self.last_good(), seconds)
            print(said, flush=True)

    def status(self, state: str, reason: str = "") -> None:
        """Writes status.json, for schedulers and people; a full disk is no reason to stop."""
        content = {
            "state": state,
            "reason": redact(reason),
            "step": self.step,
            "last_good": self.last_good(),
            "rank": self.ranks.rank,
            "time": time.time(),
        }
        try:
            files.write_json(self.path / "status.json", content, writer=str(self.ranks.rank))
        except OSError as error:
            if self.log is not None:
                self.log.logger.warning("status.json cannot be written (%s)", error)

    def last_good(self) -> int | None:
        """The step of the newest checkpoint whose files are all there."""
        whole = (p for p in checkpoint.newest_first(self.path / "checkpoints") if not checkpoint.verify(p, False))
        newest = next(whole, None)
        return checkpoint.step_of(newest) if newest else None

    def guarded(self, what: str, function: Callable[[], None]) -> None:
        """Evaluation inside training: what it raises is noted, and ends the run only by train.on_eval_error=fail."""
        try:
            function()
        except Stopped:
            raise
        except Exception as error:
            if self.config.train.on_eval_error == "fail":
                raise RunError(f"{what} at step {self.step} failed: {first_line(error)}") from error
            assert self.log is not None
            self.log.logger.warning("%s at step %d failed, training goes on: %s", what, self.step, first_line(error))
            self.log.logger.info("traceback", exc_info=error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.collector.release()
        state, reason = self.outcome
        if error is not None:
            state, reason = ("diverged" if isinstance(error, Diverged) else "failed"), first_line(error)
            if self.log is not None and not isinstance(error, (RunError, UserError)):
                self.log.logger.info("the run ends by an error", exc_info=error)
            self.writer.abandon()
        else:
            self.stop.close()
        refused = isinstance(error, UserError) and not self.begun  # the status stays that of the run so far
        if not refused and (self._is_first_failure() if error is not None else self.ranks.is_main):
            self.status(state, reason)
        if error is not None and self.begun and self.ranks.is_main:
            print(summary.failed(self.step, self.path, self.last_good()), flush=True)
        self.stop.remove()
        if self.log is not None:
            self.log.close()
        if self.lock is not None:
            self.lock.release()

    def _is_first_failure(self) -> bool:
        """Whether no rank has yet said why the run ends: what follows on the others is a consequence."""
        try:
            return json.loads(files.read_text(self.path / "status.json"))["state"] not in ("failed", "diverged")
        except (OSError, ValueError, KeyError):
            return True
