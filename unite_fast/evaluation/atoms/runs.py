"""What a model of molecules or crystals has learned: samples of it, and its reconstructions of held-out structures.

    python -m unite_fast evaluate atoms --checkpoint runs/molecules --count 10000

Every class (data set) of a joint model is scored by itself. Under torchrun the network's work is shared out; the
chemistry runs in processes of rank 0. The result has the scores of real structures beside it and lies in RUN/scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast import checkpoint, data, modality, sampling
from unite_fast.base import files, outputs, provenance
from unite_fast.base.command import run
from unite_fast.base.errors import Stopped, UserError
from unite_fast.config import Config, DataConfig, EvaluationConfig, ModelConfig, SampleConfig, choices
from unite_fast.config.yaml_text import to_dict
from unite_fast.data.atoms import Structures, pack, writers
from unite_fast.data.atoms.source import AtomSource
from unite_fast.efficiency import precision
from unite_fast.evaluation.atoms import pictures, report
from unite_fast.evaluation.atoms.molecules import WHOLE, ready
from unite_fast.evaluation.results import is_result_of
from unite_fast.model.unite import UNITE
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.reconstruct import reconstruct

BATCH = 128  # reconstructions per pass
TILES = 4  # of samples between looks for a stop
CURVES = {  # of a result, the numbers that a run's log keeps, by what they are of
    "reconstruction": ("match", "rmsd", "rms"),
    "generation": ("valid", "unique_of_valid", "novel_of_unique", "valid_and_unique", "overall_valid"),
}


def never() -> bool:
    return False


def open_heldout(reading: DataConfig, model: ModelConfig, part: str = "") -> AtomSource:
    """The held-out structures of a run, of another ``part`` if one is named. Raises UserError."""
    if "atoms" not in modality.of(model).scores:
        raise UserError("these scores are of molecules and crystals, and this is a model of images")
    atoms = dataclasses.replace(reading.atoms, heldout_part=part or reading.atoms.heldout_part)
    source = data.open_source(dataclasses.replace(reading, atoms=atoms), model, "heldout")
    assert isinstance(source, AtomSource)
    return source


def open_training(reading: DataConfig, model: ModelConfig) -> Structures:
    """What a run trains on, on the host. Raises UserError."""
    source = data.open_source(reading, model)
    assert isinstance(source, AtomSource)
    return source.on(torch.device("cpu"))


def _together(mine: list[Any], ranks: Ranks) -> list[Any]:
    """What all ranks have, in the order of its numbers; ``mine``: (number, item) pairs."""
    return [item for _, item in sorted((pair for part in ranks.gather(mine) for pair in part), key=lambda p: p[0])]


@torch.no_grad()
def reconstructions(
    model: UNITE,
    structures: Structures,
    labels: Tensor,
    t_max: float,
    ranks: Ranks,
    stopping: Callable[[], bool] = never,
) -> Structures:
    """Each structure as the model gives it back, in order. labels (S,) int64. Raises Stopped."""
    source = AtomSource(structures, model.config.num_latents, sizes=model.config.atoms.registers == "per_atom")
    mine: list[Any] = []
    for low in range(ranks.rank * BATCH, len(structures), ranks.world_size * BATCH):
        if stopping():
            raise Stopped
        numbers = torch.arange(low, min(low + BATCH, len(structures)))
        few = source.few(numbers)
        content = {name: value.to(ranks.device) for name, value in few.content.items()}
        sizes = None if few.sizes is None else few.sizes.to(ranks.device)
        made = reconstruct(
            model, model.modality.content(content), numbers, t_max, labels[numbers].to(ranks.device), sizes
        )
        items = model.modality.items(made)
        mine += [(i, one._replace(name=structures.names[i])) for i, one in zip(numbers.tolist(), items, strict=True)]
    return pack(_together(mine, ranks))


@torch.no_grad()
def samples(
    model: UNITE,
    seeds: list[int],
    labels: list[int],
    how: SampleConfig,
    ranks: Ranks,
    stopping: Callable[[], bool] = never,
) -> Structures:
    """One sample per seed and label, in order: each a function of its seed and label alone. Raises Stopped."""
    group = TILES * sampling.TILE
    mine: list[Any] = []
    for low in range(ranks.rank * group, len(seeds), ranks.world_size * group):
        if stopping():
            raise Stopped
        part = slice(low, low + group)
        items = model.modality.items(sampling.sample_tiles(model, seeds[part], labels[part], how))
        names = [f"seed {seed}" for seed in seeds[part]]
        mine += [(low + i, one._replace(name=name)) for i, (one, name) in enumerate(zip(items, names, strict=True))]
    return pack(_together(mine, ranks))


def score(
    model: UNITE,
    ranks: Ranks,
    heldout: AtomSource,
    training: Structures | None,
    count: int,
    how: SampleConfig,
    t_max: float,
    scorer: str = "rdkit",
    workers: int = 1,
    stopping: Callable[[], bool] = never,
) -> tuple[dict[str, Any], dict[str, Structures]]:
    """(results by "CLASS reconstruction" and "CLASS generation" as ``report`` makes them, the structures likewise).

    count: samples of each class, made as ``how`` says; t_max: ``objective.tokenizer_t_max``. Without ``training`` there
    is no novelty. All ranks call it and get the structures; the results are rank 0's, and empty on the others.
    """
    cpu = torch.device("cpu")
    results: dict[str, Any] = {}
    made: dict[str, Structures] = {}
    for label, name in enumerate(heldout.class_names):
        everything = heldout.on(cpu)
        truth = everything.select((everything.labels == label).nonzero()[:, 0])
        labels = torch.full((len(truth),), label)
        back = reconstructions(model, truth, labels, t_max, ranks, stopping)
        new = samples(model, list(range(count)), [label] * count, how, ranks, stopping)
        made |= {f"{name} reconstruction": back, f"{name} truth": truth, f"{name} generation": new}
        seen = None if training is None else training.select((training.labels == label).nonzero()[:, 0])
        if ranks.is_main:
            results[f"{name} reconstruction"] = report.reconstructed(back, truth, scorer, workers)
            results[f"{name} generation"] = report.generated(new, truth, seen, scorer=scorer, workers=workers)
    return results, made


def flat(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``score`` that curves are drawn of."""
    found = {}
    for name, result in results.items():
        wanted = CURVES[name.rsplit(" ", 1)[-1]]
        found |= {f"{name} {key}": result["scores"][key] for key in wanted if result["scores"].get(key) is not None}
    return found


