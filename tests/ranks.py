"""Functions and commands on several ranks of this machine, in processes forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import Outcome

import unite_fast.base.command
from unite_fast.parallel import distributed
from unite_fast.run import garbage

SERVER = multiprocessing.get_context("forkserver")
# What ranks import late, too: torch loads its compiler in the first step of anything.
LATE = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "sklearn.datasets")
SERVER.set_forkserver_preload(["torch", "train", "unite_fast.checkpoint.dcp", *LATE])


def _fork(count: int, target: Callable[..., None], arguments: tuple[Any, ...], seconds: float) -> list[Any]:
    """``target(environment of a rank, *arguments)`` on ``count`` ranks; the processes, which have ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        environment = base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        processes.append(SERVER.Process(target=target, args=(environment, *arguments), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return processes


def _enter(environment: dict[str, str]) -> None:
    garbage.keep()  # a rank that looked through all that is imported would copy it
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _rank(
    environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], device: str, folder: Path
) -> None:
    _enter(environment)
    rank = int(environment["RANK"])
    try:
        ranks = distributed.start(device, timeout=30)
        try:
            outcome = (True, function(ranks, *arguments))
        finally:
            distributed.stop()
    except BaseException:
        outcome = (False, traceback.format_exc())
    torch.save(outcome, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")


def on_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu", seconds: float = 300
) -> list[Any]:
    """What ``function(ranks, *arguments)`` returns on each of ``count`` ranks (tensors, numbers, dicts, lists).

    Fails with the traceback of every rank that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        _fork(count, _rank, (function, arguments, device, Path(folder)), seconds)
        files = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        outcomes = [torch.load(f, "cpu", weights_only=True) if f.is_file() else (False, "no answer") for f in files]
    failures = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(outcomes) if not good]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def _command(
    environment: dict[str, str], main: Callable[[list[str]], int | None], words: list[str], folder: Path
) -> None:
    _enter(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
    sys.exit(unite_fast.base.command.run(main, words))


def command_on_ranks(count: int, main: Callable[[list[str]], int | None], *arguments: object) -> Outcome:
    """Runs a ``main`` as torchrun would on ``count`` processes: the worst of their codes, all they said."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _fork(count, _command, (main, [str(a) for a in arguments], Path(folder)), 300)
        said = [(Path(folder) / name).read_text() for name in ("out", "err")]
    return Outcome(max((process.exitcode for process in processes), key=abs), *said)
