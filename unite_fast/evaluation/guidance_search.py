"""The published search for the guidance scale, and the sweep over intervals and orders around its result.

``search`` and ``sweep`` ask a function for the FID of settings and know nothing else; ``Scored`` remembers what was
asked, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.evaluation.generation import Settings
from unite_fast.parallel.distributed import Ranks

STEP = 0.2
MOST = 7  # further scales after the first two
LOWS = (0.0, 0.05, 0.15, 0.2)
KEYS = {"identity", "settings", "result"}  # of a row


class Scored:
    """A cache of scores in a .jsonl file: one line per settings, with the ``identity`` of files."""

    def __init__(
        self,
        path: Path,
        identity: str,
        compute: Callable[[Settings], dict[str, Any]],
        ranks: Ranks,
        discard: bool = False,
        environment: dict[str, Any] | None = None,
    ) -> None:
        """All ranks must call it. Raises UserError for a file of another identity, unless it is to be discarded.

        environment: of the scores that are computed now; a row keeps that of its own.
        """
        self.path, self.identity, self.compute, self.ranks = path, identity, compute, ranks
        self.discard, self.environment = discard, environment
        self.rows: list[dict[str, Any]] = ranks.decide(self._read)

    def _read(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with files.refusals(str(self.path), "; choose another --out"):
            text = files.read_text(self.path, "replace") if os.path.lexists(self.path) else ""
        found = [row for row in files.json_objects(text) if row.keys() >= KEYS]
        if text and not found and not self.discard:
            raise UserError(f"{self.path} holds something else than scores; choose another --out")
        for row in found:
            if row["identity"] != self.identity:
                if self.discard:
                    continue
                raise UserError(
                    f"{self.path} holds scores of another checkpoint, network or reference; choose another --out"
                )
            rows.append(row)
        return rows

    def __call__(self, settings: Settings) -> float:
        return self.row(settings)["result"]["fid"]

    def row(self, settings: Settings) -> dict[str, Any]:
        """{"settings", "result", "environment"}, computed if it was not yet."""
        plain = settings.described()
        for row in self.rows:
            if row["settings"] == plain:
                return row
        row = {"identity": self.identity, "settings": plain, "result": self.compute(settings)}
        row["environment"] = self.environment
        self.rows.append(row)
        self.ranks.together(self._write)
        return row

    def _write(self) -> None:
        if self.ranks.is_main:
            files.write(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))


def search(fid: Callable[[Settings], float], start: Settings) -> Settings:
    """The best scale found from ``start``: it and the one 0.2 below, then on the better way while FID falls."""

    def at(scale: float) -> Settings:
        return dataclasses.replace(start, cfg_scale=round(scale, 6))

    here, below = at(start.cfg_scale), at(start.cfg_scale - STEP)
    down = below.cfg_scale >= 0 and fid(below) < fid(here)
    best, direction = (below, -STEP) if down else (here, STEP)
    for _ in range(MOST):
        candidate = at(best.cfg_scale + direction)
        if candidate.cfg_scale < 0 or fid(candidate) >= fid(best):
            break
        best = candidate
    return best


def grid(fid: Callable[[Settings], float], start: Settings, low: float, high: float, step: float) -> Settings:
    """The best of the scales from ``low`` to ``high`` by ``step``, all of them scored (the paper's appendix B)."""
    count = math.floor((high - low) / step + 1e-6) + 1
    return min((dataclasses.replace(start, cfg_scale=round(low + k * step, 6)) for k in range(count)), key=fid)


def sweep(fid: Callable[[Settings], float], best: Settings, orders: bool = True) -> Settings:
    """The best of ``best``, its other intervals (low to 1), and, with ``orders``, the order cfg_first."""
    options = [best]
    options += [dataclasses.replace(best, cfg_interval=(low, 1.0)) for low in LOWS]
    options += [dataclasses.replace(best, cfg_order="cfg_first")] if orders else []
    return min(options, key=fid)


def table(rows: list[dict[str, Any]], distance: str = "FID") -> str:
    """The scores as text, the best marked. distance: what "fid" is called."""
    lowest = min(row["result"]["fid"] for row in rows)
    lines = [f"{'w':>6}  {'interval':14}{'order':12}{distance:>10}{'IS':>9}"]
    for row in rows:
        s, r = row["settings"], row["result"]
        interval = f"[{s['cfg_interval'][0]:g}, {s['cfg_interval'][1]:g}]"
        mark = "  best" if r["fid"] == lowest else ""
        lines.append(f"{s['cfg_scale']:>6g}  {interval:14}{s['cfg_order']:12}{r['fid']:>10.3f}{r['is']:>9.3f}{mark}")
    return "\n".join(lines)
