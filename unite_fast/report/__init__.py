"""One page about a run: what it is, curves, pictures over time, scores with their protocols. A single file, no network.

python -m unite_fast.report runs/digits        # writes runs/digits/report/index.html
"""

from __future__ import annotations

import argparse
import functools
import html
import math
from pathlib import Path

from unite_fast.base import command, files, outputs
from unite_fast.base.errors import UserError
from unite_fast.evaluation.atoms import viewer
from unite_fast.report import scores
from unite_fast.report.charts import curve
from unite_fast.report.parts import folded, picture, read_lines, readable
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
FLOW = (
    "The flow loss may rise while samples become better: it is measured on latents that hold more and more, and so "
    "become harder to predict. Dashed lines: where the run was started again. A scale marked log is logarithmic; "
    "values called beyond lie outside the chart."
)
MOST_PICTURES, MOST_CLASSES = 6, 12
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
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; } figure img { max-width: 100%; background: #fff; }
.pictures .broad, .pictures div:has(> .broad) { grid-column: 1 / -1; } .broad > div { overflow-x: auto; }
.broad img { max-width: max(100%, 860px); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 12px 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } @media (max-width: 480px) { dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; } body { padding: 12px; } }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; } svg .title { fill: var(--ink);
  font-size: 13px; } svg .axis { stroke: var(--line); } svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
svg polyline { fill: none; stroke: var(--blue);
  stroke-width: 1.6; } svg circle { fill: var(--blue); }
