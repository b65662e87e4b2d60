"""python -m unite_fast.evaluate"""

import sys

from unite_fast.base.command import run
from unite_fast.evaluate import main

sys.exit(run(main))
