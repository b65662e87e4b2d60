"""Where checkpoints are, which is the newest, and whether one is whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from unite_fast.base import files, launcher
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256

NO_PICKLE = "this program executes nothing while it loads"
EXPORTED = "model.safetensors"  # what ``export`` writes: one set of weights, the configuration in its metadata
NAME = re.compile(r"step-(\d{7,})$")
UNREADABLE = (ValueError, AttributeError, KeyError, TypeError, RecursionError)  # of a manifest that is none
_hashes: dict[tuple[int, ...], str] = {}
TENSORS = re.compile(r"training(-(\d{5})-of-(\d{5}))?\.safetensors$")


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other path."""
    found = NAME.search(path.name)
    return int(found.group(1)) if found else None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, those included that cannot be looked at. Raises UserError for such a folder."""
    with files.refusals(str(folder), "; make it readable: what is in it decides where a run goes on"):
        names = os.listdir(folder) if folder.is_dir() else []
    found = [
        (step, folder / name)
        for name in names
        if name.startswith("step-") and (step := step_of(Path(name))) is not None
    ]
    return [path for _, path in sorted(found, reverse=True) if _may_be_folder(path)]


def _may_be_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return True


def verify(path: Path, content: bool = True) -> str:
    """An empty string for a whole checkpoint, else what is wrong with it. Without ``content``, sizes alone count."""
    try:
        return _problem(path, content)
    except OSError as error:  # of a disk or a server: other checkpoints may be whole
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror or error}"


def _recorded(path: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of each file of a checkpoint, as it says. Raises what a manifest can be wrong with."""
    manifest = json.loads(files.read_text(path / "manifest.json"))
    return [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()]


def _problem(path: Path, content: bool) -> str:
    try:
        recorded = _recorded(path)
    except (FileNotFoundError, *UNREADABLE):
        if (path / ".metadata").exists():
            return f"it is a folder of torch.distributed.checkpoint, whose metadata is a pickle; {NO_PICKLE}"
        return "it has no readable manifest.json"
    for name, size, sha256 in recorded:
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}: it was cut short or changed"
        if content and _hashed(file) != sha256:
            return f"{name} does not have the recorded sha256: its content changed"
    names = [name for name, _, _ in recorded]
    return "" if "state.json" in names and _is_complete(names) else "its manifest is incomplete"


def _hashed(file: Path) -> str:
    """Its sha256. A command looks for a checkpoint more than once: what is as it was is hashed once in a process."""
    known = _version(file)
    if known not in _hashes:
        _hashes[known] = file_sha256(file)
    return _hashes[known]


def _version(file: Path) -> tuple[int, ...]:
    """Two of one file differ where it has been written to. The first two may differ between machines, too."""
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_part(path: Path, part: int, parts: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of every ``parts``-th file of a checkpoint that verifies without content, largest first: by its name, its version
    and sha256. For ``take_hashes`` of another process."""
    found = {}
    with contextlib.suppress(OSError, *UNREADABLE):  # whoever verifies will meet it, and say it
        by_size = sorted(_recorded(path), key=lambda entry: -entry[1])
        for name, _, _ in by_size[part::parts]:
            file = path / Path(name).name
            version = _version(file)
            found[name] = version, _hashed(file)
    return found


def take_hashes(path: Path, found: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """``verify`` need not hash again what another process has: files that have its sizes and times here, too."""
    for name, (version, sha256) in found.items():
        with contextlib.suppress(OSError):
            here = _version(path / Path(name).name)
            if here[2:] == version[2:]:
                _hashes[here] = sha256


def _is_complete(names: Iterable[str]) -> bool:
    """Whether the numbered files of tensors among ``names`` are all there."""
    found = [match for name in names if (match := TENSORS.match(name))]
    counts = {int(match[3] or 1) for match in found}
    return len(counts) == 1 and len(found) == counts.pop()


def newest(folder: Path, content: bool = True) -> tuple[Path | None, list[str], list[Path]]:
    """(the newest checkpoint that verifies or None, one line for each newer one that does not, those themselves).
    content: as of ``verify``."""
    lines: list[str] = []
    rejected: list[Path] = []
    for path in newest_first(folder):
        problem = verify(path, content)
        if not problem:
            return path, lines, rejected
        lines.append(f"skipping {path}: {problem}")
        rejected.append(path)
    return None, lines, rejected


def locate(path: str | Path, quiet: bool = False, content: bool = True) -> Path:
    """A checkpoint folder, exported or official file from what a user names: one, or a folder of them.

    Of a folder, the newest that verifies; rank 0 says on stderr which newer ones do not, unless ``quiet``. content: as
    of ``verify``. Raises UserError.
    """
    with files.refusals(f"checkpoint {path}", "; make it readable, or choose another one"):
        return _located(Path(path), quiet, content)


def _located(path: Path, quiet: bool, content: bool) -> Path:
    if path.is_file():
        return path
    if (path / "manifest.json").is_file() or NAME.search(path.name):
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}")
        problem = verify(path, content)
        if problem:
            raise UserError(f"checkpoint {path} is damaged: {problem}; choose another one")
        return path
    for folder in (path / "checkpoints", path):
        found, rejected, _ = newest(folder, content) if folder.is_dir() else (None, [], [])
        if found:
            if rejected and not quiet and launcher.rank() == 0:
                print(*rejected, sep="\n", file=sys.stderr)
            return found
        if rejected:
            raise UserError(f"no usable checkpoint in {folder}: {rejected[0]}")
    if (path / EXPORTED).is_file():
        return path / EXPORTED
    raise UserError(f"no checkpoint at {path}; give a run folder, a step-N folder, an export, or an official .pt file")


def reads(located: Path) -> list[Path]:
    """The files and folders that a checkpoint consists of: where no command may write."""
    if located.is_file():
        return [located, located.with_suffix(".json")] if located.suffix != ".safetensors" else [located]
    return [located.parent if located.parent.name == "checkpoints" else located]


def run_of(located: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it does."""
    return located.parent.parent if located.is_dir() and located.parent.name == "checkpoints" else None


def identity(located: Path) -> str:
    """A sha256 that changes whenever the weights do: of a file, or of a checkpoint folder's manifest."""
    return file_sha256(located if located.is_file() else located / "manifest.json")
