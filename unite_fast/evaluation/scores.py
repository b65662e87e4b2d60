"""The scores that a run can have while it trains: what each opens before the first step, and what it computes.

A new one is a row of ``SCORES``, how often it is due a key of ``evaluation``, and its name one of ``Modality.scores``.
``run.monitor`` asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from unite_fast import data
from unite_fast.analysis.trajectory import DEFINITION, Trajectory
from unite_fast.analysis.walk import chosen, walk
from unite_fast.base.errors import UserError
from unite_fast.base.files import digest
from unite_fast.config import Config, DataConfig, EfficiencyConfig, EvaluationConfig, ModelConfig, SampleConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.data.atoms import Structures
from unite_fast.data.atoms.source import AtomSource
from unite_fast.efficiency import precision
from unite_fast.evaluation import features, generation, guidance_search, reconstruction, statistics
from unite_fast.evaluation.atoms import runs as atoms
from unite_fast.evaluation.features import Extractor
from unite_fast.evaluation.fid import Statistics
from unite_fast.evaluation.generation import Options, Settings
from unite_fast.modality import Losses
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks


@dataclass(frozen=True)
class Moment:
    """A run at the step that is scored. The model has the weights that are scored."""

    config: Config
    model: UNITE
    ranks: Ranks
    losses: Losses  # the run's
    scale: float  # of the guidance, from which a search begins
    weights: dict[str, Any]  # what a protocol says of them
    progress: Path  # of what an interrupted score keeps
    stopping: Callable[[], bool]


# What scores are computed with, opened before the first step, once for all that have the same. Raises UserError.
Open = Callable[[DataConfig, ModelConfig, EvaluationConfig, SampleConfig, EfficiencyConfig], Any]


class Score(NamedTuple):
    words: str  # what it is called
    key: str  # of ``evaluation``: the epochs between two of them
    open: Open
    run: Callable[[Moment, Any], dict[str, Any]]  # {"protocol", "result"} and more. Raises Stopped
    shown: tuple[str, ...] = ()  # results in its printed line, if not all
    holds: str = ""  # another score that it makes needless when both are due


class ImageFiles(NamedTuple):
    """What scores of images are computed with."""

    extractor: Extractor
    reference: Statistics | None
    about: dict[str, Any]  # of the reference
    heldout: data.Source | None


class AtomFiles(NamedTuple):
    """What scores of molecules and crystals are computed with."""

    heldout: AtomSource
    training: Structures


def _open_images(
    reading: DataConfig, model: ModelConfig, e: EvaluationConfig, how: SampleConfig, efficiency: EfficiencyConfig
) -> ImageFiles:
    """For all scores of images that ``e`` asks for."""
    generates = e.fid_epoch > 0 or e.sweep_epoch > 0
    if generates:
        generation.of_run(how, e, efficiency).check(model)
        if not e.reference:
            raise UserError("evaluation.reference names no statistics of the real images; make them with "
                            "python -m unite_fast.evaluation.statistics")  # fmt: skip
    heldout = data.open_source(reading, model, "heldout") if e.rfid_epoch else None
    reference, about = statistics.read(e.reference) if generates else (None, {})
    extractor = features.open_extractor(reading, model, e.extractor, e.inception, e.inception_sha256)
    if reference is not None:
        statistics.check_extractor(about, len(reference.mean), extractor, e.reference)
    return ImageFiles(extractor, reference, about, heldout)


def _open_heldout(reading: DataConfig, model: ModelConfig, *_: Any) -> data.Source:
    source, split = data.open_heldout(reading, model)
    if split == "train":
        raise UserError("evaluation.heldout_epoch needs held-out samples; name some with data.heldout_path")
    return source


def _open_atoms(reading: DataConfig, model: ModelConfig, e: EvaluationConfig, *_: Any) -> AtomFiles:
    atoms.ready(e.scorer)
    return AtomFiles(atoms.open_heldout(reading, model), atoms.open_training(reading, model))


def _search(at: Moment, files: ImageFiles, sweeps: bool = False) -> dict[str, Any]:
    """The published search from the best scale so far; a sweep also tries other intervals and cfg_first."""
    extractor, reference, about, _ = files
    assert reference is not None, "opened for searches"
    identity = digest([at.weights, extractor.identity(), about["sha256"]])
    options = Options(at.progress, stopping=at.stopping)

    def compute(chosen: Settings) -> dict[str, Any]:
        return generation.score(at.model, chosen, extractor, reference, at.ranks, identity, options=options)

    scored = guidance_search.Scored(at.progress, identity, compute, at.ranks, discard=True)
    c = at.config
    begin = generation.of_run(c.sample, c.evaluation, c.efficiency, cfg_scale=at.scale)
    best = guidance_search.search(scored, begin)
    overall = guidance_search.sweep(scored, best) if sweeps else best
    rows = [{"settings": row["settings"], "result": row["result"]} for row in scored.rows]
    protocol = {"extractor": extractor.identity(), "reference": about}
    protocol |= {"seeds": f"0-{overall.count - 1}", "inception_score_parts": 10}
    return {
        "protocol": protocol,
        "rows": rows,
        "best": best.described(),
        "best_overall": overall.described(),
        "result": scored.row(overall)["result"],
    }


def _sweep(at: Moment, files: ImageFiles) -> dict[str, Any]:
    return _search(at, files, sweeps=True)


def _rfid(at: Moment, files: ImageFiles) -> dict[str, Any]:
    assert files.heldout is not None, "opened for rFID"
    return _reconstructions(at, files.heldout, files.extractor)


def _reconstructions(at: Moment, source: data.Source, extractor: Extractor | None) -> dict[str, Any]:
    c, perceptual = at.config, getattr(at.losses, "perceptual", None)
    settings = reconstruction.of_run(c.objective, c.evaluation, c.efficiency)
    said = statistics.described(c.data.source, c.model.image_size, "heldout", source, at.ranks.device)
    with nullcontext() if perceptual is None else perceptual.without_dropout():
        protocol = reconstruction.protocol(settings, extractor, perceptual, said)
        result = reconstruction.score(
            at.model, settings, source, c.data, extractor, at.ranks, perceptual, stopping=at.stopping
        )
    return {"protocol": protocol, "result": result}


def _atoms(at: Moment, files: AtomFiles) -> dict[str, Any]:
    """The chemistry runs in rank 0's processes, as many as there are cores."""
    c, e = at.config, at.config.evaluation
    with precision.autocast(e.precision, at.ranks.device):
        results, _ = atoms.score(
            at.model, at.ranks, files.heldout, files.training, e.count, c.sample, c.objective.tokenizer_t_max,
            scorer=e.scorer, workers=0, stopping=at.stopping,
        )  # fmt: skip
    protocol = {"heldout": files.heldout.pipeline_id(), "sample": to_dict(c.sample), "scorer": e.scorer}
    protocol |= {"count": e.count, "precision": e.precision}
    return {"protocol": protocol, "result": atoms.flat(results), "tables": results}


