"""How this program writes files: beside their place, then renamed, so that a name holds a whole file or none.

What lies beside is called ``.NAME.incomplete``; nothing reads it, and the next writer of NAME removes it. A symbolic
link at either name is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from unite_fast.base.errors import UserError

RATIO, MARGIN = 16, 1 << 26  # of what a file unfolds to: to its size, and in bytes beside that


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; the file is never whole in memory. Raises OSError."""
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_read(path: Path) -> io.BufferedReader:
    """A regular file, to be read. Raises OSError, also for a pipe or a device, of which a read might never end."""
    return open_regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path, "rb")


def regular(path: Path) -> Path:
    """``path``, for libraries that open files by name. Raises OSError as ``open_read``."""
    open_read(path).close()
    return path


def read(path: Path) -> bytes:
    """The whole of a file. Raises OSError as ``open_read``."""
    with open_read(path) as file:
        return file.read()


def open_regular(descriptor: int, path: Path, mode: str, **options: Any) -> Any:
    """The file object of a descriptor, opened with O_NONBLOCK. Raises OSError unless it is a regular file's."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, mode, **options)


def read_text(path: Path, errors: str = "strict") -> str:
    """As ``read``, of UTF-8. Raises OSError and ValueError."""
    return read(path).decode(errors=errors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where it holds none, or cannot be read."""
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of lines; a line that holds none, as one that was cut short, is left out."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [one for one in found if isinstance(one, dict)]


def room(path: Path) -> int:
    """The most bytes that a file of numbers or images, which compression hardly shortens, may unfold to."""
    return RATIO * path.stat().st_size + MARGIN


def check_zip(path: Path) -> None:
    """Raises ValueError for a zip, as an .npz is one, that unfolds to more than it has ``room`` for, and OSError."""
    with open_read(path) as file, zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > room(path):
        raise ValueError(f"it unfolds to {size} bytes; {room(path)} are allowed")


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def expanded(path: str, where: str) -> str:
    """A path with ~ and $NAME replaced, as a shell would have done. Raises UserError that begins with ``where``."""
    found = os.path.expandvars(os.path.expanduser(path))
    unknown = re.search(r"\$\{?([A-Za-z_]\w*)", found)
    if unknown:
        raise UserError(f"{where} {path}: the environment has no {unknown[1]}; export it, or write the path out")
    if found.startswith("~"):
        raise UserError(f"{where} {path}: no such home folder; write the path out, or ./{path}")
    return found


@contextlib.contextmanager
def refusals(where: str, mend: str = "") -> Iterator[None]:
    """What the system refuses within (an OSError) is raised as UserError: ``where``: why``mend``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}{mend}") from None


def aside(path: Path, writer: str = "") -> Path:
    """Where ``path`` is written first. writer: tells apart those that may write the same file at the same time."""
    return path.with_name(f".{path.name}.{writer}.incomplete" if writer else f".{path.name}.incomplete")


def create(path: Path) -> BinaryIO:
    """A new file in the place of what has its name; a link is not followed. Raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def open_log(path: Path) -> TextIO:
    """A file that is appended to; a link in its place is removed. Raises OSError, also for a pipe or a device."""
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    return open_regular(os.open(path, flags, 0o644), path, "a", encoding="utf-8", errors="backslashreplace")


def open_lock(path: Path) -> int:
    """A descriptor of a file that stays, empty at first; a link in its place is removed. Raises OSError."""
    if path.is_symlink():
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


@contextlib.contextmanager
def replacing(path: Path, writer: str = "", sync: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends without an error, and otherwise leaves no trace.

    sync: its content is on the disk before it has the name. Raises OSError; also where ``path`` is a device, a pipe or
    a socket, which nothing should take the place of, and where another process has begun to write the same file: the
    later one has it.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EEXIST, "it is a device, a pipe or a socket, which is not replaced")
    temporary, own = aside(path, writer), None
    try:
        with create(temporary) as file:
            own = os.fstat(file.fileno())
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if not _is(temporary, own):
            raise OSError(errno.EBUSY, "another process writes it at the same time", str(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if own is not None and _is(temporary, own):
                temporary.unlink()
        raise


def _is(path: Path, status: os.stat_result) -> bool:
    """Whether the file at ``path`` is the one of this status."""
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def remove_folder(path: Path) -> None:
    """Removes a folder, or a link or a file in its place; what the system refuses stays."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` when the block ends without an error. Raises OSError."""
    temporary = aside(path)
    remove_folder(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        remove_folder(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(path: Path, content: str | bytes, writer: str = "", sync: bool = False) -> None:
    """Writes a whole file, text as UTF-8. Raises OSError."""
    with replacing(path, writer, sync) as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def write_json(path: Path, value: Any, writer: str = "") -> None:
    """Writes plain values as indented JSON. Raises OSError."""
    write(path, json.dumps(value, indent=1), writer)
