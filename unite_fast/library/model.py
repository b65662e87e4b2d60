"""A network with what is needed to use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unite_fast import checkpoint, sampling
from unite_fast.base.errors import UserError
from unite_fast.config import SampleConfig
from unite_fast.library.forms import Form, from_tensor, to_tensor_of
from unite_fast.model.unite import UNITE
from unite_fast.sampling.reconstruct import tokens
from unite_fast.sampling.request import classes_of
from unite_kernels import backend

BATCH = 32  # images per pass


class Model:
    """A network with what is needed to use it.

    Images go in as files, PIL images, arrays (H, W, Q) or tensors (Q, H, W), one of them, a list, or a batch in one
    array or tensor; uint8, or float in [0, 1]. Files and PIL images are cropped and resized as in training.
    They come out as a list of PIL images, an array uint8 (B, S, S, Q), or a tensor float32 (B, Q, S, S) in [0, 1].
    """

    def __init__(
        self,
        network: UNITE,
        how: SampleConfig,
        alpha: str,
        t_max: float,
        class_names: Sequence[str],
        device: torch.device,
    ) -> None:
        """how: of samples, where a call does not say; alpha: as in ``data.alpha``; t_max: of tokenization's times."""
        if "pixels" not in network.modality.analyses:
            raise UserError(f"load() is for images; this is a model of {network.modality.thing}s: use sample.py")
        self.network, self.how, self.class_names = network.to(device).eval(), how, list(class_names)
        self.alpha, self.t_max = alpha, t_max
        self.shape = (network.config.channels, network.config.image_size, network.config.image_size)  # of an image
        network.use_kernels(backend.best(device))

    @property
    def device(self) -> torch.device:
        return self.network.latent_tokens.device

    def classes(self, labels: str | int | Sequence[str | int] | None) -> list[int]:
        """The numbers of classes given by name or number; of None the null class, which stands for none of them.

        Raises UserError for a class that does not exist.
        """
        count = self.network.config.num_classes
        if labels is None:
            return [count]
        given = [labels] if isinstance(labels, str | int) else labels
        return [number for label in given for number in classes_of(str(label), count, self.class_names)]

    @torch.no_grad()
    def sample(
        self,
        labels: str | int | Sequence[str | int] | None = None,
        seeds: Iterable[int] | None = None,
        output: Form = "pil",
        **options: Any,
    ) -> Any:
        """Images of classes, used in turn, one for each of ``seeds`` (by default 0, 1, ... as many as ``labels``).

        The image of a seed and a class is that of ``sample.py``, up to rounding. options: solver, steps, cfg_scale,
        cfg_interval, cfg_order, last; those that are not given are the run's. Raises UserError.
        """
        classes = self.classes(labels)
        chosen = list(range(len(classes)) if seeds is None else seeds)
        if self.network.config.num_classes in classes:  # nothing to guide towards
            options = {"cfg_scale": 1.0} | options
        every = torch.tensor([classes[i % len(classes)] for i in range(len(chosen))], dtype=torch.int64)
        parts = []
        for i in range(0, len(chosen), BATCH):
            few = slice(i, i + BATCH)
            parts.append(sampling.sample(self.network, every[few], self.how, seeds=chosen[few], **options))
        return from_tensor(torch.cat(parts), output)

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Latents float32 (B, K, C), normalised, on the device. Raises UserError."""
        batches = self.images(images).split(BATCH)
        places = torch.arange(sum(map(len, batches))).split(BATCH)
        pairs = zip(batches, places, strict=True)
        return torch.cat([tokens(self.network, x.to(self.device), p, self.t_max) for x, p in pairs])

    @torch.no_grad()
    def decode(self, latents: Tensor, output: Form = "pil") -> Any:
        """Images of latents (B, K, C)."""
        if latents.shape[1:] != self.network.latent_shape:
            raise UserError(f"latents are {tuple(latents.shape)}; expected (B, *{self.network.latent_shape})")
        finished = [self.network.decode(z).float().clamp(0, 1) for z in latents.to(self.device).split(BATCH)]
        return from_tensor(torch.cat(finished), output)

    def images(self, images: Any) -> Tensor:
        """What the network sees of ``images``: float32 (B, Q, S, S) in [0, 1], on the CPU. Raises UserError."""
        if isinstance(images, str | Path | Image.Image) or (hasattr(images, "ndim") and images.ndim < 4):
            images = [images]
        found = [to_tensor_of(one, self.shape, self.alpha) for one in images]
        if wrong := [tuple(one.shape) for one in found if one.shape != self.shape]:
            raise UserError(f"an image is {wrong[0]}; this model takes {self.shape}")
        return torch.stack(found) if found else torch.empty(0, *self.shape)


def load(path: str | Path, weights: str = "ema", device: str = "auto") -> Model:
    """A model from a run folder, a checkpoint, an export or an official .pt. Raises UserError.

    weights: ema, model (the raw ones), or another average that the run kept. device: auto takes a GPU where there is
    one.
    """
    located = checkpoint.locate(path)
    network, config = checkpoint.load_model(located, weights)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    names, t_max = checkpoint.class_names(located), config.objective.tokenizer_t_max
    return Model(network, config.sample, config.data.alpha, t_max, names, torch.device(chosen))
