"""The scores on the page: while training, of the commands, of the digits; a distance is named after its network."""

from __future__ import annotations

import functools
import html
from pathlib import Path
from typing import Any

from unite_fast.base import files
from unite_fast.evaluation import features
from unite_fast.evaluation.features import INCEPTION
from unite_fast.evaluation.results import while_training
from unite_fast.report.charts import curve
from unite_fast.report.parts import folded, readable

# What the published code and papers report; the other columns of a result are folded.
MAIN = (
    "fid", "sfid", "is", "kid", "precision", "recall", "rfid", "rsfid", "psnr", "l1", "lpips", "images", "cfg_scale",
    "evaluations",
)  # fmt: skip
WORDS = {"is": "IS", "kid": "KID", "psnr": "PSNR, dB", "l1": "L1", "lpips": "LPIPS", "evaluations": "NFE"}
OF_A_CLASSIFIER = {  # of ``evaluation.small``
    "psnr": "PSNR of held-out images, dB",
    "feature_distance": "their reconstructions' distance in its features",
    "recognised": "samples that it recognises",
    "kid": "samples' kernel distance x 1,000 in its features",
    "kid_lite0": "the same in EfficientNet-lite0's",
    "nearest": "samples' distance to the nearest training image",
}
MONITORED = (
    ("fid", "{} at the best guidance"),
    ("is", "Inception score there"),
    ("scale", "best guidance scale"),
    ("rfid", "r{} of held-out images"),
    ("psnr", "PSNR of held-out images, dB"),
    ("l1", "L1 of held-out images"),
    ("lpips", "LPIPS of held-out images"),
    ("flow", "flow loss of held-out samples at fixed times"),
    ("explained", "share of their latents' variance that predictions explain"),
    ("cosine", "cosine of their predicted and clean latents"),
)


def distance(protocol: Any) -> str:
    """What a Fréchet distance is called: FID and sFID with the published Inception weights alone."""
    extractor = protocol.get("extractor") if isinstance(protocol, dict) else None
    if not isinstance(extractor, dict):
        return "Fréchet distance"
    if extractor.get("sha256") == INCEPTION:
        return features.WORDS[features.distance(extractor.get("layers") or [""])]
    other = ", other weights" if "inception" in str(extractor.get("name", "")).lower() else ""
    return f"Fréchet distance ({extractor.get('name', 'another network')}{other})"


def heading(column: str, protocol: Any) -> str:
    if isinstance(protocol, dict) and "classifier" in protocol:
        return OF_A_CLASSIFIER.get(column, column)
    if column in features.WORDS:
        return ("r" if column.startswith("r") else "") + distance(protocol)
    return WORDS.get(column, column.replace("_", " "))


