"""Every row of the matrix has a test."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_row_has_a_test():
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    found = {row for text in texts for row in re.findall(r'^@fault\("(F\d\d)"', text, re.M)}
    assert sorted(found) == [f"F{i:02d}" for i in range(1, 47)]
