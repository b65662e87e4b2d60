"""Processes: one per GPU under torchrun or SLURM, gloo on CPUs, or a single process without any launcher."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.base import launcher
from unite_fast.base.errors import CommonError, RunError, Stopped, UserError, first_line
from unite_fast.base.parent import end_with_parent
from unite_fast.parallel import meeting

T = TypeVar("T")
SIGN_OF_LIFE = 5.0  # seconds; far below any comm.train_timeout that makes sense


class _Work:
    """``function`` in a thread: (problem, value) of it once it has ended."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.found = function, ("", None)
        self.error: BaseException | None = None  # other than a user's mistake: this rank ends by it
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.found = ("", self.function())
        except UserError as error:
            self.found = (str(error), None)
        except BaseException as error:
            self.error = error

    def outcome(self, seconds: float) -> tuple[str, Any] | None:
        """None while it runs, for at most ``seconds``. Raises what ended it, other than UserError."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            return None
        if self.error is not None:
            raise self.error
        return self.found


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for objects and flags: never waits for a GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain ``value``, on every rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def decide(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on every rank; its UserError is raised on every rank.

        It may take any time, since rank 0 says every few seconds that it is at work: hashing a large checkpoint on a
        slow disk is no hang. It runs in a thread of its own there.
        """
        if self.world_size == 1:
            return function()
        work = _Work(function) if self.is_main else None
        while True:
            outcome: list[Any] = [work.outcome(SIGN_OF_LIFE) if work is not None else None]
            dist.broadcast_object_list(outcome, src=0, group=self.control)
            if outcome[0] is not None:
                break
        problem, value = outcome[0]
        if problem:
            raise CommonError(problem)
        return value

    def each(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returns on every rank, on every rank; the first UserError of any is raised on all of them.

        As in ``decide`` it may take any time, on each of them another.
        """
        if self.world_size == 1:
            return [function()]
        work = _Work(function)
        while True:
            outcomes: list[tuple[str, T] | None] = self.gather(work.outcome(SIGN_OF_LIFE))
            found = [outcome for outcome in outcomes if outcome is not None]
            if len(found) == len(outcomes):
                break
        if problem := next((problem for problem, _ in found if problem), ""):
            raise CommonError(problem)
        return [value for _, value in found]

    def together(self, function: Callable[[], T]) -> T:
        """This rank's ``function()``; when it raises on any rank, all of them raise alike, so that none waits in vain.

        ``function`` must not communicate, and all ranks must call this. A failure comes before a user's mistake and
        that before Stopped; a rank that did not raise it gets RunError, CommonError or Stopped with the same words.
        """
        if self.world_size == 1:
            return function()
        kinds = (RunError, CommonError, Stopped)
        error: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        own = 2 if isinstance(error, Stopped) else 1 if isinstance(error, UserError) else 0
        said = None if error is None else (own, f"{error}" or type(error).__name__)
        found = [(other[0], rank, other[1]) for rank, other in enumerate(self.gather(said)) if other is not None]
        if not found:
            return result
        kind, rank, text = min(found)
        if error is not None and kind == own:
            raise error
        raise kinds[kind](text if kind else f"rank {rank}: {text}")

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over ranks. All ranks must pass tensors of equal shapes in equal order."""
        self.sum_(tensors)
        if self.world_size > 1:
            for tensor in tensors:
                tensor /= self.world_size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks. All ranks must pass tensors of equal shapes in equal order."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def device_type(device: str) -> str:
    """What ``Config.device`` means here: "cuda" or "cpu"."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def start(device: str = "auto", timeout: float = 600.0) -> Ranks:
    """Joins the process group that the environment describes (none for a single process). Raises UserError.

    A collective that takes longer than ``timeout`` seconds raises on the ranks that wait in it.
    """
    world, rank, local = launcher.world_size(), launcher.rank(), launcher.local_rank()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU here; use device=cpu or check the driver")
    use_cuda = device_type(device) == "cuda"
    if use_cuda and local >= torch.cuda.device_count():
        raise UserError(f"local rank {local} has no GPU of its own; start at most {torch.cuda.device_count()} per node")
    chosen = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)  # torchrun killed by force leaves nobody who would end this rank
        launcher.check_torchrun()
    if world > 1:
        launcher.check_meeting_point()
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(world))
        limit = timedelta(seconds=timeout)
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=limit)))
            start_name = meeting.agree(store, rank, world, timeout)
        except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
            where = ":".join(os.environ[name] for name in launcher.MEETING_POINT)
            raise UserError(
                f"no meeting at {where} ({first_line(error)}): is the port in use, or a process missing? choose "
                "another MASTER_PORT, or start all of them with torchrun"
            ) from None
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=dist.PrefixStore(start_name, store),
            rank=rank,
            world_size=world,
            timeout=limit,
            device_id=chosen if use_cuda else None,
        )
        control = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(control, dist.ProcessGroup)
        return Ranks(rank, world, chosen, control)
    return Ranks(rank, world, chosen)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
