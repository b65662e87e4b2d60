"""Evaluation of the digits demo: how real, how varied and how faithful the model's digits are.

    python -m unite_fast.evaluation.digits runs/digits

The measures are pure functions of NumPy arrays; ``measure`` applies them to a model, ``main`` to a run's latest
checkpoint. Images are float arrays in [0, 1].

    pooled PSNR      10 log10(1 / mean squared error over all held-out images and pixels), in dB; the PSNR of the scores
                     (``modality.images.psnr``) is the mean over images of the dB of each, which is higher
    recognised       share of samples in which a support vector classifier, trained on the real training digits, sees
                     the class that was asked for
    spread           standard deviation over the images of a class, averaged over pixels and classes
    Fréchet          |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to the pixels' principal components
    nearest          mean distance to the nearest training digit: memorised samples lie closer than held-out digits do

A sample's Fréchet distance is taken to random halves of the real digits, with as many samples as a half holds, so that
it has the same bias as the distance between the two halves, which is what a perfect model would reach.

Shape letters: N images, Q channels, S image size, P = Q * S * S pixels, F features.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast import checkpoint, data, sampling
from unite_fast.base import files
from unite_fast.base.command import run
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig, SampleConfig
from unite_fast.data.digits import require
from unite_fast.efficiency import precision
from unite_fast.modality import pictures
from unite_fast.modality.images import to_float
from unite_fast.model.unite import UNITE

COMPONENTS = 32  # principal components of the 64 pixels; they hold 97 % of the variance
SAMPLE_BATCH = 250
SPLITS = 8  # random halvings of the real digits, averaged
REQUIRED_ACCURACY = 0.97


def flat(images: np.ndarray) -> np.ndarray:
    """(N, ...) -> (N, P) float64."""
    return np.asarray(images, dtype=np.float64).reshape(len(images), -1)


def pooled_psnr(real: np.ndarray, reconstruction: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of all images together, peak 1."""
    error = np.mean((flat(real) - flat(reconstruction)) ** 2)
    return float(10 * np.log10(1 / max(error, 1e-12)))


def train_classifier(images: np.ndarray, labels: np.ndarray, held_images: np.ndarray, held_labels: np.ndarray):
    """(classifier, its accuracy on the held-out digits). Raises ValueError when that is below 97 %."""
    from sklearn.svm import SVC

    classifier = SVC(C=10.0, gamma=0.25)  # pyright: ignore[reportArgumentType]  # the stubs know the text values only
    classifier.fit(flat(images), labels)
    accuracy = recognised(classifier, held_images, held_labels)
    if not accuracy >= REQUIRED_ACCURACY:
        raise ValueError(f"the classifier is right on {accuracy:.1%} of held-out digits, needs {REQUIRED_ACCURACY:.0%}")
    return classifier, accuracy