def _holds_structures(folder: Path) -> bool:
    return all(one.suffix == ".extxyz" for one in folder.iterdir())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast evaluate atoms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder, step-N folder, or export")
    add("--weights", metavar="NAME", help="ema, model, or another average that it has (default: the run's)")
    add("--count", type=int, metavar="N", help="samples of each class (default: the run's evaluation.count)")
    add("--part", choices=("valid", "test"), default="", help="held-out part (default: the run's)")
    add("--scorer", choices=WHOLE, help="the rule of validity and match (default: the run's)")
    add("--solver", choices=sampling.SOLVERS, help="default: the run's")
    add("--steps", type=int, help="steps of a fixed-step solver (default: the run's)")
    add("--cfg", type=float, metavar="W", help="guidance scale (default: the run's)")
    add("--no-novelty", action="store_true", help="leave out the novelty, which reads the training set")
    add("--save", type=Path, metavar="FOLDER", help="also the structures, as .extxyz files")
    add("--out", type=Path, metavar="FILE.json", help="the result (default: in RUN/scores)")
    add("--workers", type=int, default=0, help="processes for the chemistry; 0: one per core")
    add("--precision", choices=choices(EvaluationConfig, "precision"), help="of the network (default: the run's)")
    add("--device", choices=choices(Config, "device"), default="auto")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def scores_of(located: Path) -> Path:
    """The folder of a checkpoint's results."""
    return (checkpoint.run_of(located) or located.parent) / "scores"


def place(located: Path, step: int | None, weights: str, protocol: dict[str, Any]) -> Path:
    """Where a result lies that no other protocol has."""
    named = f"atoms_{located.stem if step is None else f'step_{step:07d}'}_{weights}_{files.digest(protocol)[:8]}.json"
    return scores_of(located) / named


def main(argv: list[str]) -> None:
    a = parse(argv)
    located = checkpoint.locate(a.checkpoint)
    config = checkpoint.load_weights(located, a.weights or "ema")[1]
    if config is None:
        raise UserError(f"{located} is an official checkpoint, which is of images")
    e = config.evaluation
    weights, scorer, count = a.weights or e.weights, a.scorer or e.scorer, a.count or e.count
    asked = {"solver": a.solver, "steps": a.steps, "cfg_scale": a.cfg}
    how = dataclasses.replace(config.sample, **{name: value for name, value in asked.items() if value is not None})
    sampling.check(how)
    ready(scorer)
    if a.count is not None and a.count < 1:
        raise UserError(f"--count {a.count}: give at least 1")
    if a.out is not None:
        outputs.check_file(a.out, "--out", checkpoint.reads(located), is_result_of("atoms"))
    else:
        outputs.check(scores_of(located), "the scores' folder")
    if a.save is not None:
        outputs.check_folder(a.save, "--save", checkpoint.reads(located), _holds_structures)
    model, config = checkpoint.load_model(located, weights)
    heldout = open_heldout(config.data, config.model, a.part)
    training = None if a.no_novelty else open_training(config.data, config.model)
    ranks = distributed.start(a.device)
    try:
        precision.setup(ranks.device)
        model.to(ranks.device)
        with precision.autocast(a.precision or e.precision, ranks.device):
            results, made = score(
                model, ranks, heldout, training, count, how, config.objective.tokenizer_t_max, scorer, a.workers
            )
        if not ranks.is_main:
            return
        protocol = {
            "checkpoint": {"sha256": checkpoint.identity(located), "weights": weights},
            "heldout": heldout.pipeline_id(), "count": count, "sample": to_dict(how), "scorer": scorer,
            "precision": a.precision or e.precision, "seeds": f"0-{count - 1}",
        }  # fmt: skip
        path = a.out or place(located, checkpoint.recorded_step(located), weights, protocol)
        protocol["environment"] = provenance.of(ranks.device, ranks.world_size)
        for name, structures in made.items():
            if a.save is not None:
                a.save.mkdir(parents=True, exist_ok=True)
                listed = (structures[i] for i in range(len(structures)))
                writers.write(a.save / f"{name.replace(' ', '_')}.extxyz", listed)
        content = {"command": "atoms", "protocol": protocol, "result": flat(results), "tables": results}
        content["shown"] = pictures.shown(made, scorer)
        drawn = pictures.save(path.parent.parent / "report", made, scorer) if path.parent.name == "scores" else []
        with files.refusals(str(path), "; choose another place with --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, content)
        print("\n\n".join(report.table(result) for result in results.values()))
        print("\n".join(f"written to {one}" for one in (path, *drawn)))
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(run(main))
