"""What the export writes is read by everything here that reads weights, and what it is not is one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TINY, command, command_of, tiny_run

from unite_fast import checkpoint, evaluate, export
from unite_fast.base.errors import UserError
from unite_fast.config.yaml_text import parse_yaml

CONFIG = parse_yaml(TINY, "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, and two exports of it: ``ema`` and ``raw``."""
    folder = tiny_run(tmp_path_factory.mktemp("exported"), "train.max_steps=20")
    for weights, out in (("ema", "ema"), ("model", "raw")):
        said = command_of(export.main, folder / "run", "--out", folder / out, "--weights", weights)
        assert said.returncode == 0, said.stderr
    return folder


def test_an_export_is_the_checkpoint(folder):
    for weights, out in (("ema", "ema"), ("model", "raw")):
        expected, config = checkpoint.load_model(folder / "run", weights)
        for path in (folder / out, folder / out / "model.safetensors"):
            model, found = checkpoint.load_model(path, weights)
            assert (found.model, found.sample, found.optim) == (config.model, config.sample, config.optim)
            state = expected.state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    file = checkpoint.locate(folder / "ema")
    assert file == folder / "ema" / "model.safetensors"
    assert checkpoint.identity(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.identity(file) != checkpoint.identity(checkpoint.locate(folder / "raw"))


def test_the_programs_take_an_export(folder, tmp_path):
    for name in ("run", "ema"):
        words = ("--seeds", "0-3", "--device", "cpu", "--out", tmp_path / name)
        said = command("sample.py", "--checkpoint", folder / name, *words)
        assert said.returncode == 0, said.stderr
    images = sorted((tmp_path / "run").glob("*.png"))
    assert len(images) == 4
    assert all(image.read_bytes() == (tmp_path / "ema" / image.name).read_bytes() for image in images)

    scores = []
    for name in ("run", "ema"):
        words = ("--checkpoint", folder / name, "--extractor", "digits", "--device", "cpu")
        said = command_of(evaluate.main, "rfid", *words)
        assert said.returncode == 0, said.stderr
        (file,) = (folder / name / "scores").glob("rfid_step_0000020_ema_*.json")
        scores.append(json.loads(file.read_text()))
    assert scores[0]["result"]["rfid"] == scores[1]["result"]["rfid"]
    assert scores[1]["protocol"]["checkpoint"] == {
        "sha256": checkpoint.identity(folder / "ema" / "model.safetensors"), "weights": "ema",
    }  # fmt: skip

    words = ("--config", folder / "tiny.yaml", f"run_dir={tmp_path / 'next'}", "train.max_steps=1", "optim.lr=1e-30")
    said = command("train.py", *words, f"init_from={folder / 'ema'}")
    assert said.returncode == 0, said.stderr
    name = "encoder.blocks.0.attn.proj.weight"
    begun = checkpoint.load_weights(tmp_path / "next", "model")[0][name]
    torch.testing.assert_close(begun, load_file(folder / "ema" / "model.safetensors")[name])


def facts(path: Path) -> dict[str, str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return file.metadata()


def test_the_card_says_what_the_source_says(folder, reference, tmp_path):
    """Step, commit and sampling options are those of the source, through any number of exports, or left out."""

    def exported(source: Path, name: str, *options: str) -> tuple[str, dict, dict[str, str]]:
        out = tmp_path / name
        said = command_of(export.main, source, "--out", out, "--overwrite", *options)
        assert said.returncode == 0, said.stderr
        return (out / "README.md").read_text(), json.loads((out / "config.json").read_text()), facts(out)

    card, config, found = exported(folder / "run", "run")
    assert "EMA weights, step 20, written by" in card
    assert "Sampling options of the run: solver euler, 2 steps, guidance 1 for t in [0.0, 1.0]." in card
    assert config["sample"]["solver"] == "euler"
    assert (found["step"], found["origin"]) == ("20", "run")
    assert json.loads(found["provenance"])["torch"] == torch.__version__
    assert exported(tmp_path / "run", "again") == (card, config, found)

    content = torch.load(reference / "tiny.pt", weights_only=True)
    shutil.copy(reference / "tiny.json", tmp_path / "tiny.json")
    torch.save(content | {"step": 1234, "current_best_cfg_scale": 2.6}, tmp_path / "tiny.pt")
    for options in ((), ("--trust-pickle",)):
        card, config, found = exported(tmp_path / "tiny.pt", "official", *options)
        assert "EMA weights, step 1234 by its own count, written by" in card
        assert "The search during its training found guidance 2.6 for t in [0.1, 1.0] the best." in card
        assert "solver" not in card.replace("labels, solver", "")
        assert config["sample"] == {"cfg_scale": 2.6, "cfg_interval": [0.1, 1.0]}
        assert (found["step"], found["origin"]) == ("1234", "official")
        assert (config["model"]["encoder"]["in_context_start"], config["model"]["decoder"]["heads"]) == (2, 3)
    assert exported(tmp_path / "official", "official again") == (card, config, found)
    torch.save({"model": content["model"]}, tmp_path / "tiny.pt")
    card, config, found = exported(tmp_path / "tiny.pt", "bare", "--weights", "model")
    assert "Raw weights, written by" in card
    assert config["sample"] == {}
    assert "guidance" not in card.replace("guidance and its interval", "")


def rewritten(folder: Path, out: Path, tensors: dict | None = None, **facts: str) -> Path:
    source = folder / "ema" / "model.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata() | facts
    save_file(load_file(source) | (tensors or {}), out, {k: v for k, v in metadata.items() if v})
    return out


def test_an_export_of_an_earlier_version(folder, tmp_path):
    with safe_open(folder / "ema" / "model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["optim"] |= {"schedule": "constant", "mid_lr": 5e-5, "epoch_unit": "images"}
    path = rewritten(folder, tmp_path / "old.safetensors", config=json.dumps(config))
    assert checkpoint.load_model(path)[1].optim.flat_epochs == 1e9


def test_what_is_no_export_is_one_line(folder, tmp_path):
    def refused(path: Path, words: str, weights: str = "ema") -> None:
        with pytest.raises(UserError, match=words) as caught:
            checkpoint.load_model(path, weights)
        assert "\n" not in str(caught.value)

    refused(folder / "raw", "holds the weights 'model' alone, not 'ema'")
    refused(folder / "ema", "holds the weights 'ema' alone, not 'ema_0.9'", "ema_0.9")
    refused(rewritten(folder, tmp_path / "a.safetensors", config=""), "does not say what it holds")
    refused(rewritten(folder, tmp_path / "b.safetensors", config="{"), "does not say what it holds")
    refused(rewritten(folder, tmp_path / "c.safetensors", config="[]"), "must be a section")
    refused(
        rewritten(folder, tmp_path / "d.safetensors", config='{"model": {"patch_size": 0}}'),
        "model.patch_size must be above 0, got 0",
    )
    config = CONFIG | {"model": CONFIG["model"] | {"num_latents": 9}}
    refused(rewritten(folder, tmp_path / "e.safetensors", config=json.dumps(config)), "holds another model")
    bad = {"latent_tokens": load_file(folder / "ema" / "model.safetensors")["latent_tokens"] * torch.nan}
    refused(rewritten(folder, tmp_path / "f.safetensors", bad), "latent_tokens is not finite")
    (tmp_path / "g.safetensors").write_text("no tensors")
    refused(tmp_path / "g.safetensors", "cannot be read")
    refused(tmp_path, "no checkpoint at")

    words = ("--config", folder / "tiny.yaml", f"run_dir={tmp_path / 'next'}", f"resume={folder / 'ema'}")
    said = command("train.py", *words)
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert "start from them with init_from=" in said.stderr
