"""python -m unite_fast.doctor"""

import sys

from unite_fast.base.command import run
from unite_fast.doctor import main

sys.exit(run(main))
