"""load(): images to latents and back and samples by name, as the README shows it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photographs import crop
from PIL import Image
from support import ROOT, TINY, command, command_of

import unite_fast
from unite_fast import evaluate, export
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig
from unite_fast.report import gallery


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run of two classes, runs/pets, and a photograph."""
    root = tmp_path_factory.mktemp("place")
    for number in range(8):
        folder = root / "pets" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        crop(number).save(folder / f"{number}.png")
    crop(1).save(root / "photo.jpg")
    (root / "tiny.yaml").write_text(TINY)
    keys = ["data.source=folder", f"data.path={root / 'pets'}", "data.workers=0", "model.num_classes=2"]
    keys += ["model.channels=3", "train.global_batch=8", "train.max_steps=2", f"run_dir={root / 'runs' / 'pets'}"]
    done = command("train.py", "--config", root / "tiny.yaml", *keys)
    assert done.returncode == 0, done.stderr
    return root


def test_the_readme_runs(place, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "from unite_fast import load" in block]
    monkeypatch.chdir(place)
    found: dict = {}
    exec(compile(block, "README.md", "exec"), found)
    assert found["latents"].shape == (2, 8, 4)
    assert all(image.size == (8, 8) for image in [*found["images"], *found["between"]])


def test_every_form_of_an_image_is_the_same_image(place):
    model = unite_fast.load(place / "runs" / "pets")
    photo = Image.open(place / "photo.jpg")
    reference = model.encode(photo)
    seen = model.images(photo)  # (1, 3, 8, 8), what the network sees
    pixels = (seen[0] * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    for one in (place / "photo.jpg", str(place / "photo.jpg"), [photo], pixels, array, seen, array[None], seen[0]):
        assert torch.equal(model.encode(one), reference)
    assert torch.allclose(model.encode(seen.double()), reference, atol=1e-5)
    assert np.array_equal(np.asarray(model.decode(reference)[0]), model.decode(reference, "array")[0])
    tensor = model.decode(reference, "tensor")
    assert (tensor.shape, tensor.dtype) == ((1, 3, 8, 8), torch.float32)


def test_samples_are_those_of_the_program(place, tmp_path):
    model = unite_fast.load(place / "runs" / "pets")
    words = ("--checkpoint", place / "runs" / "pets", "--seeds", "3-4", "--labels", "dog,cat", "--out", tmp_path / "s")
    assert command("sample.py", *words).returncode == 0
    for image, path in zip(model.sample(["dog", 0], seeds=[3, 4]), sorted((tmp_path / "s").glob("*.png")), strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(path)).astype(int)).max() <= 1
    assert model.classes(None) == [2]
    assert model.sample(seeds=range(40), output="array").shape == (40, 8, 8, 3)
    with torch.no_grad():  # else its last layer, which begins at 0, says the same of all classes
        for parameter in model.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    one, other = (model.sample("dog", output="tensor", cfg_scale=w) for w in (1.0, 3.0))
    assert not torch.equal(one, other)


