"""Strategies by which ranks share a model (``train.strategy``).

    ddp      every rank holds all of it; gradients are averaged (``overlap``)
    fsdp2    weights, gradients and optimizer states are sharded over all ranks (torch's fully_shard)
    hsdp     sharded over ``train.shard_size`` neighbouring ranks, and each such group holds a copy

Under the last two a parameter is a DTensor with its stock name, sharded by rows. A step has several forward and
backward passes through the same weights, and ``train.reshard`` says when whole ones and whole gradients are there:

    step   gathered by the first pass that needs them, held until the last backward through them, in which their
           gradients are reduced: the traffic of one forward and backward, whatever the number of passes
    pass   gathered for every forward and every backward, gradients reduced in every backward: the least memory

The matrices of a block are a unit, gathered in bfloat16 where products are in bfloat16; what is small, and what is
computed in float32, is a unit of the network around the blocks, gathered as it is. Gradients are reduced in float32:
the mean over all ranks.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from unite_fast.base.errors import UserError
from unite_fast.config import TrainConfig
from unite_fast.parallel.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Unit(NamedTuple):
    """Parameters that are gathered together, before the first of ``modules`` runs.

    All of its modules run in a pass that runs any. products: they are weights of matrix products alone.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    products: bool = False


def is_unit(module: nn.Module) -> bool:
    """Whether ``module`` is one of those before which a unit is gathered."""
    return hasattr(module, "set_requires_gradient_sync")


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
    units: Sequence[Unit],
    methods: Mapping[nn.Module, Sequence[str]],
    train: TrainConfig,
    half: bool,
    timeout: float,
    ranks: Ranks,
) -> None:
    """Shards ``model`` in place, over several ranks.

    units: those around others first; what is in none of them is the model's own. methods: what callers use of a module
    in place of its forward. half: units of products are gathered in bfloat16. timeout: seconds that a rank waits for
    the others. Attributes of parameters (the optimizers' tags) are kept.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # torch warns that writing into a unit's output would break its backward; no module here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    tags = {name: vars(parameter) for name, parameter in model.named_parameters()}
    mesh, frees = _mesh(train, timeout, ranks), train.reshard == "pass"
    own = {id(p) for unit in units for p in unit.parameters}
    rest = Unit([model], [p for p in model.parameters() if id(p) not in own])
    for unit in [rest, *units]:
        kept = {id(p) for p in unit.parameters}
        fully_shard(
            unit.modules if len(unit.modules) > 1 else unit.modules[0],  # type: ignore[arg-type]
            mesh=mesh,
            reshard_after_forward=frees,
            # Inputs stay as they are: the residual stream and its norms are in float32.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half and unit.products else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            ignored_params={p for p in model.parameters() if id(p) not in kept},
        )
    _prefetch([unit for unit in units if unit.products])
    for module, names in methods.items():
        for name in names:
            register_fsdp_forward_method(module, name)
    for name, parameter in model.named_parameters():
        vars(parameter).update(tags[name])


def _prefetch(units: Sequence[Unit]) -> None:
    """Each unit of a chain asks for the next while it computes, the other way round in backward.

    A network's matrices are a chain, and ``units`` has them network by network, in the order of a pass.
    """
    modules: list[Any] = [unit.modules[0] for unit in units]
    for module, following in itertools.pairwise(modules):
        if type(module) is type(following):
            module.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([module])


class Passes:
    """Tells FSDP which backward of a step is the last one through a network (``train.reshard``).

    modules: the roots of what is sharded; none where nothing is.
    """

    def __init__(self, modules: Sequence[nn.Module] = (), reshard: str = "pass") -> None:
        self.roots: list[Any] = list(modules) if reshard == "step" else []
        self.closes = False

    def begin(self, last: bool) -> None:
        """Before a micro-batch, the last one of a step or not: what is gathered stays, gradients stay with the rank."""
        self.closes = last
        for root in self.roots:
            self._set(root, False)

    def last(self, module: nn.Module) -> None:
        """The next backward through ``module`` is the last one of the micro-batch through it."""
        if self.closes and self.roots:
            self._set(module, True)

    def _set(self, module: Any, last: bool) -> None:
        if not is_unit(module):
            return
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)
        if module in self.roots:
            module.set_is_last_backward(last)


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
