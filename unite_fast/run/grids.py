"""The picture grids of a run: real images, their reconstructions, samples of averaged and of raw weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from unite_fast import data, sampling
from unite_fast.base import faults
from unite_fast.config import Config
from unite_fast.modality.images import to_float
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.reconstruct import reconstruct
from unite_fast.training.state import TrainState
from unite_fast.training.step import sampling_model

GRID_COLUMNS = 8


def examples(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images in [0, 1] and labels of the grids: one of each of the first classes that have any.

    Held-out images where the run has them.
    """
    held_out = config.data.source == "digits" or config.data.heldout_path
    source = data.open_source(config.data, config.model, "heldout" if held_out else "train")
    present, columns = source.labels.unique(), torch.arange(GRID_COLUMNS)
    labels, occurrence = present[columns % len(present)], columns // len(present)
    indices = []
    for label, number in zip(labels.tolist(), occurrence.tolist(), strict=True):
        members = (source.labels == label).nonzero()[:, 0]
        indices.append(int(members[number % len(members)]))
    images = torch.stack([source.load(i) for i in indices])
    return to_float(images.to(device)), labels.to(device)


@torch.no_grad()
def save_pictures(
    path: Path, state: TrainState, config: Config, ranks: Ranks, images: Tensor, labels: Tensor, steps: int = 0
) -> None:
    """samples/step_N.png, four rows: real | reconstruction | EMA samples | raw samples, with fixed noise and labels.

    images (B, Q, S, S) in [0, 1] and labels (B,) are shown; the samples have the same labels. A sharded model needs
    all ranks; rank 0 writes.
    """
    model, s = state.model, config.sample
    model.eval()
    faults.strike("eval", state.step)
    how, seeds = dataclasses.replace(s, steps=steps or s.steps), range(len(labels))
    try:
        raw = sampling.sample(model, labels, how, seeds=seeds)
        restore = sampling_model(state)
        try:
            reconstruction = reconstruct(model, images, torch.arange(len(images)), config.objective.tokenizer_t_max)
            averaged = sampling.sample(model, labels, how, seeds=seeds)
        finally:
            restore()
    finally:
        model.train()
    if ranks.is_main:
        model.modality.show(path / "samples" / f"step_{state.step:07d}.png", [images, reconstruction, averaged, raw])
