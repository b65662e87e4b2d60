"""Scores while a run trains, on all ranks, of averaged weights: FID with the published search for the guidance scale,
its sweep over intervals and orders, and reconstructions of held-out images.

    scores/training/step_0050040_search.json    {"kind", "step", "epoch", "protocol", "rows", "best", "result"}

Nothing of the run changes but ``best_cfg_scale``, from which the next search begins: the raw weights are put back bit
for bit, and the samples' noise is a function of seeds. When a score is due is a function of the images seen. A stop
ends it after the tile in work, and the run that goes on from there finishes it first; what fails on one rank fails on
all and is dealt with by train.on_eval_error.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unite_fast import data
from unite_fast.base import faults, files, provenance
from unite_fast.base.errors import Stopped, UserError
from unite_fast.base.files import digest as digest_of
from unite_fast.config import Config, DataConfig, EvaluationConfig, ModelConfig
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
from unite_fast.modality.images import ImageLosses
from unite_fast.optim import ema
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.session import Session
from unite_fast.training.state import TrainState
from unite_fast.training.step import weights_of

NAMES = {
    "search": "the guidance search", "sweep": "the guidance sweep", "rfid": "the reconstruction score",
    "atoms": "the score of samples and reconstructions",
}  # fmt: skip


class Files(NamedTuple):
    """What scores of images are computed with, opened before the first step."""

    extractor: Extractor
    reference: Statistics | None
    about: dict[str, Any]  # of the reference


class AtomFiles(NamedTuple):
    """What scores of molecules and crystals are computed with."""

    heldout: AtomSource
    training: Structures


def _check_modality(e: EvaluationConfig, modality: str) -> None:
    for key in ("fid_epoch", "sweep_epoch", "rfid_epoch") if modality == "atoms" else ("atoms_epoch",):
        if getattr(e, key):
            raise UserError(f"evaluation.{key} does not score model.modality={modality}; set it to 0")


def _open_atoms(reading: DataConfig, model: ModelConfig, scorer: str) -> AtomFiles:
    """Raises UserError."""
    try:
        atoms.ready(scorer)
        return AtomFiles(atoms.open_heldout(reading, model), atoms.open_training(reading, model))
    except UserError as error:
        raise UserError(f"evaluation while training: {error}") from None


def open_files(config: Config, world_size: int) -> Files | AtomFiles | None:
    """None when nothing is to be scored. Raises UserError for files that are missing or do not fit, and for counts."""
    e = config.evaluation
    generates = e.fid_epoch > 0 or e.sweep_epoch > 0
    _check_modality(e, config.model.modality)
    if not generates and not e.rfid_epoch and not e.atoms_epoch:
        return None
    known = [*ema.names(config.optim), "model"]
    if e.weights not in known:
        raise UserError(f"evaluation.weights={e.weights} is not among the run's: {', '.join(known)}")
    # Ranks with fewer tiles would leave the others waiting for their shards.
    if config.train.strategy != "ddp" and world_size > 1:
        raise UserError(
            f"evaluation while training needs train.strategy=ddp (or one process), this is {config.train.strategy}; "
            "score its checkpoints with python -m unite_fast.evaluate"
        )
    if e.atoms_epoch:
        return _open_atoms(config.data, config.model, e.scorer)
    try:
        if generates:
            generation.of_run(config.sample, e, config.efficiency).check(config.model)
            if not e.reference:
                raise UserError("evaluation.reference names no statistics of the real images; make them with "
                                "python -m unite_fast.evaluation.statistics")  # fmt: skip
        if e.rfid_epoch:
            data.open_source(config.data, config.model, "heldout")
        reference, about = statistics.read(e.reference) if generates else (None, {})
        extractor = features.open_extractor(config.data, config.model, e.extractor, e.inception, e.inception_sha256)
        if reference is not None:
            statistics.check_extractor(about, len(reference.mean), extractor, e.reference)
    except UserError as error:
        raise UserError(f"evaluation while training: {error}") from None
    return Files(extractor, reference, about)


def due(e: EvaluationConfig, batch: int, images_seen: int, images_per_epoch: int, last: bool = False) -> list[str]:
    """What has to be scored after the step that reached ``images_seen``: at the end of every so many epochs.

    last: no step follows. An epoch of which less than a batch is missing then counts as ended.
    """
    reached = images_seen + (batch - 1 if last else 0)

    def ends(epochs: float) -> bool:
        period = max(1, round(epochs * images_per_epoch))
        return epochs > 0 and images_seen > 0 and reached // period > max(0, images_seen - batch) // period

    generated = ["sweep"] if ends(e.sweep_epoch) else ["search"] if ends(e.fid_epoch) else []
    return generated + (["rfid"] if ends(e.rfid_epoch) else []) + (["atoms"] if ends(e.atoms_epoch) else [])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _finished(path: Path) -> dict[str, Any] | None:
    """The content of a score; None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class Monitor:
    """Calls of ``monitor(state)`` after each step, on all ranks, score what is due."""

    def __init__(
        self,
        config: Config,
        session: Session,
        files: Files | AtomFiles,
        state: TrainState,
        images_per_epoch: int,
        last_step: int,
        losses: Losses,
    ) -> None:
        """Removes scores later than ``state``: they will come again. Unfinished ones are taken up then."""
        self.config, self.session, self.files = config, session, files
        self.perceptual = losses.perceptual if isinstance(losses, ImageLosses) else None
        self.ranks: Ranks = session.ranks
        self.images_per_epoch, self.last_step = images_per_epoch, last_step
        self.folder = session.path / "scores" / "training"
        self.ranks.decide(functools.partial(self._tidy, state.step))

    def _tidy(self, step: int) -> None:
        with files.refusals(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("step_*"):
                if int(path.name.split("_")[1]) > step and path.suffix == ".json":
                    path.unlink()

    def __call__(self, state: TrainState) -> str:
        """Scores what is due and not done yet; an empty string, or the state in which a stop ends all ranks."""
        e, batch = self.config.evaluation, self.config.train.global_batch
        for kind in due(e, batch, state.images_seen, self.images_per_epoch, state.step == self.last_step):
            path = self.folder / f"step_{state.step:07d}_{kind}.json"
            finished = self.ranks.decide(functools.partial(_finished, path))
            if finished is not None:  # perhaps after the checkpoint was saved, which then has an older scale
                if "best" in finished:
                    state.best_cfg_scale = finished["best"]["cfg_scale"]
                continue
            try:
                self.session.guarded(NAMES[kind], functools.partial(self._score, kind, state, path))
            except Stopped:
                return self.session.settle()
        return ""

    def _score(self, kind: str, state: TrainState, path: Path) -> None:
        self.ranks.together(functools.partial(faults.strike, "eval", state.step))
        name = self.config.evaluation.weights
        tensors = state.optimizer.parameters if name == "model" else state.optimizer.averages[name]
        weights = {
            "run": self.config.name, "step": state.step, "weights": name,
            "sha256": self.ranks.decide(functools.partial(digest, tensors)),
        }  # fmt: skip
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        state.model.eval()
        try:
            with weights_of(state, tensors), torch.random.fork_rng(devices=devices), torch.no_grad():
                if isinstance(self.files, AtomFiles):
                    found = self._atoms(state, self.files)
                elif kind == "rfid":
                    found = self._rfid(state, self.files)
                else:
                    found = self._search(kind, state, path, weights, self.files)
        finally:
            state.model.train()
        protocol = {"checkpoint": weights} | found.pop("protocol")
        protocol["environment"] = provenance.of(self.ranks.device, self.ranks.world_size)
        epoch = state.images_seen / self.images_per_epoch
        content = {"kind": kind, "step": state.step, "epoch": epoch, "protocol": protocol} | found
        self.ranks.together(functools.partial(self._write, path, content))
        if "best" in found:
            state.best_cfg_scale = found["best"]["cfg_scale"]

    def _atoms(self, state: TrainState, files: AtomFiles) -> dict[str, Any]:
        """Of the weights in ``state``; the chemistry runs in rank 0's processes, as many as there are cores."""
        c, e = self.config, self.config.evaluation
        with precision.autocast(e.precision, self.ranks.device):
            results, _ = atoms.score(
                state.model, self.ranks, files.heldout, files.training, e.count, c.sample, c.objective.tokenizer_t_max,
                scorer=e.scorer, workers=0, stopping=self.session.stopping,
            )  # fmt: skip
        protocol = {"heldout": files.heldout.pipeline_id(), "sample": to_dict(c.sample), "scorer": e.scorer}
        protocol |= {"count": e.count, "precision": e.precision}
        return {"protocol": protocol, "result": atoms.flat(results), "tables": results}

    def _search(
        self, kind: str, state: TrainState, path: Path, weights: dict[str, Any], files: Files
    ) -> dict[str, Any]:
        """The published search from the best scale so far; "sweep" also tries other intervals and cfg_first."""
        extractor, reference, about = files
        progress = path.with_suffix(".jsonl")
        identity = digest_of([weights, extractor.identity(), about["sha256"]])
        options = Options(progress, stopping=self.session.stopping)

        def compute(chosen: Settings) -> dict[str, Any]:
            return generation.score(state.model, chosen, extractor, reference, self.ranks, identity, options=options)

        scored = guidance_search.Scored(progress, identity, compute, self.ranks, discard=True)
        start = state.best_cfg_scale or self.config.sample.cfg_scale
        c = self.config
        best = guidance_search.search(scored, generation.of_run(c.sample, c.evaluation, c.efficiency, cfg_scale=start))
        overall = guidance_search.sweep(scored, best) if kind == "sweep" else best
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

    def _rfid(self, state: TrainState, files: Files) -> dict[str, Any]:
        c, perceptual = self.config, self.perceptual
        settings = reconstruction.of_run(c.objective, c.evaluation, c.efficiency)
        source = data.open_source(c.data, c.model, "heldout")
        said = statistics.described(c.data.source, c.model.image_size, "heldout", source, self.ranks.device)
        with nullcontext() if perceptual is None else perceptual.without_dropout():
            protocol = reconstruction.protocol(settings, files.extractor, perceptual, said)
            result = reconstruction.score(
                state.model, settings, source, c.data, files.extractor, self.ranks, perceptual,
                stopping=self.session.stopping,
            )  # fmt: skip
        return {"protocol": protocol, "result": result}

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        files.write_json(path, content)
        for left in self.folder.glob(f"{path.stem}.jsonl*"):  # of other numbers of ranks, too
            left.unlink(missing_ok=True)
        wanted = ("fid", "is", "rfid", "psnr", "lpips")
        shown = {k: v for k, v in content["result"].items() if k in wanted or content["kind"] == "atoms"}
        scale = f" at w = {content['best_overall']['cfg_scale']:g}" if "best_overall" in content else ""
        said = "  ".join(f"{k} {v:.5g}" for k, v in shown.items())
        print(f"{NAMES[content['kind']]} at step {content['step']}{scale}: {said}", flush=True)