def test_mistakes_are_one_line(place):
    model = unite_fast.load(place / "runs" / "pets")
    for call, words in (
        (lambda: model.sample("dgo"), "no class 'dgo'; there are dog"),
        (lambda: model.encode(torch.rand(3, 9, 9)), r"an image is \(3, 9, 9\); this model takes \(3, 8, 8\)"),
        (lambda: model.encode(torch.rand(3, 8, 8) * 255), r"float in \[0, 1\]"),
        (lambda: model.encode("no.png"), "cannot read no.png: No such file"),
        (lambda: model.decode(torch.zeros(1, 2, 3)), r"expected \(B, \*\(8, 4\)\)"),
        (lambda: unite_fast.load(place / "nothing"), "no checkpoint at"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(AttributeError):
        _ = unite_fast.nothing


@pytest.mark.parametrize(
    ("words", "cells"),
    [
        (("guidance", "--scales", "1,3"), (2, 2)),
        (("classes", "--seeds", "0-2", "--labels", "dog"), (1, 3)),
        (("between-seeds", "--seeds", "3,8"), (2, 9)),
        (("between-images", "photo.jpg", "pets/cat/0.png"), (1, 11)),
        (("nearest",), (4, 2)),
    ],
)
def test_galleries(place, monkeypatch, words, cells):
    monkeypatch.chdir(place)
    done = command_of(gallery.main, words[0], "runs/pets", *words[1:])
    assert done.returncode == 0, done.stderr
    path = place / "runs" / "pets" / "report" / f"gallery_{words[0].replace('-', '_')}.png"
    assert str(path.relative_to(place)) in done.stdout
    with Image.open(path) as image:
        rows, columns = cells
        assert image.width // 98 >= columns
        assert rows * 98 + 2 < image.height < (rows + 1) * 98
    wrong = command_of(gallery.main, words[0], "runs/pets", *words[1:], "--labels", "dgo")
    assert wrong.returncode == 2
    assert "no class 'dgo'" in wrong.stderr


def test_the_ends_between_two_seeds_are_their_samples(place):
    model = unite_fast.load(place / "runs" / "pets")
    shown = gallery.Shown(model.network, model.how, DataConfig(), model.t_max, [], [1], [3, 8], [], [])
    with torch.no_grad():
        (row,), words = gallery.between_seeds(shown)
    ends = model.sample(["dog"], seeds=[3, 8], output="tensor")
    assert torch.allclose(row[[0, -1]], ends, atol=1e-4)
    assert (words.columns[0], words.columns[-1]) == ("seed 3", "seed 8")


def test_the_card_of_an_export(place, monkeypatch):
    """Classes, a snippet that runs, the licence, the run's picture and scores; uploading asks for its package."""
    monkeypatch.chdir(place)
    scored = command_of(evaluate.main, "heldout", "--checkpoint", "runs/pets", "--data", "pets")
    assert scored.stdout.startswith("no LPIPS: the package lpips holds its heads alone; for the trunk: "), scored.stderr
    done = command_of(export.main, "runs/pets", "--out", "shared", "--license", "mit")
    assert done.returncode == 0, done.stderr
    card = (place / "shared" / "README.md").read_text()
    assert "license: mit\n" in card
    assert "Classes: cat, dog." in card
    assert re.search(r"- images 8, psnr [\d.]+, l1 [\d.]+ .*features of no network", card)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(compile(block.replace('load("tiny")', 'load("shared")'), "card", "exec"), {})
    assert json.loads((place / "shared" / "model_index.json").read_text())["_class_name"][1] == "UnitePipeline"
    pushed: list = []
    hub = SimpleNamespace(create_repo=lambda *a, **k: pushed.append(a), upload_folder=lambda **k: pushed.append(k))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: hub))
    again = command_of(export.main, "runs/pets", "--out", "shared", "--overwrite", "--push-to-hub", "me/pets")
    assert again.stdout.endswith("pushed to the hub as me/pets\n"), again.stderr
    assert pushed == [("me/pets",), {"repo_id": "me/pets", "folder_path": "shared"}]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused = command_of(export.main, "runs/pets", "--out", "shared", "--overwrite", "--push-to-hub", "me/pets")
    assert "pip install huggingface_hub" in refused.stderr


def test_diffusers_loads_an_export(place, monkeypatch):
    """And what it samples is what the model samples; what it saves can be loaded again."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(place)
    assert command_of(export.main, "runs/pets", "--out", "pipe").returncode == 0
    model, asked = unite_fast.load("runs/pets"), {"labels": ["dog", "cat"], "seeds": [3, 4]}
    made = diffusers.DiffusionPipeline.from_pretrained("./pipe", trust_remote_code=True)
    expected = model.sample(**asked, output="tensor", steps=3)
    assert torch.equal(made(**asked, output_type="pt", steps=3).images, expected)
    floats = made(**asked, output_type="np", steps=3).images
    assert np.array_equal(floats, expected.permute(0, 2, 3, 1).numpy())
    assert [image.tobytes() for image in made(**asked).images] == [i.tobytes() for i in model.sample(**asked)]
    made.save_pretrained("saved")
    again = diffusers.DiffusionPipeline.from_pretrained("./saved", custom_pipeline="./saved", trust_remote_code=True)
    assert torch.equal(again(**asked, output_type="pt", steps=3).images, expected)
