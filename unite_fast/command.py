"""What every command of the project does with errors: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from unite_fast.config import UserError
from unite_fast.data import WorkerError
from unite_fast.runtime.distributed import rank_of_environment


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main`` on the arguments. With ``--debug`` errors keep their traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        return main(arguments) or 0
    except UserError as error:
        if debug:
            raise
        if rank_of_environment() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        if debug:
            raise
        print(f"error: rank {rank_of_environment()}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
