"""Processes that end with the one that started them, however it ends. Linux; elsewhere they stay as they are.

The system tells a process that its parent has ended only if it asked before. So this module notes which process that
is, at every fork and when it is first imported, and ``end_with_parent`` sees whether it has already gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
_parent, _own = os.getppid(), os.getpid()


def _forked() -> None:
    global _parent, _own
    _parent, _own = _own, os.getpid()


os.register_at_fork(after_in_child=_forked)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """This process gets the signal ``number`` when the thread that started it is gone; at once if it is by now."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != _parent:
            os.kill(_own, number)
