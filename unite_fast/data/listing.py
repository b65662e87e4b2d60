"""Which files of some kinds lie below a folder: one answer for training, packing and reconstruction."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from unite_fast.base.errors import UserError
from unite_fast.base.files import refusals
from unite_fast.data.encoded import EXTENSIONS

OTHER = (".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".ico", ".jfif")
SPLITS = "train|test|val|dev|eval|h[eo]ld[-_]?out|t10k|unlabell?ed|unsupervised"
SPLIT = re.compile(
    rf"(?:^|[-_. ]|(?<=[a-z])(?=[A-Z]))(?i:({SPLITS})(?:ing|idation|id|uation)?)(?=[-_. \d]|$)"  # also dataTrain
)
RANGE = re.compile(r"(\d+)\.\.(\d+)$")
MOST_NAMES = 1 << 20
Folders = dict[tuple[int, int], str]  # that were listed, by what tells them apart
log = logging.getLogger("unite_fast.data")


def say_left_out(counts: Counter[str], where: str) -> None:
    """One warning for images of kinds that are not read. counts: by suffix."""
    if counts:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        log.warning("%s: %s are left out; only %s are read", where, kinds, ", ".join(EXTENSIONS))


def files_of(root: Path, suffix: str) -> list[Path]:
    """``root`` itself, or the files in it, whose names end in ``suffix``; sorted. ``root`` may be a pattern such as
    ``shards/train-{000..146}.tar`` or ``shards/train-*.tar``.

    Raises UserError for a name of the pattern that is not there, and for files of several splits, not told apart.
    """
    if root.is_file():
        return [root] if root.name.endswith(suffix) else []
    if is_pattern(root):
        return [path for path in matching(root) if path.name.endswith(suffix)]
    names = [entry.name for entry in _entries(root)] if root.is_dir() else []
    return _checked(root, [root / name for name in names if name.endswith(suffix) and (root / name).is_file()])


def _checked(root: Path, found: list[Path]) -> list[Path]:
    """``found``. Raises UserError for files of several splits, and for one under two names."""
    check_splits(root, found)
    reached: dict[str, Path] = {}
    for path in found:
        other = reached.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise UserError(f"{other} and {path} are one file, whose content would count twice; remove the link")
    return found


def check_splits(root: Path, found: Iterable[Path]) -> None:
    """Raises UserError for files, below the folder or pattern ``root``, whose names are those of several splits."""
    folder = _fixed(root)
    pattern = str(root.relative_to(folder))
    if any(SPLIT.search(part) for part in pattern.split("/")):
        return  # which of them is said
    by_split: dict[str, tuple[Path, str]] = {}
    for path in found:
        parts = path.relative_to(folder).parts
        for depth, part in enumerate(parts):
            for split in SPLIT.finditer(part):
                word = part[split.start() : split.end(1)]
                others = f"{'' if split.start() == 0 else '*'}{word}*{path.suffix}"
                inner = "/".join(parts[: depth + 1]) if depth + 1 < len(parts) else "/".join([*parts[:-1], others])
                by_split[split[1].lower()] = path, f"{folder}/{inner}"
    if len(by_split) > 1:
        splits = sorted(by_split)
        shown = " and ".join(str(by_split[split][0].relative_to(folder)) for split in splits[:2])
        raise UserError(
            f"{root} holds files of several splits ({', '.join(splits)}), as {shown}; name those of one, such as "
            f"'{by_split[splits[-1]][1]}'"
        )


def check_split_folders(root: Path, listed: Folders) -> None:
    """As ``check_splits``, of folders of images: those below ``root`` that are called as splits are, whole names."""
    by_split: dict[str, str] = {}
    for folder in listed.values():
        for part in Path(folder).relative_to(root).parts:
            if (split := SPLIT.match(part)) and split.end() == len(part):
                by_split[split[1].lower()] = folder
    if len(by_split) > 1:
        splits = sorted(by_split)
        raise UserError(
            f"{root} holds folders of several splits ({', '.join(splits)}); name one of them, such as "
            f"{by_split[splits[-1]]}; classes that are really called so need other names"
        )


def is_pattern(path: Path) -> bool:
    """Whether a path that is not there names others by signs, as a shell understands them."""
    return not path.exists() and any(sign in str(path) for sign in "*?[{")


def _fixed(root: Path) -> Path:
    """The folder in which a pattern chooses: signs in the names of folders that are there are none."""
    folder = root
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def matching(root: Path) -> list[Path]:
    """The files that a pattern names, sorted. Raises UserError for a plain name that is not there, for files of several
    splits, and for one under two names."""
    folder = _fixed(root)
    found = set()
    for name in _unbraced(str(root.relative_to(folder)), root):
        if any(sign in name for sign in "*?["):
            found |= set(_matching(folder, Path(name).parts))
        elif (folder / name).is_file():
            found.add(folder / name)
        else:
            raise UserError(f"{root}: {folder / name} is not there")
    return _checked(root, sorted(path for path in found if path.is_file()))


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What is there below ``folder`` of a pattern. Raises UserError for a folder in the way that cannot be read."""
    if not parts:
        yield folder
    elif not any(sign in parts[0] for sign in "*?["):
        if os.path.lexists(folder / parts[0]):
            yield from _matching(folder / parts[0], parts[1:])
    elif folder.is_dir():
        for entry in _entries(folder):
            if fnmatch.fnmatchcase(entry.name, parts[0]):
                yield from _matching(folder / entry.name, parts[1:])


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted, but for names that begin with a dot. Raises UserError."""
    with _readable(folder):
        return sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)


def _readable(folder: str | Path) -> AbstractContextManager[None]:
    return refusals(str(folder), "; make it readable, or remove it")


def _unbraced(pattern: str, where: Path) -> list[str]:
    """``a{0..2}{x,y}`` written out, as a shell does; numbers keep their width. Raises UserError for too many."""
    begun = re.search(r"\{([^{}]*)\}", pattern)
    if begun is None:
        return [pattern]
    numbers = RANGE.match(begun[1])
    if numbers is None:
        choices = begun[1].split(",")
    else:
        low, high = int(numbers[1]), int(numbers[2])
        if high - low >= MOST_NAMES:
            raise UserError(f"{where}: {begun[0]} names {high - low + 1} files; {MOST_NAMES} at most")
        choices = [str(number).zfill(len(numbers[1])) for number in range(low, high + 1)]
    return [name for c in choices for name in _unbraced(pattern[: begun.start()] + c + pattern[begun.end() :], where)]


def images_below(
    folder: Path, above: Sequence[Path] = (), left_out: Counter[str] | None = None, listed: Folders | None = None
) -> list[str]:
    """As ``files_below``, of images. left_out: gets the number of images of kinds that are not read, by suffix."""
    return files_below(folder, EXTENSIONS, above, left_out, listed)


def files_below(
    folder: Path,
    endings: tuple[str, ...],
    above: Sequence[Path] = (),
    left_out: Counter[str] | None = None,
    listed: Folders | None = None,
) -> list[str]:
    """Paths of the files with such endings in ``folder``, then of those in each of its sub-folders, sorted within each.

    endings: in small letters, with their dots; above: folders that ``folder`` lies in. Names that begin with a dot are
    left out. Links are followed. Raises UserError for a sub-folder that cannot be read, for a link to one above it,
    which has no end, and for one that is reached twice. listed: folders that count as reached; gets these.
    """
    counts: Counter[str] = Counter() if left_out is None else left_out
    reached = {} if listed is None else listed
    return _below(str(folder), endings, tuple(_identity(str(path)) for path in above), counts, reached)


def _identity(folder: str) -> tuple[int, int]:
    with _readable(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino


def _below(
    folder: str, endings: tuple[str, ...], above: tuple[tuple[int, int], ...], left_out: Counter[str], listed: Folders
) -> list[str]:
    here = _identity(folder)
    if here in above:
        raise UserError(f"{folder} is a link to a folder that it lies in; remove the link")
    other = listed.setdefault(here, folder)
    if other != folder and os.path.realpath(other) == os.path.realpath(folder):
        raise UserError(f"{other} and {folder} are one folder, whose files would count twice; remove the link")
    entries = _entries(folder)
    with _readable(folder):
        folders = [entry.path for entry in entries if entry.is_dir()]
    found = [e.path for e in entries if e.name.lower().endswith(endings) and not e.is_dir()]
    left_out.update(suffix for e in entries for suffix in OTHER if e.name.lower().endswith(suffix))
    for path in folders:
        found += _below(path, endings, (*above, here), left_out, listed)
    return found