def recognised(classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (N, ...) that ``classifier`` gives their label (N,)."""
    return float(np.mean(classifier.predict(flat(images)) == np.asarray(labels)))


def within_class_spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviation over the images of a class, averaged over pixels and classes."""
    pixels, labels = flat(images), np.asarray(labels)
    return float(np.mean([pixels[labels == c].std(axis=0).mean() for c in np.unique(labels)]))


def principal_components(images: np.ndarray, count: int = COMPONENTS):
    """A function (N, ...) -> (N, F): projection on the leading components of ``images``."""
    pixels = flat(images)
    mean = pixels.mean(axis=0)
    _, _, directions = np.linalg.svd(pixels - mean, full_matrices=False)
    basis = directions[:count].T
    return lambda other: (flat(other) - mean) @ basis


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features a (N, F) and b (M, F)."""
    difference = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_to_halves(real: np.ndarray, others: dict[str, np.ndarray], splits: int = SPLITS) -> dict[str, float]:
    """{"halves": ..., name: ...}: Fréchet distance between halves of ``real``, and of each array to a half.

    Means over ``splits`` random halvings. Every distance is between equally many images (half of the real ones, or
    the size of the smallest array), because the distance of finite sets has a bias that falls with their size.
    """
    rng = np.random.default_rng(0)
    project = principal_components(real)
    features = project(real)
    projected = {name: project(images) for name, images in others.items()}
    n = min([len(real) // 2, *(len(p) for p in projected.values())])
    totals = dict.fromkeys(["halves", *others], 0.0)
    for _ in range(splits):
        order = rng.permutation(len(real))
        half = features[order[:n]]
        totals["halves"] += frechet_distance(half, features[order[-n:]])
        for name, p in projected.items():
            totals[name] += frechet_distance(half, p[rng.permutation(len(p))[:n]])
    return {name: total / splits for name, total in totals.items()}


def nearest_distance(images: np.ndarray, training: np.ndarray) -> float:
    """Mean Euclidean pixel distance of images (N, ...) to the nearest training image."""
    a, b = flat(images), flat(training)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.sqrt(squared.min(axis=1).clip(0)).mean())


def latent_std(latents: np.ndarray) -> float:
    """Standard deviation over samples of each latent coordinate of (N, K, C), averaged over coordinates."""
    return float(flat(latents).std(axis=0).mean())


def digits(reading: DataConfig, model: ModelConfig, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, Q, S, S) in [0, 1] and labels (N,) of the "train" or "heldout" digits, in their stored order."""
    source = data.open_source(reading, model, split)
    return torch.stack([to_float(source.load(i)) for i in range(len(source))]), source.labels


def draw(model: UNITE, labels: Tensor, how: SampleConfig) -> tuple[Tensor, float]:
    """(samples (N, Q, S, S) for labels (N,), images per second). Image i has seed i; solver and guidance of ``how``."""
    images, start = [], time.perf_counter()
    for chunk in torch.arange(len(labels)).split(SAMPLE_BATCH):
        images.append(sampling.sample(model, labels[chunk], how, seeds=chunk))
    return torch.cat(images), len(labels) / (time.perf_counter() - start)


@torch.no_grad()
def measure(
    model: UNITE, reading: DataConfig, how: SampleConfig, count: int = 1000
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(figures, pictures) of a model of the digits.

    Figures: nested numbers, described at the top of this file; "samples" has an entry for guidance scale 1 and one for
    ``how``, of ``count`` samples each, the classes in turn. Pictures: "real" and "reconstruction" of the
    held-out digits, and the samples by scale.
    """
    (train, train_labels), (held, held_labels) = (
        digits(reading, model.config, split) for split in ("train", "heldout")
    )
    real, real_labels = torch.cat([train, held]).numpy(), torch.cat([train_labels, held_labels]).numpy()
    classifier, accuracy = train_classifier(train.numpy(), train_labels.numpy(), held.numpy(), held_labels.numpy())
    latents = model.tokenize(held)
    reconstruction = model.decode(latents).clamp(0, 1)
    labels = torch.arange(count) % 10
    scales = sorted({1.0, how.cfg_scale})
    drawn = {scale: draw(model, labels, dataclasses.replace(how, cfg_scale=scale)) for scale in scales}
    distances = frechet_to_halves(real, {f"{scale:g}": images.numpy() for scale, (images, _) in drawn.items()})
    real_spread = within_class_spread(real, real_labels)
    figures = {
        "held_out_pooled_psnr": pooled_psnr(held.numpy(), reconstruction.numpy()),
        "latent_std": latent_std(latents.numpy()),
        "classifier_accuracy": accuracy,
        "real": {
            "frechet_halves": distances["halves"],
            "nearest": nearest_distance(held.numpy(), train.numpy()),
        },
        "samples": {
            f"{scale:g}": {
                "recognised": recognised(classifier, images.numpy(), labels.numpy()),
                "spread": within_class_spread(images.numpy(), labels.numpy()) / real_spread,
                "frechet": distances[f"{scale:g}"],
                "nearest": nearest_distance(images.numpy(), train.numpy()),
                "images_per_second": speed,
            }
            for scale, (images, speed) in drawn.items()
        },
    }
    samples = {f"{scale:g}": images for scale, (images, _) in drawn.items()}
    return figures, {"real": held, "reconstruction": reconstruction} | samples


def table(figures: dict[str, Any], s: SampleConfig, count: int) -> str:
    """The figures as text."""
    real, accuracy = figures["real"], figures["classifier_accuracy"]
    lines = [
        f"held-out reconstruction   {figures['held_out_pooled_psnr']:.1f} dB pooled PSNR",
        f"latents                   standard deviation over held-out digits {figures['latent_std']:.2f}",
        "",
        f"{'':24}{'recognised':>12}{'spread':>9}{'Fréchet':>9}{'nearest':>9}{'images/s':>10}",
        f"{'real digits':24}{accuracy:>12.1%}{1:>9.2f}{real['frechet_halves']:>9.3f}{real['nearest']:>9.2f}",
    ]
    for scale, row in figures["samples"].items():
        name = f"{count:,} samples, w = {scale}"
        lines.append(
            f"{name:24}{row['recognised']:>12.1%}{row['spread']:>9.2f}{row['frechet']:>9.3f}{row['nearest']:>9.2f}"
            f"{row['images_per_second']:>10.0f}"
        )
    lines += [
        "",
        f"w: guidance scale, for t in {list(s.cfg_interval)}; {s.solver}, {s.steps} steps",
        "recognised: by a classifier trained on the real training digits; its row of real digits is the held-out ones",
        "spread: within a class, relative to real digits. Fréchet: to a half of the real; first row: between halves",
        "nearest: mean pixel distance to the nearest training digit (real row: of held-out digits)",
    ]
    return "\n".join(lines)


def save_pictures(folder: Path, images: dict[str, Tensor], held_labels: Tensor, rows: int = 8) -> list[Path]:
    """Ten columns, one per class: samples_w<scale>.png, and reconstruction.png with real digits left, decoded right."""
    order = held_labels.argsort(stable=True).view(10, -1)[:, :rows].T  # (rows, 10)
    blank = torch.ones(1, *images["real"].shape[1:])
    sides = [torch.cat([images["real"][row], blank, images["reconstruction"][row]]) for row in order]
    paths = [folder / "reconstruction.png"]
    pictures.save_grid(paths[0], sides, smallest=40)
    for scale in images.keys() - {"real", "reconstruction"}:
        paths.append(folder / f"samples_w{scale}.png")
        pictures.save_grid(paths[-1], list(images[scale][: 10 * rows].split(10)), smallest=40)
    return sorted(paths)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.evaluation.digits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="run folder; its newest checkpoint's EMA weights are used")
    parser.add_argument("--samples", type=int, default=1000, help="number of samples, a multiple of 10")
    args = parser.parse_args(argv)
    if args.samples < 100 or args.samples % 10:
        raise UserError(f"--samples {args.samples}: give a multiple of 10, at least 100")
    precision.setup(torch.device("cpu"))
    model, config = checkpoint.load_model(args.run)
    require(config.data, f"{args.run}: this command")
    figures, images = measure(model, config.data, config.sample, args.samples)
    folder = args.run / "report"
    paths = save_pictures(folder, images, digits(config.data, config.model, "heldout")[1])
    files.write_json(folder / "figures.json", figures)
    print(table(figures, config.sample, args.samples))
    print(f"\nin {folder}: {', '.join(path.name for path in paths)}, figures.json")


if __name__ == "__main__":
    sys.exit(run(main))
