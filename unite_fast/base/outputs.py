"""Where a command may write: decided here for all commands, before their work begins.

Refused is a place that the command reads from, or within one; what somebody else has put there; a file where a folder
is meant and the reverse; and where the system lets this process write nothing.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from unite_fast.base import files
from unite_fast.base.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FILES = (*PICTURES, ".npz", ".tar", ".zip", ".gz", ".json", ".safetensors", ".html")  # a folder may be called w1.5


def check(path: Path, option: str, sources: Iterable[str | Path] = ()) -> None:
    """Raises UserError where nothing may be written. sources: files and folders that the command reads.

    Leaves no trace.
    """
    for source in map(Path, sources):
        if _is_within(path, source):
            where = "is" if _resolved(path) == _resolved(source) else "lies in"
            raise UserError(f"{option} {path} {where} {source}, which is read; choose a place outside it")
    with files.refusals(f"{option} {path}", "; choose another place"):
        existing = path if path.is_dir() else path.parent
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        tempfile.TemporaryFile(dir=existing).close()


def check_file(
    path: Path, option: str, sources: Iterable[str | Path] = (), ours: Callable[[Path], bool] = lambda path: False
) -> None:
    """As ``check``, of a file that is to be written. ours: whether one that is there was made by the same command."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file")
    check(path, option, sources)
    if not path.exists():
        return
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{option} {path} is a device, a pipe or a socket, which is not replaced; name a file")
    if not ours(path):
        raise UserError(f"{option} {path} is there already and was not made by this command; choose another name")


def check_folder(
    path: Path, option: str, sources: Iterable[str | Path] = (), ours: Callable[[Path], bool] = lambda path: False
) -> None:
    """As ``check``, of a folder that is to be filled. ours: whether one that is not empty may be filled further."""
    if path.suffix.lower() in FILES and not path.is_dir():
        raise UserError(f"{option} {path}: give a folder; leave out the suffix {path.suffix}")
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{option} {path} is a file; give a folder")
    check(path, option, sources)
    if path.is_dir() and not ours(path):
        with files.refusals(f"{option} {path}"):
            found = sorted(os.listdir(path))
        if found:
            raise UserError(f"{option} {path} is not empty and was not made by this command ({found[0]} is in it); "
                            "choose another one")  # fmt: skip


def holds_json(*keys: str) -> Callable[[Path], bool]:
    """A function that tells whether a file is a JSON object with one of ``keys``: how results are recognised."""

    def told(path: Path) -> bool:
        try:
            content = json.loads(files.read_text(path))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and any(key in content for key in keys)

    return told


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link that has no end
        return path.absolute()


def _is_within(path: Path, source: Path) -> bool:
    """Whether ``path`` is ``source``, by whatever name, or lies in it."""
    here, there = _resolved(path), _resolved(source)
    try:
        same = path.exists() and source.exists() and os.path.samefile(path, source)
    except OSError:
        same = False
    return same or here == there or there in here.parents
