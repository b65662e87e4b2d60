"""What UNITE is trained on: how it enters the encoder, what the decoder makes of latents, how the two are compared.

A new modality is one file with a class that has the members of ``Modality``, a row of ``MODALITIES``, and in
``config/keys.py`` its name and what it is made from. What is special to it anywhere else is asked of it here.

Shape letters: B batch, M context tokens, D encoder width, K registers, F decoder input width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unite_fast.config import EfficiencyConfig, ModelConfig, ObjectiveConfig
from unite_fast.data import Source
from unite_fast.data.batch import Batch
from unite_fast.layers.vit import ViT
from unite_fast.modality.atoms import Atoms
from unite_fast.modality.images import Images
from unite_fast.modality.pictures import Words

Content = Tensor | Mapping[str, Tensor]  # a batch's content, or the one tensor that says it all


class Losses(Protocol):
    """A module that compares. Its terms' names are those of the log, the report and TensorBoard."""

    weights: dict[str, float]  # of each term in the total, in the order of the log

    def __call__(self, content: Mapping[str, Tensor], prediction: Any, sizes: Tensor | None) -> dict[str, Tensor]:
        """The terms, float32 0-d, each a mean over the samples."""
        ...

    def to(self, device: torch.device) -> Any: ...

    def compile_parts(self, region: Callable[..., Any]) -> None:
        """Compiles what is worth it on its device. region: makes a compiled function (``efficiency.compiling``)."""
        ...


class Modality(Protocol):
    """``sizes``, int64 (B,): of samples of variable size, of whose registers and context tokens so many are there."""

    embedder_name: str  # of the embedder in checkpoints
    thing: str  # a sample, in a word; ``sampling.makers`` writes its files
    embedding: str  # what the embedder makes, in words
    scores: tuple[str, ...]  # those of ``evaluation.scores`` that are of it
    analyses: tuple[str, ...]  # what of ``analyse`` not every modality has: "probes" of classes, "pixels" compared
    shared_pipeline: bool  # whether an export has a pipeline of diffusers
    card: str  # an export's README, to be formatted (``export``)
    assumed: tuple[int, str]  # samples of an epoch, and what they are, for plans of a run whose data are not there yet

    def embedder(self, config: ModelConfig, /) -> nn.Module:
        """(content, sizes) -> context (B, M, D)."""
        ...

    def decoder(self, config: ModelConfig, /) -> ViT:
        """(latents (B, K, F), sizes) -> a prediction: a tensor, or several by name."""
        ...

    def content(self, given: Content) -> dict[str, Tensor]:
        """As the embedder and the losses take it, from what a source or a user gives."""
        ...

    def losses(
        self, model: ModelConfig, objective: ObjectiveConfig, efficiency: EfficiencyConfig, files: bool = True
    ) -> Losses:
        """Opens the files that they need. Raises UserError. files: false for whoever counts sizes, which any weights
        have."""
        ...

    def prepare(self, model: Any, source: Source) -> None:
        """Puts into a new ``UNITE`` what it has to know of its training set, where that is more than weights. Raises
        UserError for a source of something else."""
        ...

    def example(self, model: ModelConfig, batch: int, device: torch.device | str = "cpu") -> Batch:
        """A batch of the largest samples there are, for whoever counts sizes: its values mean nothing."""
        ...

    def context_tokens(self, model: ModelConfig, /) -> int:
        """The most tokens that the embedder makes of a sample."""
        ...

    def decoder_tokens(self, model: ModelConfig, /) -> int:
        """Tokens in the decoder's layers."""
        ...

    def missing(self, objective: ObjectiveConfig, /) -> str:
        """Which file its losses need that no key names yet, for whoever plans a run; "" where there is none."""
        ...

    def epoch(self, model: ModelConfig, samples: int, /) -> tuple[int, str]:
        """(samples of the epoch that projected speeds are told by, its name). samples: the run's, 0 if not known.

        (0, "") where the model or its samples are so small that no GPU would be kept busy.
        """
        ...

    def embedding_flops(self, model: ModelConfig, /) -> float:
        """Of the embedder, per sample, forward and backward; its inputs need no gradient."""
        ...

    def registers(self, config: ModelConfig, content: Mapping[str, Tensor], /) -> int:
        """How many registers a content is padded to, at most those of the model."""
        ...

    def perceptual_flops(self, model: ModelConfig, /) -> float:
        """Of the perceptual loss, per sample, forward and backward; 0 where there is none."""
        ...

    def outputs(self, model: ModelConfig, /) -> int:
        """How many numbers the decoder's last layers make of a sample's tokens."""
        ...

    def draw_sizes(self, model: Any, seeds: Tensor, labels: Tensor, /) -> Tensor | None:
        """The sizes of samples, int64 (B,), a function of each one's seed and label alone; None: they have no sizes."""
        ...

    def finished(self, model: Any, prediction: Any, labels: Tensor, sizes: Tensor | None = None) -> Any:
        """A prediction as users get it: a tensor or several by name, the samples in the first dimension."""
        ...

    def original(self, content: Mapping[str, Tensor], /) -> Any:
        """A content in the form of a finished prediction."""
        ...

    def items(self, finished: Any, /) -> list[Any]:
        """Finished predictions one by one, on the host: images as tensors, molecules and crystals as ``Structure``."""
        ...

    def show(self, path: Path, rows: list[Any], words: Words) -> None:
        """Draws rows of finished predictions into a file, with words around them."""
        ...

    def likeness(self, content: Mapping[str, Tensor], made: Any) -> str:
        """How near a finished reconstruction is to a content, in a word or two for its row; empty: not said."""
        ...


MODALITIES: dict[str, Modality] = {"images": Images(), "atoms": Atoms()}


def of(config: ModelConfig) -> Modality:
    """The one that ``model.modality`` names."""
    return MODALITIES[config.modality]
