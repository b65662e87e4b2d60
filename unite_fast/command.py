"""What every command of the project does with errors: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from unite_fast.config import CommonError, RunError, UserError
from unite_fast.data import WorkerError
from unite_fast.runtime.distributed import rank_of_environment

LOST_CONTACT = re.compile(r"Connection (reset|closed)|Timed out|timed out waiting|Broken pipe|Connection refused", re.I)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main`` on the arguments. With ``--debug`` errors keep their traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    rank = rank_of_environment()
    who = f"rank {rank}: " if rank else ""
    try:
        return main(arguments) or 0
    except UserError as error:
        if debug:
            raise
        if not rank or not isinstance(error, CommonError):
            print(f"error: {who}{error}", file=sys.stderr)
        return 2
    except (RunError, WorkerError) as error:
        if debug:
            raise
        print(f"error: {who}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if debug or not LOST_CONTACT.search(str(error)):
            raise
        print(f"error: {who}another rank is gone or stuck ({first_line(error)}); see logs/ in the run folder",
              file=sys.stderr)  # fmt: skip
        return 1


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
