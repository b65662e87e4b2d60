"""Each rank's own log file, with the stacks of a rank that hangs or crashes, and no secrets."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import re
import sys
import time
from pathlib import Path
from typing import TextIO

from unite_fast.base import files

SECRET = re.compile(r"(?i)\b([\w-]*(?:key|token|secret|password)[\w-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+")


def redact(text: str) -> str:
    """``text`` with the values of everything that is called a key, token, secret or password replaced."""
    return SECRET.sub(r"\1[redacted]", text)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _File(logging.StreamHandler[TextIO]):
    """A log file whose refusals cost one warning, and no line of the program."""

    refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.refused:
            print(f"warning: the log {self.stream.name} cannot be written; training goes on", file=sys.stderr)
        self.refused = True


class RankLog:
    """logs/rank_NNN.log of a run folder. The package's log goes there, its warnings also to stderr."""

    def __init__(self, folder: Path, rank: int, hang_seconds: float) -> None:
        """hang_seconds: after this long without ``alive`` the stacks of all threads are written, once."""
        self.seconds, self.armed_at = hang_seconds, float("-inf")
        self.file: TextIO | None = None
        refusal = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = folder / f"rank_{rank:03d}.log"
            self.file = files.open_log(name)
        except OSError as error:
            refusal = f"{folder} cannot be written ({error.strerror or error}); training goes on without its logs"
        to_file = _File(self.file) if self.file is not None else logging.NullHandler()
        to_file.setFormatter(_Format(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(logging.WARNING)
        to_terminal.setFormatter(_Format("warning: %(message)s" if not rank else f"warning: rank {rank}: %(message)s"))
        self.handlers = (to_file, to_terminal)
        self.logger = logging.getLogger("unite_fast")
        self.logger.setLevel(logging.INFO)
        for handler in self.handlers:
            self.logger.addHandler(handler)
        if refusal:
            self.logger.warning(refusal)
        if self.file is not None:
            faulthandler.enable(self.file)

    def alive(self) -> None:
        """Puts off the dump of stacks. Cheap: the timer is renewed ten times per ``hang_seconds`` at most."""
        now = time.monotonic()
        if self.file is not None and now - self.armed_at > self.seconds / 10:
            faulthandler.dump_traceback_later(self.seconds, file=self.file)
            self.armed_at = now

    def close(self) -> None:
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
        for handler in self.handlers:
            self.logger.removeHandler(handler)
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk still refuses has been said
                self.file.close()
