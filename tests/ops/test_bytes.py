"""The bytes that each kernel moves, against the least it must: see benchmarks/bytes.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cases
import pytest
import torch
from checking import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="counts loads and stores in Triton's interpreter; on a GPU the kernels are compiled"
)
SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "bytes.py"


@pytest.fixture(scope="module")
def counting():
    spec = importlib.util.spec_from_file_location("bytes_moved", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", cases.CASES)
def test_bytes_moved_are_near_the_minimum(counting, name):
    forward, backward = counting.ratios(name)
    assert 1.0 <= forward <= counting.FORWARD_LIMIT  # below 1 the counter, or the minimum, would be wrong
    assert 1.0 <= backward <= counting.BACKWARD_LIMIT


def test_the_counter_leaves_out_masked_elements(counting):
    """A width of 192 runs in blocks of 256: exactly x, weight, shift and scale are read, y and rstd written."""
    t = cases.CASES["adaln"].tensors(1, 4, 192, torch.float32, torch.float32)
    with counting.Counter() as counter:
        cases.launches("adaln", t)[0]()
    assert counter.moved == 4 * (4 * 192 * 2 + 3 * 192 + 4)
