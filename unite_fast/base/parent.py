"""Processes that end with the one that started them, however it ends. Linux; elsewhere they stay as they are."""

from __future__ import annotations

import contextlib
import ctypes
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """This process gets the signal ``number`` when the thread that started it is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
