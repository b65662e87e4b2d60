"""Steps and samples on fake CUDA tensors: one device, nothing read back, and every launch compiles for sm_90.

tests/cuda_trace.py does the work, in a process of its own, in which Triton's kernels are compiled and not interpreted.
Without names it traces more: every recipe, the Large and XL encoders, recomputation.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support import process

SHARED = 227 * 1024  # bytes that a block may use on sm_90
STEPS = (
    "tiny, fp32, eager", "tiny, fp32, fused, one image", "B, bf16, fused", "B, bf16, fused, residual bf16", "B, fp8",
    "B, fp8_rowwise", "B, bf16, fused, against a discriminator",
)  # fmt: skip
SAMPLES = ("samples, bf16",)
COMPILED = ("tiny, fp8, compiled",)
FAULTS = {
    "fault: a number of the host": "meets tensors on cpu",
    "fault: a value is read back": "DataDependentOutputException",
    "fault: no such grid": "_double_kernel: grid (1, 65536)",
    "fault: a fake that is wrong": "its fake says",
}
KERNELS = {
    "adaln_triton._forward_kernel", "adaln_triton._backward_kernel", "adaln_triton._reduce_kernel",
    "conv_relu._finish_kernel", "conv_relu._mask_kernel", "conv_relu._pool_backward_kernel", "conv_relu._pool_kernel",
    "corruption._flow_kernel", "corruption._inject_kernel", "corruption._tokenizer_kernel",
    "lpips_head._forward_kernel", "lpips_head._backward_kernel", "qk_norm_rope_triton._forward_kernel",
    "qk_norm_rope_triton._backward_kernel", "swiglu._forward_kernel", "swiglu._backward_kernel",
}  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the same is run there")


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    pytest.importorskip("triton")
    result = process("tests/cuda_trace.py", *STEPS, *SAMPLES, *COMPILED, *FAULTS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*STEPS, *SAMPLES])
def test_nothing_waits_or_meets_another_device(traced, name):
    row = traced["scenarios"][name]
    assert not row["error"], row["error"]
    assert row["operations"] > 1000  # it did look
    assert row["launches"] >= row["registered"]
    assert (row["launches"] == 0) == ("eager" in name)


@pytest.mark.parametrize("name", COMPILED)
def test_inductor_writes_code_of_every_region(traced, name):
    row = traced["scenarios"][name]
    assert not row["error"], row["error"]
    assert row["graphs"] == 2 * (2 * 2 + 1)  # two blocks at two lengths and a layer; forward and backward


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_looked_for_is_found(traced, name):
    assert FAULTS[name] in traced["scenarios"][name]["error"]


def test_every_launch_compiles_within_a_multiprocessor(traced):
    """Not a list of ours: the specialisations of the launches above, by dtypes, sizes and alignment."""
    assert {kernel["name"] for kernel in traced["kernels"]} == KERNELS
    for kernel in traced["kernels"]:
        assert kernel["shared"] <= SHARED, kernel
        if kernel["scenario"].startswith("B"):  # a tiny model's heads of 16 are nobody's speed
            assert kernel["spills"] == kernel["stack"] == 0, kernel
