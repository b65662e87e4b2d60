"""Triton's interpreter (switched on by the conftest.py above), repaired where its bfloat16 differs from the hardware's.

On a GPU nothing is interpreted and nothing repaired: the same tests then check the compiled kernels.

The interpreter truncates float32 to bfloat16 where a GPU rounds to nearest even, and multiplies bfloat16 matrices as
if their bits were integers. Both are replaced here, so that bfloat16 is held to the same error budget as float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checking import DEVICE


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True, scope="session")
def _hardware_bfloat16():
    if DEVICE == "cuda":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return handle(_round_to_bf16(src.data).reshape(np.shape(src.data)), target)
        if source == tl.bfloat16 and target == tl.float32:
            return handle(_from_bf16(np.asarray(src.data)), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_from_bf16(np.asarray(x.data)), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(builder, "cast_impl", cast_impl)
    for name in ("create_fp_ext", "create_fp_trunc"):
        patch.setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    patch.setattr(builder, "create_dot", create_dot)
    yield
    patch.undo()


@pytest.fixture
def nan_filled():
    """torch.empty returns NaN: an element that a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # wanted for what follows alone
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
