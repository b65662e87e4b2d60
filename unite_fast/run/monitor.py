"""Scores while a run trains, on all ranks, of averaged weights: when one of ``evaluation.scores`` is due, of what, and
where it is kept.

    scores/training/step_0050040_search.json    {"kind", "step", "epoch", "protocol", "rows", "best", "result"}

Nothing of the run changes but ``best_cfg_scale``, from which the next search begins: the raw weights are put back bit
for bit, and the samples' noise is a function of seeds. When a score is due is a function of the images seen. A stop
ends it after the tile in work, and the run that goes on from there finishes it first; what fails on one rank fails on
all and is dealt with by train.on_eval_error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unite_fast import modality
from unite_fast.base import faults, files, provenance
from unite_fast.base.errors import Stopped, UserError
from unite_fast.config import Config, EvaluationConfig
from unite_fast.evaluation.results import WHILE_TRAINING, weights_sha256
from unite_fast.evaluation.scores import SCORES, Moment
from unite_fast.modality import Losses
from unite_fast.optim import ema
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.session import Session
from unite_fast.training.state import TrainState
from unite_fast.training.weights import weights_of

Opened = Mapping[str, Any]  # what each score that will be due is computed with, by its name


def open_files(config: Config) -> Opened:
    """Empty when nothing is to be scored. Raises UserError for files that are missing or do not fit, and for counts."""
    e, fitting = config.evaluation, modality.of(config.model).scores
    wanted = {name: score for name, score in SCORES.items() if getattr(e, score.key)}
    for name, score in wanted.items():
        if name not in fitting:
            raise UserError(
                f"evaluation.{score.key} does not score model.modality={config.model.modality}; set it to 0"
            )
    if not wanted:
        return {}
    known = [*ema.names(config.optim), "model"]
    if e.weights not in known:
        raise UserError(f"evaluation.weights={e.weights} is not among the run's: {', '.join(known)}")
    opened: dict[Any, Any] = {}
    try:
        for score in wanted.values():
            if score.open not in opened:
                opened[score.open] = score.open(config.data, config.model, e, config.sample, config.efficiency)
    except UserError as error:
        raise type(error)(f"evaluation while training: {error}") from None
    return {name: opened[score.open] for name, score in wanted.items()}


def due(e: EvaluationConfig, batch: int, images_seen: int, images_per_epoch: int, last: bool = False) -> list[str]:
    """What has to be scored after the step that reached ``images_seen``: at the end of every so many epochs.

    last: no step follows. An epoch of which less than a batch is missing then counts as ended.
    """
    reached = images_seen + (batch - 1 if last else 0)

    def ends(epochs: float) -> bool:
        period = max(1, round(epochs * images_per_epoch))
        return epochs > 0 and images_seen > 0 and reached // period > max(0, images_seen - batch) // period

    found = [name for name, score in SCORES.items() if ends(getattr(e, score.key))]
    return [name for name in found if not any(SCORES[other].holds == name for other in found)]


def _finished(path: Path) -> dict[str, Any] | None:
    """The content of a score; None where there is none that can be read."""
    try:
        return json.loads(files.read_text(path))
    except (OSError, ValueError):
        return None


class Monitor:
    """Calls of ``monitor(state)`` after each step, on all ranks, score what is due."""

    def __init__(
        self,
        config: Config,
        session: Session,
        files: Opened,
        state: TrainState,
        images_per_epoch: int,
        last_step: int,
        losses: Losses,
    ) -> None:
        """Removes scores later than ``state``: they will come again. Unfinished ones are taken up then."""
        self.config, self.session, self.files = config, session, files
        self.losses = losses
        self.ranks: Ranks = session.ranks
        self.images_per_epoch, self.last_step = images_per_epoch, last_step
        self.folder = session.path / WHILE_TRAINING
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
                self.session.guarded(SCORES[kind].words, functools.partial(self._score, kind, state, path))
            except Stopped:
                return self.session.settle()
        return ""

    def _score(self, kind: str, state: TrainState, path: Path) -> None:
        self.ranks.together(functools.partial(faults.strike, "eval", state.step))
        name = self.config.evaluation.weights
        tensors = state.optimizer.parameters if name == "model" else state.optimizer.averages[name]
        weights = {"run": self.config.name, "step": state.step, "weights": name}
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with weights_of(state, tensors) as model, torch.random.fork_rng(devices=devices), torch.no_grad():
            held = {n: p for n, p in model.named_parameters() if n in tensors}
            weights["sha256"] = self.ranks.decide(functools.partial(weights_sha256, held))
            scale = state.best_cfg_scale or self.config.sample.cfg_scale
            at = Moment(
                self.config, model, self.ranks, self.losses, scale, weights, path.with_suffix(".jsonl"),
                self.session.stopping,
            )  # fmt: skip
            found = SCORES[kind].run(at, self.files[kind])
        protocol = {"checkpoint": weights} | found.pop("protocol")
        protocol["environment"] = provenance.of(self.ranks.device, self.ranks.world_size)
        epoch = state.images_seen / self.images_per_epoch
        content = {"kind": kind, "step": state.step, "epoch": epoch, "protocol": protocol} | found
        self.ranks.together(functools.partial(self._write, path, content))
        if "best" in found:
            state.best_cfg_scale = found["best"]["cfg_scale"]

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        files.write_json(path, content)
        for left in self.folder.glob(f"{path.stem}.jsonl*"):  # of other numbers of ranks, too
            left.unlink(missing_ok=True)
        score = SCORES[content["kind"]]
        shown = {k: v for k, v in content["result"].items() if not score.shown or k in score.shown}
        scale = f" at w = {content['best_overall']['cfg_scale']:g}" if "best_overall" in content else ""
        said = "  ".join(f"{k} {v:.5g}" for k, v in shown.items())
        print(f"{score.words} at step {content['step']}{scale}: {said}", flush=True)
