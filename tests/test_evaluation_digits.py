"""The measures of the digits demo on data whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from unite_fast.base.errors import UserError
from unite_fast.checkpoint import saving
from unite_fast.config.yaml_text import from_dict
from unite_fast.evaluation import digits as D
from unite_fast.modality.images import psnr
from unite_fast.model.unite import build
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.distributed import Ranks
from unite_fast.training.state import Part, TrainState

TINY = {
    "model": {
        "image_size": 8,
        "patch_size": 4,
        "channels": 1,
        "num_classes": 10,
        "latent_dim": 4,
        "num_latents": 4,
        "encoder": {"depth": 1, "width": 16, "heads": 2, "in_context_start": 0, "in_context_len": 1},
        "decoder": {"depth": 1, "width": 16, "heads": 2, "mlp_hidden": 16, "in_features": 16},
    },
    "data": {"source": "digits", "flip": False},
    "sample": {"solver": "euler", "steps": 2, "cfg_scale": 2.0},
}


@pytest.fixture(scope="module")
def real():
    data = load_digits()
    order = np.random.default_rng(1).permutation(len(data.target))
    return (data.images[order, None] / 16).astype(np.float32), data.target[order]


def test_pooled_psnr(real):
    """Of the mean error; the mean over images of each one's PSNR is another number."""
    images, _ = real
    assert D.pooled_psnr(images, images + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert D.pooled_psnr(images, images) > 100
    worse = images[:2] + np.array([0.1, 0.01], dtype=np.float32)[:, None, None, None]
    assert D.pooled_psnr(images[:2], worse) == pytest.approx(10 * np.log10(2 / (0.01 + 0.0001)), abs=1e-3)
    each = psnr(torch.from_numpy(images[:2]), torch.from_numpy(worse))
    torch.testing.assert_close(each, torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)


def test_classifier_knows_held_out_digits(real):
    images, labels = real
    classifier, accuracy = D.train_classifier(images[300:], labels[300:], images[:300], labels[:300])
    assert accuracy >= 0.97
    assert D.recognised(classifier, images[:300], (labels[:300] + 1) % 10) < 0.02
    assert D.recognised(classifier, np.zeros((100, 1, 8, 8)), np.arange(100) % 10) == pytest.approx(0.1)


def test_classifier_that_learned_nothing_is_refused(real):
    images, labels = real
    shuffled = np.random.default_rng(0).permutation(labels[300:])
    with pytest.raises(ValueError, match="needs 97%"):
        D.train_classifier(images[300:], shuffled, images[:300], labels[:300])


def test_spread(real):
    images, labels = real
    means = np.stack([images[labels == c].mean(axis=0) for c in range(10)])[labels]
    assert D.within_class_spread(means, labels) < 1e-6
    whole = D.within_class_spread(images, labels)
    halved = D.within_class_spread(means + (images - means) / 2, labels)
    assert halved == pytest.approx(whole / 2, rel=1e-5)
    shuffled = D.within_class_spread(images, np.random.default_rng(0).permutation(labels))
    assert shuffled > 1.2 * whole  # variety between the classes does not count as variety within them


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3)) * [1, 2, 3]
    b = rng.normal(size=(200_000, 3)) * [1, 1, 1] + [2, 0, 0]
    assert D.frechet_distance(a, b) == pytest.approx(4 + 1 + 4, rel=0.02)
    assert D.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_sees_rotated_covariance():
    """Equal means and equal variances of each feature, but opposite correlation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100_000, 2))
    a, b = x @ np.array([[1, 0.9], [0, 0.19**0.5]]), x @ np.array([[1, -0.9], [0, 0.19**0.5]])
    # [[1, .9], [.9, 1]] and [[1, -.9], [-.9, 1]] have common eigenvectors, with the values 1.9 and 0.1 swapped.
    assert D.frechet_distance(a, b) == pytest.approx(2 * (1.9**0.5 - 0.1**0.5) ** 2, rel=0.02)


def test_frechet_to_halves(real):
    images, labels = real
    rng = np.random.default_rng(0)
    noisy = images + 0.2 * rng.normal(size=images.shape)
    others = {"real": images, "noisy": noisy, "dim": images * 0.8}
    distances = D.frechet_to_halves(images, others, splits=3)
    assert distances["real"] <= distances["halves"]  # they share images
    assert distances["dim"] > 5 * distances["halves"]
    assert distances["noisy"] > 3 * distances["halves"]
    small = D.frechet_to_halves(images, {"two classes": images[labels < 2]}, splits=3)
    assert small["halves"] > distances["halves"]  # fewer images, more bias
    assert small["two classes"] > 5 * small["halves"]


def test_nearest_distance_tells_copies_from_new_digits(real):
    images, _ = real
    copies = D.nearest_distance(images[300:600], images[300:])
    assert copies < 1e-3 < 0.5 < D.nearest_distance(images[:300], images[300:])


def test_latent_std():
    z = np.random.default_rng(0).normal(size=(5000, 4, 3)) * 0.5 + np.arange(3)
    assert D.latent_std(z) == pytest.approx(0.5, rel=0.02)
    assert D.latent_std(np.ones((10, 4, 3))) == 0


def save_untrained(folder, values):
    config = from_dict(values)
    model = build(config.model)
    writer = saving.Writer(folder / "checkpoints", config, Ranks(0, 1, torch.device("cpu")))
    writer.save(TrainState({"": Part(model, Optimizer(model, config.optim))}), {})
    writer.wait()


def test_report_on_an_untrained_model(tmp_path, capsys):
    """It must look as bad as it is: samples without variety that no classifier could tell apart."""
    save_untrained(tmp_path, TINY)
    D.main([str(tmp_path), "--samples", "100"])
    printed = capsys.readouterr().out
    closing = f"in {tmp_path / 'report'}: reconstruction.png, samples_w1.png, samples_w2.png, figures.json"
    assert printed.splitlines()[-1] == closing
    figures = json.loads((tmp_path / "report" / "figures.json").read_text())
    assert set(figures["samples"]) == {"1", "2"}
    for row in figures["samples"].values():
        assert row["recognised"] <= 0.2
        assert row["spread"] < 0.05
        assert row["frechet"] > 20 * figures["real"]["frechet_halves"]
        assert row["images_per_second"] > 0
    assert figures["held_out_pooled_psnr"] < 15
    assert figures["latent_std"] < 0.01
    pictures = {path.name: path for path in (tmp_path / "report").glob("*.png")}
    assert set(pictures) == {"reconstruction.png", "samples_w1.png", "samples_w2.png"}
    with Image.open(pictures["samples_w2.png"]) as samples, Image.open(pictures["reconstruction.png"]) as both:
        assert samples.height == both.height
        assert both.width > 2 * samples.width


def test_report_refuses_other_data(tmp_path):
    save_untrained(tmp_path, TINY | {"data": {"source": "synthetic", "flip": False}})
    with pytest.raises(UserError, match="synthetic"):
        D.main([str(tmp_path)])
    with pytest.raises(UserError, match="multiple of 10"):
        D.main([str(tmp_path), "--samples", "101"])
