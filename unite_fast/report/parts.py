"""What every part of the page uses: files of a run that may be damaged, pictures, folded text."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unite_fast.base import files

BROAD = 700  # pixels of a picture's width, beyond which it is not shown beside another


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; others are left out."""
    try:
        return files.json_objects(files.read_text(path, "replace"))
    except OSError:
        return []


def readable(what: str, make: Callable[[], str]) -> str:
    """What ``make`` makes of files of the run, or that they cannot be read: one damaged file costs its part alone."""
    try:
        return make()
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return f"<p>{html.escape(what)} cannot be read.</p>"


def picture(path: Path, caption: str) -> str:
    """A PNG with what it shows. A broad one, in which words stand, takes the whole width of the page."""
    content, words = files.read(path), html.escape(caption)
    broad = " class='broad'" if int.from_bytes(content[16:20]) > BROAD else ""
    image = f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    return f"<figure{broad}><div>{image}</div><figcaption>{words}</figcaption></figure>"


def folded(name: str, content: Any) -> str:
    """Text, or JSON, behind a line that opens it."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
