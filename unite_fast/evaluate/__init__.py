"""Scores of a checkpoint, each written with everything that it depends on.

    python -m unite_fast.evaluate fid --checkpoint runs/imagenet_b --reference imagenet256.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth

    fid --protocol scores/fid_a.json ...  the same weights and settings again; the files' hashes are compared.
                                          scores/training/step_N_search.json: its best, of checkpoints/step-N
    table ...                             the paper's protocols: Heun 50 balanced, dopri5 balanced, dopri5 random;
                                          and, not the paper's, exp3 with 32 steps
    search ... [--sweep]                  the published search for the guidance scale; goes on when rerun
    rfid --checkpoint ... --inception ... reconstructions of the held-out images: rFID, PSNR, L1, LPIPS
    atoms --checkpoint ...                samples and reconstructions of molecules and crystals (evaluation.atoms.runs)

Under torchrun the work is shared out. Results lie in RUN/scores (beside an export; of an official .pt in ./scores)
unless --out says otherwise. A name holds the step, the weights, the guidance scale and solver, and digits of the whole
protocol's hash, so that a result replaces none of another protocol:

    fid_step_0001404_ema_w2_heun10_5e1c0f3a.json

Options that are not given are those of --protocol, or of the run, as its scores while training have them: its sections
sample and evaluation with extractor and reference, efficiency.kernels, the best guidance scale that they found. An
official .pt is scored in fp32 with the guidance scale that its own training found best, on (0.1, 1), as published.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unite_fast import checkpoint, data, sampling
from unite_fast.base import files, outputs, provenance
from unite_fast.base.errors import UserError, idle
from unite_fast.config import Config, EfficiencyConfig, EvaluationConfig, choices
from unite_fast.efficiency import precision
from unite_fast.evaluation import guidance_search, reconstruction, statistics
from unite_fast.evaluation.atoms import runs
from unite_fast.evaluation.features import Extractor
from unite_fast.evaluation.fid import Statistics
from unite_fast.evaluation.generation import PLAIN, Options, Settings, of_run, score
from unite_fast.evaluation.results import beside_other_commits, compare, is_result, read_result, timeless
from unite_fast.modality import lpips
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import freeze
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.generate import parse_interval

TABLE = (
    ("Heun 50, balanced", {"solver": "heun", "steps": 50, "labels": "equal"}),
    ("dopri5, balanced", {"solver": "dopri5", "steps": 50, "labels": "equal"}),
    ("dopri5, random", {"solver": "dopri5", "steps": 50, "labels": "random"}),
    ("exp3 32, balanced (ours)", {"solver": "exp3", "steps": 32, "labels": "equal"}),
)
ATOMS = "atoms"  # the command that another module has


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(ATOMS, help="its options: python -m unite_fast evaluate atoms --help", add_help=False)
    for name in COMMANDS:
        one = commands.add_parser(name)
        add = one.add_argument
        add("--checkpoint", required=True, metavar="PATH", help="run folder, step-N folder, export, or official .pt")
        add("--weights", metavar="NAME", help="ema, model, or another average that it has (default: the run's)")
        add("--out", metavar="FILE", help="the result (default: in RUN/scores, named after what it depends on)")
        add("--device", choices=choices(Config, "device"), default="auto")
        add("--debug", action="store_true", help="show tracebacks")
        add("--precision", choices=choices(EvaluationConfig, "precision"), help="of the network (default: the run's)")
        add("--kernels", choices=choices(EfficiencyConfig, "kernels"), help="of the network (default: the run's)")
        statistics.add_extractor_options(one)
        one.set_defaults(extractor=None)  # the run's
        if name == "rfid":
            add("--lpips", metavar="FILE", help="torchvision's vgg16-397923af.pth; LPIPS is left out without it")
            add("--data", metavar="FOLDER", help="held-out images (default: the run's data.heldout_path)")
            continue
        add("--reference", metavar="FILE.npz", help="statistics of the real images (default: the run's)")
        add("--count", type=int, help="images (default: the run's)")
        add("--pairs", action="store_true", help="also KID and precision/recall; needs a reference with features")
        add("--kid-subset", type=int, help="images of a KID subset (default: 1000)")
        add(
            "--cfg",
            type=float,
            metavar="W",
            help="guidance scale (default: the best that the run found, else the run's)",
        )
        add("--cfg-interval", metavar="LOW,HIGH", help="where guidance acts (default: the run's)")
        add("--compile", action="store_true", help="torch.compile of the network's blocks")
        add("--graph", action="store_true", help="replay the network's evaluations from CUDA graphs")
        if name == "search":
            add("--sweep", action="store_true", help="then other intervals and the order cfg_first")
        if name == "fid":
            add("--protocol", metavar="FILE", help="an earlier result: its settings are used, its hashes compared")
        if name != "table":
            add("--cfg-order", choices=sampling.ORDERS)
            add("--labels", choices=("equal", "random"))
            add("--solver", choices=sampling.SOLVERS)
            add("--steps", type=int)
    arguments = parser.parse_args(argv)
    if (
        arguments.command != "rfid"
        and arguments.kid_subset
        and not arguments.pairs
        and not getattr(arguments, "protocol", None)
    ):
        raise idle("--kid-subset", "without --pairs")
    return arguments


@dataclasses.dataclass(frozen=True)
class Context:
    """What the commands share."""

    arguments: argparse.Namespace
    located: Path
    model: UNITE
    config: Config
    ranks: Ranks
    earlier: dict[str, Any] | None  # the result that --protocol names

    def weights(self) -> dict[str, str]:
        return {"sha256": checkpoint.identity(self.located), "weights": self.arguments.weights}

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that the run trains, which its scores while training know."""
        freeze(self.model, self.config.optim.frozen)
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def folder(self) -> Path:
        """Where results lie."""
        if self.arguments.out:
            return Path(self.arguments.out).parent
        within, name = self.located.parent, self.located.name
        if self.located.is_dir():
            return (within.parent if within.name == "checkpoints" else within) / "scores"
        return within / "scores" if name == checkpoint.EXPORTED else Path("scores")

    def check_out(self) -> None:
        """Raises UserError where results lie in what is read, would replace something else, or cannot be written."""
        a, folder = self.arguments, self.folder()
        if a.out:
            given = ("reference", "protocol", "inception", "lpips", "data")
            read = [path for name in given if (path := getattr(a, name, None))]
            if Path(a.out).suffix != ".json":
                raise UserError(f"--out {a.out}: name a .json file; what else is kept lies beside it")
            outputs.check_file(Path(a.out), "--out", [*checkpoint.reads(self.located), *read], is_result)
        else:
            outputs.check(folder, "the scores' folder")
        with files.refusals(str(folder), "; choose another place with --out"):
            folder.mkdir(parents=True, exist_ok=True)

    def out(self, protocol: dict[str, Any], what: str = "") -> Path:
        """--out, or a name that no other protocol has. ``what``: the readable part of the difference."""
        if self.arguments.out:
            return Path(self.arguments.out)
        counted = self.located.is_dir() or self.located.name == checkpoint.EXPORTED  # an official step counts otherwise
        step = checkpoint.recorded_step(self.located) if counted else None
        of = self.located.stem if step is None else f"step_{step:07d}"
        parts = [self.arguments.command, of, self.arguments.weights, what, files.digest(timeless(protocol))[:8]]
        path = self.folder() / f"{'_'.join(filter(None, parts))}.json"
        return self.ranks.decide(lambda: beside_other_commits(path, protocol.get("environment", {})))

    def settings(self) -> Settings:
        """Those of the run, or the protocol's, with what the options change."""
        a = self.arguments
        c = self.config
        base = of_run(c.sample, c.evaluation, c.efficiency)
        if scale := checkpoint.found_scale(self.located):
            base = dataclasses.replace(base, cfg_scale=scale)
        if self.earlier:
            base = Settings.read(self.earlier["protocol"]["settings"])
        changes: dict[str, Any] = {
            "count": a.count,
            "cfg_scale": a.cfg,
            "cfg_interval": None if a.cfg_interval is None else parse_interval(a.cfg_interval),
            "precision": a.precision,
            "kernels": a.kernels,
            "compile": a.compile or None,
        }
        changes |= {name: getattr(a, name, None) for name in ("labels", "solver", "steps", "cfg_order")}
        changed = dataclasses.replace(base, **{k: v for k, v in changes.items() if v is not None})
        changed.check(self.model.config)
        if changed.cfg_scale == 1 and a.command != "search":
            for option in ("cfg_interval", "cfg_order"):
                if getattr(a, option, None) is not None:
                    raise idle(f"--{option.replace('_', '-')}", "without guidance, which --cfg gives")
        return changed

    def save(self, path: Path, content: dict[str, Any], finished: bool = True) -> None:
        """Writes the result whole, on one process. Raises UserError when the disk refuses."""
        if not self.ranks.is_main:
            return
        with files.refusals(f"--out {path}"):
            files.write_json(path, content)
        if finished:
            print(f"written to {path}")


