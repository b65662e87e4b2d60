"""Loads the compiled operations: ``_C_cpu.so`` (torch.ops.unite_kernels_cpu) and ``_C_cuda.so`` (..._cuda).

Importing this module loads nothing. Each library is loaded on the first call that needs it, once per process, and
a library that cannot be loaded raises a RuntimeError saying why and what to do; nothing falls back silently.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

BUILD = "python setup.py build_ext --inplace"


class Library(NamedTuple):
    present: bool
    reason: str  # empty when present


@cache
def _load(name: str) -> str:
    """The reason why library ``name`` cannot be used; empty once it is loaded."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"{name} is not built; run `{BUILD}`, which says what is missing"
    if name == "_C_cuda.so" and torch.version.cuda is None:
        return f"{name} needs a CUDA build of torch, and torch {torch.__version__} is none"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{name} does not load ({error}); run `{BUILD}` again"
    return ""


def _require(name: str) -> None:
    reason = _load(name)
    if reason:
        raise RuntimeError(reason)


def load_cpu() -> None:
    """Make torch.ops.unite_kernels_cpu available. Raises RuntimeError with the reason if it cannot be."""
    _require("_C_cpu.so")


def load_cuda() -> None:
    """Make torch.ops.unite_kernels_cuda available. Raises RuntimeError with the reason if it cannot be."""
    _require("_C_cuda.so")


def status() -> dict[str, Library]:
    """For "cpu" and "cuda": whether the library loads here, and if not the reason. Loads them."""
    return {kind: Library(not (reason := _load(f"_C_{kind}.so")), reason) for kind in ("cpu", "cuda")}