def protocol_of(content: dict[str, Any]) -> Any:
    rows = content.get("rows") or [{}]
    return content.get("protocol") or content.get("best") or rows[0].get("protocol")


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def rows_of(name: str, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, result) of a file that ``python -m unite_fast.evaluate`` wrote: one score, a table, or a search."""
    if isinstance(content.get("result"), dict) and not content.get("rows"):
        if isinstance(content.get("real"), dict):
            return [("the run", content["result"]), ("real images", content["real"])]
        return [(name, content["result"])]
    rows = []
    for row in content.get("rows", []):
        settings = row.get("settings", {})
        where = f"w {settings.get('cfg_scale')} in {settings.get('cfg_interval')}"
        label = row.get("name") or where + (" cfg_first" if settings.get("cfg_order") == "cfg_first" else "")
        rows.append((f"{name}: {label}", row["result"]))
    return rows


def table(names: list[str], rows: list[tuple[str, dict[str, Any]]], protocol: Any) -> str:
    header = "".join(f"<th>{html.escape(heading(name, protocol) if name else '')}</th>" for name in ["", *names])
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td>{number(r.get(n, ''))}</td>" for n in names) + "</tr>"
        for label, r in rows
    )
    return f"<div class='wide'><table><tr>{header}</tr>{body}</table></div>"


def score_table(name: str, content: dict[str, Any]) -> str:
    """A table of the rows of one result, its lesser columns folded; empty when it has none."""
    rows = rows_of(name, content)
    if not rows:
        return ""
    names = list(dict.fromkeys(key for _, result in rows for key in result if key != "resumed_at"))
    protocol = protocol_of(content)
    by_classifier = isinstance(protocol, dict) and "classifier" in protocol
    main = [name for name in OF_A_CLASSIFIER if name in names] if by_classifier else []
    main = main or [name for name in MAIN if name in names] or names
    rest = [name for name in names if name not in main]
    shown = table(main, rows, protocol)
    if rest:
        shown += f"<details><summary>more of {html.escape(name)}</summary>{table(rest, rows, None)}</details>"
    return shown


def guidance_plot(content: dict[str, Any]) -> str:
    """The distance over the guidance scale, of a search's rows that share the first one's interval and order."""
    rows = [row for row in content.get("rows", []) if "settings" in row]
    same = [r for r in rows if all(r["settings"][k] == rows[0]["settings"][k] for k in ("cfg_interval", "cfg_order"))]
    points = sorted((row["settings"]["cfg_scale"], row["result"].get("sfid", row["result"].get("fid"))) for row in same)
    if len(points) < 2:
        return ""
    title = f"{distance(protocol_of(content))} over the guidance scale"
    return f"<div class='grid'>{curve(title, [p[0] for p in points], [p[1] for p in points])}</div>"


def training_scores(folder: Path) -> str:
    """Curves over the run, the newest search, its protocol."""
    found = while_training(folder)
    if not found:
        return ""
    searches = [c for c in found if c.get("rows")]
    rows = [(c["step"], c["result"] | {"scale": c["best"]["cfg_scale"] if c.get("rows") else None}) for c in found]
    looked = next((distance(c["protocol"]) for c in found if "fid" in c["result"] or "rfid" in c["result"]), "")
    charts = []
    for name, title in MONITORED:
        points = [(step, row[name]) for step, row in rows if row.get(name) is not None]
        if points:
            charts.append(curve(title.format(looked), [p[0] for p in points], [p[1] for p in points]))
    parts = [f"<h2>Scores while training, over optimizer steps</h2><div class='grid'>{''.join(charts)}</div>"]
    if searches:
        newest = searches[-1]
        count = newest["rows"][0]["settings"]["count"]
        name = f"{newest['kind']} at step {newest['step']}, {count:,} images"
        parts += [score_table(name, newest), guidance_plot(newest)]
    return "".join(parts) + folded("protocol of scores while training", found[-1].get("protocol"))


def score(path: Path) -> str:
    """Of one file; empty when it holds none."""
    content = files.read_json(path)
    found = score_table(path.stem, content)
    if not found:
        return ""
    protocol = content.get("protocol") or content.get("best") or [row.get("protocol") for row in content["rows"]]
    return found + guidance_plot(content) + folded(f"protocol of {path.stem}", protocol)


def digits(folder: Path) -> str:
    """What ``evaluation.digits`` measured of a run of the demo."""
    figures = files.read_json(folder / "report" / "figures.json")
    if "samples" not in figures:
        return ""
    real = figures["real"]
    ideal = {"recognised": figures["classifier_accuracy"], "spread": 1.0, "distance": real["frechet_halves"]}
    rows = [("real digits", ideal | {"nearest": real["nearest"]})]
    rows += [(f"samples, guidance {w}", row | {"distance": row["frechet"]}) for w, row in figures["samples"].items()]
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{row['recognised']:.1%}</td><td>{row['spread']:.2f}</td>"
        f"<td>{row['distance']:.3f}</td><td>{row['nearest']:.2f}</td></tr>"
        for name, row in rows
    )
    names = ("", "recognised", "spread in a class", "Fréchet distance (pixels)", "to the nearest training digit")
    header = "".join(f"<th>{name}</th>" for name in names)
    psnr = f"<p>Held-out digits are reconstructed with {figures['held_out_pooled_psnr']:.1f} dB (pooled PSNR).</p>"
    return f"{psnr}<div class='wide'><table><tr>{header}</tr>{body}</table></div>"


def scores(folder: Path) -> str:
    """Tables of all results in RUN/scores, each protocol folded beneath, and those of the digits."""
    parts = [readable("report/figures.json", functools.partial(digits, folder))]
    for path in sorted((folder / "scores").glob("*.json")):
        parts.append(readable(path.name, functools.partial(score, path)))
    return "".join(parts) or "<p>No scores yet: python -m unite_fast evaluate heldout, or fid, writes them.</p>"


def held_out_psnr(folder: Path) -> str:
    """The newest one, in words; empty where none was measured."""
    newest = sorted((folder / "scores").glob("*.json"), key=lambda path: path.stat().st_mtime)
    for content in [*map(files.read_json, reversed(newest)), *reversed(while_training(folder))]:
        result = content.get("result")
        if isinstance(result, dict) and isinstance(result.get("psnr"), float):
            step = f" at step {content['step']:,}" if "step" in content else ""
            return f"{result['psnr']:.1f} dB{step}"
    pooled = files.read_json(folder / "report" / "figures.json").get("held_out_pooled_psnr")
    return f"{pooled:.1f} dB, pooled" if isinstance(pooled, float) else ""
