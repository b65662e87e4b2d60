"""How fast a run could go and how fast its images come: projections from FLOPs, and the rate of its source."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from unite_fast import data, modality
from unite_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from unite_fast.data import rate
from unite_fast.model.flops import peak_of
from unite_fast.plan.cost import step_flops

IMAGENET = 1_281_167  # images of ImageNet-1k's training set
MP20 = 27_136  # crystals of MP20's
NODE = 8  # GPUs
PLANNED = "NVIDIA H200"  # the device of projections where there is no GPU
OFFICIAL_MFU = 0.105  # the official code's UNITE-B with 3 flow steps on 8 H200: 26 minutes per epoch, by its README
MFUS = (0.3, 0.4)

# Images/s per core of 256 x 256 images, CPU time (LOG.md, 2026-11-22, AMD EPYC): data.source and data.crop. DALI's are
# of its CPU pipeline. Random crops cost about what their exact sibling does.
PER_CORE = {
    ("folder", "exact"): 358, ("folder", "fast"): 892, ("tar", "exact"): 358, ("tar", "fast"): 892,
    ("packed", "exact"): 37_669, ("dali", "exact"): 357,
}  # fmt: skip


class Projection(NamedTuple):
    mfu: float
    images_per_second: float  # on one GPU
    official: bool = False  # the official code's
    samples: int = IMAGENET  # of an epoch
    words: tuple[str, str] = ("images", "ImageNet epoch")

    def minutes(self, gpus: int) -> float:
        """Per epoch."""
        return self.samples / (self.images_per_second * gpus) / 60

    def line(self) -> str:
        official = " (the official code)" if self.official else ""
        things, epoch = self.words
        return (
            f"MFU {self.mfu:.1%}: {self.images_per_second:,.0f} {things}/s per GPU, {self.minutes(1):,.3g} minutes "
            f"per {epoch}, {self.minutes(NODE):,.3g} on {NODE} GPUs{official}"
        )


def device_name() -> str:
    """The GPU that is here, or the one that is planned for."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else PLANNED


def official_is_known(model: ModelConfig, o: ObjectiveConfig) -> bool:
    """Whether OFFICIAL_MFU is of this model and this device."""
    same = model == ModelConfig() and o.flow_steps == 3 and o.perceptual_weight > 0
    return same and device_name() == PLANNED


def assumed(modality: str) -> tuple[int, str]:
    """Samples of an epoch where no path is given yet, and what they are."""
    return (MP20, "crystals of MP20") if modality == "atoms" else (IMAGENET, "images of ImageNet-1k")


def project(
    model: ModelConfig, o: ObjectiveConfig, mfu: float | None = None, samples: int = 0, frozen: tuple[str, ...] = ()
) -> list[Projection]:
    """Images/s of this device at this utilisation, or at several: a prediction, not a measurement.

    samples: of an epoch of molecules or crystals. Empty where the device's peak is not known, and for images and models
    so small that no GPU would be kept busy.
    """
    atoms = model.modality == "atoms"
    large = model.encoder.width >= 256 if atoms else model.image_size >= 64
    peak = peak_of(device_name()) if large else None
    flops = step_flops(model, o, frozen)["total"]
    if not peak:
        return []
    known = official_is_known(model, o)
    mfus = (mfu,) if mfu else (OFFICIAL_MFU, *MFUS) if known else MFUS
    if atoms:
        return [Projection(m, m * peak / flops, False, samples or MP20, ("structures", "epoch")) for m in mfus]
    return [Projection(m, m * peak / flops, known and m == OFFICIAL_MFU) for m in mfus]


def expected_rate(d: DataConfig, image_size: int) -> float | None:
    """Images/s that one rank's workers should deliver, from the table and the cores that they can have."""
    per_core = PER_CORE.get((d.source, "fast" if d.crop == "fast" else "exact"))
    if per_core is None or image_size != 256:
        return None
    return per_core * min(max(1, d.workers), len(os.sched_getaffinity(0)))


def supply(config: Config, source: data.Source, mfu: float = MFUS[-1], seconds: float = 2.0) -> str:
    """One line: images/s of the source, expected and measured here for one rank, against what training takes.

    Raises as ``rate.measure``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    batch = min(128, config.train.micro_batch)
    found = rate.measure(source, batch, seconds, device, config.data.workers, config.data.timeout, config.seed)
    expected = expected_rate(config.data, config.model.image_size)
    said = f"expected {expected:,.0f} images/s, " if expected else ""
    projections = project(config.model, config.objective, mfu, 0, config.optim.frozen)
    demand = projections[0].images_per_second if projections else 0.0
    said += f"measured {found.line(demand, modality.of(config.model).thing)}"
    return said + (f" at MFU {mfu:.0%} on one {device_name()}" if projections else "")