def _heldout(at: Moment, source: data.Source) -> dict[str, Any]:
    """Reconstructions of images, and the flow's losses of any modality: with the same samples, noise and times at every
    call, so that they compare over a run."""
    c, places = at.config, chosen(source, at.config.evaluation.heldout_count)
    losses = Trajectory(at.ranks.device, at.model.latent_shape, images=False)
    t_max, recipe = c.objective.tokenizer_t_max, c.evaluation.precision
    walk(at.model, source, places, c.data, [losses], at.ranks, t_max, recipe, stopping=at.stopping)
    seen = losses.result()
    by_time = {f"flow_t{t:g}": loss for t, loss in zip(seen["times"], seen["velocity_loss"], strict=True)}
    flow = {"flow": fmean(by_time.values()), "x0": fmean(seen["x0_loss"]), "cosine": fmean(seen["cosine"])}
    flow |= {"cosine_mean": seen["cosine_mean"], "latent_std": seen["latent_std"]} | by_time
    if isfinite(explained := fmean(seen["explained"])):  # of latents that do not differ nothing can be
        flow["explained"] = explained
    said = {"definition": DEFINITION, "samples": seen["samples"]}
    if "rfid" in at.model.modality.scores:
        found = _reconstructions(at, source, None)
        return {"protocol": found["protocol"] | {"flow": said}, "result": found["result"] | flow}
    held = statistics.described(c.data.source, c.model.image_size, "heldout", source, at.ranks.device)
    return {"protocol": {"data": held, "flow": said}, "result": flow}


OF_IMAGES = ("fid", "is", "rfid", "psnr", "l1", "lpips")
SCORES = {  # in the order in which they are computed
    "sweep": Score("the guidance sweep", "sweep_epoch", _open_images, _sweep, OF_IMAGES, holds="search"),
    "search": Score("the guidance search", "fid_epoch", _open_images, _search, OF_IMAGES),
    "rfid": Score("the reconstruction score", "rfid_epoch", _open_images, _rfid, OF_IMAGES),
    "heldout": Score(
        "the score of held-out samples", "heldout_epoch", _open_heldout, _heldout, (*OF_IMAGES, "flow", "explained")
    ),
    "atoms": Score("the score of samples and reconstructions", "atoms_epoch", _open_atoms, _atoms),
}
