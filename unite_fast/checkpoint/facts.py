"""What a checkpoint says of itself beside its weights: of an export, and of the images that the run saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unite_fast.base import files


def facts(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors; empty for one that cannot be read."""
    try:
        with safe_open(files.regular(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def saved_images(path: Path) -> dict[str, Any]:
    """What a checkpoint folder keeps of the images that the run saw (``Source.identity``); empty in older ones."""
    try:
        found = json.loads(files.read_text(path / "state.json")).get("data")
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def class_names(located: Path) -> list[str]:
    """Of the labels 0, 1, ... of a checkpoint folder or an export; empty where it does not say."""
    found: Any = None
    if located.is_dir():
        found = saved_images(located).get("class names")
    elif located.suffix == ".safetensors":
        try:
            found = json.loads(facts(located).get("class_names", "[]"))
        except (ValueError, RecursionError):
            found = None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []
