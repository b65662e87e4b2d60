"""Whole runs of the decoder's fine-tuning: resumed, compared, ordinary checkpoints; mistakes in one line."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from stepping import load_tiny
from support import ROOT, TINY, command, command_of
from test_adversarial import ALONE, STAGE

import unite_fast.export
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import load_model, load_weights, read
from unite_fast.efficiency import compatibility
from unite_fast.interop import load_reference, save_reference
from unite_fast.run.stats import read_metrics


def train(config: Path, folder: Path, *arguments: str) -> str:
    outcome = command("train.py", "--config", config, f"run_dir={folder}", *arguments)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration, and a run of it of three steps."""
    folder = tmp_path_factory.mktemp("adversarial")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    train(config, folder / "base", "train.max_steps=3", "optim.warmup_epochs=0")
    return config, folder / "base"


LATER = (
    *("train.checkpoint_every=1", "train.keep_last=9", "train.max_steps=6", "optim.warmup_epochs=0", "optim.lr=1e-3"),
    *("objective.adversarial.discriminator_start=1", "objective.adversarial.generator_start=3"),
)


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    config, folder = base
    path = folder.parent / "tuned"
    train(config, path, *STAGE, *LATER, f"init_from={folder}", "train.image_every=6")
    return path


@pytest.mark.parametrize("stop", [1, 3, 4])  # before the discriminator's first step, the decoder's first with it, after
def test_a_run_resumes_bit_for_bit(base, tuned, tmp_path, stop):
    path = tmp_path / "run"
    shutil.copytree(tuned, path)
    for step in range(stop + 1, 7):
        shutil.rmtree(path / "checkpoints" / f"step-{step:07d}")
    assert f"at step {stop}" in train(base[0], path, *STAGE, *LATER, "init_from=gone")  # of which nothing is needed
    one, two = (read(folder / "checkpoints" / "step-0000006") for folder in (tuned, path))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    rows = [[{k: v for k, v in row.items() if k in ("total", "d_accuracy", "adaptive_weight", "generator")}
             for row in read_metrics(folder / "metrics.jsonl")] for folder in (tuned, path)]  # fmt: skip
    assert rows[0] == rows[1]
    assert json.loads((path / "provenance.json").read_text())["fine_tuned_from"]["step"] == 3


def test_the_result_is_an_ordinary_checkpoint(base, tuned, tmp_path):
    weights, config = load_weights(tuned)
    before, _ = load_weights(base[1])
    assert config is not None
    same = {name for name, value in before.items() if torch.equal(value, weights[name])}
    assert weights.keys() == before.keys()
    assert before.keys() - same == {n for n in before if n.startswith(("decoder.", "up_sample_decoder."))}
    origin = json.loads((tuned / "provenance.json").read_text())["fine_tuned_from"]
    assert origin.keys() == {"name", "step", "weights", "sha256"}
    assert (origin["name"], origin["step"], origin["weights"], len(origin["sha256"])) == ("tiny", 3, "ema", 64)
    state = json.loads((tuned / "checkpoints" / "step-0000006" / "state.json").read_text())
    assert state["origin"] == origin
    assert sorted(p.name for p in (tuned / "samples").glob("*.png")) == ["step_0000000.png", "step_0000006.png"]
    grid = tmp_path / "grid.png"
    drawn = command("sample.py", "--checkpoint", tuned, "--seeds", "0-3", "--out", grid)
    assert drawn.returncode == 0, drawn.stderr
    out = tmp_path / "export"
    assert command_of(unite_fast.export.main, tuned, "--out", out).returncode == 0
    exported, _ = load_model(out)
    model, _ = load_model(tuned)
    for name, value in model.state_dict().items():
        assert torch.equal(value, exported.state_dict()[name]), name
    save_reference(tmp_path / "official.pt", model)
    again = load_reference(tmp_path / "official.pt", in_context_start=1, decoder_heads=2)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.decode(again.tokenize(x)), model.decode(model.tokenize(x)))


