"""A key of the configuration: its default, its line of ``--help``, its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any, get_args, get_type_hints


def option(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    path: bool = False,
    of: str = "",
) -> Any:
    """A field: its default, its line of ``--help``, its bounds. A number without a lower bound is at least 0.

    path: it names a file or folder, in which ~ and $NAME are replaced.
    of: what a model must be made from (``MADE_FROM``) to read it.
    """
    if least is None and above is None:
        least = 0
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    metadata = {
        "meaning": meaning,
        "path": path,
        "of": of,
        "bounds": {words: bound for words, bound in bounds.items() if bound is not None},
    }
    return field(default=default, metadata=metadata)


def choices(section: type, key: str) -> tuple[str, ...]:
    """The words that a key of a section may have, in the order of its type; they stand nowhere else."""
    return get_args(get_type_hints(section)[key])