table { border-collapse: collapse; margin-top: 12px; } td, th { padding: 4px 14px 4px 0; text-align: right;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.wide { overflow-x: auto; }
pre { overflow-x: auto; background: color-mix(in srgb, var(--line) 35%, transparent); padding: 12px; font-size: 12px; }
"""


def spread(paths: list[Path], most: int = MOST_PICTURES) -> list[Path]:
    """At most ``most`` of ``paths``, evenly chosen, the last one always among them."""
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def analyses(folder: Path) -> str:
    """The pictures of RUN/analysis, what their numbers mean beneath; empty where there are none."""
    parts = []
    for path in sorted((folder / "analysis").glob("*.json")):
        content = files.read_json(path)
        shown = [p for p in (path.with_suffix(".png"), *sorted(path.parent.glob(f"{path.stem}_*.png"))) if p.is_file()]
        pictures = "".join(picture(p, p.stem.replace("_", " ")) for p in shown)
        parts.append(f"<div>{pictures}{folded(f'protocol of {path.stem}', content.get('protocol'))}</div>")
    return f"<h2>Analyses</h2><div class='pictures'>{''.join(parts)}</div>" if parts else ""


def structures(folder: Path) -> str:
    """Molecules and crystals of the newest score that shows some, to be turned by the mouse."""
    newest_first = sorted((folder / "scores").glob("atoms_*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        content = files.read_json(path)
        if isinstance(content, dict) and isinstance(content.get("shown"), dict):
            words = "<p class='about'>Drag to turn. Reconstructions, in orange, lie over the real ones.</p>"
            return f"<h2>Structures</h2>{words}{viewer.section(content['shown'])}"
    return ""


def curves(rows: list[dict[str, float]], restarts: list[float]) -> str:
    """Over optimizer steps: the loss, its terms, then the other CURVES; of rows of metrics.jsonl."""
    columns = dict.fromkeys(name for row in rows for name in row)
    terms = {name: f"{name} loss" for name in columns if name not in CURVES and name not in NOT_SHOWN}
    charts = []
    for name, title in {"total": CURVES["total"], **terms, **CURVES}.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if any(math.isfinite(value) and value for _, value in points):
            charts.append(curve(title, [step for step, _ in points], [value for _, value in points], restarts))
    return "".join(charts)


def duration(rows: list[dict[str, float]]) -> str:
    """Of training alone, from the speeds of the log lines."""
    seconds, seen = 0.0, 0.0
    for row in rows:
        rate = row.get("images_per_second", 0.0)
        if rate > 0 and math.isfinite(rate) and "images_seen" in row:
            seconds += max(0.0, row["images_seen"] - seen) / rate
            seen = row["images_seen"]
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if seconds else ""


def facts(folder: Path, rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What stands on top: what the run is, how far it came, how good it is, how to go on with it."""
    status, said = (files.read_json(folder / name) for name in ("status.json", "provenance.json"))
    steps = [row["step"] for row in rows]
    reached = f"{status.get('state', 'unknown')} at step {status.get('step', steps[-1] if steps else 0):,}"
    if rows and "images_seen" in rows[-1]:
        reached += f", {rows[-1]['images_seen']:,.0f} images seen"
    classes = [str(name) for name in said.get("class_names", [])]
    names = ", ".join(classes[:MOST_CLASSES]) + (", ..." if len(classes) > MOST_CLASSES else "")
    trained_on = f"{said['images']:,} samples" if "images" in said else ""
    if trained_on and classes:
        trained_on += f" in {len(classes)} classes: {names}"
    device = " · ".join(str(said[key]) for key in ("device", "torch") if key in said)
    device += f" · {said['world_size']} processes" if said.get("world_size", 1) != 1 else ""
    found = [
        ("state", reached),
        ("parameters", f"{said['parameters']:,}" if "parameters" in said else ""),
        ("data", trained_on),
        ("training time", duration(rows)),
        ("held-out PSNR", scores.held_out_psnr(folder)),
        ("device and torch", device),
        ("code", str(said.get("commit", ""))[:12] + (" with changes" if said.get("dirty") else "")),
        ("sample", f"{command.called('sample')} --checkpoint {folder} --out samples.png"),
    ]
    return [(name, text) for name, text in found if text]


def summary(folder: Path, rows: list[dict[str, float]]) -> str:
    lines = "".join(
        f"<dt>{name}</dt><dd>{'<code>' if name == 'sample' else ''}{html.escape(text)}"
        f"{'</code>' if name == 'sample' else ''}</dd>"
        for name, text in facts(folder, rows)
    )
    return f"<dl>{lines}</dl>"


def restarts(folder: Path) -> list[float]:
    """Steps at which the run was started again."""
    return [float(one["step"]) for one in read_lines(folder / "starts.jsonl") if isinstance(one.get("step"), int)]


def page(folder: Path) -> str:
    """The page of a run folder. Raises UserError when it is not one."""
    rows = read_metrics(folder / "metrics.jsonl")
    config = folder / "config.resolved.yaml"
    if not rows and not config.is_file():
        raise UserError(f"{folder} is not a run folder: it has neither metrics.jsonl nor config.resolved.yaml")
    grids = spread(sorted((folder / "samples").glob("step_*.png")))
    captions = {p: f"step {int(p.stem.removeprefix('step_')):,}" for p in grids}
    captions |= {p: p.stem.replace("_", " ") for p in sorted((folder / "report").glob("*.png"))}
    shown = [readable(p.name, functools.partial(picture, p, caption)) for p, caption in captions.items()]
    name = html.escape(folder.resolve().name)
    settings = config.read_text(errors="replace") if config.is_file() else ""
    charts = readable("metrics.jsonl", lambda: curves(rows, restarts(folder))) or "No metrics yet."
    sections = [
        f"<h1>{name}</h1>{readable('status.json', lambda: summary(folder, rows))}",
        f"<h2>Curves over optimizer steps</h2><div class='grid'>{charts}</div><p class='about'>{FLOW}</p>",
        f"<h2>Pictures</h2><div class='pictures'>{''.join(reversed(shown)) or 'No pictures yet.'}</div>",
        readable("analysis", lambda: analyses(folder)),
        readable("report/structures", lambda: structures(folder)),
        readable("scores/training", lambda: scores.training_scores(folder)),
        f"<h2>Scores</h2>{scores.scores(folder)}",
        f"<h2>Configuration</h2>{folded('config.resolved.yaml', settings)}",
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
