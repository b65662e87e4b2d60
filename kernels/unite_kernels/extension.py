"""Loads the compiled operations: ``_C_cpu.so`` (torch.ops.unite_kernels_cpu) and ``_C_cuda.so`` (..._cuda).

Importing this module loads nothing. Each library is loaded on the first call that needs it, once per process, and
a library that cannot be loaded raises a RuntimeError saying why and what to do; nothing falls back silently.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD = (  # a wheel is pure where no compiler was
    "python setup.py build_ext --inplace"
    if (CHECKOUT / "setup.py").is_file()
    else "pip install --no-build-isolation FOLDER_OF_THE_SOURCES"
)


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


def obstacle(kind: str) -> str:
    """Why the "cpu" or "cuda" library cannot be used here; empty once it is loaded."""
    return _load(f"_C_{kind}.so")


def load_cpu() -> None:
    """Make torch.ops.unite_kernels_cpu available. Raises RuntimeError with the reason if it cannot be."""
    _require("_C_cpu.so")


def load_cuda() -> None:
    """Make torch.ops.unite_kernels_cuda available. Raises RuntimeError with the reason if it cannot be."""
    _require("_C_cuda.so")


def status() -> dict[str, Library]:
    """For "cpu" and "cuda": whether the library loads here, and if not the reason. Loads them."""
    return {kind: Library(not (reason := obstacle(kind)), reason) for kind in ("cpu", "cuda")}


def sources_digest(checkout: Path = CHECKOUT) -> str:
    """A sha256 of csrc/, from which the libraries are compiled; empty in an installation without it."""
    files = sorted(p for p in (checkout / "csrc").rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(checkout).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest() if files else ""


def stale(kind: str) -> str:
    """Why the "cpu" or "cuda" library does not belong to the sources beside it; empty if it does, or none are there.

    setup.py records the hash of the sources beside a library. One without that record is compared by date.
    """
    library, checkout = Path(__file__).with_name(f"_C_{kind}.so"), CHECKOUT
    digest = sources_digest(checkout)
    if not digest or not library.exists():
        return ""
    record = library.with_suffix(".sources")
    if record.is_file():
        return "" if record.read_text() == digest else "it was built from other sources"
    newest = max(p.stat().st_mtime for p in (checkout / "csrc").rglob("*") if p.is_file())
    return "its sources are newer" if newest > library.stat().st_mtime else ""
