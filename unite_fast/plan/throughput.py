"""How fast a run could go and how fast its images come: projections from FLOPs, and the rate of its source."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from unite_fast import data, modality
from unite_fast.config import Config, ModelConfig, ObjectiveConfig
from unite_fast.data import rate
from unite_fast.model.flops import peak_of
from unite_fast.parallel.distributed import device_type
from unite_fast.plan.cost import step_flops

NODE = 8  # GPUs
PLANNED = "NVIDIA H200"  # the device of projections where there is no GPU
OFFICIAL_MFU = 0.105  # the official code's UNITE-B with 3 flow steps on 8 H200: 26 minutes per epoch, by its README
MFUS = (0.3, 0.4)


class Projection(NamedTuple):
    mfu: float
    images_per_second: float  # on one GPU
    official: bool  # the official code's
    samples: int  # of an epoch
    words: tuple[str, str]  # what they are; the epoch's name

    def minutes(self, gpus: int) -> float:
        """Per epoch."""
        return epoch_minutes(self.samples, self.images_per_second, gpus)

    def line(self) -> str:
        official = " (the official code)" if self.official else ""
        things, epoch = self.words
        return (
            f"MFU {self.mfu:.1%}: {self.images_per_second:,.0f} {things}/s per GPU, {self.minutes(1):,.3g} minutes "
            f"per {epoch}, {self.minutes(NODE):,.3g} on {NODE} GPUs{official}"
        )


def epoch_minutes(samples: int, per_second: float, gpus: int) -> float:
    """per_second: samples on one GPU."""
    return samples / (per_second * gpus) / 60


def device_name() -> str:
    """The GPU that is here, or the one that is planned for."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else PLANNED


def official_is_known(model: ModelConfig, o: ObjectiveConfig) -> bool:
    """Whether OFFICIAL_MFU is of this model and this device."""
    same = model == ModelConfig() and o.flow_steps == 3 and o.perceptual_weight > 0
    return same and device_name() == PLANNED


def project(
    model: ModelConfig,
    o: ObjectiveConfig,
    mfu: float | None = None,
    samples: int = 0,
    frozen: tuple[str, ...] = (),
    lengths: torch.Tensor | None = None,
) -> list[Projection]:
    """Images/s of this device at this utilisation, or at several: a prediction, not a measurement.

    samples, lengths: of the run's epoch, 0 and None where that is not known. Empty where the device's peak is not
    known, and for what is so small that no GPU would be kept busy.
    """
    of = modality.of(model)
    (count, epoch), peak = of.epoch(model, samples), peak_of(device_name())
    if not count or not peak:
        return []
    flops, known = step_flops(model, o, frozen, lengths)["total"], official_is_known(model, o)
    mfus = (mfu,) if mfu else (OFFICIAL_MFU, *MFUS) if known else MFUS
    words = (f"{of.thing}s", epoch)
    return [Projection(m, m * peak / flops, known and m == OFFICIAL_MFU, count, words) for m in mfus]


def expected_rate(source: data.Source, workers: int, image_size: int) -> float | None:
    """Images/s that one rank's workers should deliver, by what one is known to and the cores that they can have."""
    if source.per_core is None or image_size != 256:
        return None
    return source.per_core * min(max(1, workers), len(os.sched_getaffinity(0)))


def supply(config: Config, source: data.Source, mfu: float = MFUS[-1], seconds: float = 2.0) -> str:
    """One line: images/s of the source, expected and measured here for one rank, against what training takes.

    Raises as ``rate.measure``.
    """
    device = torch.device(device_type(config.device))
    batch = min(128, config.train.micro_batch)
    found = rate.measure(source, batch, seconds, device, config.data.workers, config.data.timeout, config.seed)
    expected = expected_rate(source, config.data.workers, config.model.image_size)
    said = f"expected {expected:,.0f} images/s, " if expected else ""
    projections = project(config.model, config.objective, mfu, 0, config.optim.frozen, source.lengths)
    demand = projections[0].images_per_second if projections else 0.0
    said += f"measured {found.line(demand, modality.of(config.model).thing)}"
    return said + (f" at MFU {mfu:.0%} on one {device_name()}" if projections else "")
