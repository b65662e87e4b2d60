"""What every command of the project does with errors: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from unite_fast.base import files, launcher
from unite_fast.base.errors import CommonError, RunError, UserError, first_line

# Raised by a signal handler of torch, anywhere in the program.
DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? (\d+)[\d, ]*\) (is killed|exited)")
LOST_CONTACT = re.compile(r"Connection (reset|closed)|Timed out|timed out waiting|Broken pipe|Connection refused", re.I)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main`` on the arguments. With ``--debug`` errors keep their traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    rank, who = 0, ""
    try:
        arguments = [_expanded(argument) for argument in arguments]
        rank = launcher.rank()
        who = f"rank {rank}: " if rank else ""
        return main(arguments) or 0
    except UserError as error:
        if debug:
            raise
        if not rank or not isinstance(error, CommonError):
            print(f"error: {who}{error}", file=sys.stderr)
        return 2
    except RunError as error:
        if debug:
            raise
        print(f"error: {who}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if debug:
            raise
        if died := DIED.search(str(error)):
            print(f"error: {who}data: a decoding worker (pid {died[1]}) died; out of memory? lower data.workers, or "
                  "free memory and /dev/shm", file=sys.stderr)  # fmt: skip
            return 1
        if not LOST_CONTACT.search(str(error)):
            raise
        print(f"error: {who}another rank is gone or stuck ({first_line(error)}); see logs/ in the run folder",
              file=sys.stderr)  # fmt: skip
        return 1


def _expanded(argument: str) -> str:
    """``--out=~/samples``, which a shell passes as it stands, with the home folder in its place. Raises UserError."""
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--") and value.startswith("~"):
        return f"{name}={files.expanded(value, name)}"
    return argument
