"""A node of a job: torchrun's agent, whose two ranks are forked from it, with everything imported.

    agent HOST ENDPOINT RESTARTS [argument of train.py ...]        HOST: 1 where the ranks' meeting is kept, else 0

What torchrun itself would do before is parse these words.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
import unite_fast.base.command

ALIVE = 1  # seconds between an agent's signs of life, of which two may be missed: torchrun's default takes 15 to tell


def rank(*arguments: str) -> NoReturn:
    torch.set_num_threads(1)
    sys.exit(unite_fast.base.command.run(train.main, arguments))


def main(words: list[str]) -> None:
    host, endpoint, restarts, *arguments = words
    os.setsid()  # a node's processes are lost together
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=2,
        run_id="nodes",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": host == "1", "keep_alive_interval": ALIVE, "keep_alive_max_attempt": 2},
        max_restarts=int(restarts),
        start_method="fork",
    )
    elastic_launch(config, rank)(*arguments)
