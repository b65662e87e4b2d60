"""The picture grids of a run: real samples, their reconstructions, samples of averaged and of raw weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from unite_fast import data, sampling
from unite_fast.base import faults
from unite_fast.config import DataConfig, ModelConfig, SampleConfig
from unite_fast.data import Batch
from unite_fast.modality import pictures
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.stats import Log
from unite_fast.sampling.reconstruct import reconstruct
from unite_fast.training.state import TrainState
from unite_fast.training.weights import weights_of


class Shown(NamedTuple):
    """What stands in the grids."""

    batch: Batch
    names: list[str]  # of the classes, one of each column; empty without classes
    held_out: bool  # whether the run is not trained on them


def examples(reading: DataConfig, model: ModelConfig, device: torch.device) -> Shown:
    """The samples of the grids: one of each of the first classes that have any.

    Held-out ones where the run has them.
    """
    source, split = data.open_heldout(reading, model)
    held_out = split == "heldout"
    present = source.labels.unique()
    columns = torch.arange(pictures.columns(len(present)))
    labels, occurrence = present[columns % len(present)], columns // len(present)
    indices = []
    for label, number in zip(labels.tolist(), occurrence.tolist(), strict=True):
        members = (source.labels == label).nonzero()[:, 0]
        indices.append(int(members[number % len(members)]))
    batch = source.few(torch.tensor(indices)).to(device)
    return Shown(batch, [source.class_names[i] for i in labels.tolist()] if source.class_names else [], held_out)


@torch.no_grad()
def save_pictures(
    path: Path, state: TrainState, how: SampleConfig, t_max: float, ranks: Ranks, log: Log | None, shown: Shown
) -> None:
    """samples/step_N.png, four rows: real | reconstruction | EMA samples | raw samples, with fixed noise and labels.

    shown: the real ones; the samples have the same labels. t_max: of the times of tokenization.
    All ranks of a sharded model call it, or rank 0 alone, which draws and sends them to the services of ``log``.
    """
    batch, made = shown.batch, []
    faults.strike("eval", state.step)
    labels, content = batch.labels, state.model.modality.content(batch.content)
    seeds = range(len(labels))
    with weights_of(state, state.optimizer.ema) as model:
        if ranks.is_main:
            made.append(reconstruct(model, content, torch.arange(len(labels)), t_max, labels, batch.sizes))
            made.append(sampling.sample(model, labels, how, seeds=seeds))
    with weights_of(state, state.optimizer.parameters) as model:
        if ranks.is_main:
            made.append(sampling.sample(model, labels, how, seeds=seeds))
    if not ranks.is_main:
        return
    reconstruction, averaged, raw = made
    modality = state.model.modality
    real = modality.original(content)
    guided = "" if how.cfg_scale == 1 else f"\nguidance {how.cfg_scale:g}"
    near = modality.likeness(content, reconstruction)
    kind = "real, held out" if shown.held_out else "real"
    rows = [kind, f"reconstructed\nEMA {near}".rstrip(), f"sampled, EMA{guided}", f"sampled, raw{guided}"]
    words = pictures.Words(f"step {state.step:,}", shown.names, rows)
    target = path / "samples" / f"step_{state.step:07d}.png"
    modality.show(target, [real, reconstruction, averaged, raw], words)
    if log is not None:
        log.picture(target, state.step)
