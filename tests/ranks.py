"""Functions run on several ranks of this machine, in processes forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unite_fast.parallel import distributed

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "train", "sklearn.datasets"]
)


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], device: str, environment: dict[str, str], folder: Path
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
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
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        processes = []
        for rank in range(count):
            environment = base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            process = SERVER.Process(
                target=_rank, args=(function, arguments, device, environment, Path(folder)), daemon=True
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join(seconds)
            process.kill()
        files = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        outcomes = [torch.load(f, "cpu", weights_only=True) if f.is_file() else (False, "no answer") for f in files]
    failures = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(outcomes) if not good]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]
