"""How far a long command is: a bar on a terminal; elsewhere a line every half minute, none before."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between lines


class _Lines:
    """Takes what tqdm would draw over its last line, and writes it as lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def bar(items: Any = None, **options: Any) -> tqdm:
    """``tqdm(items, **options)`` on stderr."""
    if sys.stderr.isatty():
        return tqdm(items, **options)
    slow: dict[str, Any] = {"delay": SECONDS, "mininterval": SECONDS, "maxinterval": SECONDS}
    return tqdm(items, file=_Lines(), ncols=79, ascii=True, **slow, **options)
