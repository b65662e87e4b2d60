"""Scores of generated images: samples stream from the sampler into the sums of FID and are never all in memory.

Interrupted scoring goes on: each process keeps its sums in a file beside the result, together with what it had done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from unite_fast import sampling
from unite_fast.base import files
from unite_fast.base.errors import Stopped, UserError
from unite_fast.config import EfficiencyConfig, EvaluationConfig, ModelConfig, SampleConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.efficiency import precision
from unite_fast.evaluation import fid
from unite_fast.evaluation.features import Extractor
from unite_fast.flow.field import Replays
from unite_fast.modality import pictures
from unite_fast.model.flops import sampling_flops
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.request import parse_labels

SAVE_SECONDS = 60.0


# The same for every score: x * 255 without rounding, as published, and the batch shape of the network.
FIXED = {"uint8": "truncated", "tile": sampling.TILE}


@dataclass(frozen=True)
class Settings(SampleConfig):
    """Which images: everything that a score depends on besides the weights, the extractor and the reference."""

    count: int = EvaluationConfig.count  # seeds 0 .. count - 1, one image each
    labels: str = "equal"  # class-balanced; or random
    precision: str = EvaluationConfig.precision
    kernels: str = EfficiencyConfig.kernels  # or fused; they, and compiled blocks, change rounding
    compile: bool = False

    def described(self) -> dict[str, Any]:
        """As a protocol has them."""
        return to_dict(self) | FIXED

    @classmethod
    def read(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``described``. Raises UserError for those of a version that makes other images."""
        values = {"last": SampleConfig.last} | values  # of versions without a choice
        known = {field.name for field in fields(cls)} | FIXED.keys()
        if wrong := values.keys() ^ known or {name for name, value in FIXED.items() if values[name] != value}:
            raise UserError(f"the protocol's settings differ from this version's in {', '.join(sorted(wrong))}")
        kept: dict[str, Any] = {name: value for name, value in values.items() if name not in FIXED}
        kept["cfg_interval"] = tuple(kept["cfg_interval"])
        return cls(**kept)

    def check(self, model: ModelConfig) -> None:
        """Raises UserError on settings that make no sense."""
        sampling.check(self)
        if self.labels not in ("equal", "random"):
            raise UserError(f"--labels {self.labels}: equal or random")
        if self.count < 2:
            raise UserError(f"--count {self.count}: at least 2 images")
        classes = max(1, model.num_classes)
        below = self.count // classes * classes
        if self.labels == "equal" and self.count != below:
            near = " or ".join(str(n) for n in (below, below + classes) if n)
            raise UserError(
                f"--count {self.count} does not divide over {classes} classes; nearest that do: {near} "
                "(or --labels random)"
            )


def of_run(how: SampleConfig, e: EvaluationConfig, efficiency: EfficiencyConfig, **changes: Any) -> Settings:
    """What a run is scored with, while it trains and afterwards: its configuration's settings, with ``changes``."""
    taken = vars(how) | {"count": e.count, "precision": e.precision, "kernels": efficiency.kernels}
    return Settings(**(taken | changes))


class Progress:
    """A process's sums on disk while it works; ``key`` says what they are of, ``done`` how many tiles they hold."""

    def __init__(self, path: Path | None, key: str, ranks: Ranks) -> None:
        name = f"{ranks.rank}-of-{ranks.world_size}"
        self.path = None if path is None else path.with_name(f"{path.name}.partial-{name}")
        self.key, self.saved = key, time.monotonic()

    def load(self, accumulator: fid.Accumulator) -> int:
        """Restores the sums; returns the tiles they hold, 0 when there is nothing of this key."""
        if self.path is None or not self.path.is_file():
            return 0
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content["key"] != self.key:
                return 0
            accumulator.restore(content["sums"])
            return int(content["done"])
        except Exception:  # cut short or foreign: begin again
            accumulator.restore({k: torch.zeros_like(v) for k, v in accumulator.state().items()})
            return 0

    def save(self, accumulator: fid.Accumulator, done: int, now: bool = False) -> None:
        if self.path is not None and (now or time.monotonic() - self.saved >= SAVE_SECONDS):
            self.path.parent.mkdir(parents=True, exist_ok=True)  # a node's own disk may not have it
            with files.replacing(self.path) as file:
                torch.save({"key": self.key, "done": done, "sums": accumulator.state()}, file)
            self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Options:
    """What a score does not depend on."""

    progress: Path | None = None  # beside it lie the sums of interrupted scoring
    report: Callable[[int], object] = lambda images: None  # how many were made since the last call
    stopping: Callable[[], bool] = lambda: False  # asked before each tile; true on one process stops all
    replays: Replays | None = None  # see ``sampling.sample``


