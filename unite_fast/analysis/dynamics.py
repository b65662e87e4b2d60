"""Curves of several runs over each other (arXiv 2603.22283, Figure 4), and what of them can be said in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MEASURED = ("total", "latent_std", "grad_norm")
LAST = 0.1  # of the rows: what "end" is the mean of
START = 0.2  # of the rows: latents that are still nearly equal have the lowest flow losses of all
DEFINITION = {
    "curves": "columns of metrics.jsonl over optimizer steps: losses as logged, means between log lines",
    "end": "mean over the last tenth of the rows",
    "lowest": "lowest value behind the first fifth of the rows, and the step of it",
    "change": "end divided by the mean over the tenth of the rows behind the first fifth: above 1 where it rose",
}


def curves(rows: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, list[list[float]]]:
    """{name: [steps, values]} of the finite values of those columns that are there."""
    found = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        if points:
            found[name] = [[float(v) for v in axis] for axis in zip(*points, strict=True)]
    return found


def summary(found: dict[str, list[list[float]]]) -> dict[str, Any]:
    """{name: {"end", "lowest", "at", "change"}} of ``curves``."""
    said = {}
    for name, (steps, values) in found.items():
        tenth, first = max(1, round(LAST * len(values))), int(START * len(values))
        end, early = (sum(part) / len(part) for part in (values[-tenth:], values[first : first + tenth]))
        lowest = min(values[first:])
        said[name] = {"end": end, "lowest": lowest, "at": steps[values.index(lowest, first)]}
        if early > 0:
            said[name]["change"] = end / early
    return said


def of_run(rows: Sequence[dict[str, float]], terms: Sequence[str]) -> dict[str, Any]:
    """Of a run's rows; terms: the names of its loss terms. Empty without rows."""
    found = curves(rows, [*terms, *MEASURED])
    return {"curves": found, "summary": summary(found)} if found else {}
