"""What each command computes, prints and keeps."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unite_fast import checkpoint, data, sampling
from unite_fast.base import files, progress, provenance
from unite_fast.base.errors import UserError, idle
from unite_fast.checkpoint import guide
from unite_fast.evaluate.context import Context, short
from unite_fast.evaluation import guidance_search, reconstruction, statistics
from unite_fast.evaluation.features import WORDS, Extractor
from unite_fast.evaluation.fid import Statistics
from unite_fast.evaluation.generation import Options, Settings, score
from unite_fast.evaluation.results import compare, timeless
from unite_fast.modality import lpips

MOST_SCALES = 100  # of a grid
TABLE = (
    ("Heun 50, balanced", {"solver": "heun", "steps": 50, "labels": "equal"}),
    ("dopri5, balanced", {"solver": "dopri5", "steps": 50, "labels": "equal"}),
    ("dopri5, random", {"solver": "dopri5", "steps": 50, "labels": "random"}),
    ("exp3 32, balanced (ours)", {"solver": "exp3", "steps": 32, "labels": "equal"}),
)
OF_RECONSTRUCTIONS = ("heldout", "rfid")


class Scorer:
    """Opens the network and the reference once; ``score`` then serves any settings."""

    def __init__(self, context: Context) -> None:
        self.context, a = context, context.arguments
        self.extractor: Extractor = statistics.open_extractor(
            a, context.config.data, context.config.model, context.ranks.device
        )
        self.reference: Statistics
        self.reference, self.about = statistics.read(a.reference)
        statistics.check_extractor(self.about, len(self.reference.mean), self.extractor, a.reference)
        if a.pairs and self.reference.features is None:
            raise UserError(f"--pairs needs features in {a.reference}; make it with --features")
        self.replays = sampling.open_replays(a.graph, context.ranks.device)
        self.compiled = False
        names = checkpoint.class_names(context.located)
        self.guide = guide.asked(a, context.model, names, context.ranks, context.settings().kernels)

    def weights(self) -> dict[str, Any]:
        """Of the model, and of what guides it."""
        return self.context.weights() | ({} if self.guide is None else {"autoguidance": self.guide.identity})

    def protocol(self, settings: Settings) -> dict[str, Any]:
        """What the score depends on. Equal protocols and an equal commit give equal scores."""
        return {
            "checkpoint": self.weights(),
            "extractor": self.extractor.identity(),
            "reference": self.about,
            "settings": settings.described(),
            "seeds": f"0-{settings.count - 1}",
            "inception_score_parts": 10,
            "kid_subset": self.context.arguments.kid_subset if self.context.arguments.pairs else None,
            "environment": provenance.of(self.context.ranks.device, self.context.ranks.world_size),
        }

    def score(self, settings: Settings, path: Path) -> dict[str, Any]:
        """``path``: of the result, beside which the sums of interrupted scoring lie."""
        a, ranks, guiding = self.context.arguments, self.context.ranks, self.guide and self.guide.model
        if settings.compile and not self.compiled:
            for one in filter(None, (self.context.model, guiding)):
                sampling.compile_blocks(one)
            self.compiled = True
        name = WORDS[self.extractor.distance]
        with progress.bar(total=settings.count, unit="image", desc=name, disable=not ranks.is_main) as shown:
            options = Options(path, shown.update, replays=self.replays)
            weights = json.dumps(self.weights())
            extractor, reference = self.extractor, self.reference
            return score(
                self.context.model, settings, extractor, reference, ranks, weights, a.pairs, a.kid_subset, options,
                guiding,
            )  # fmt: skip


def fid_command(context: Context) -> None:
    scorer, settings = Scorer(context), context.settings()
    protocol, earlier = scorer.protocol(settings), context.earlier
    if earlier is not None:
        compare(protocol, earlier, context.trained)
    path = context.out(protocol, short(settings))
    result, name = scorer.extractor.named(scorer.score(settings, path)), scorer.extractor.distance
    if context.ranks.is_main:
        print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()))
        if earlier is not None:
            print(f"earlier: {name} {earlier['result'][name]:.6g}, now {result[name]:.6g}")
    context.save(path, {"protocol": protocol, "result": result})


def unfinished(path: Path) -> list[dict[str, Any]]:
    """The rows that an interrupted table has kept beside its place."""
    try:
        rows = json.loads(files.read_text(path))["rows"]
        return rows if all(row["protocol"] and row["result"] for row in rows) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def table_command(context: Context) -> None:
    """A finished table stays until the new one is whole: rows gather in a file of their own."""
    scorer, base, rows = Scorer(context), context.settings(), []
    variants = [(name, dataclasses.replace(base, **changes)) for name, changes in TABLE]
    path = context.out(scorer.protocol(variants[0][1]), f"w{base.cfg_scale:g}")
    gathered = path.with_suffix(".unfinished")
    kept = context.ranks.decide(lambda: unfinished(gathered))
    for name, settings in variants:
        protocol = scorer.protocol(settings)
        same = [row for row in kept if timeless(row["protocol"]) == timeless(protocol)]
        if found := context.ranks.decide(functools.partial(list, same)):
            rows.append(found[0])
            continue
        rows.append(
            {"name": name, "protocol": protocol, "result": scorer.extractor.named(scorer.score(settings, path))}
        )
        context.save(gathered, {"rows": rows}, finished=False)
    if context.ranks.is_main:
        distance = scorer.extractor.distance
        print(f"{'protocol':26}{'NFE':>6}{'passes':>8}{WORDS[distance]:>10}{'IS':>9}{'images/s':>10}")
        for row in rows:
            r = row["result"]
            rate = f"{r['images_per_second']:.1f}" if "images_per_second" in r else "-"
            nfe = f"{r['evaluations']:>6.4g}{r['passes']:>8.4g}"
            print(f"{row['name']:26}{nfe}{r[distance]:>10.3f}{r['is']:>9.3f}{rate:>10}")
    context.save(path, {"rows": rows})
    if context.ranks.is_main:
        gathered.unlink(missing_ok=True)


def parse_grid(text: str) -> tuple[float, float, float]:
    """LOW,HIGH,STEP. Raises UserError."""
    try:
        low, high, step = (float(part) for part in text.split(","))
    except ValueError:
        low = high = step = math.nan
    if not (0 <= low <= high < math.inf and step > 0 and (high - low) / step < MOST_SCALES):
        raise UserError(f"--grid {text}: write LOW,HIGH,STEP with 0 <= LOW <= HIGH, as 1,4,0.2; at most {MOST_SCALES}")
    return low, high, step


def search_command(context: Context) -> None:
    scorer, start = Scorer(context), context.settings()
    protocol, grid = scorer.protocol(start), context.arguments.grid
    how = {"grid": parse_grid(grid)} if grid else {}
    path = context.out(protocol | how, f"grid_{grid.replace(',', '_')}" if grid else f"from_{short(start)}")
    identity = files.digest(
        [scorer.weights(), scorer.extractor.identity(), scorer.about["sha256"], protocol["kid_subset"]]
    )
    scored = guidance_search.Scored(
        path.with_suffix(".jsonl"),
        identity,
        lambda settings: scorer.score(settings, path),
        context.ranks,
        environment=protocol["environment"],
    )
    best = guidance_search.grid(scored, start, *parse_grid(grid)) if grid else guidance_search.search(scored, start)
    if context.arguments.sweep:
        best = guidance_search.sweep(scored, best, orders=scorer.guide is None)
    if context.ranks.is_main:
        print(guidance_search.table(scored.rows, WORDS[scorer.extractor.distance]))
    found = scorer.protocol(best) | {"environment": scored.row(best)["environment"]}
    rows = [row | {"result": scorer.extractor.named(row["result"])} for row in scored.rows]
    context.save(path, {"best": found} | how | {"rows": rows})


def open_lpips(context: Context, kernels: str) -> lpips.Perceptual | None:
    """On the trunk that --lpips names, or else the run's, or the one that ``fetch`` has left here; None without one, of
    which a line is printed, and for gray images. Raises UserError."""
    objective, channels, asked = context.config.objective, context.config.model.channels, context.arguments.lpips
    if channels != 3:
        if asked:
            raise idle("--lpips", "for gray images, of which LPIPS sees none")
        return None
    places = (objective.perceptual_trunk, f"weights/{lpips.TRUNK_FILE}", lpips.TRUNK_FILE)
    found = asked or next((place for place in places if place and Path(place).is_file()), "")
    if not found:
        if context.ranks.is_main:
            print("no LPIPS: the package lpips holds its heads alone; for the trunk: python -m unite_fast fetch vgg16")
        return None
    how = dataclasses.replace(objective, perceptual_weight=1.0, perceptual_trunk=found, perceptual_dropout=False)
    perceptual = lpips.load_perceptual(how, channels, kernels)
    return None if perceptual is None else perceptual.to(context.ranks.device)


def rfid_command(context: Context) -> None:
    """Of held-out images; ``heldout``: without the network that rFID needs."""
    a, config = context.arguments, context.config
    if a.data:
        if not config.data.reads_files:
            raise idle("--data", f"for a run of data.source={config.data.source}")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout_path=a.data))
    asked = {"precision": a.precision, "kernels": a.kernels}
    settings = dataclasses.replace(
        reconstruction.of_run(config.objective, config.evaluation, config.efficiency),
        **{k: v for k, v in asked.items() if v is not None},
    )
    perceptual, extractor = open_lpips(context, settings.kernels), None
    if a.command == "rfid":
        extractor = statistics.open_extractor(a, config.data, config.model, context.ranks.device)
    source = data.open_source(config.data, config.model, "heldout")
    with progress.bar(total=len(source), unit="image", desc=a.command, disable=not context.ranks.is_main) as shown:
        result: dict[str, Any] = reconstruction.score(
            context.model, settings, source, config.data, extractor, context.ranks, perceptual, report=shown.update
        )
    if extractor is not None:
        result = extractor.named(result)
    said = statistics.described(config.data.source, config.model.image_size, "heldout", source, context.ranks.device)
    if context.ranks.is_main:
        print("  ".join(f"{k} {v:.6g}" for k, v in result.items()))
    protocol = {
        "checkpoint": context.weights(),
        **reconstruction.protocol(settings, extractor, perceptual, said),
        "environment": provenance.of(context.ranks.device, context.ranks.world_size),
    }
    context.save(context.out(protocol), {"protocol": protocol, "result": result})


COMMANDS: dict[str, Callable[[Context], None]] = {
    "fid": fid_command,
    "table": table_command,
    "search": search_command,
    "heldout": rfid_command,
    "rfid": rfid_command,
}
