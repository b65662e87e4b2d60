"""The analyses as pictures. The one door to matplotlib; without it there are numbers alone.

Each function takes {model: result}, in the order in which the models were named, and draws one PNG.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unite_fast.base import files

Results = Mapping[str, dict[str, Any]]
FEW = 30  # points of a curve that are shown as such
LEAST_EXPLAINED = -0.5  # where the picture of it ends; an untrained network's is far below


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.3):
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def alignment(path: Path, models: Results) -> None:
    """A row per time, a column per measure, whose panels have one range; over blocks, a line per model."""
    measures = {
        "debiased_registers": "CKA of registers, debiased",
        "debiased_mean": "CKA of samples, debiased",
        "cknna": "CKNNA",
        "cosine": "cosine",
    }
    times = next(iter(models.values()))["times"]
    figure, grid = _figure(len(measures), len(times), 3.2, 2.5)
    for row, t in zip(grid, times, strict=True):
        for axes, (measure, title) in zip(row, measures.items(), strict=True):
            for name, found in models.items():
                if measure in found:
                    values = found[measure][found["times"].index(t)]
                    axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
            axes.set_title(f"{title}, t = {t:g}", fontsize="small")
            axes.set_xlabel("block", fontsize="small")
    for column in zip(*grid, strict=True):
        low = min(axes.get_ylim()[0] for axes in column)
        for axes in column:
            axes.set_ylim(low, 1.02)
    _legend(grid[0][0])
    figure.suptitle("Tokenizing against denoising activations, by layer")
    _save(figure, path)


def trajectory(path: Path, models: Results) -> None:
    measures = {
        "cosine": ("cosine of predicted and clean latents", "cosine_mean", "; dotted: their mean as the prediction"),
        "explained": ("variance of the latents that the prediction explains", "", ""),
        "psnr": ("PSNR of the decoded prediction, dB", "psnr_clean", "; dotted: the clean latents"),
    }
    present = {m: words for m, words in measures.items() if any(m in found for found in models.values())}
    figure, grid = _figure(len(present))
    for axes, (measure, (title, level, words)) in zip(grid[0], present.items(), strict=True):
        for name, found in models.items():
            if measure not in found:
                continue
            (line,) = axes.plot(found["times"], found[measure], marker=".", label=name)
            if found.get(level) is not None:
                axes.axhline(found[level], color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_title(title, fontsize="small")
        axes.set_xlabel(f"t (0: noise, 1: clean{words})", fontsize="small")
        if measure == "explained":
            axes.set_ylim(max(axes.get_ylim()[0], LEAST_EXPLAINED), 1.02)
    _legend(grid[0][0])
    _save(figure, path)


def entropy(path: Path, models: Results) -> None:
    """MB by part and group at the middle bin width: trained filled, at the start outlined."""
    figure, grid = _figure(1, 1, 2.5 + 1.1 * len(models))
    axes, middle = grid[0][0], len(next(iter(models.values()))["widths"]) // 2
    keys = list(
        dict.fromkeys(
            (part, group) for found in models.values() for part, groups in found["trained"].items() for group in groups
        )
    )
    step = 0.8 / len(models)

    def height(found: dict[str, Any], state: str, key: tuple[str, str]) -> float:
        return found.get(state, {}).get(key[0], {}).get(key[1], {"mb": [0.0] * (middle + 1)})["mb"][middle]

    for i, (name, found) in enumerate(models.items()):
        places = [k + i * step for k in range(len(keys))]
        axes.bar(places, [height(found, "trained", key) for key in keys], step, label=name, color=f"C{i}")
        if "start" in found:
            heights = [height(found, "start", key) for key in keys]
            axes.bar(places, heights, step, fill=False, edgecolor="black", linewidth=0.7)
    axes.set_xticks(
        [k + 0.4 - step / 2 for k in range(len(keys))],
        ["\n".join(key) for key in keys],
        fontsize="x-small",
        rotation=45,
    )
    axes.set_ylabel("MB")
    axes.set_title("Entropy of weights; outlined: at the start", fontsize="small")
    _legend(axes)
    _save(figure, path)


def probes(path: Path, models: Results) -> None:
    bars = [(probe, kind) for probe in ("linear", "knn") for kind in ("flat", "mean")]
    figure, grid = _figure(1, 1, 4 + 0.6 * len(models))
    axes, step = grid[0][0], 0.8 / len(models)
    for i, (name, found) in enumerate(models.items()):
        axes.bar([k + i * step for k in range(4)], [100 * found[p][kind] for p, kind in bars], step, label=name)
    axes.axhline(100 * next(iter(models.values()))["chance"], color="black", linestyle=":", linewidth=1)
    labels = [f"{probe}, {kind}" for probe, kind in bars]
    axes.set_xticks([k + 0.4 - step / 2 for k in range(4)], labels, fontsize="small")
    axes.set_ylabel("right, % (dotted: chance)")
    axes.set_title("Classes read out of latents", fontsize="small")
    _legend(axes)
    _save(figure, path)


def dynamics(path: Path, models: Results) -> None:
    """A panel for each curve, those of scores behind those of losses."""
    each = list(dict.fromkeys(name for found in models.values() for name in found["curves"]))
    names = sorted(each, key=lambda name: any(name in found.get("scored", {}) for found in models.values()))
    many = len(names) > 9
    columns = min(5 if many else 3, len(names))
    figure, grid = _figure(columns, -(-len(names) // columns), *((3.0, 2.4) if many else ()))
    flat = list(grid.flat)
    for axes, curve in zip(flat, names, strict=False):
        for name, found in models.items():
            if curve in found["curves"]:
                points = found["curves"][curve]
                axes.plot(*points, label=name, linewidth=1, marker="." if len(points[0]) < FEW else "")
        scored = {found["scored"][curve]: None for found in models.values() if curve in found.get("scored", {})}
        axes.set_title(f"{curve}, of {' and '.join(scored)}" if scored else curve, fontsize="small")
        axes.set_xlabel("step", fontsize="small")
        values = [v for found in models.values() for v in found["curves"].get(curve, [[], []])[1]]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
    for axes in flat[len(names) :]:
        axes.set_axis_off()
    _legend(flat[0])
    _save(figure, path)


DRAWN: dict[str, Callable[[Path, Results], None]] = {
    "alignment": alignment, "trajectory": trajectory, "entropy": entropy, "probes": probes, "dynamics": dynamics,
}  # fmt: skip


def sweep(path: Path, rows: Mapping[str, Mapping[str, dict[str, Any]]], columns: list[str], across: int = 5) -> None:
    """A panel per column that has numbers: each run's seeds as dots, their mean as a line."""
    names, shown = list(rows), [column for column in columns if any(column in row for row in rows.values())]
    figure, grid = _figure(across, -(-len(shown) // across), 2.6, 0.8 + 0.22 * len(rows))
    panels = list(grid.flat)
    for k, (axes, column) in enumerate(zip(panels, shown, strict=False)):
        for place, name in enumerate(names):
            if cell := rows[name].get(column):
                values = list(cell["values"].values())
                axes.plot(values, [place] * len(values), "o", markersize=3, color="tab:blue")
                axes.plot([cell["mean"]], [place], "|", markersize=12, color="black")
        axes.set_title(column, fontsize="x-small")
        axes.set_yticks(range(len(names)), names if k % across == 0 else [""] * len(names), fontsize="x-small")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize="x-small")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", linewidth=0.3)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    _save(figure, path)