def short(settings: Settings) -> str:
    """The guidance scale and the solver, for a file's name."""
    return f"w{settings.cfg_scale:g}_{settings.solver}{'' if settings.solver == 'dopri5' else settings.steps}"


def fill_in(arguments: argparse.Namespace, earlier: dict[str, Any] | None, located: Path) -> None:
    """Gives each of these options that was not on the command line its value of the protocol, or else its default."""
    scored = checkpoint.saved_config(located).evaluation if located.is_dir() else EvaluationConfig
    protocol = earlier["protocol"] if earlier else {"checkpoint": {"weights": scored.weights}, "kid_subset": None}
    if arguments.weights is None:
        arguments.weights = protocol["checkpoint"]["weights"]
    if arguments.extractor is None and not arguments.inception:
        arguments.extractor, arguments.inception = scored.extractor, scored.inception
        if scored.inception_sha256 != EvaluationConfig.inception_sha256:
            arguments.inception_sha256 = scored.inception_sha256
    arguments.extractor = arguments.extractor or "inception"
    if arguments.extractor != "inception" and arguments.inception == scored.inception:
        arguments.inception = ""  # the run's, for another day
    if arguments.command != "rfid":
        arguments.reference = arguments.reference or scored.reference
        if not arguments.reference:
            raise UserError("--reference names no statistics of the real images, nor does the run; make them with "
                            "python -m unite_fast.evaluation.statistics")  # fmt: skip
        arguments.pairs = arguments.pairs or protocol["kid_subset"] is not None
        if arguments.kid_subset is None:
            arguments.kid_subset = protocol["kid_subset"] or 1000


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

    def protocol(self, settings: Settings) -> dict[str, Any]:
        """What the score depends on. Equal protocols and an equal commit give equal scores."""
        return {
            "checkpoint": self.context.weights(),
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
        a, ranks = self.context.arguments, self.context.ranks
        if settings.compile and not self.compiled:
            sampling.compile_blocks(self.context.model)
            self.compiled = True
        progress = (
            (lambda line: print(line, end="\r", file=sys.stderr)) if sys.stderr.isatty() and ranks.is_main else None
        )
        options = Options(path, progress or PLAIN.report, replays=self.replays)
        return score(
            self.context.model,
            settings,
            self.extractor,
            self.reference,
            ranks,
            json.dumps(self.context.weights()),
            a.pairs,
            a.kid_subset,
            options,
        )


def fid_command(context: Context) -> None:
    scorer, settings = Scorer(context), context.settings()
    protocol, earlier = scorer.protocol(settings), context.earlier
    if earlier is not None:
        compare(protocol, earlier, context.trained)
    path = context.out(protocol, short(settings))
    result = scorer.score(settings, path)
    if context.ranks.is_main:
        print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()))
        if earlier is not None:
            print(f"earlier: fid {earlier['result']['fid']:.6g}, now {result['fid']:.6g}")
    context.save(path, {"protocol": protocol, "result": result})


