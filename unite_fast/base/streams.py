"""What a program prints may be refused, by a closed pipe, a lost terminal or a full disk: that costs one warning.

with streams.forgiving() as refused: ...     # refused() tells afterwards whether something was lost
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody reads any more: a full disk may have room again
_unneeded = False


class _Forgiving:
    """A text stream that raises nothing while it is written to. What it cannot encode it escapes."""

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other
        self.lost = self.warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "utf-8"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._refused(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._refused(error)

    def finish(self) -> None:
        """Before the program ends: what is still held back would otherwise be refused once more, in a traceback."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._refused(error)
            self._discard()

    def _refused(self, error: Exception) -> None:
        code = getattr(error, "errno", None)
        if code in GONE:
            self._discard()
        if not self.warned and (_unneeded or code != errno.EPIPE):
            self.warned = True
            with contextlib.suppress(OSError, ValueError):
                why = getattr(error, "strerror", None) or error
                self._other.write(f"warning: {self._name} cannot be written ({why}); the work goes on\n")
        self.lost = self.lost or code != errno.EPIPE

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


def unneeded() -> None:
    """Says that what is printed from here on stands in files as well: to lose it is no failure."""
    global _unneeded
    _unneeded = True


@contextlib.contextmanager
def forgiving() -> Iterator[Callable[[], bool]]:
    """sys.stdout and sys.stderr so. Yields a function: whether output was lost that somebody would have read."""
    global _unneeded
    out, err, _unneeded = sys.stdout, sys.stderr, False
    streams = (_Forgiving(out, "standard output", err), _Forgiving(err, "standard error", out))
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield lambda: streams[0].lost and not _unneeded
    finally:
        for stream in streams:
            stream.finish()
        if sys.stdout is streams[0]:
            sys.stdout = out
        if sys.stderr is streams[1]:
            sys.stderr = err
