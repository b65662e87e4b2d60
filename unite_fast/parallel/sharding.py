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
from unite_fast.config import TrainConfig
from unite_fast.parallel.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_size(t: TrainConfig, world_size: int) -> int:
    """Ranks that hold one copy of the model together; 1 for ddp. Raises UserError."""
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


def apply(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    methods: Sequence[str],
    train: TrainConfig,
    timeout: float,
    ranks: Ranks,
) -> None:
    """Shards ``model`` in place, over several ranks.

    units: modules that are gathered together, those within others first; methods: what callers use of ``model`` in
    place of its forward; timeout: seconds that a rank waits for the others. Attributes of parameters (the optimizers'
    tags) are kept.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # torch warns that writing into a unit's output would break its backward; no module here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    tags = {name: vars(parameter) for name, parameter in model.named_parameters()}
    mesh = _mesh(train, timeout, ranks)
    for unit in units:
        fully_shard(list(unit), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(model, method)
    for name, parameter in model.named_parameters():
        vars(parameter).update(tags[name])


def _mesh(train: TrainConfig, timeout: float, ranks: Ranks) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    kind, world = ranks.device.type, dist.group.WORLD
    if train.strategy == "fsdp2":
        assert world is not None
        return DeviceMesh.from_group(world, kind, mesh_dim_names=("shard",))
    size = shard_size(train, ranks.world_size)
    grid = torch.arange(ranks.world_size).view(-1, size)
    limit = timedelta(seconds=timeout)
    # Every rank takes part in making every group, its own or not.
    shards = [dist.new_group(row.tolist(), timeout=limit) for row in grid]
    copies = [dist.new_group(column.tolist(), timeout=limit) for column in grid.T]
    own: list[Any] = [copies[ranks.rank % size], shards[ranks.rank // size]]
    return DeviceMesh.from_group(own, kind, grid, mesh_dim_names=("replicate", "shard"))
