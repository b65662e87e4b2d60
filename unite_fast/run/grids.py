"""The picture grids of a run: real samples, their reconstructions, samples of averaged and of raw weights."""

from __future__ import annotations

from pathlib import Path

import torch

from unite_fast import data, sampling
from unite_fast.base import faults
from unite_fast.config import DataConfig, ModelConfig, SampleConfig
from unite_fast.data import Batch
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.reconstruct import reconstruct
from unite_fast.training.state import TrainState
from unite_fast.training.step import weights_of

GRID_COLUMNS = 8


def examples(reading: DataConfig, model: ModelConfig, device: torch.device) -> Batch:
    """The samples of the grids: one of each of the first classes that have any.

    Held-out ones where the run has them.
    """
    source, _ = data.open_heldout(reading, model)
    present, columns = source.labels.unique(), torch.arange(GRID_COLUMNS)
    labels, occurrence = present[columns % len(present)], columns // len(present)
    indices = []
    for label, number in zip(labels.tolist(), occurrence.tolist(), strict=True):
        members = (source.labels == label).nonzero()[:, 0]
        indices.append(int(members[number % len(members)]))
    batch = source.few(torch.tensor(indices))
    return Batch.from_tensors({name: tensor.to(device) for name, tensor in batch.tensors().items()})


@torch.no_grad()
def save_pictures(path: Path, state: TrainState, how: SampleConfig, t_max: float, ranks: Ranks, shown: Batch) -> None:
    """samples/step_N.png, four rows: real | reconstruction | EMA samples | raw samples, with fixed noise and labels.

    shown: the real ones; the samples have the same labels. t_max: of the times of tokenization.
    A sharded model needs all ranks; rank 0 writes.
    """
    model = state.model
    model.eval()
    faults.strike("eval", state.step)
    labels, content = shown.labels, model.modality.content(shown.content)
    seeds = range(len(labels))
    try:
        raw = sampling.sample(model, labels, how, seeds=seeds)
        with weights_of(state, state.optimizer.ema):
            reconstruction = reconstruct(model, content, torch.arange(len(labels)), t_max, labels, shown.sizes)
            averaged = sampling.sample(model, labels, how, seeds=seeds)
    finally:
        model.train()
    if ranks.is_main:
        real = model.modality.original(content)
        model.modality.show(path / "samples" / f"step_{state.step:07d}.png", [real, reconstruction, averaged, raw])
