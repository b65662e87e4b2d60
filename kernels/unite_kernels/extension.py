"""Loads the compiled operations: ``_C_cpu.so`` (torch.ops.unite_kernels_cpu) and ``_C_cuda.so`` (..._cuda).

Importing this module loads nothing. Each library is loaded on the first call that needs it, once per process. One that
cannot be loaded, or was built from other sources than those beside it, raises a RuntimeError saying why and what to do;
nothing falls back silently.
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


def _path(kind: str) -> Path:
    return Path(__file__).with_name(f"_C_{kind}.so")


def is_built(kind: str) -> bool:
    """Whether there is a "cpu" or "cuda" library, which may yet have an ``obstacle``."""
    return _path(kind).exists()


@cache
def obstacle(kind: str) -> str:
    """Why the "cpu" or "cuda" library cannot be used here; empty once it is loaded."""
    path = _path(kind)
    if not path.exists():
        return f"{path.name} is not built; run `{BUILD}`, which says what is missing"
    if kind == "cuda" and torch.version.cuda is None:
        return f"{path.name} needs a CUDA build of torch, and torch {torch.__version__} is none"
    if why := stale(kind):
        return f"{path.name} is not of this checkout: {why}; run `{BUILD}`, or remove it"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load ({error}); run `{BUILD}` again, or remove it"
    return ""


def _require(kind: str) -> None:
    if reason := obstacle(kind):
        raise RuntimeError(reason)


def load_cpu() -> None:
    """Make torch.ops.unite_kernels_cpu available. Raises RuntimeError with the reason if it cannot be."""
    _require("cpu")


def load_cuda() -> None:
    """Make torch.ops.unite_kernels_cuda available. Raises RuntimeError with the reason if it cannot be."""
    _require("cuda")


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
    library, checkout = _path(kind), CHECKOUT
    if not library.exists() or not (digest := sources_digest(checkout)):
        return ""
    record = library.with_suffix(".sources")
    if record.is_file():
        return "" if record.read_text() == digest else "it was built from other sources"
    newest = max(p.stat().st_mtime for p in (checkout / "csrc").rglob("*") if p.is_file())
    return "its sources are newer" if newest > library.stat().st_mtime else ""
