"""The rows of the matrix are those of the tests, numbered without a gap, and as many as README says."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

TEXTS = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
ROWS = sorted({row for text in TEXTS for row in re.findall(r'^@fault\("(F\d\d)"', text, re.M)})


def test_every_row_has_a_test():
    assert [f"F{i:02d}" for i in range(1, len(ROWS) + 1)] == ROWS
    assert re.findall(r"starves runs in (\d+) ways", (ROOT / "README.md").read_text()) == [str(len(ROWS))]
