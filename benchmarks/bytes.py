"""Bytes that each Triton kernel loads and stores, counted in Triton's interpreter, over the least it must move.

    TRITON_INTERPRET=1 python benchmarks/bytes.py        table

Every unmasked element of every load and store is counted, also those that a cache would serve, and the torch sums of
partial results with them. The least: every row read and written once, at a float32 residual and a bfloat16 branch;
statistics, tables and per-sample vectors are not part of it. Programs take the rows that they take at a training batch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "ops")]

import cases  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

WIDTH = 768
ROWS = {"qk_norm_rope": (32, 16)}  # samples, tokens: its programs take the same tokens of several samples
OTHER_ROWS = (1, 128)
FORWARD_LIMIT, BACKWARD_LIMIT = 1.05, 1.15


class Counter(TorchDispatchMode):
    """Wraps the interpreter's loads and stores; ``moved`` is in bytes, elements under a false mask left out."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.sum.dim_IntList:
            self.moved += args[0].nbytes + out.nbytes
        return out

    def __enter__(self):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        # Unmasked loads and stores call the masked ones, so these two see everything exactly once.
        self.saved = Builder.create_masked_load, Builder.create_masked_store
        load, store = self.saved
        counter = self

        def count(pointers, mask):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counter.moved += size * int(np.count_nonzero(np.broadcast_to(mask.data, np.shape(pointers.data))))

        def counted_load(builder, pointers, mask, *rest):
            count(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            count(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
        return super().__enter__()

    def __exit__(self, *error):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        Builder.create_masked_load, Builder.create_masked_store = self.saved
        return super().__exit__(*error)


def ratios(name: str) -> tuple[float, float]:
    """Forward and backward bytes of one operation over its minimum."""
    residual, branch = torch.float32, torch.bfloat16
    if name == "adaln":
        residual = torch.bfloat16  # its y has x's dtype
    case = cases.CASES[name]
    rows = ROWS.get(name, OTHER_ROWS)
    t = case.tensors(*rows, WIDTH, residual, branch)
    moved = []
    with cases.training_programs():
        for step in cases.launches(name, t):
            with Counter() as counter:
                step()
            moved.append(counter.moved)
    least = case.minimum(*rows, WIDTH, residual.itemsize, branch.itemsize)
    return moved[0] / least[0], moved[1] / least[1]


def main() -> int:
    print(f"{'operation':<16}{'forward':>9}{'backward':>10}   limits {FORWARD_LIMIT}, {BACKWARD_LIMIT}")
    over = []
    for name in cases.CASES:
        forward, backward = ratios(name)
        print(f"{name:<16}{forward:>9.3f}{backward:>10.3f}")
        if forward > FORWARD_LIMIT or backward > BACKWARD_LIMIT:
            over.append(name)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
