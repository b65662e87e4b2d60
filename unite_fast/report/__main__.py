from __future__ import annotations

import sys

from unite_fast.base import command
from unite_fast.report import main

if __name__ == "__main__":
    sys.exit(command.run(main))
