"""What a rank sends: collectives and their bytes by kind, counted where torch dispatches them.

    with Traffic() as seen:
        step(batch)
    seen.calls["all_gather"], seen.payload["all_gather"], seen.sent["all_gather"]

payload: bytes of the whole tensor of a collective, on the side where it is whole. sent: what a rank puts on the wire
by the ring algorithms that NCCL uses for large tensors, n ranks: (n - 1) / n of the payload, twice that for an
all-reduce. Objects sent by pickle over the control group count as ``broadcast`` and ``all_gather_list``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By torch's name in the c10d and the functional namespace, without underscores around it.
KINDS = {
    "allreduce": "all_reduce", "all_reduce": "all_reduce",
    "allgather_base": "all_gather", "all_gather_into_tensor": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_base": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base": "all_to_all", "all_to_all_single": "all_to_all",
    "broadcast": "broadcast", "allgather": "all_gather_list",
}  # fmt: skip
ONCE, TWICE = 1, 2
PASSES = {"all_reduce": TWICE}  # of the payload over the wire; ONCE where nothing is said


def wire(kind: str, payload: float, ranks: int) -> float:
    """Bytes that a rank sends for a collective of ``payload`` bytes among ``ranks``."""
    return payload * PASSES.get(kind, ONCE) * (ranks - 1) / ranks


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _ranks(arguments: Iterable[Any]) -> int:
    """Of the group among a collective's arguments: its object, or the name that functional collectives give."""
    for value in arguments:
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value).size()
        if isinstance(value, dist.ProcessGroup):
            return value.size()
    sizes = [value for value in arguments if isinstance(value, int) and not isinstance(value, bool)]
    return sizes[0] if sizes else dist.get_world_size()


class Traffic(TorchDispatchMode):
    """Counters by kind of collective; see the module's text."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.by_dtype: Counter[tuple[str, str]] = Counter()  # payload by (kind, dtype)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        kind = KINDS.get(name.strip("_")) if namespace in ("c10d", "_c10d_functional") else None
        if kind is not None:
            values = [*args, *(kwargs or {}).values()]
            found = list(_tensors(values))
            size = max((t.nbytes for t in found), default=0)
            if kind == "all_reduce":
                size = sum(t.nbytes for t in found)
            ranks = _ranks(values)
            if namespace == "_c10d_functional" and kind == "all_gather":
                size *= ranks  # its argument is a rank's part
            self.calls[kind] += 1
            self.payload[kind] += size
            self.sent[kind] += round(wire(kind, size, ranks))
            self.by_dtype[kind, str(found[0].dtype).removeprefix("torch.")] += size
        return function(*args, **(kwargs or {}))