def test_the_comparison_of_runs(base, tuned, tmp_path, monkeypatch, capsys):
    """benchmarks/fine_tuned.py: what is equal has a distance of zero; figures, table and picture of two columns."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("fine_tuned")
    for name in ("TRAINED_ON", "HELD_OUT", "SAMPLES"):
        monkeypatch.setattr(program, name, 80)
    columns = ["--runs", "before", str(base[1]), str(base[1]), "--runs", "after", str(tuned)]
    program.main([*columns, "--json", str(tmp_path / "f.json"), "--picture", str(tmp_path / "p.png")])
    found, lines = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out.splitlines()
    assert found["before"][0] == found["before"][1] != found["after"][0]
    assert len(lines) == 2 + len(program.ROWS)
    assert f"{found['after'][0]['psnr']:.4g}" in lines[2]
    assert (tmp_path / "p.png").stat().st_size > 1000
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    same = program.compared(x, x)
    assert abs(same["fd"]) < 1e-6
    assert (same["precision"], same["recall"]) == (1, 1)


def refused(config: Path, folder: Path, *overrides: str) -> str:
    outcome = command("train.py", "--config", config, f"run_dir={folder}", *overrides)
    assert outcome.returncode == 2, outcome.stdout + outcome.stderr
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_mistakes_are_one_line(base, tuned, tmp_path):
    config, trained = base
    run, began = tmp_path / "run", f"init_from={base[1]}"
    assert "init_from names none; give a run" in refused(config, run, *STAGE)
    assert "no checkpoint at" in refused(config, run, *STAGE, "init_from=nowhere")
    assert "holds no discriminator" in refused(config, run, *STAGE, f"resume={trained}")
    assert "holds a discriminator as well" in refused(config, run, f"resume={tuned}", "train.max_steps=9")
    another = (*STAGE, began, "model.encoder.depth=4")
    assert "holds another model: model.encoder.depth is 3 there and 4 here" in refused(config, run, *another)
    some = "optim.frozen=[encoder, patch_embed]"
    said = refused(config, run, *STAGE, began, some)
    assert "latent_tokens would be trained as well: set optim.frozen=[latent_tokens, patch_embed, encoder, " in said
    assert "no parameter's name begins with decodr" in refused(config, run, *STAGE, began, "optim.frozen=[decodr]")
    assert "leaves no parameter" in refused(
        config, run, *STAGE, began, f"{STAGE[-1][:-1]}, decoder, up_sample_decoder]"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("objective.flow_steps=3",), "set objective.flow_steps=0"),
        (("objective.pixel_weight=0",), "objective.pixel_weight and perceptual_weight are 0"),
        (("objective.adversarial.discriminator_start=5",), "generator_start 0 is before discriminator_start 5"),
        (("objective.adversarial.blocks=[3]",), "blocks: 3 is not below the encoder's depth 3"),
        (("objective.adversarial.blocks=[1, 1]",), "names a block twice"),
        (("objective.adversarial.augment=[color]",), "augment: 'color' is not one of colour, translation, cutout"),
        (("objective.adversarial.penalty=r1", "objective.adversarial.penalty_weight=0"), "must be above 0, got 0"),
        (("objective.adversarial.adaptive_cap=0",), "adaptive_cap must be above 0"),
        (("objective.adversarial.weight=0",), "does nothing beside objective.adversarial.weight=0"),
        (("objective.adversarial.penalty_weight=2",), "does nothing beside objective.adversarial.penalty=none"),
        (("objective.adversarial.weight=-1",), "weight must be at least 0"),
        (("model.modality=atoms",), "the discriminator is of images"),
    ],
)
def test_what_does_not_go_together(overrides, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as error:
        load_tiny(*STAGE, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "mend"),
    [
        ("efficiency.cuda_graph=step", "set efficiency.cuda_graph=none"),
    ],
)
def test_ways_of_computing_that_are_refused(base, tmp_path, option, mend):
    said = refused(base[0], tmp_path / "run", *STAGE, f"init_from={base[1]}", option)
    assert f"objective.adversarial does not work with {option}; {mend}" in said


def test_weights_freed_between_passes_are_refused():
    config = load_tiny(*STAGE, "train.strategy=fsdp2", "train.reshard=pass")
    said = "objective.adversarial does not work with train.reshard=pass; set train.reshard=step"
    with pytest.raises(UserError, match=said):
        compatibility.check_device(config.efficiency, config.train, config.objective, ALONE.device)
