"""How a forked child of the fault tests and attacks ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def end_with(call: Callable[[], int], failed: int) -> NoReturn:
    """Exits with what ``call`` returns or stops with; ``failed``, after its traceback, for any other exception."""
    code = failed
    try:
        code = call()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
