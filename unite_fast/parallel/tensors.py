"""Tensors of which a rank holds a part: the DTensors that FSDP2 makes of parameters.

torch's module of them costs half a second to import, so it is imported where one is made; here they are told apart
from plain tensors by what they can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part: Any = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered by the ranks that share it, which all call; any other tensor as it is."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def locals_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [local(tensors[name].detach()) for name in names]


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold one copy of a DTensor; None for any other tensor."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return None if mesh is None else mesh.get_group(mesh.ndim - 1)


def copies_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the same part of a DTensor, on a mesh of two dimensions (HSDP); else None."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return None if mesh is None or mesh.ndim < 2 else mesh.get_group(0)


def part_of(whole: Tensor, model: Tensor) -> Tensor:
    """What a rank holds of ``whole`` (the same on all ranks) when it is sharded as ``model``, on its device."""
    mesh: Any = getattr(model, "device_mesh", None)
    if mesh is None or hasattr(whole, "device_mesh"):
        return local(whole)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = distribute_tensor(whole.to(model.device), mesh, model.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return sharded.to_local()
