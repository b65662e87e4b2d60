"""One process at a time in a folder.

A POSIX lock on a file: the system frees it however the process ends, forked children do not inherit it, and it works on
network file systems that support locks. Where the file system has none, a file FILE.owner that only one process can
make stands in for it: its time is renewed while the owner lives, and one that is no longer renewed is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path

from unite_fast.base import files
from unite_fast.base.errors import UserError

PATIENCE = 10.0  # seconds for the processes of an earlier start, which torchrun or the scheduler is ending
BEAT, MISSED = 10.0, 4  # seconds between renewals of an owner's file, and how many may be missing
HELD = (errno.EAGAIN, errno.EACCES)
log = logging.getLogger("unite_fast.base.locks")


def _myself() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def traces(name: str) -> set[str]:
    """What a lock of a file ``name`` leaves in its folder while it is held."""
    return {name, f"{name}.owner"}


class Lock:
    """What ``take`` has taken, until ``release`` or the end of the process."""

    def __init__(self, descriptor: int, owner: Path | None = None) -> None:
        self.descriptor, self.owner = descriptor, owner
        self.released = threading.Event()
        if owner is not None:
            threading.Thread(target=self._beat, args=(owner,), daemon=True).start()

    def _beat(self, owner: Path) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(owner)

    def release(self) -> None:
        if self.released.is_set():
            return
        self.released.set()
        if self.owner is not None:
            self.owner.unlink(missing_ok=True)
        os.close(self.descriptor)


def take(path: Path, place: object, mend: str) -> Lock:
    """The lock of the file ``path``. Raises UserError: PLACE is in use by whoever holds it; MEND. Raises OSError."""
    descriptor = files.open_lock(path)
    try:
        owner = None if _locked(descriptor, place, mend) else _own(path, place, mend)
        with contextlib.suppress(OSError):  # a full disk: nobody can be told who holds it, but it is held
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{_myself()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor, owner)


def _locked(descriptor: int, place: object, mend: str) -> bool:
    """Whether the file is locked now; False where the file system has no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in HELD:
                return False
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if not _is_ending(holder) or time.monotonic() > deadline:
                raise _busy(place, holder, mend) from None
            time.sleep(0.2)


def _own(path: Path, place: object, mend: str) -> Path:
    owner = path.with_name(f"{path.name}.owner")
    log.warning("%s: this file system has no locks; %s tells two jobs apart instead", place, owner.name)
    while True:
        try:
            with owner.open("x") as file:
                file.write(_myself())
            return owner
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError):
            holder = files.read_text(owner, "replace")
            if not _is_ending(holder) and _is_renewed(owner, holder):
                raise _busy(place, holder, mend)
            owner.unlink()


def _is_renewed(owner: Path, holder: str) -> bool:
    """Whether its owner lives: one of this host does, since it is not gone; of another we wait for a renewal."""
    if holder.endswith(f" on {socket.gethostname()}"):
        return True
    before, deadline = owner.stat().st_mtime_ns, time.monotonic() + MISSED * BEAT
    while time.monotonic() < deadline:
        time.sleep(BEAT / 4)
        if owner.stat().st_mtime_ns != before:
            return True
    return False


def _busy(place: object, holder: str, mend: str) -> UserError:
    return UserError(f"{place} is in use by {holder or 'an unknown process'}; {mend}")


def _is_ending(holder: str) -> bool:
    """Whether the holder is a process of this host that is gone or about to be: its parent has ended."""
    found = re.match(r"pid (\d+) on (.*)", holder)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        text = Path(f"/proc/{found[1]}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] in "ZX"
