"""Images: patches as context, a ViT that ends in pixels, losses on pixels and features.

Shape letters: B batch, Q channels, S image size, P patch size, M = (S / P)**2 patches, K latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from unite_fast.config import EfficiencyConfig, ModelConfig, ObjectiveConfig
from unite_fast.data import Source
from unite_fast.data.batch import Batch
from unite_fast.layers import Linear, adamw_parameter, sincos_2d
from unite_fast.layers.vit import ViT
from unite_fast.modality import pictures
from unite_fast.modality.lite0 import Lite0
from unite_fast.modality.lpips import Perceptual, load_perceptual, perceptual_flops, pixel_loss
from unite_fast.modality.pictures import Words

IMAGENET = 1_281_167  # images of ImageNet-1k's training set
CARD = """\
---
library_name: unite-fast
{license}tags: [image-tokenizer, flow-matching, image-generation]
---
# {name}

A UNITE model ([arXiv 2603.22283](https://arxiv.org/abs/2603.22283)): one transformer that tokenizes images and
generates them. {parameters:,} parameters, images of {size}x{size}, {classes} classes, {latents} latents of width
{width}. {weights}{step}, written by unite-fast {version}{commit}.

```python
from unite_fast import load

model = load("{name}")                # this folder
images = model.sample({example})      # PIL images
latents = model.encode("photo.jpg")   # and back: model.decode(latents)
```

With diffusers, `DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)` gives a pipeline that samples the
same images.

{named}{picture}{sampling}{scores}A score means something only together with its protocol: Inception weights and
reference statistics by hash, number of samples, labels, solver, steps, guidance and its interval, weights (EMA or raw),
dtype, rounding to 8 bits, seeds, and the commit.
"""


def to_float(images: Tensor) -> Tensor:
    """float32 in [0, 1] on the same device, from uint8 (divided by 255) or float32 (returned as it is)."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    if images.dtype == torch.float32:
        return images
    raise TypeError(f"images are {images.dtype}; expected uint8 or float32")


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image (B,), from two (B, Q, S, S) batches in [0, 1]."""
    error = (images - reconstruction).square().flatten(1).mean(1).clamp_min(1e-12)
    return -10 * torch.log10(error)


class Projection(nn.Module):
    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch_size, stride=patch_size)


class ImagePatches(nn.Module):
    """Images (B, Q, S, S) -> patch tokens (B, M, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder.width
        table = torch.zeros(1, (config.image_size // config.patch_size) ** 2 + 1, width)
        learned = config.patch_positions == "learned"
        if learned:
            nn.init.normal_(table, std=0.5)
        # Row 0 belongs to a class token that the published model does not use.
        self.position_embeddings = nn.Parameter(table, requires_grad=learned)
        self.patch_embeddings = Projection(config.channels, width, config.patch_size)

    def forward(self, content: Mapping[str, Tensor], sizes: Tensor | None = None) -> Tensor:
        images = content["images"]
        return self.patch_embeddings.projection(images).flatten(2).transpose(1, 2) + self.position_embeddings[:, 1:]


class ImageDecoder(ViT):
    """(B, K, in_features) -> (B, Q, S, S). Not clamped.

    With one latent per patch (published) each latent token becomes its patch. With any other number the latents
    are followed by one query per patch, and the queries become the patches.
    """

    positions: Tensor  # (1, M + 1, D)

    def __init__(self, model: ModelConfig) -> None:
        config = model.decoder
        super().__init__(config)
        self.side, self.patch_size, self.channels = (
            model.image_size // model.patch_size,
            model.patch_size,
            model.channels,
        )
        self.queries = model.num_latents != self.side**2
        self.decoder_pred = Linear(config.width, self.patch_size**2 * self.channels)
        positions = torch.cat([torch.zeros(1, config.width), sincos_2d(self.side, config.width)])
        self.register_buffer("positions", positions[None], persistent=False)
        if self.queries:
            self.latent_positions = adamw_parameter(torch.randn(1, model.num_latents, config.width) * 0.5)
            self.query_token = nn.Parameter(torch.zeros(config.width))

    @property
    def last_layer(self) -> Tensor:
        """The weights that make pixels."""
        return self.decoder_pred.weight

    def forward(self, z: Tensor, sizes: Tensor | None = None) -> Tensor:
        if sizes is not None:
            raise ValueError("images have as many latents as the model: leave out sizes")
        x = self.decoder_embed(z)
        if self.queries:
            latents, x = x + self.latent_positions, self.query_token.to(x.dtype).expand(len(x), self.side**2, -1)
        x = self.with_class_token(x) + self.positions
        if self.queries:
            x = torch.cat([x, latents], dim=1)
        x = self.run(x)
        x = self.decoder_pred(self.decoder_norm(x[:, : self.side**2 + 1]))[:, 1:]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, c=self.channels)


class ImageLosses(nn.Module):
    """The pixel loss, under the name of its kind, and LPIPS or the distance in features where they have a weight."""

    def __init__(self, config: ObjectiveConfig, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        self.lite0 = Lite0() if config.feature_weight else None
        self.kind, self.perceptual = config.pixel_loss, perceptual
        self.weights = {config.pixel_loss: config.pixel_weight}
        if perceptual is not None:
            self.weights["lpips"] = config.perceptual_weight
        if self.lite0 is not None:
            self.weights["features"] = config.feature_weight

    def compile_parts(self, region: Callable[..., Any]) -> None:
        if self.perceptual is not None and not self.perceptual.fused:
            self.perceptual.compile_trunk(region)

    def forward(
        self, content: Mapping[str, Tensor], prediction: Tensor, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        images = content["images"]
        terms = {self.kind: pixel_loss(images, prediction, self.kind)}
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(images, prediction).float()
        if self.lite0 is not None:
            terms["features"] = self.lite0(images, prediction)
        return terms


class Images:
    """The modality of images; see ``Modality``."""

    embedder_name, thing, embedding = "patch_embed", "image", "patch embedding"
    scores, analyses = ("search", "sweep", "rfid", "heldout"), ("probes", "pixels")
    shared_pipeline, card, assumed = True, CARD, (IMAGENET, "images of ImageNet-1k")
    embedder = staticmethod(ImagePatches)
    decoder = staticmethod(ImageDecoder)

    def content(self, given: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = given["images"] if isinstance(given, Mapping) else given
        return {"images": images if images.is_floating_point() else to_float(images)}

    def losses(
        self, model: ModelConfig, objective: ObjectiveConfig, efficiency: EfficiencyConfig, files: bool = True
    ) -> ImageLosses:
        if files or not objective.perceptual_weight:
            return ImageLosses(objective, load_perceptual(objective, model.channels, efficiency.kernels))
        return ImageLosses(objective, Perceptual(None, objective.perceptual_range, backend=efficiency.kernels))

    def prepare(self, model: Any, source: Source) -> None:
        pass

    def context_tokens(self, model: ModelConfig) -> int:
        """Patches."""
        return (model.image_size // model.patch_size) ** 2

    def decoder_tokens(self, model: ModelConfig) -> int:
        """The class token and a token per patch, and the latents beside them where they are not the patches'."""
        patches = self.context_tokens(model)
        return 1 + patches + (model.num_latents if model.num_latents != patches else 0)

    def missing(self, objective: ObjectiveConfig) -> str:
        needed = objective.perceptual_weight > 0 and not objective.perceptual_trunk
        return "objective.perceptual_trunk is not given: LPIPS is counted all the same" if needed else ""

    def epoch(self, model: ModelConfig, samples: int) -> tuple[int, str]:
        if model.image_size < 64:
            return 0, ""
        return (samples, f"epoch of {samples:,}") if samples not in (0, IMAGENET) else (IMAGENET, "ImageNet epoch")

    def embedding_flops(self, model: ModelConfig) -> float:
        return 2 * 2 * self.context_tokens(model) * model.patch_size**2 * model.channels * model.encoder.width

    def registers(self, config: ModelConfig, content: Mapping[str, Tensor]) -> int:
        return config.num_latents

    def perceptual_flops(self, model: ModelConfig) -> float:
        return perceptual_flops(model.image_size)

    def outputs(self, model: ModelConfig) -> int:
        return (
            (self.context_tokens(model) + 1) * model.patch_size**2 * model.channels
        )  # those of the class token are dropped

    def example(self, model: ModelConfig, batch: int, device: torch.device | str = "cpu") -> Batch:
        images = torch.empty(batch, model.channels, model.image_size, model.image_size, device=device)
        samples = torch.arange(batch, device=device)
        return Batch({"images": images}, samples % max(1, model.num_classes), samples)

    def draw_sizes(self, model: Any, seeds: Tensor, labels: Tensor) -> None:
        return None

    def finished(self, model: Any, prediction: Tensor, labels: Tensor, sizes: Tensor | None = None) -> Tensor:
        return prediction.float().clamp(0, 1)

    def original(self, content: Mapping[str, Tensor]) -> Tensor:
        return content["images"]

    def items(self, finished: Tensor) -> list[Tensor]:
        return list(finished.cpu())

    def show(self, path: Path, rows: list[Tensor], words: Words) -> None:
        pictures.save_labelled(path, rows, words)

    def likeness(self, content: Mapping[str, Tensor], made: Tensor) -> str:
        return f"{float(psnr(content['images'], made).mean()):.1f} dB"
