"""Plots of benchmark rows as PNG files. Needs matplotlib (the dev extra)."""

from __future__ import annotations

import re
from pathlib import Path

from harness import RESULTS

PARTS = ("tokenize", "flow", "decode", "perceptual", "update")
FOLDER = RESULTS / "roofline"


def _axes(width: float, height: float):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure, name: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png"
    figure.savefig(path, dpi=110)
    return path


def time_by_part(rows: list[dict], config: str) -> Path:
    """Milliseconds per image of each scenario of roofline.py, stacked by part."""
    figure, axes = _axes(9, 0.55 * len(rows) + 1.6)
    names = [f"{r['scenario']}\n{r['images_per_second']:.0f} images/s, MFU {r['mfu']:.0%}" for r in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        values = [r["ms_per_image"][part] for r in rows]
        axes.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per image on one GPU")
    steps = rows[0]["flow_steps"]
    axes.set_title(f"PREDICTION from stated H200 figures, not measured: {config}, N = {steps}", fontsize="medium")
    axes.legend(loc="lower right", fontsize="small")
    return _save(figure, f"{config}_n{steps}_prediction")


def step_ladder(rows: list[dict], device: str) -> Path:
    """Each rung's speed over eager, of every model and number of flow steps in ``rows``."""
    rows = [r for r in rows if r["faster_than_eager"]]  # others were timed alone
    groups = sorted({(r["model"], r["flow_steps"]) for r in rows})
    rungs = list(dict.fromkeys(r["rung"] for r in rows))
    figure, axes = _axes(1.6 + 1.6 * len(groups), 4)
    width = 0.8 / len(rungs)
    for k, rung in enumerate(rungs):
        found = {(r["model"], r["flow_steps"]): r["faster_than_eager"]["median"] for r in rows if r["rung"] == rung}
        heights = [found.get(g, 0.0) for g in groups]
        axes.bar([i + k * width for i in range(len(groups))], heights, width, label=rung)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(groups))], [f"{m}, N = {n}" for m, n in groups])
    axes.set_ylabel("times as fast as eager")
    axes.set_title(f"optimizer step on {device}")
    axes.legend(fontsize="small", loc="lower right")
    return _save(figure, f"ladder_{device}")
