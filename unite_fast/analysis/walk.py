"""One pass over images, molecules or crystals for all analyses that need them.

A tile is 32 samples, always the same ones, always together in the network, whatever the number of processes: a sum over
tiles depends on processes through the order of its float64 additions alone.

Shape letters: B samples of a tile, K registers, C latent dim, D width of the encoder, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unite_fast import data
from unite_fast.base.errors import Stopped
from unite_fast.config import DataConfig
from unite_fast.data import Source
from unite_fast.data.batch import slots_taken
from unite_fast.efficiency import precision
from unite_fast.flow import interpolate
from unite_fast.model.encoder import GenerativeEncoder
from unite_fast.model.unite import TOKENIZE_SEED, UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.reconstruct import tokens
from unite_kernels import philox

TILE = 32
ROUNDING = 1e-12  # of features' squares: less than that they vary by the rounding of float32 alone
NOISE_STREAM = 1 << 19  # of the noise that latents are corrupted with; the same at all times


@dataclass(frozen=True)
class Tile:
    """What the tokenization pass says of B samples."""

    model: UNITE
    content: dict[str, Tensor]
    labels: Tensor  # (B,)
    samples: Tensor  # (B,): their places in the source
    sizes: Tensor | None  # (B,): see ``Batch``
    latents: Tensor  # (B, K, C), normalised
    layers: list[Tensor]  # L times (B, K, D): each block's output at the registers

    @property
    def taken(self) -> Tensor:
        """bool (B, K): which registers are there."""
        b, k = self.latents.shape[:2]
        if self.sizes is None:
            return torch.ones(b, k, dtype=torch.bool, device=self.latents.device)
        return slots_taken(self.sizes, k)

    def mean(self, x: Tensor) -> Tensor:
        """Of x (B, K, D) over the registers that are there: float64 (B, D)."""
        taken = self.taken
        return (x.double() * taken[:, :, None]).sum(1) / taken.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class Denoised:
    """What the denoising pass makes of a tile's latents, noised to time t: z_t = t z + (1 - t) eps."""

    t: float
    prediction: Tensor  # (B, K, C): the clean latents, normalised
    layers: list[Tensor]


class Analysis(Protocol):
    """Adds up tiles. ``times``: at which it wants ``add`` to be called; without any, ``begin`` alone is."""

    @property
    def times(self) -> Sequence[float]: ...

    def begin(self, tile: Tile) -> None: ...

    def add(self, tile: Tile, denoised: Denoised) -> None: ...

    def reduce(self, ranks: Ranks) -> None:
        """Adds up what the processes have, before ``result``."""
        ...

    def result(self) -> dict[str, Any]: ...


@contextmanager
def recorded(encoder: GenerativeEncoder, registers: int) -> Iterator[list[Tensor]]:
    """Within, a list that fills with each block's output (B, K, D) at the registers."""
    found: list[Tensor] = []

    def keep(block: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        layout, kept = arguments[4], arguments[6]
        rows = output[0]
        found.append((rows if kept else rows[:, layout.prefix : layout.prefix + registers]).float())

    handles = [block.register_forward_hook(keep) for block in encoder.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tokenized(model: UNITE, batch: data.Batch, t_max: float) -> Tile:
    """The tokenization pass, with the registers' noise and times that each sample's place gives."""
    content = model.modality.content(batch.content)
    with recorded(model.encoder, model.config.num_latents) as layers:
        latents = tokens(model, content, batch.samples, t_max, batch.sizes)
    return Tile(model, content, batch.labels, batch.samples, batch.sizes, latents.float(), layers)


def denoised(tile: Tile, t: float) -> Denoised:
    """The denoising pass at time t without a class, as tokenization has none."""
    model, b = tile.model, len(tile.labels)
    noise = philox.normal(TOKENIZE_SEED, NOISE_STREAM, tile.samples, model.latent_shape)
    times = torch.full((b,), t, device=tile.latents.device)
    labels = torch.full_like(tile.labels, model.null_class)
    with recorded(model.encoders()[-1], model.config.num_latents) as layers:
        prediction = model.denoise(interpolate(tile.latents, noise, times), times, labels, tile.sizes)
    return Denoised(t, prediction.float(), layers)


def spread(count: int, of: int) -> Tensor:
    """int64: at most ``count`` of the numbers below ``of``, evenly spread."""
    n = min(count, of)
    return torch.arange(n) * of // max(n, 1)


def chosen(source: Source, count: int) -> Tensor:
    """At most ``count`` places of a source, evenly spread; sources are often sorted by class."""
    return spread(count, len(source))


class Kept:
    """Samples whose features are kept as they are: at most ``count`` of those at ``places``, a row of a table each."""

    def __init__(self, places: Tensor, count: int) -> None:
        self.rows = {place: row for row, place in enumerate(places[spread(count, len(places))].tolist())}

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, table: Tensor, tile: Tile, values: Tensor) -> None:
        """values (B, ...) of a tile into the rows (n, ...) of those that are kept."""
        for place, value in zip(tile.samples.tolist(), values, strict=True):
            if place in self.rows:
                table[self.rows[place]] = value


def tiles(source: Source, places: Tensor, reading: DataConfig, ranks: Ranks) -> Iterator[data.Batch]:
    """This rank's tiles of the samples at ``places``."""
    mine = list(places.split(TILE))[ranks.rank :: ranks.world_size]
    if mine:
        yield from data.all_images(
            source, TILE, 0, 1, ranks.device, reading.workers, reading.timeout, indices=torch.cat(mine)
        )


@torch.no_grad()
def walk(
    model: UNITE,
    source: Source,
    places: Tensor,
    reading: DataConfig,
    analyses: Sequence[Analysis],
    ranks: Ranks,
    t_max: float,
    recipe: str = "fp32",
    report: Callable[[], object] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Shows the samples at ``places`` to all analyses; afterwards every process can ask for every result.

    t_max: ``objective.tokenizer_t_max`` of the training; recipe: as ``precision.autocast`` takes it; report: called
    after each of this process's tiles. What goes wrong on one process is raised on all, as is Stopped once
    ``stopping()`` is true on one.
    """
    times = sorted({t for analysis in analyses for t in analysis.times})
    batches = tiles(source, places, reading, ranks)

    def next_tile() -> bool:
        if stopping():
            raise Stopped("a stop was asked for")
        batch = next(batches, None)
        if batch is None:
            return False
        with precision.autocast(recipe, ranks.device):
            tile = tokenized(model, batch, t_max)
            for analysis in analyses:
                analysis.begin(tile)
            for t in times:
                seen = denoised(tile, t)
                for analysis in analyses:
                    if t in analysis.times:
                        analysis.add(tile, seen)
        report()
        return True

    while any(ranks.gather(ranks.together(next_tile))):
        pass
    for analysis in analyses:
        analysis.reduce(ranks)


def significant(value: Any, digits: int = 6) -> Any:
    """Numbers within nested plain values, rounded to as many digits as no order of additions changes.

    JSON has no word for what is not finite: it becomes None.
    """
    if isinstance(value, dict):
        return {k: significant(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [significant(v, digits) for v in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def undefined(value: Any) -> int:
    """How many numbers within nested plain values are not finite."""
    if isinstance(value, dict | list | tuple):
        return sum(undefined(v) for v in (value.values() if isinstance(value, dict) else value))
    return int(isinstance(value, float) and not math.isfinite(value))
