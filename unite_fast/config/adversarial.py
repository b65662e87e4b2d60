"""The keys of the decoder's fine-tuning against a discriminator (``objective.adversarial``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unite_fast.config.option import option


@dataclass(frozen=True)
class AdversarialConfig:
    """Fine-tuning of the decoder of images with a discriminator that is made from the Generative Encoder."""

    weight: float = option(0.0, "weight of the adversarial loss; 0: none of this; 0.75 for fine-tuning")
    loss: Literal["hinge", "non_saturating"] = option("hinge", "of discriminator and decoder")
    # One step ago, so that it is of the whole batch, however that is cut, and costs no second pass.
    adaptive: bool = option(
        True, "times |gradient of the reconstruction| / |that of this loss| at the decoder's last layer, one step ago"
    )
    adaptive_cap: float = option(1e4, "the most that this ratio may be", above=0)
    discriminator_start: int = option(0, "optimizer steps before the discriminator learns")
    generator_start: int = option(0, "optimizer steps before the decoder learns from it")
    trunk: Literal["frozen", "trained"] = option(
        "frozen", "the encoder that the heads stand on: the model's own, or a copy that learns as well"
    )
    blocks: tuple[int, ...] = option(
        (), "blocks after which a head reads the patch tokens; none: a quarter, a half, three quarters", above=0
    )
    channels: int = option(256, "width of a head", above=0)
    spectral_norm: bool = option(True, "divide the heads' weights by their largest singular values")
    lr_ratio: float = option(1.0, "the discriminator's learning rate over the decoder's", above=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decays of its AdamW's two moments", below=1)
    augment: tuple[str, ...] = option(
        ("colour", "translation", "cutout"), "DiffAugment of what it sees: some of these, the same for both images"
    )
    augment_probability: float = option(1.0, "probability that a pair of images is changed so", most=1)
    penalty: Literal["none", "r1", "lecam"] = option("none", "regularisation; r1: by differences along one direction")
    penalty_weight: float = option(1.0, "weight of the penalty", above=0)
    round_fakes: bool = option(True, "it sees images of 8 bits; the gradient passes the rounding unchanged")
