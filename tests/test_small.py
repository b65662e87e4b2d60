"""Scores of small real images against direct formulas and torch-fidelity's; real images stand beside."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from support import command_of, tiny_run

from unite_fast import checkpoint, data, sampling
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig, SampleConfig
from unite_fast.evaluation import small
from unite_fast.modality.images import to_float
from unite_fast.model.unite import build
from unite_fast.sampling.reconstruct import reconstruct

MODEL = ModelConfig(image_size=8, patch_size=2, channels=1, num_classes=10)
DIGITS = DataConfig(source="digits", flip=False)
HELD = functools.partial(data.open_source, DIGITS, MODEL, "heldout")


def test_kernel_distance_is_the_direct_formula():
    x, y = (torch.randn(40, 8, generator=torch.Generator().manual_seed(s)).double() + s for s in (0, 1))
    x, y = (3 * v / y.square().mean().sqrt() for v in (x, y))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 9 / 8 + 1) ** 3  # the root mean square of y is 3

    others = ~torch.eye(40, dtype=torch.bool)
    expected = kernel(x, x)[others].mean() + kernel(y, y)[others].mean() - 2 * kernel(x, y).mean()
    assert small.kid(x, y) == pytest.approx(1000 * float(expected), rel=1e-9)


def fashion(root: Path) -> Path:
    """Ten images in the format of MNIST."""
    for part, count in (("train", 10), ("t10k", 10)):
        images, labels = bytes(range(10)) * 64, bytes(range(10))
        (root / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, count, 8, 8) + images)
        (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, count) + labels)
    return root


def test_the_nearest_images_are_those_of_the_direct_formula():
    source = data.open_source(DIGITS, MODEL)
    (every, _), (few, _) = small.some(source, torch.arange(len(source))), small.some(HELD(), torch.arange(7))
    direct = (few[:, None] - every[None]).square().flatten(2).mean(2).sqrt()
    distances, places = small.nearest(few, source, 3)
    torch.testing.assert_close(distances, direct.min(1).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(direct.gather(1, places), direct.topk(3, largest=False).values, rtol=1e-4, atol=1e-4)
    assert float(small.nearest(every[5:6], source)[0]) < 1e-3


def test_the_classifier_is_kept_and_read(tmp_path):
    path = tmp_path / "c.safetensors"
    first = small.classifier(path, DIGITS, MODEL)
    again = small.classifier(path, DIGITS, MODEL)
    images, labels = small.some(HELD(), torch.arange(300))
    with torch.no_grad():
        assert torch.equal(first(images), again(images))
        assert (first(images).argmax(1) == labels).float().mean() > 0.6  # two epochs of 1,497 images
    fewer = DataConfig(source="idx", path=str(fashion(tmp_path)))
    with pytest.raises(UserError, match="was fitted to other images than those of the run; name another file"):
        small.classifier(path, fewer, MODEL)
    with pytest.raises(UserError, match="no classifier of such images"):
        small.classifier(path, DIGITS, ModelConfig(image_size=8, patch_size=2, channels=3, num_classes=10))


@torch.no_grad()
def check_in_the_classifiers_eyes(found: dict, run: Path, judge: small.Classifier, monkeypatch) -> None:
    """feature_distance and recognised, image by image; then with real digits of class seed mod 10 for samples."""
    model, config = checkpoint.load_model(run)
    held = data.open_source(DIGITS, MODEL, "heldout")
    images = torch.stack([to_float(held.load(i)) for i in range(60)])
    labels = [int(held.labels[i]) for i in range(60)]
    made = reconstruct(model, images, torch.arange(60), config.objective.tokenizer_t_max)
    real, back = judge.features(images).double(), judge.features(made).double()

    def mean_distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return sum(float(((a - b) ** 2).sum()) for a, b in pairs) / len(pairs)

    scale = mean_distance([(real[i], real[i - 1]) for i in range(60)])
    of_class = [[i for i in range(60) if labels[i] == c] for c in range(10)]
    alike = [(real[i], real[j]) for places in of_class for i, j in itertools.pairwise(places)]
    pairs = {"result": list(zip(real, back, strict=True)), "real": alike}
    how = dataclasses.replace(config.sample, cfg_scale=1.0)
    samples = sampling.sample(model, torch.arange(60) % 10, how, seeds=range(60))
    right = [int(judge(samples[i : i + 1]).argmax()) == i % 10 for i in range(60)]
    rightly = [int(judge(images[i : i + 1]).argmax()) == labels[i] for i in range(60)]
    for name, of in pairs.items():
        assert found[name]["feature_distance"] == pytest.approx(mean_distance(of) / scale, rel=1e-4), name
    assert found["result"]["recognised"] == pytest.approx(sum(right) / 60)
    assert found["real"]["recognised"] == pytest.approx(sum(rightly) / 60)
    stand_in = [of_class[seed % 10][seed // 10 % len(of_class[seed % 10])] for seed in range(60)]
    monkeypatch.setattr(small.sampling, "sample", lambda *a, seeds, **k: images[[stand_in[s] for s in seeds.tolist()]])
    of_real = small.measure(model, DIGITS, how, judge, config.objective.tokenizer_t_max, 60)["result"]
    assert of_real["recognised"] == pytest.approx(sum(rightly[place] for place in stand_in) / 60)
    assert of_real["recognised"] > 0.6


def test_images_in_the_order_of_their_classes_are_drawn():
    """As folders list them: the first images of the first classes would stand for all."""
    source = HELD()
    assert small.mixed(source).tolist() == list(range(len(source)))
    source.labels = source.labels.sort().values
    places = small.mixed(source)
    assert places.sort().values.tolist() == list(range(len(source)))
    assert len(set(source.labels[places[:60]].tolist())) == 10


def test_too_few_held_out_images_are_refused(tmp_path):
    found = DataConfig(source="idx", path=str(fashion(tmp_path)))
    with pytest.raises(UserError, match="10 held-out images are too few to compare with; give at least 40"):
        small.measure(build(MODEL), found, SampleConfig(), small.Classifier(1, 10), 0.9)


def test_a_run_is_scored_beside_real_images(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "train.max_steps=3") / "run"
    words = (run, "--classifier", tmp_path / "c.safetensors", "--count", 60)
    assert command_of(small.main, *words).returncode == 0
    found = json.loads((run / "scores" / "small.json").read_text())
    assert {"psnr", "feature_distance", "recognised", "kid", "nearest"} <= found["result"].keys()
    assert 0 < found["real"]["nearest"] < found["result"]["nearest"]
    assert (found["held_out"], found["samples"]) == (60, 60)
    check_in_the_classifiers_eyes(found, run, small.classifier(tmp_path / "c.safetensors", DIGITS, MODEL), monkeypatch)
    assert found["real"]["kid"] < found["result"]["kid"]
    assert found["real"]["recognised"] > found["result"]["recognised"]
    assert 0 < found["real"]["feature_distance"] < 1
    assert command_of(small.main, *words[:-1], 5).returncode == 2