def unfinished(path: Path) -> list[dict[str, Any]]:
    """The rows that an interrupted table has kept beside its place."""
    try:
        rows = json.loads(path.read_text())["rows"]
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
        rows.append({"name": name, "protocol": protocol, "result": scorer.score(settings, path)})
        context.save(gathered, {"rows": rows}, finished=False)
    if context.ranks.is_main:
        print(f"{'protocol':26}{'NFE':>6}{'passes':>8}{'FID':>10}{'IS':>9}{'images/s':>10}")
        for row in rows:
            r = row["result"]
            rate = f"{r['images_per_second']:.1f}" if "images_per_second" in r else "-"
            nfe = f"{r['evaluations']:>6.4g}{r['passes']:>8.4g}"
            print(f"{row['name']:26}{nfe}{r['fid']:>10.3f}{r['is']:>9.3f}{rate:>10}")
    context.save(path, {"rows": rows})
    if context.ranks.is_main:
        gathered.unlink(missing_ok=True)


def search_command(context: Context) -> None:
    scorer, start = Scorer(context), context.settings()
    protocol = scorer.protocol(start)
    path = context.out(protocol, f"from_{short(start)}")
    identity = files.digest(
        [context.weights(), scorer.extractor.identity(), scorer.about["sha256"], protocol["kid_subset"]]
    )
    scored = guidance_search.Scored(
        path.with_suffix(".jsonl"),
        identity,
        lambda settings: scorer.score(settings, path),
        context.ranks,
        environment=protocol["environment"],
    )
    best = guidance_search.search(scored, start)
    if context.arguments.sweep:
        best = guidance_search.sweep(scored, best)
    if context.ranks.is_main:
        print(guidance_search.table(scored.rows))
    found = scorer.protocol(best) | {"environment": scored.row(best)["environment"]}
    context.save(path, {"best": found, "rows": scored.rows})


def rfid_command(context: Context) -> None:
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
    perceptual = None
    if a.lpips:
        objective = dataclasses.replace(
            config.objective, perceptual_weight=1.0, perceptual_trunk=a.lpips, perceptual_dropout=False
        )
        perceptual = lpips.load_perceptual(objective, config.model.channels, settings.kernels)
    perceptual = perceptual.to(context.ranks.device) if perceptual is not None else None
    extractor = statistics.open_extractor(a, config.data, config.model, context.ranks.device)
    source = data.open_source(config.data, config.model, "heldout")
    result = reconstruction.score(context.model, settings, source, config.data, extractor, context.ranks, perceptual)
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
    "rfid": rfid_command,
}


def main(argv: list[str]) -> None:
    if argv[:1] == [ATOMS]:
        return runs.main(argv[1:])
    arguments = parse(argv)
    earlier = read_result(arguments.protocol) if getattr(arguments, "protocol", None) else None
    located = checkpoint.locate(arguments.checkpoint)
    fill_in(arguments, earlier, located)
    model, config = checkpoint.load_model(located, arguments.weights)
    ranks = distributed.start(arguments.device)
    try:
        precision.setup(ranks.device)
        context = Context(arguments, located, model.to(ranks.device), config, ranks, earlier)
        ranks.decide(context.check_out)
        with torch.no_grad():
            COMMANDS[arguments.command](context)
    finally:
        distributed.stop()
