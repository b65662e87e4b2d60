"""What the commands of this package do with errors: one line, and exit code 2 for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable

from unite_fast.config import UserError
from unite_fast.data.source import WorkerError


def run(main: Callable[[list[str]], int]) -> int:
    """Runs ``main`` on the program's arguments and returns the exit code."""
    try:
        return main(sys.argv[1:])
    except (UserError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
