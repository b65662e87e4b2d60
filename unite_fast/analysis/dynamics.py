"""Curves of several runs over each other, and what of them can be said in numbers: losses, and beside them the scores
that a run took while it trained (arXiv 2603.22283, Figure 4: the flow loss rises while FID falls).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MEASURED = ("total", "latent_std", "grad_norm")
LAST = 0.1  # of the rows: what "end" is the mean of
START = 0.2  # of the rows: latents that are still nearly equal have the lowest flow losses of all
KINDS = {"sweep": "search"}  # of scores that make one curve: a sweep stands in the place of a search
# Of a score, what says how it was computed.
WORK = ("images", "evaluations", "passes", "gflop_per_image", "images_per_second", "tflops", "resumed_at")
DEFINITION = {
    "curves": "over optimizer steps: columns of metrics.jsonl, losses as logged, means between log lines; and by KIND "
    "and measure the scores while training (scores/training/step_*_KIND.json), of a sweep those of a search",
    "scored": "whose weights a curve of scores is of",
    "end": "mean over the last tenth of the points",
    "lowest": "lowest value behind the first fifth of the points, and the step of it",
    "change": "end divided by the mean over the tenth of the points behind the first fifth: above 1 where it rose",
}

Curves = dict[str, list[list[float]]]  # {name: [steps, values]}


def is_number(value: Any) -> bool:
    """Whether a value from a file can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Curves:
    """Of the finite values of those columns that are there."""
    found = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and is_number(row[name])]
        if points:
            found[name] = [[float(v) for v in axis] for axis in zip(*points, strict=True)]
    return found


def of_scores(scores: Sequence[Mapping[str, Any]]) -> tuple[Curves, dict[str, str]]:
    """Curves called "KIND measure", and whose weights each is of. scores: contents of files that may hold anything."""
    rows: dict[int, dict[str, Any]] = {}
    weights: dict[str, dict[str, None]] = {}
    for content in scores:
        kind, step, result, protocol = (content.get(key) for key in ("kind", "step", "result", "protocol"))
        if not isinstance(kind, str) or type(step) is not int or not isinstance(result, dict):
            continue
        of = protocol.get("checkpoint") if isinstance(protocol, dict) else None
        average = str(of.get("weights", "")) if isinstance(of, dict) else ""
        for measure, value in result.items():
            if measure not in WORK and is_number(value):
                name = f"{KINDS.get(kind, kind)} {measure}"
                rows.setdefault(step, {"step": step})[name] = value
                weights.setdefault(name, {})[average] = None
    found = curves([rows[step] for step in sorted(rows)], list(weights))
    return found, {name: ", ".join(of) for name, of in weights.items()}


def summary(found: Curves) -> dict[str, Any]:
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


def of_run(
    rows: Sequence[dict[str, float]], terms: Sequence[str], scores: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Of a run's rows; terms: the names of its loss terms; scores: see ``of_scores``. Empty without any."""
    found = curves(rows, [*terms, *MEASURED])
    beside, scored = of_scores(scores)
    found |= beside
    return {"curves": found, "summary": summary(found)} | ({"scored": scored} if scored else {}) if found else {}
