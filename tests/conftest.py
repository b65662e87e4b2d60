"""Fixtures shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import REFERENCE, TINY


def pytest_configure() -> None:
    """Before any fixture, whatever its scope: small matrices run fastest on one thread, and sums depend on how many."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """As at the start, whatever an earlier test set; denormals are flushed as in training."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


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
