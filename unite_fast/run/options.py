"""Options of train.py: which are wrong, which would do nothing beside others, and what the machine decides."""

from __future__ import annotations

import argparse

import torch

from unite_fast.base import launcher
from unite_fast.base.errors import UserError, idle
from unite_fast.config import EfficiencyConfig
from unite_fast.efficiency import execution
from unite_fast.parallel.distributed import device_type

SET_BY_DEV_RUN = (
    "train.max_steps=", "train.log_every=", "train.image_every=", "train.checkpoint_every=", "resume=",
    "sample.solver=", "sample.steps=",
)  # fmt: skip


def settled(efficiency: EfficiencyConfig, device: str) -> EfficiencyConfig:
    """With what kernels=auto is here; rank 0 says so where that is the slower one. device: ``Config.device``."""
    efficiency, said = execution.settled(efficiency, torch.device(device_type(device)))
    if said and launcher.rank() == 0:
        print(said)
    return efficiency


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options of train.py that are wrong, or that would do nothing beside others."""
    if arguments.mfu is not None and not (arguments.dry_run and 0 < arguments.mfu <= 1):
        raise UserError(f"--mfu {arguments.mfu:g}: a fraction above 0 and at most 1, together with --dry-run")
    if arguments.ranks is not None and not (arguments.dry_run and arguments.ranks > 0):
        raise UserError(f"--ranks {arguments.ranks}: a number of processes, at least 1, together with --dry-run")
    if arguments.print_config and (arguments.dry_run or arguments.fast_dev_run):
        raise idle("--dry-run" if arguments.dry_run else "--fast-dev-run", "with --print-config")
    if arguments.dry_run and arguments.fast_dev_run:
        raise idle("--fast-dev-run", "with --dry-run")
    if arguments.fast_dev_run < 0:
        raise UserError(f"--fast-dev-run {arguments.fast_dev_run}: give a number of steps, at least 1")
    if arguments.fast_dev_run:
        for override in arguments.overrides:
            if override.startswith(SET_BY_DEV_RUN):
                raise idle(f"override {override}", "with --fast-dev-run, which sets it")
