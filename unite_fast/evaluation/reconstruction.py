"""Reconstruction of held-out images: rFID, PSNR, L1 and LPIPS over any number of processes.

Each image is tokenized with noise that is a function of its index, decoded, clamped to [0, 1]. PSNR and L1 are means
over images of the float values; rFID compares truncated uint8 images with the originals in the same form.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unite_fast import data
from unite_fast.base.errors import Stopped, UserError
from unite_fast.config import DataConfig, EfficiencyConfig, EvaluationConfig, ObjectiveConfig
from unite_fast.data import Source
from unite_fast.efficiency import precision
from unite_fast.evaluation import fid
from unite_fast.evaluation.features import Extractor
from unite_fast.modality import pictures
from unite_fast.modality.images import psnr, to_float
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.reconstruct import reconstruct


@dataclass(frozen=True)
class Settings:
    """Everything that a score depends on besides the weights, the images, the extractor and LPIPS' trunk."""

    tokenizer_t_max: float = ObjectiveConfig.tokenizer_t_max
    precision: str = EvaluationConfig.precision
    kernels: str = EfficiencyConfig.kernels


def of_run(objective: ObjectiveConfig, e: EvaluationConfig, efficiency: EfficiencyConfig) -> Settings:
    """What a run's reconstructions are made with, while it trains and afterwards."""
    return Settings(objective.tokenizer_t_max, e.precision, efficiency.kernels)


def protocol(
    settings: Settings, extractor: Extractor | None, perceptual: Perceptual | None, source: dict[str, Any]
) -> dict[str, Any]:
    """What a score says of itself, besides the weights. source: of ``statistics.described``."""
    lpips = None if perceptual is None else {"trunk": perceptual.trunk_sha256, "range": perceptual.input_range}
    looked = None if extractor is None else extractor.identity()
    said = {"extractor": looked, "data": source, "settings": asdict(settings), "lpips": lpips}
    return said | {"uint8": "truncated"}


@torch.no_grad()
def score(
    model: UNITE,
    settings: Settings,
    source: Source,
    reading: DataConfig,
    extractor: Extractor | None,
    ranks: Ranks,
    perceptual: Perceptual | None = None,
    batch: int = 32,
    stopping: Callable[[], bool] = lambda: False,
    report: Callable[[int], object] = lambda images: None,
) -> dict[str, float]:
    """{"images", "psnr", "l1", "rfid", "lpips", "images_per_second"} of all images of ``source``.

    reading: workers and timeout. report: gets the number of images of each batch, all processes together. rfid and
    lpips only with their networks, which compute in float32. Raises on all ranks what goes wrong on one, and Stopped
    once ``stopping()`` is true on one.
    """
    model.use_kernels(settings.kernels)
    real, made = (
        (fid.Accumulator(len(source), extractor.sizes, ranks.device) if extractor is not None else None)
        for _ in range(2)
    )
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # images, PSNR, L1, LPIPS
    begun = time.perf_counter()
    share = (ranks.rank, ranks.world_size, ranks.device)
    batches = iter(data.all_images(source, batch, *share, reading.workers, reading.timeout))

    def add_next() -> bool:
        """Adds this rank's next batch; false when there is none."""
        if stopping():
            raise Stopped("a stop was asked for")
        found = next(batches, None)
        if found is None:
            return False
        images = to_float(found.images)
        with precision.autocast(settings.precision, ranks.device):
            reconstruction = reconstruct(model, images, found.samples, settings.tokenizer_t_max)
        finite = torch.isfinite(reconstruction).flatten(1).all(1).tolist()
        if not all(finite):
            index = int(found.samples[finite.index(False)])
            raise UserError(f"the reconstruction of {source.name(index)} is not finite; no score")
        lpips = perceptual(images, reconstruction) * len(images) if perceptual is not None else sums.new_zeros(())
        absolute = (images - reconstruction).abs().flatten(1).mean(1)
        values = [sums.new_tensor(len(images)), psnr(images, reconstruction).sum(), absolute.sum(), lpips]
        sums.add_(torch.stack([v.double() for v in values]))
        report(len(images) * ranks.world_size)
        if extractor is not None and real is not None and made is not None:
            real.add(found.samples, *extractor.compute(pictures.to_uint8(images)))
            made.add(found.samples, *extractor.compute(pictures.to_uint8(reconstruction)))
        return True

    while any(ranks.gather(ranks.together(add_next))):
        pass
    ranks.sum_([sums])
    count = float(sums[0])
    result = {"images": count, "psnr": float(sums[1]) / count, "l1": float(sums[2]) / count}
    if perceptual is not None:
        result["lpips"] = float(sums[3]) / count
    if real is not None and made is not None:
        real.reduce(ranks)
        made.reduce(ranks)
        result["rfid"] = fid.frechet(made.statistics(), real.statistics())
    result["images_per_second"] = count / (time.perf_counter() - begun)
    return result
