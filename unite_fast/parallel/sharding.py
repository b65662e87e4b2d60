"""Strategies by which ranks share a model (``train.strategy``).

    ddp      every rank holds all of it; gradients are averaged (``overlap``)
    fsdp2    weights, gradients and optimizer states are sharded over all ranks (torch's fully_shard)
    hsdp     sharded over ``train.shard_size`` neighbouring ranks, and each such group holds a copy

Under the last two a parameter is a DTensor with its stock name, sharded by rows. It is gathered for the passes that
need it, and its gradient is reduced after each backward: the mean over all ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from unite_fast.base.errors import UserError
from unite_fast.config import Config
from unite_fast.parallel.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_size(config: Config, world_size: int) -> int:
    """Ranks that hold one copy of the model together; 1 for ddp. Raises UserError."""
    t = config.train
    if t.strategy == "ddp":
        return 1
    if t.strategy == "fsdp2":
        return world_size
    size = t.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", 0)))
    if not size:
        raise UserError(
            "train.strategy=hsdp: the launcher does not say how many ranks a node has; set train.shard_size"
        )
    if size > world_size or world_size % size:
        divisors = [str(d) for d in range(1, world_size + 1) if world_size % d == 0]
        raise UserError(
            f"train.strategy=hsdp: train.shard_size {size} does not divide {world_size} ranks; "
            f"set train.shard_size to {' or '.join(divisors)}"
        )
    return size


def check(config: Config, world_size: int) -> None:
    """Refuses what a strategy cannot do. Raises UserError."""
    t, e = config.train, config.efficiency
    if t.shard_size and t.strategy != "hsdp":
        raise UserError(f"train.shard_size is for train.strategy=hsdp, and this is {t.strategy}; leave it out")
    shard_size(config, world_size)
    if t.strategy == "ddp":
        return
    # What is asked for, whether it is refused, and the neutral value.
    refused = (
        # a rank that starts its micro-step again would gather alone
        ("train.on_oom=halve", t.on_oom == "halve", "train.on_oom=fail"),
        # compiled layers are called past FSDP's hooks
        (f"efficiency.compile={e.compile}", e.compile != "none", "efficiency.compile=none"),
        (f"efficiency.cuda_graph={e.cuda_graph}", e.cuda_graph != "none", "efficiency.cuda_graph=none"),
        ("efficiency.shard_muon=false", not e.shard_muon, "efficiency.shard_muon=true"),
        ("efficiency.overlap_gradients=false", not e.overlap_gradients, "efficiency.overlap_gradients=true"),
        (
            f"train.replica_check_every={t.replica_check_every}",
            t.strategy == "fsdp2" and t.replica_check_every > 0,
            "train.replica_check_every=0",
        ),
        # the other recipes keep whole weights
        (
            f"efficiency.precision={e.precision}",
            world_size > 1 and e.precision not in ("fp32", "bf16"),
            "efficiency.precision=bf16",
        ),
    )
    for key, asked, neutral in refused:
        if asked:
            raise UserError(
                f"train.strategy={t.strategy} does not work with {key}; set {neutral}, or train.strategy=ddp"
            )


def apply(
    model: nn.Module, units: Sequence[Sequence[nn.Module]], methods: Sequence[str], config: Config, ranks: Ranks
) -> None:
    """Shards ``model`` in place if the strategy says so and there are several ranks.

    units: modules that are gathered together, those within others first; methods: what callers use of ``model`` in
    place of its forward. Attributes of parameters (the optimizers' tags) are kept.
    """
    if config.train.strategy == "ddp" or ranks.world_size == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # torch warns that writing into a unit's output would break its backward; no module here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    tags = {name: vars(parameter) for name, parameter in model.named_parameters()}
    mesh = _mesh(config, ranks)
    for unit in units:
        fully_shard(list(unit), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(model, method)
    for name, parameter in model.named_parameters():
        vars(parameter).update(tags[name])


def _mesh(config: Config, ranks: Ranks) -> DeviceMesh:
    """Of groups that wait no longer than comm.train_timeout."""
    from torch.distributed.device_mesh import DeviceMesh

    kind, world = ranks.device.type, dist.group.WORLD
    if config.train.strategy == "fsdp2":
        assert world is not None
        return DeviceMesh.from_group(world, kind, mesh_dim_names=("shard",))
    size = shard_size(config, ranks.world_size)
    grid = torch.arange(ranks.world_size).view(-1, size)
    timeout = timedelta(seconds=config.comm.train_timeout)
    # Every rank takes part in making every group, its own or not.
    shards = [dist.new_group(row.tolist(), timeout=timeout) for row in grid]
    copies = [dist.new_group(column.tolist(), timeout=timeout) for column in grid.T]
    own: list[Any] = [copies[ranks.rank % size], shards[ranks.rank // size]]
    return DeviceMesh.from_group(own, kind, grid, mesh_dim_names=("replicate", "shard"))
