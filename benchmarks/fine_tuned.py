"""What fine-tuning a decoder does to reconstructions and samples of small images: a table over runs, before and after.

    python benchmarks/fine_tuned.py --runs before runs/fashion --runs after runs/fashion_adversarial --picture out.png

A name and runs, as of several seeds, follow each option; a column of the table has their means and ranges. Samples
have the same seeds before and after and so the same latents, to the bit: what differs is the decoder. Features are the
hidden layer of a small classifier of the real training images, which no run has seen, at unit variance.

    PSNR         pooled over held-out images
    features     mean squared distance of a reconstruction's features from those of its image; 1: of two images
    edges        mean absolute difference of neighbouring pixels, over that of real images: below 1 where blurred
    rFD, FD      Frechet distance of the features of reconstructions from those of their images; of samples, from as
                 many held-out ones
    KID          of the samples' features from the held-out ones' (torch-fidelity's, subsets of 1,000), times 1000
    precision, recall     of the samples among the held-out ones, by nearest neighbours (torch-fidelity's)
    recognised   samples in which the classifier sees the class that was asked for
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast import checkpoint, data, sampling
from unite_fast.base.command import run
from unite_fast.base.errors import UserError
from unite_fast.config import Config
from unite_fast.efficiency import precision
from unite_fast.evaluation import fid
from unite_fast.modality import pictures
from unite_fast.modality.images import to_float
from unite_fast.sampling.reconstruct import reconstruct

TRAINED_ON, HELD_OUT, SAMPLES, SUBSET, BATCH = 10_000, 2_000, 2_000, 1_000, 250
ROWS = {
    "psnr": "reconstructions: pooled PSNR, dB", "features": "distance of features", "rfd": "rFD", "edges": "edges",
    "fd": "samples: FD", "kid": "KID x 1000", "precision": "precision", "recall": "recall",
    "recognised": "recognised, %", "sample_edges": "edges",
}  # fmt: skip


def some(config: Config, split: str, count: int) -> tuple[Tensor, Tensor]:
    """(images (N, Q, S, S) in [0, 1], labels (N,)): evenly spread over a source, at most ``count``."""
    source = data.open_source(config.data, config.model, split)
    chosen = torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    batch = source.few(chosen)
    content = batch.content["images"] if isinstance(batch.content, Mapping) else batch.content
    return to_float(content), batch.labels


def as_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


class Network:
    """A classifier with one hidden layer, fitted to real training images from a fixed seed."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.neural_network import MLPClassifier

        fitted: Any = MLPClassifier((64,), alpha=1e-2, max_iter=20 if len(images) > 5000 else 60, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it stops at max_iter, which is meant
            fitted.fit(images.flatten(1).numpy(), labels.numpy())
        self.fitted = fitted
        self.deviation = 1.0
        self.deviation = self.features(images).std()

    def features(self, images: Tensor) -> np.ndarray:
        x = as_bytes(images).flatten(1).double().numpy()
        return np.maximum(x @ self.fitted.coefs_[0] + self.fitted.intercepts_[0], 0) / self.deviation

    def right(self, images: Tensor, labels: Tensor) -> float:
        """Per cent."""
        return 100 * float(np.mean(self.fitted.predict(as_bytes(images).flatten(1).numpy()) == labels.numpy()))


def edges(images: Tensor) -> float:
    return float((images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2)


def gaussian(found: np.ndarray) -> fid.Statistics:
    return fid.Statistics(found.mean(0), np.cov(found, rowvar=False), len(found), found)


def compared(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """{"fd", "kid", "precision", "recall"} of two sets of features."""
    a, b = gaussian(made), gaussian(real)
    pairs = fid.pairwise(a, b, min(SUBSET, len(made) // 2, len(real) // 2))
    return {"fd": fid.frechet(a, b), "kid": 1e3 * pairs["kid"]} | {k: pairs[k] for k in ("precision", "recall")}


@torch.no_grad()
def scores(folder: str, opened: Callable[[Config], tuple[Network, Tensor, Tensor]]) -> tuple[dict[str, float], Any]:
    """(figures of a run's EMA weights, (held-out images, their reconstructions, samples))."""
    model, config = checkpoint.load_model(folder)
    network, held, labels = opened(config)
    places = torch.arange(len(held))
    t_max = config.objective.tokenizer_t_max
    made = torch.cat([
        reconstruct(model, {"images": held[p]}, p, t_max, labels[p], None) for p in places.split(BATCH)
    ])  # fmt: skip
    asked = torch.arange(SAMPLES) % config.model.num_classes
    drawn = torch.cat([
        sampling.sample(model, asked[s], config.sample, seeds=s) for s in torch.arange(SAMPLES).split(BATCH)
    ])  # fmt: skip
    real, again = network.features(held), network.features(made)
    error = float((as_bytes(held) - as_bytes(made)).double().square().mean())
    found = {
        "psnr": -10 * np.log10(error), "edges": edges(made) / edges(held),
        "rfd": fid.frechet(gaussian(again), gaussian(real)),
        "features": float(((real - again) ** 2).sum(1).mean() / (2 * real.var(0).sum())),
        "recognised": network.right(drawn, asked), "sample_edges": edges(drawn) / edges(held),
    }  # fmt: skip
    return found | compared(network.features(drawn), real[:SAMPLES]), (held, made, drawn)


def of_real(config: Config, network: Network, held: Tensor, labels: Tensor) -> dict[str, float]:
    """The same figures where training images stand for samples."""
    train, _ = some(config, "train", min(SAMPLES, len(held)))
    found = compared(network.features(train), network.features(held)[:SAMPLES])
    return found | {"recognised": network.right(held, labels), "sample_edges": edges(train) / edges(held)}


def table(columns: dict[str, list[dict[str, float]]], real: dict[str, float]) -> str:
    """Markdown: means and ranges over the runs of each column, and what real images reach."""
    lines = [f"| | {' | '.join(columns)} | real images |", "|---" * (len(columns) + 2) + "|"]
    for key, words in ROWS.items():
        said = []
        for rows in columns.values():
            values = np.array([row[key] for row in rows])
            said.append(f"{values.mean():.4g} ({values.min():.4g} to {values.max():.4g})")
        lines.append(f"| {words} | {' | '.join(said)} | {f'{real[key]:.4g}' if key in real else ''} |")
    return "\n".join(lines)


def picture(path: Path, columns: list[Any], count: int = 10) -> None:
    """Rows: held-out images, their reconstructions by each column's first run, samples of each."""
    chosen = torch.linspace(0, len(columns[0][0]) - 1, count).long()
    rows = [columns[0][0][chosen], *(made[chosen] for _, made, _ in columns), *(drawn[:count] for *_, drawn in columns)]
    pictures.save_grid(path, rows, smallest=40)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", nargs="+", action="append", required=True, metavar=("NAME", "RUN"))
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of the first run of each column")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if any(len(column) < 2 for column in arguments.runs):
        raise UserError("--runs takes a name and one run or more")
    precision.setup(torch.device("cpu"))
    held: list[Any] = []

    def opened(config: Config) -> tuple[Network, Tensor, Tensor]:
        if not held:
            network = Network(*some(config, "train", TRAINED_ON))
            held.extend([network, *some(config, "heldout", HELD_OUT)])
            held.append(of_real(config, *held))
        return held[0], held[1], held[2]

    found = {name: [scores(folder, opened) for folder in folders] for name, *folders in arguments.runs}
    figures: dict[str, Any] = {name: [row for row, _ in runs] for name, runs in found.items()}
    print(table(figures, held[3]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"real images": held[3]}, indent=1))
    if arguments.picture:
        picture(arguments.picture, [runs[0][1] for runs in found.values()])


if __name__ == "__main__":
    sys.exit(run(main))
