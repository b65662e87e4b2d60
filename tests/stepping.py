"""Training steps without train.py: a step, its state and its batches; the operations that a step dispatches."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from support import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.config import Config, ObjectiveConfig, batch_split
from unite_fast.config.yaml_text import load
from unite_fast.data import Batch, batch_of_images
from unite_fast.modality.images import ImageLosses
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.objective import Draws, FlowPass, Objective, SeededDraws
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.step import TrainStep


def load_tiny(*overrides: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(TINY)
        return load(str(path), list(overrides))


def backward(
    model: UNITE,
    images: Tensor,
    labels: Tensor,
    draws: Draws | SeededDraws,
    config: ObjectiveConfig,
    perceptual: Perceptual | None = None,
    flow_pass: FlowPass | None = None,
) -> dict[str, Tensor]:
    """``Objective.backward`` of images (B, Q, S, S) in [0, 1]."""
    objective = Objective(config, ImageLosses(config, perceptual))
    return objective.backward(model, batch_of_images(images, labels, labels), draws, flow_pass=flow_pass)


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach the device by name, and apart from them those that launch something.

    Views and uninitialised tensors launch nothing; a registered operation counts once, whatever it launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launching: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        self.counts[name] += 1
        aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
        is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
        if not is_view and "empty" not in name and "_unsafe_view" not in name:
            self.launching[name] += 1
        return function(*args, **(kwargs or {}))


def trainer(*overrides: str, device: str = "cpu", ranks: Ranks | None = None) -> tuple[TrainStep, Callable[[], Batch]]:
    """A step and a source of this rank's batches, as train.py makes them."""
    config = load_tiny(*overrides)
    ranks = ranks or Ranks(0, 1, torch.device(device))
    state = assemble.fresh_state(config, ranks)
    state.model.train()
    n, m = config.train.global_batch, config.model
    objective = Objective.open(config.model, config.objective, config.efficiency)
    step = TrainStep(state, config, ranks, batch_split(config.train, ranks.world_size), 1000, objective)
    generator = torch.Generator().manual_seed(0)
    share = slice(ranks.rank * n // ranks.world_size, (ranks.rank + 1) * n // ranks.world_size)

    def batch() -> Batch:
        samples = torch.arange(state.images_seen, state.images_seen + n)
        images = torch.rand(n, m.channels, m.image_size, m.image_size, generator=generator)
        return batch_of_images(*(t[share].to(ranks.device) for t in (images, samples % m.num_classes, samples)))

    return step, batch