PLAIN = Options()


def draw(
    model: UNITE,
    settings: Settings,
    seeds: list[int],
    counts: dict[str, float],
    replays: Replays | None,
    guide: UNITE | None = None,
) -> torch.Tensor:
    """The images (B, Q, S, S) of ``seeds``. Raises UserError for one that is not finite."""
    labels = parse_labels(settings.labels, seeds, model.config.num_classes)
    with precision.autocast(settings.precision, next(model.parameters()).device):
        images = sampling.sample_tiles(model, seeds, labels, settings, counts=counts, replays=replays, guide=guide)
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if not all(finite):
        raise UserError(f"the model gives an image that is not finite (seed {seeds[finite.index(False)]}); no score")
    return images


@torch.no_grad()
def score(
    model: UNITE,
    settings: Settings,
    extractor: Extractor,
    reference: fid.Statistics | None,
    ranks: Ranks,
    identity: str = "",
    pairs: bool = False,
    subset: int = 1000,
    options: Options = PLAIN,
    guide: UNITE | None = None,
) -> dict[str, Any]:
    """{"fid", "is", "is_std", ..., "evaluations", "passes", "gflop_per_image", "images_per_second", "resumed_at"}.

    identity: of the weights, a guide's among them, so that interrupted sums of others are not taken up. evaluations and
    passes are means over tiles. Every process returns the same; what goes wrong on one is raised on all. Raises Stopped
    once ``options.stopping()`` is true on one, with the sums kept beside ``options.progress``.
    """
    settings.check(model.config)
    for one in filter(None, (model, guide)):
        one.use_kernels(settings.kernels)
    accumulator = fid.Accumulator(settings.count, extractor.sizes, ranks.device, pairs)
    # Kept, restored and added over processes with the others: tiles, evaluations, passes.
    work = accumulator.sums["work"] = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    key = files.digest([identity, extractor.identity(), settings.described(), pairs, ranks.world_size])
    file = Progress(options.progress, key, ranks)
    tiles = range(ranks.rank, -(-settings.count // sampling.TILE), ranks.world_size)
    done = resumed = file.load(accumulator)
    begun = time.perf_counter()

    def add_next() -> bool:
        """Adds this process's next tile; false when there is none."""
        nonlocal done
        if options.stopping():
            raise Stopped("a stop was asked for")
        if done == len(tiles):
            return False
        first = tiles[done] * sampling.TILE
        seeds = list(range(first, min(first + sampling.TILE, settings.count)))
        counts: dict[str, float] = {}
        images = draw(model, settings, seeds, counts, options.replays, guide)
        accumulator.add(torch.tensor(seeds), *extractor.compute(pictures.to_uint8(images)))
        work.add_(work.new_tensor([counts[name] for name in ("solutions", "evaluations", "passes")]))
        done += 1
        file.save(accumulator, done)
        options.report(min(sampling.TILE * ranks.world_size, settings.count))
        return True

    try:
        while any(ranks.gather(ranks.together(add_next))):
            pass
    except Stopped:
        file.save(accumulator, done, now=True)
        raise
    seconds = time.perf_counter() - begun
    accumulator.reduce(ranks)
    # On one process: the others' linear algebra might round differently, and a search must go the same way on all.
    found = ranks.together(lambda: fid.scores(accumulator, reference, pairs, subset) if ranks.is_main else {})
    count, evaluations, passes = work.tolist()
    result: dict[str, Any] = found | {"evaluations": evaluations / count, "passes": passes / count}
    result |= {"gflop_per_image": sampling_flops(model.config, result["passes"]) / 1e9, "resumed_at": resumed}
    if resumed < len(tiles):
        rate = (len(tiles) - resumed) * sampling.TILE * ranks.world_size / seconds
        result |= {"images_per_second": rate, "tflops": rate * result["gflop_per_image"] / 1e3}
    result = ranks.gather(result)[0]
    file.remove()
    return result
