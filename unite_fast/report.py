"""One page about a run: curves, pictures over time, speed, scores with their protocols. A single file, no network.

python -m unite_fast.report runs/digits        # writes runs/digits/report/index.html
"""

from __future__ import annotations

import argparse
import base64
import functools
import html
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unite_fast.base import command, files, outputs
from unite_fast.base.errors import UserError
from unite_fast.evaluation.atoms import viewer
from unite_fast.run.stats import read_metrics

# Columns of a row. One that is not here is a term of the loss.
CURVES = {
    "total": "loss",
    "latent_std": "standard deviation of the latents",
    "discriminator": "the discriminator's loss",
    "d_real": "its mean logit of real images",
    "d_fake": "its mean logit of reconstructions",
    "d_accuracy": "share of images that it judges rightly",
    "adaptive_weight": "adaptive weight of the generator loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "mfu": "model FLOP utilisation",
}
NOT_SHOWN = (
    "step", "images_seen", "skipped", "tflops", "seconds_left", "data_wait", "checkpoint_stall", "memory_gib",
)  # fmt: skip
MONITORED = (
    ("fid", "FID at the best guidance"),
    ("is", "Inception score there"),
    ("scale", "best guidance scale"),
    ("rfid", "rFID of held-out images"),
    ("psnr", "PSNR of held-out images, dB"),
    ("lpips", "LPIPS of held-out images"),
    ("flow", "flow loss of held-out samples at fixed times"),
    ("cosine", "cosine of their predicted and clean latents"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 52, 10, 28, 24
MOST_POINTS, MOST_PICTURES = 400, 6
HEAD = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width'><meta name='generator' content='unite-fast'>"
)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --line: #d8dde3; --paper: #fff; --blue: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --soft: #9aa5b0; --line: #343b43; --paper: #14181c; --blue: #6db3ec; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1160px; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 36px 0 12px; border-bottom: 1px solid var(--line); }
p.about, figcaption { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px; }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; background: #fff; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; } svg .title { fill: var(--ink);
  font-size: 13px; } svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke: var(--blue);
  stroke-width: 1.6; } svg circle { fill: var(--blue); }
