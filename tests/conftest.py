"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import random
import signal
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from support import REFERENCE, TINY

from unite_fast.run import garbage


def pytest_configure() -> None:
    """Before any fixture, whatever its scope: small matrices run fastest on one thread, and sums depend on how many.

    A shell ignores Ctrl-C for what it starts in the background, and so would all that tests start and send it to.
    """
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take a quarter of a minute or more, the longest first: begun last, one of them would have a process to
# itself while the other has nothing left to do.
LONG = (
    "test_distributed", "test_composition", "test_resume", "test_monitor", "test_stops", "test_cuda_traced",
    "test_efficiency", "test_gpu_check", "test_graph", "test_security", "test_images", "test_compile",
    "test_sampling", "test_examples", "test_training", "test_traffic", "test_flops", "test_atoms", "test_scores",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert not set(LONG) - {path.stem for path in Path(__file__).parent.rglob("test_*.py")}, "renamed?"
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def frozen():
    """What is there before a test stays: to look through all of torch again would be a fifth of a tiny run's time."""
    gc.collect()
    garbage.keep()


@pytest.fixture(autouse=True)
def one_thread():
    """As at the start, whatever an earlier test set; denormals are flushed as in training."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def own_seed(request: pytest.FixtureRequest):
    """Every test draws from a seed of its own name: the same numbers on every machine, in every order and selection."""
    seed = crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    if not (REFERENCE / "tiny.safetensors").is_file():
        pytest.skip("the golden values lie in ../shared/reference beside the checkout; they are not there")
    return REFERENCE
