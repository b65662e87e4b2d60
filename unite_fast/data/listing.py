"""Which images lie below a folder: one answer for training, packing and reconstruction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from unite_fast.base.errors import UserError
from unite_fast.data.encoded import EXTENSIONS


def images_below(folder: Path, above: Sequence[Path] = ()) -> list[str]:
    """Paths of the images in ``folder``, then of those in each of its sub-folders, sorted within each.

    Names that begin with a dot are left out. Links are followed. above: folders that ``folder`` lies in. Raises
    UserError for a sub-folder that cannot be read, and for a link to a folder above it, which has no end.
    """
    return _below(str(folder), tuple(_identity(str(path)) for path in above))


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make it readable, or remove it") from None
    return status.st_dev, status.st_ino


def _below(folder: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    here = _identity(folder)
    if here in above:
        raise UserError(f"{folder} is a link to a folder that it lies in; remove the link")
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
        folders = [entry.path for entry in entries if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make it readable, or remove it") from None
    found = [e.path for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()]
    for path in folders:
        found += _below(path, (*above, here))
    return found
