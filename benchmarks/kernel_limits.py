"""How machine code is held to what it has reached: kernel_limits.json, by minor version of Triton and by kernel.

    {"3.6": {"swiglu:forward@768": {"programs": 10, "barriers": 2, ...}}}

An unknown version is held to the worst of the others. check_kernels.py compiles, and records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What is held, and whether more of it is better.
HELD = {"programs": True, "barriers": False, "shuffles": False, "wide": True, "in_flight": True}


def limits_of(recorded: dict[str, dict[str, dict[str, float]]], version: str) -> dict[str, dict[str, float]]:
    """By kernel, what must be reached with ``version``: its own record, or else the worst of all."""
    if version in recorded or not recorded:
        return recorded.get(version, {})
    kernels = {name for limits in recorded.values() for name in limits}
    found: dict[str, dict[str, float]] = {}
    for name in kernels:
        known = [limits[name] for limits in recorded.values() if name in limits]
        found[name] = worst(known)
    return found


def worst(known: list[dict[str, float]]) -> dict[str, float]:
    """Of several versions' records, or of several kernels that have one name."""
    return {k: (min if more else max)(limit[k] for limit in known) for k, more in HELD.items()}


def shortcomings(row: dict[str, Any], limit: dict[str, float] | None, fitted: int) -> list[str]:
    """What of a kernel is worse than its limit, each in words. fitted: the table's programs; 0 if it says nothing."""
    found = [f"{row[k]} {k}" for k in ("spills", "stack") if row[k]]
    if fitted and row["programs"] < fitted:
        found.append(f"{row['programs']} programs per multiprocessor, {fitted} in the table of launches")
    for key, more in HELD.items() if limit else ():
        if (row[key] < limit[key]) if more else (row[key] > limit[key]):  # type: ignore[index]
            found.append(f"{key} {row[key]}, was {limit[key]}")  # type: ignore[index]
    return found


def remarks(row: dict[str, Any], fitted: int) -> list[str]:
    """What the table of launches leaves unused."""
    return [f"table {fitted} programs, fits {row['programs']}"] if fitted and row["programs"] > fitted else []


def held(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in HELD}


def write(path: Path, recorded: dict[str, dict[str, dict[str, float]]]) -> None:
    """One kernel per line."""
    parts = []
    for version, limits in sorted(recorded.items()):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(limit)}" for name, limit in sorted(limits.items()))
        parts.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
