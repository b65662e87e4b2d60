"""A CUDA graph's rules on a CPU: operations are recorded with the very tensors they touch, and repeated on them.

What a graph would get wrong, a replay of the tape gets wrong as well: a number of the host that changes from step to
step was recorded as it was, a tensor that Python has since replaced is no longer looked at, and a new gradient has
another address. Views are not repeated: their tensors still look at the same storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Has the interface of ``graph.CudaRecording``. Recording runs the function; the first replay does not."""

    def __init__(self, function: Callable[..., dict[str, Tensor]], inputs: Mapping[str, Tensor], *_: object) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.fresh = True
        with self:
            self.outputs = function(**inputs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
        if not aliases or any(alias.is_write for alias in aliases):
            self.operations.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the casts are on the tape
    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        for function, args, kwargs, recorded in self.operations:
            results = function(*args, **kwargs)
            for new, old in zip(tree_leaves(results), tree_leaves(recorded), strict=True):
                if isinstance(new, Tensor) and new is not old:
                    old.copy_(new)