table { border-collapse: collapse; margin-top: 12px; } td, th { padding: 4px 14px 4px 0; text-align: right;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.wide { overflow-x: auto; }
pre { overflow-x: auto; background: color-mix(in srgb, var(--line) 35%, transparent); padding: 12px; font-size: 12px; }
"""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values that span [low, high]."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def curve(title: str, xs: list[float], ys: list[float]) -> str:
    """A line chart as SVG; values that are not finite are left out and counted."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    left_out = len(xs) - len(pairs)
    stride = max(1, math.ceil(len(pairs) / MOST_POINTS))
    pairs = pairs[::stride] + (pairs[-1:] if (len(pairs) - 1) % stride else [])
    name = html.escape(title) + (f" ({left_out} not finite)" if left_out else "")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><text class="title" x="0" y="14">{name}</text>'
    if not pairs:
        return head + "</svg>"
    lows, highs = (tuple(f(axis) for axis in zip(*pairs, strict=True)) for f in (min, max))
    flat = highs[1] == lows[1]
    low_y, high_y = (
        (lows[1] - (abs(lows[1]) or 1) / 2, highs[1] + (abs(highs[1]) or 1) / 2) if flat else (lows[1], highs[1])
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - lows[0]) / ((highs[0] - lows[0]) or 1)
        up = (y - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [head]
    for value in ticks(low_y, high_y):
        y = place(lows[0], value)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(lows[0], highs[0]):
        parts.append(f'<text x="{place(value, low_y)[0]:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:g}</text>')
    points = [place(x, y) for x, y in pairs]
    parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    parts.append(f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5"/></svg>')
    return "".join(parts)


def picture(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    words = html.escape(caption)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{content}"><figcaption>{words}</figcaption></figure>'


def spread(paths: list[Path], most: int = MOST_PICTURES) -> list[Path]:
    """At most ``most`` of ``paths``, evenly chosen, the last one always among them."""
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def readable(what: str, make: Callable[[], str]) -> str:
    """What ``make`` makes of files of the run, or that they cannot be read: one damaged file costs its part alone."""
    try:
        return make()
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return f"<p>{html.escape(what)} cannot be read.</p>"


def number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else html.escape(str(value))


def rows_of(name: str, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, result) of a file that ``python -m unite_fast.evaluate`` wrote: one score, a table, or a search."""
    if isinstance(content.get("result"), dict) and not content.get("rows"):
        return [(name, content["result"])]
    rows = []
    for row in content.get("rows", []):
        settings = row.get("settings", {})
        where = f"w {settings.get('cfg_scale')} in {settings.get('cfg_interval')}"
        label = row.get("name") or where + (" cfg_first" if settings.get("cfg_order") == "cfg_first" else "")
        rows.append((f"{name}: {label}", row["result"]))
    return rows


def guidance_plot(content: dict[str, Any]) -> str:
    """FID over the guidance scale, of a search's rows that share the first one's interval and order; else nothing."""
    rows = [row for row in content.get("rows", []) if "settings" in row]
    same = [r for r in rows if all(r["settings"][k] == rows[0]["settings"][k] for k in ("cfg_interval", "cfg_order"))]
    points = sorted((row["settings"]["cfg_scale"], row["result"]["fid"]) for row in same)
    if len(points) < 2:
        return ""
    plot = curve("FID over the guidance scale", [p[0] for p in points], [p[1] for p in points])
    return f"<div class='grid'>{plot}</div>"


def training_scores(folder: Path) -> str:
    """What ``monitor`` wrote into RUN/scores/training: curves over the run, the newest search, its protocol."""
    files = sorted((folder / "scores" / "training").glob("step_*.json"))
    found = [content for path in files if isinstance((content := read_json(path)).get("result"), dict)]
    if not found:
        return ""
    searches = [c for c in found if c.get("rows")]
    rows = [(c["step"], c["result"] | {"scale": c["best"]["cfg_scale"] if c.get("rows") else None}) for c in found]
    charts = []
    for name, title in MONITORED:
        points = [(step, row[name]) for step, row in rows if row.get(name) is not None]
        if points:
            charts.append(curve(title, [p[0] for p in points], [p[1] for p in points]))
    parts = [f"<h2>Scores while training, over optimizer steps</h2><div class='grid'>{''.join(charts)}</div>"]
    if searches:
        newest = searches[-1]
        count = newest["rows"][0]["settings"]["count"]
        name = f"{newest['kind']} at step {newest['step']}, {count:,} images"
        parts += [score_table(name, newest), guidance_plot(newest)]
    return "".join(parts) + folded("scores while training", found[-1].get("protocol"))


def score_table(name: str, content: dict[str, Any]) -> str:
    """A table of the rows of one result; empty when it has none."""
    rows = rows_of(name, content)
    if not rows:
        return ""
    names = list(dict.fromkeys(key for _, result in rows for key in result if key != "resumed_at"))
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td>{number(r.get(n, ''))}</td>" for n in names) + "</tr>"
        for label, r in rows
    )
    return f"<div class='wide'><table><tr>{header}</tr>{body}</table></div>"


def folded(name: str, protocol: Any) -> str:
    text = html.escape(json.dumps(protocol, indent=1))
    return f"<details><summary>protocol of {html.escape(name)}</summary><pre>{text}</pre></details>"


def score(path: Path) -> str:
    """Of one file; empty when it holds none."""
    content = read_json(path)
    table = score_table(path.stem, content)
    if not table:
        return ""
    protocol = content.get("protocol") or content.get("best") or [row.get("protocol") for row in content["rows"]]
    return table + guidance_plot(content) + folded(path.stem, protocol)


def scores(folder: Path) -> str:
    """Tables of all results in RUN/scores, each protocol folded beneath."""
    parts = []
    for path in sorted((folder / "scores").glob("*.json")):
        parts.append(readable(path.name, functools.partial(score, path)))
    return "".join(parts) or "<p>No scores yet: python -m unite_fast.evaluate writes them.</p>"


def analyses(folder: Path) -> str:
    """The pictures of RUN/analysis, what their numbers mean beneath; empty where there are none."""
    parts = []
    for path in sorted((folder / "analysis").glob("*.json")):
        content = read_json(path)
        shown = [p for p in (path.with_suffix(".png"), *sorted(path.parent.glob(f"{path.stem}_*.png"))) if p.is_file()]
        pictures = "".join(picture(p, p.stem.replace("_", " ")) for p in shown)
        parts.append(f"{pictures}{folded(path.stem, content.get('protocol'))}")
    return (
        f"<h2>Analyses</h2><div class='grid'>{''.join(f'<div>{part}</div>' for part in parts)}</div>" if parts else ""
    )


def structures(folder: Path) -> str:
    """Molecules and crystals of the newest score that shows some, to be turned by the mouse."""
    newest_first = sorted((folder / "scores").glob("atoms_*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("shown"), dict):
            words = "<p class='about'>Drag to turn. Reconstructions, in orange, lie over the real ones.</p>"
            return f"<h2>Structures</h2>{words}{viewer.section(content['shown'])}"
    return ""


def curves(rows: list[dict[str, float]]) -> str:
    """Over optimizer steps: the loss, its terms, then the other CURVES; of rows of metrics.jsonl."""
    columns = dict.fromkeys(name for row in rows for name in row)
    terms = {name: f"{name} loss" for name in columns if name not in CURVES and name not in NOT_SHOWN}
    charts = []
    for name, title in {"total": CURVES["total"], **terms, **CURVES}.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if any(math.isfinite(value) and value for _, value in points):
            charts.append(curve(title, [step for step, _ in points], [value for _, value in points]))
    return "".join(charts)


def page(folder: Path) -> str:
    """The page of a run folder. Raises UserError when it is not one."""
    rows = read_metrics(folder / "metrics.jsonl")
    config = folder / "config.resolved.yaml"
    if not rows and not config.is_file():
        raise UserError(f"{folder} is not a run folder: it has neither metrics.jsonl nor config.resolved.yaml")
    status, provenance = (read_json(folder / name) for name in ("status.json", "provenance.json"))
    steps = [row["step"] for row in rows]
    grids = spread(sorted((folder / "samples").glob("step_*.png")))
    captions = {
        p: f"step {p.stem.removeprefix('step_').lstrip('0') or '0'}: real, reconstructed, EMA, raw" for p in grids
    }
    captions |= {p: p.stem.replace("_", " ") for p in sorted((folder / "report").glob("*.png"))}
    shown = [readable(p.name, functools.partial(picture, p, caption)) for p, caption in captions.items()]
    about = f"{status.get('state', 'unknown')} at step {status.get('step', steps[-1] if steps else 0)}"
    if rows and "images_seen" in rows[-1]:
        about += f", {rows[-1]['images_seen']:,.0f} images seen"
    said = {k: provenance[k] for k in ("commit", "torch", "device", "world_size", "started") if k in provenance}
    about += "".join(f" · {k} {v}" for k, v in said.items())
    name = html.escape(folder.resolve().name)
    settings = html.escape(config.read_text(errors="replace")) if config.is_file() else ""
    charts = readable("metrics.jsonl", lambda: curves(rows)) or "No metrics yet."
    sections = [
        f"<h1>{name}</h1><p class='about'>{html.escape(about)}</p>",
        f"<h2>Curves over optimizer steps</h2><div class='grid'>{charts}</div>",
        f"<h2>Pictures</h2><div class='grid'>{''.join(shown) or 'No pictures yet.'}</div>",
        readable("analysis", lambda: analyses(folder)),
        readable("report/structures", lambda: structures(folder)),
        readable("scores/training", lambda: training_scores(folder)),
        f"<h2>Scores</h2>{scores(folder)}",
        f"<h2>Configuration</h2><details><summary>config.resolved.yaml</summary><pre>{settings}</pre></details>",
    ]
    body = "".join(sections)
    return f"{HEAD}<title>{name}</title><style>{STYLE}</style></head><body>{body}</body></html>"


def is_page(path: Path) -> bool:
    """Whether a file is such a page."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD.encode()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m unite_fast.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report/index.html")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run / "report" / "index.html"
    sources = [arguments.run / name for name in ("checkpoints", "logs", "samples", "scores")]
    outputs.check_file(out, "--out", sources, is_page)
    text = page(arguments.run)
    with files.refusals(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, text)
    print(f"the run on one page: {out} ({len(text) / 1024:.0f} KiB); open it in a browser")


if __name__ == "__main__":
    sys.exit(command.run(main))
