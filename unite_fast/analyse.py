"""Looks into a trained model as the paper does: one JSON with its protocol and one picture per analysis.

    python -m unite_fast analyse runs/shared --against runs/separate runs/no_stop_gradient --data imagenet/val

    alignment   CKA, CKNNA and cosine of tokenizing and denoising activations, by layer
    trajectory  predicted against clean latents over t: cosine, and the share of their variance that is explained; of
                images also the PSNR of the decoded predictions
    entropy     bits that the weights need, by group, trained and at the start
    probes      a linear and a nearest-neighbour probe of the classes on latents (fitted to training samples)
    dynamics    the runs' losses over each other, and the scores that they took while training (evaluation.fid_epoch,
                rfid_epoch, heldout_epoch, atoms_epoch)

Every model sees the same samples, noise and times. Under torchrun the samples are shared out; the numbers are the same.
Results lie in RUN/analysis of the first model unless --out says otherwise; the report shows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unite_fast import checkpoint, data
from unite_fast.analysis import alignment, dynamics, entropy, plots, probe, trajectory
from unite_fast.analysis.walk import NOISE_STREAM, TILE, chosen, denoised, significant, tokenized, undefined, walk
from unite_fast.base import command, files, outputs, progress, provenance
from unite_fast.base.errors import UserError, idle
from unite_fast.config import Config, DataConfig, EvaluationConfig, ModelConfig, choices
from unite_fast.data.source import Source
from unite_fast.efficiency import precision
from unite_fast.evaluation import statistics
from unite_fast.evaluation.results import while_training
from unite_fast.modality.pictures import Words
from unite_fast.model.unite import TOKENIZE_SEED, UNITE, build
from unite_fast.objective import FLOW
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.stats import read_metrics
from unite_fast.sampling.reconstruct import reconstruct

SHOWN = 8  # images of the picture of a trajectory
PICTURED = (0.8, 0.5, 0.2)  # its times
FOLDER = "analysis"  # in a run's folder


class Subject(NamedTuple):
    """A model that is looked at."""

    name: str
    located: Path
    model: UNITE
    config: Config

    @property
    def run(self) -> Path | None:
        """The run folder that the checkpoint lies in, if it does."""
        return checkpoint.run_of(self.located)


class Context(NamedTuple):
    arguments: argparse.Namespace
    subjects: list[Subject]
    ranks: Ranks
    reading: DataConfig
    source: Source | None  # None where no analysis needs samples
    split: str
    training: Source | None  # None without probes

    def protocol(self, definition: dict[str, str], **more: Any) -> dict[str, Any]:
        """What the numbers depend on."""
        a = self.arguments
        said: dict[str, Any] = {
            "definition": definition,
            "checkpoints": {
                s.name: {"sha256": checkpoint.identity(s.located), "weights": a.weights} for s in self.subjects
            },
        }
        if self.source is not None:
            model, device = self.subjects[0].config.model, self.ranks.device
            said["data"] = statistics.described(self.reading.source, model.image_size, self.split, self.source, device)
            said |= {"count": a.count, "tile": TILE, "seed": TOKENIZE_SEED, "noise_stream": NOISE_STREAM}
            said["precision"] = a.precision
        return said | more | {"environment": provenance.of(self.ranks.device, self.ranks.world_size)}

    def walk(self, subject: Subject, split: str, source: Source, places: torch.Tensor, analyses: list[Any]) -> None:
        a, ranks = self.arguments, self.ranks
        mine = len(range(ranks.rank, -(-len(places) // TILE), ranks.world_size))
        said = f"{subject.name}, {split}"
        with progress.bar(total=mine, unit="tile", desc=said, disable=not ranks.is_main) as shown:
            t_max = subject.config.objective.tokenizer_t_max
            walk(subject.model, source, places, self.reading, analyses, ranks, t_max, a.precision, shown.update)


Found = dict[str, dict[str, Any]]  # by model


def of_samples(context: Context, wanted: list[str]) -> dict[str, Found]:
    """{analysis: {model: result}} of those that share one pass over the samples."""
    a, source = context.arguments, context.source
    if source is None or not wanted:
        return {}
    places, found = chosen(source, a.count), {name: {} for name in wanted}
    for subject in context.subjects:
        m, device = subject.config.model, context.ranks.device
        opened: dict[str, Any] = {}
        if "alignment" in wanted:
            blocks, width = m.encoder.depth, m.encoder.width
            opened["alignment"] = alignment.Alignment(places, blocks, width, device, a.times, a.neighbours, a.pairs)
        if "trajectory" in wanted:
            opened["trajectory"] = trajectory.Trajectory(
                device, subject.model.latent_shape, "pixels" in subject.model.modality.analyses
            )
        context.walk(subject, context.split, source, places, list(opened.values()))
        for name, analysis in opened.items():
            found[name][subject.name] = context.ranks.gather(analysis.result() if context.ranks.is_main else None)[0]
        if "trajectory" in wanted:
            found["trajectory"][subject.name] |= trajectory.gains(subject.model)
    return found


def of_probes(context: Context) -> Found:
    found: Found = {}
    training = context.training
    assert context.source is not None
    assert training is not None, "opened where there are probes"
    for subject in context.subjects:
        places, device = chosen(training, context.arguments.count), context.ranks.device
        classes, shape = subject.config.model.num_classes, subject.model.latent_shape
        fitting = probe.Training(places, shape, classes, device)
        context.walk(subject, "train", training, places, [fitting])
        asking = probe.HeldOut(fitting)
        places = chosen(context.source, context.arguments.count)
        context.walk(subject, context.split, context.source, places, [asking])
        found[subject.name] = fitting.result() | asking.result()
    return found


def of_weights(context: Context) -> Found:
    found: Found = {}
    for s in context.subjects:
        start = build(s.config.model, s.config.seed) if s.run is not None and not s.config.init_from else None
        found[s.name] = entropy.of_model(s.model, start)
    return found


def of_metrics(context: Context) -> Found:
    found: Found = {}
    for s in context.subjects:
        if s.run is None:
            continue
        kind = s.config.objective.pixel_loss
        names = [kind, "lpips", "features", *vars(s.config.objective.atoms), FLOW]
        if of := dynamics.of_run(read_metrics(s.run / "metrics.jsonl"), names, while_training(s.run)):
            found[s.name] = of
    return found


def picture(context: Context, subject: Subject, path: Path) -> None:
    """Rows of real samples, their reconstructions, and what is decoded of predictions at PICTURED."""
    source, model = context.source, subject.model
    assert source is not None
    batch = source.few(chosen(source, SHOWN)).to(context.ranks.device)
    t_max = subject.config.objective.tokenizer_t_max
    tile = tokenized(model, batch, t_max)
    made = {"reconstructed": reconstruct(model, tile.content, batch.samples, t_max, batch.labels, batch.sizes)}
    for t in PICTURED:
        prediction = model.decode(denoised(tile, t).prediction, batch.sizes)
        made[f"denoised from t = {t:g}"] = model.modality.finished(model, prediction, batch.labels, batch.sizes)
    said = [f"{name}\n{model.modality.likeness(tile.content, row)}".rstrip() for name, row in made.items()]
    rows = [model.modality.original(tile.content), *made.values()]
    model.modality.show(path, rows, Words(subject.name, (), ["real", *said]))


DEFINITIONS = {
    "alignment": alignment.DEFINITION,
    "trajectory": trajectory.DEFINITION,
    "entropy": entropy.DEFINITION,
    "probes": probe.DEFINITION,
    "dynamics": dynamics.DEFINITION,
}
OF_SAMPLES = ("alignment", "trajectory", "probes")


def write(context: Context, out: Path, name: str, found: Found) -> None:
    """The JSON and the picture of one analysis, on one process."""
    if not context.ranks.is_main or not found:
        return
    a = context.arguments
    more = {"pairs": a.pairs} if name == "alignment" else {}
    content = {"analysis": name, "protocol": context.protocol(DEFINITIONS[name], **more)}
    with files.refusals(f"--out {out}"):
        files.write_json(out / f"{name}.json", content | {"models": significant(found)})
        if plots.available():
            plots.DRAWN[name](out / f"{name}.png", found)
    print(f"{name}: {said(name, found)}")
    if missing := undefined(found):
        print(f"{name}: {missing} numbers are not defined for these samples; null in {name}.json")
    if name == "alignment" and not all("cknna" in of for of in found.values()):
        kept = next(iter(found.values()))["examples"]["cknna"]
        print(f"alignment: no CKNNA, which needs more samples than --neighbours {a.neighbours}; {kept} are compared")


def said(name: str, found: Found) -> str:
    """The numbers to look at first, in a line."""

    def words(of: dict[str, Any]) -> str:
        if name == "alignment":
            middle = len(of["times"]) // 2
            return f"CKA by block {' '.join(f'{v:.2f}' for v in of['debiased_registers'][middle])}"
        if name == "trajectory":
            explained = " ".join(f"{v:.2f}" for v in of["explained"])
            return f"explained {explained}, cosine of the mean {of['cosine_mean']:.2f}"
        if name == "entropy":
            total = {
                state: sum(g["mb"][1] for part in of[state].values() for g in part.values())
                for state in ("start", "trained")
                if state in of
            }
            return ", ".join(f"{state} {mb:.3g} MB" for state, mb in total.items())
        if name == "probes":
            return f"linear {of['linear']['flat']:.1%}, neighbours {of['knn']['flat']:.1%}, chance {of['chance']:.1%}"
        return ", ".join(f"{curve} {v['end']:.3g}" for curve, v in of["summary"].items() if "flow_t" not in curve)

    return "; ".join(f"{model}: {words(of)}" for model, of in found.items())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast analyse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run folder, step-N folder, export, or official .pt")
    add("--against", nargs="+", default=[], metavar="OTHER", help="further ones, beside it in every picture")
    add("--names", metavar="A,B,...", help="what to call them (default: the runs' names)")
    add("--only", metavar="A,B,...", help=f"of {', '.join(DEFINITIONS)} (default: all that the models have)")
    add("--weights", default="ema", metavar="NAME", help="ema, model, or another average that all have")
    add("--data", metavar="FOLDER", help="held-out samples (default: the first run's, else its training samples)")
    add("--count", type=int, default=10_000, help="samples, evenly spread (default: %(default)s)")
    add("--pairs", type=int, default=alignment.PAIRED, help="of them, for CKNNA (default: %(default)s)")
    add("--times", default=",".join(map(str, alignment.TIMES)), metavar="T,...", help="of the alignment (%(default)s)")
    add("--neighbours", type=int, default=alignment.NEIGHBOURS, help="of CKNNA (default: %(default)s)")
    add("--precision", choices=choices(EvaluationConfig, "precision"), default="fp32", help="of the network")
    add("--device", choices=choices(Config, "device"), default="auto")
    add("--out", type=Path, metavar="FOLDER", help="where results lie (default: RUN/analysis)")
    add("--debug", action="store_true", help="show tracebacks")
    a = parser.parse_args(argv)
    for name in ("count", "pairs", "neighbours"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} {getattr(a, name)}: give at least 1")
    a.asked = a.only is not None
    a.only = a.only.split(",") if a.only else list(DEFINITIONS)
    if unknown := [name for name in a.only if name not in DEFINITIONS]:
        raise UserError(f"--only {unknown[0]}: choose from {', '.join(DEFINITIONS)}")
    if "alignment" not in a.only:
        for option in ("times", "neighbours", "pairs"):
            if getattr(a, option) != parser.get_default(option):
                raise idle(f"--{option}", "without the alignment")
    try:
        a.times = tuple(float(t) for t in a.times.split(","))
    except ValueError:
        raise UserError(f"--times {a.times}: write numbers between 0 and 1, as 0.1,0.5,0.9") from None
    if not all(0 <= t <= 1 for t in a.times) or len(set(a.times)) < len(a.times):
        raise UserError(f"--times {','.join(map(str, a.times))}: different numbers between 0 and 1")
    return a


def load(a: argparse.Namespace, device: torch.device) -> list[Subject]:
    """Raises UserError where the models do not look at the same kind of samples."""
    subjects: list[Subject] = []
    paths = [a.checkpoint, *a.against]
    names = a.names.split(",") if a.names else []
    if names and (len(names) != len(paths) or len(set(names)) < len(names)):
        raise UserError(f"--names {a.names}: give {len(paths)} different names, one for each model")
    for i, path in enumerate(paths):
        located = checkpoint.locate(path)
        model, config = checkpoint.load_model(located, a.weights)
        name = names[i] if names else config.name
        name = name if name not in [s.name for s in subjects] else str(path)
        subjects.append(Subject(name, located, model.to(device), config))
        first, m = subjects[0].config.model, config.model
        for key in ("modality", "image_size", "channels", "num_classes"):
            if getattr(m, key) != getattr(first, key):
                raise UserError(f"{path}: its model.{key} is {getattr(m, key)}, the first one's {getattr(first, key)}; "
                                "models are compared on the same samples")  # fmt: skip
    return subjects


def open_samples(
    a: argparse.Namespace, reading: DataConfig, model: ModelConfig
) -> tuple[DataConfig, Source | None, str]:
    """The samples, held out if there are any, and the split that they are."""
    if not set(a.only) & set(OF_SAMPLES):
        if a.data:
            raise idle("--data", f"with --only {','.join(a.only)}")
        return reading, None, ""
    if a.data:
        if not reading.reads_files:
            raise idle("--data", f"for a run of data.source={reading.source}")
        reading = dataclasses.replace(reading, heldout_path=a.data)
    return reading, *data.open_heldout(reading, model)


def settle(
    a: argparse.Namespace, subjects: list[Subject], reading: DataConfig, split: str
) -> tuple[list[str], Source | None]:
    """(what these models do not have, which is left out, and why; the training images of the probes).

    Raises UserError where something that they do not have was asked for by name.
    """
    missing, training = {}, None
    model = subjects[0].config.model
    if split == "train" or "probes" not in subjects[0].model.modality.analyses or not model.num_classes:
        missing["probes"] = "the probes need labelled held-out images; name some with --data"
    elif "probes" in a.only:
        try:
            training = data.open_source(reading, model, "train")
        except UserError as error:
            missing["probes"] = f"the probes are fitted to the training images ({error})"
    if not any(s.run is not None for s in subjects):
        missing["dynamics"] = "none of the models lies in a run folder with metrics"
    left_out = {name: why for name, why in missing.items() if name in a.only}
    for name, why in left_out.items():
        if a.asked:
            raise UserError(f"--only {name}: {why}")
    a.only = [name for name in a.only if name not in left_out]
    return [f"no {name}: {why}" for name, why in left_out.items()], training


def check_out(a: argparse.Namespace, subjects: list[Subject]) -> Path:
    """The folder of the results. Raises UserError where nothing may be written."""
    run = subjects[0].run
    if a.out is None and run is None:
        raise UserError(f"{a.checkpoint} lies in no run folder; say with --out FOLDER where results go")
    out = a.out or run / FOLDER  # pyright: ignore[reportOptionalOperand]
    told = outputs.holds_json("analysis")
    read = [path for s in subjects for path in checkpoint.reads(s.located)]

    def ours(folder: Path) -> bool:
        return any(told(folder / f"{name}.json") for name in DEFINITIONS)

    outputs.check_folder(out, "--out", [*read, *([a.data] if a.data else [])], ours)
    with files.refusals(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    return out


def main(argv: list[str]) -> None:
    a = parse(argv)
    ranks = distributed.start(a.device)
    try:
        precision.setup(ranks.device)
        subjects = load(a, ranks.device)
        reading, source, split = open_samples(a, subjects[0].config.data, subjects[0].config.model)
        left_out, training = settle(a, subjects, reading, split)
        out = ranks.decide(lambda: check_out(a, subjects))
        context = Context(a, subjects, ranks, reading, source, split, training)
        for name, found in of_samples(context, [n for n in ("alignment", "trajectory") if n in a.only]).items():
            write(context, out, name, found)
        for name, function in (("entropy", of_weights), ("probes", of_probes), ("dynamics", of_metrics)):
            if name in a.only:
                write(context, out, name, function(context))
        if "trajectory" in a.only and ranks.is_main and source is not None:
            with torch.no_grad():
                for number, subject in enumerate(subjects):
                    try:
                        picture(context, subject, out / f"trajectory_{number + 1}.png")
                    except UserError as error:
                        left_out.append(f"no picture of {subject.name}: {error}")
        if ranks.is_main:
            print("".join(f"{line}\n" for line in left_out), end="")
            print(f"in {out}" + ("" if plots.available() else "; plots need matplotlib, pip install matplotlib"))
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(command.run(main))
