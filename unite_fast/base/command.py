"""What every command does with errors: one line, and exit code 2 for a user's mistake, 1 for the rest."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from unite_fast.base import files, launcher, streams
from unite_fast.base.errors import CommonError, RunError, UserError, first_line

# Raised by a signal handler of torch, anywhere in the program.
DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? (\d+)[\d, ]*\) (is killed|exited)")
LOST_CONTACT = re.compile(r"Connection (reset|closed)|Timed out|timed out waiting|Broken pipe|Connection refused", re.I)
# The last is how oneDNN's refusal of memory for a product reads.
NO_MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|start new thread|create a (primitive|memory object)$", re.I
)
PROGRAMS = ("train", "sample")  # beside the package in a checkout, within it when it is installed
MENDS = {
    (errno.ENOSPC, errno.EDQUOT): "free some space, then start the same command again",
    (errno.EACCES, errno.EPERM, errno.EROFS): "give this user the right to it, or choose another place",
    (errno.EMFILE, errno.ENFILE): "raise the number of open files, ulimit -n",
    (errno.EIO, errno.ESTALE): "check that storage, then start the same command again",
    (errno.EBUSY,): "wait until that has ended, then start the same command again",
    (errno.ENAMETOOLONG,): "choose a shorter name",
}
MEND = "mend that, then start the same command again"


def called(verb: str) -> str:
    """How to call a command, in the way in which this process was called: from a checkout, or as installed."""
    if Path(sys.argv[0]).name.startswith("unite"):
        return f"unite-{verb}" if verb in PROGRAMS else f"unite {verb}"
    if verb in PROGRAMS and Path(f"{verb}.py").is_file():
        return f"python {verb}.py"
    return f"python -m unite_fast {verb}"


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main`` on the arguments. With ``--debug`` errors keep their traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    with streams.forgiving() as lost:
        code = _run(main, arguments, debug)
    return code or int(lost())


def _run(main: Callable[[list[str]], int | None], arguments: list[str], debug: bool) -> int:
    who = ""
    try:
        arguments = [_expanded(argument) for argument in arguments]
        rank = launcher.rank()
        who = f"rank {rank}: " if rank else ""
        return main(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        code, said = _explained(error)
        if said is None:
            raise
        if not who or not isinstance(error, CommonError):
            print(f"error: {who}{said}", file=sys.stderr)
        return code


def _explained(error: Exception) -> tuple[int, str | None]:
    """The exit code, and the one line that says what happened; no line for what is a fault of the program."""
    if isinstance(error, (UserError, RunError)):
        return 2 if isinstance(error, UserError) else 1, str(error)
    text = first_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return (
            1,
            f"out of memory ({text}); free some, or lower train.micro_batch, --batch or data.workers",
        )
    if died := DIED.search(str(error)):
        return 1, (
            f"data: a decoding worker (pid {died[1]}) died; out of memory? lower data.workers, or "
            "free memory and /dev/shm"
        )
    if isinstance(error, (RuntimeError, ConnectionError)) and LOST_CONTACT.search(str(error)):
        return 1, f"another rank is gone or stuck ({text}); see logs/ in the run folder"
    if isinstance(error, OSError):
        mend = next((mend for codes, mend in MENDS.items() if error.errno in codes), MEND)
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or text}; {mend}"
    return 1, None


def _expanded(argument: str) -> str:
    """``--out=~/samples``, which a shell passes as it stands, with the home folder in its place. Raises UserError."""
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--") and value.startswith("~"):
        return f"{name}={files.expanded(value, name)}"
    return argument
