"""Users' mistakes: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support import command, command_of, process, tiny_run

import unite_kernels
from unite_fast import doctor, evaluate, export, fetch, load
from unite_fast.base.errors import UserError
from unite_fast.config import yaml_text
from unite_fast.doctor import machine
from unite_fast.efficiency import compatibility
from unite_kernels import backend, extension


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("trained"), "train.max_steps=2")


def fails(*arguments: object, says: str | tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in (says,) if isinstance(says, str) else says:
        assert text in lines[0]


YAML = {
    "unknown key": ("optim: {lrr: 1}", "did you mean 'optim.lr'"),
    "a key of others": ("train: {batch_size: 1}", "did you mean 'train.global_batch'"),
    "duplicate key": ("optim:\n  lr: 1\n  lr: 2", ("line 3", "'lr' stands twice")),
    "not a number": ("optim: {lr: fast}", ("optim.lr must be a number", "'fast'")),
    "python tag": ("name: !!python/object/apply:os.system [ls]", "line 1"),
    "not a section": ("optim: 3", "must be a section"),
    "not YAML": ("a: [1", "line"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "nesting"),
    "choice": ("data: {source: digit}", "did you mean 'digits'"),
    "interval": ("sample: {cfg_interval: [0.5, 0.1]}", "low < high"),
    "heads": ("model: {encoder: {width: 100, heads: 12}}", "does not divide"),
}


@pytest.mark.parametrize("case", YAML)
def test_config_files(tmp_path, case):
    text, says = YAML[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    fails("train.py", "--config", path, f"run_dir={tmp_path / 'run'}", says=says)
    assert not (tmp_path / "run").exists()


OVERRIDES = {
    "batch over accumulation": (["train.global_batch=24", "train.micro_batch=7"], ("does not divide", "6 or 8")),
    "not an override": (["train.epochs"], "section.key=value"),
    "perceptual weights": (
        ["objective.perceptual_weight=1", "model.channels=3"],
        ("VGG16", "objective.perceptual_trunk"),
    ),
    "missing data": (["data.source=folder", "data.path=no/such/folder"], "no/such/folder"),
    "mirrored digits": (["data.flip=true"], "data.flip=false"),
    "class count": (["model.num_classes=7"], ("10", "7")),
    "missing checkpoint": (["resume=no/such/run"], "no/such/run"),
    "must resume": (["resume=must"], "no usable checkpoint"),
    "average that is none": (["optim.ema_extra=[0.99, std0.5]"], ("'std0.5'", "std0.01 to std0.28")),
    "average twice": (["optim.ema_extra=[0.99, 0.99]"], "stands twice"),
    "shards that do not divide": (["train.strategy=hsdp", "train.shard_size=2"], "does not divide 1 ranks"),
    "depth": (["model.encoder.depth=0"], "error: model.encoder.depth must be above 0 and at most 1024, got 0"),
    "decay of a moment": (["optim.betas=[0.9, 1]"], "error: optim.betas must be at least 0 and below 1, got 1.0"),
    "probability": (["objective.label_dropout=2"], "error: objective.label_dropout must be at least 0 and at most 1"),
    "average without an end": (["optim.ema_extra=[1.5]"], "error: optim.ema_extra must be above 0 and below 1"),
    "guidance interval": (["sample.cfg_interval=[0.2, 1.5]"], "error: sample.cfg_interval must be at least 0 and"),
    "odd heads": (["model.encoder={width: 30, heads: 2}"], "error: model.encoder.rope needs an even width of heads"),
    "no GPU": (["device=cuda"], "no GPU"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides(tiny, tmp_path, case):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    overrides, says = OVERRIDES[case]
    fails("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *overrides, says=says)
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_no_run_takes_is_not_printed(tiny):
    said = command("train.py", "--config", tiny, "--print-config", "train.strategy=fsdp2", "train.on_oom=halve")
    assert said.returncode == 2
    assert "does not work with train.on_oom=halve" in said.stderr


def test_1e_4_is_a_number(tiny):
    assert "lr: 0.0001" in command("train.py", "--config", tiny, "--print-config", "optim.lr=1e-4").stdout


@pytest.mark.parametrize("module", [doctor, evaluate, export, fetch], ids=lambda module: module.__name__)
def test_help_is_what_the_file_says(module):
    said = command_of(module.main, "--help")
    assert said.returncode == 0
    assert module.__doc__.strip() in said.stdout


def test_as_a_process(tiny):
    result = process("train.py", "--config", tiny, "optim.lrr=1")
    assert result.returncode == 2
    assert result.stderr == "error: override optim.lrr=1: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
    assert not result.stdout


def test_missing_config_file():
    fails("train.py", "--config", "no/such.yaml", says=("no/such.yaml", "No such file"))


def test_empty_class_folder(tiny, tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").mkdir()
    overrides = ["data.source=folder", f"data.path={tmp_path / 'data'}", "model.num_classes=2"]
    fails("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *overrides, says=("no .jpg", "2 class folders"))
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "dog" / "0.png")
    fails("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *overrides, says="cat")


def test_unreadable_image(tiny, tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / "data" / name / f"{i}.png")
    bad = tmp_path / "data" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    overrides = ["data.source=folder", f"data.path={tmp_path / 'data'}", "model.num_classes=2", "data.workers=0"]
    fails("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *overrides, says=str(bad))


@pytest.fixture
def no_libraries(monkeypatch, tmp_path):
    """As in an installation whose C++ operations were never built; the folder where they would be."""
    extension.obstacle.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
        yield tmp_path
    extension.obstacle.cache_clear()


def test_missing_library(trained, tmp_path, no_libraries):
    """Said before anything runs, with how to build it; what does not need it runs."""
    says = ("kernels=fused: _C_cpu.so is not built; run `python setup.py build_ext --inplace`", "kernels=eager")
    config = ("--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "device=cpu")
    for options in ([], ["--dry-run"], ["--fast-dev-run", "1"]):
        fails("train.py", *config, "efficiency.kernels=fused", *options, says=says)
    assert not (tmp_path / "run").exists()
    sampling = ("--checkpoint", trained / "run", "--out", tmp_path / "x.png", "--seeds", "0-3", "--device", "cpu")
    fails("sample.py", *sampling, "--kernels", "fused", says=says)
    assert command("sample.py", *sampling).returncode == 0  # nothing defaults to what is not there
    score = ("rfid", "--checkpoint", trained / "run", "--extractor", "digits", "--out", tmp_path / "r.json")
    said = command_of(evaluate.main, *score, "--kernels", "auto")
    assert said.returncode == 0, said.stderr
    assert command("train.py", *config, "--dry-run").returncode == 0
    planned = command("train.py", *config, "efficiency.kernels=auto", "--dry-run")
    assert "kernels=auto: eager operations, which are slower, since _C_cpu.so is not built; run" in planned.stdout
    assert "kernels eager" in planned.stdout
    found = {kind: [f.state for f in machine.libraries(kind)] for kind in ("auto", "fused")}
    assert found == {"auto": ["WARN", "WARN"], "fused": ["FAIL", "FAIL" if torch.cuda.is_available() else "WARN"]}


def test_library_of_other_sources(trained, tmp_path, monkeypatch, no_libraries):
    """Nothing computes with it, whoever asks, and nobody is slowed down for it without a word."""
    shutil.copy(Path(unite_kernels.__file__).with_name("_C_cpu.so"), no_libraries)
    (no_libraries / "_C_cpu.sources").write_text("0" * 64)
    reason = (
        "_C_cpu.so is not of this checkout: it was built from other sources; "
        "run `python setup.py build_ext --inplace`, or remove it"
    )
    config = ("--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "device=cpu")
    fails("train.py", *config, "efficiency.kernels=fused", says=reason)
    sampling = ("--checkpoint", trained / "run", "--out", tmp_path / "x.png", "--seeds", "0", "--device", "cpu")
    fails("sample.py", *sampling, says=reason)
    fails("sample.py", *sampling, "--kernels", "fused", says=reason)
    with pytest.raises(UserError, match="is not of this checkout"):
        load(trained / "run", device="cpu")
    assert command("sample.py", *sampling, "--kernels", "eager").returncode == 0
    assert ("FAIL", "C++ library (cpu)", reason) in machine.libraries()
    assert not (tmp_path / "run").exists()
    (no_libraries / "_C_cpu.sources").write_text(extension.sources_digest())
    extension.obstacle.cache_clear()
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)  # torch survives no second copy of its operations
    assert extension.obstacle("cpu") == ""
    assert loaded == [str(no_libraries / "_C_cpu.so")]


def test_missing_library_of_a_gpu(monkeypatch, no_libraries):
    """Training needs it, sampling does not: its operations are Triton's."""
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    gpu = torch.device("cuda")
    assert "_C_cuda.so is not built" in backend.obstacle("fused", gpu, update=True)
    assert not backend.obstacle("fused", gpu)
    assert not backend.obstacle("eager", gpu, update=True)
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert "needs the package triton" in backend.obstacle("fused", gpu)
    config = yaml_text.from_dict({"efficiency": {"kernels": "fused"}})
    with pytest.raises(UserError, match=r"efficiency\.kernels=fused: .* the package triton.*efficiency\.kernels=eager"):
        compatibility.check_device(config.efficiency, config.train, config.objective, gpu)


def test_checkpoint_of_another_model(trained, tmp_path):
    arguments = ["--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}", f"resume={trained / 'run'}"]
    fails("train.py", *arguments, "model.encoder.width=64", says=("another model", "model.encoder.width", "32", "64"))


def damaged(trained, tmp_path, damage) -> object:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    damage(run / "checkpoints" / "step-0000002" / "training.safetensors")
    return run


def truncate(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "says"), [(truncate, "bytes, expected"), (flip_a_bit, "sha256")])
def test_damaged_checkpoint(trained, tmp_path, damage, says):
    run = damaged(trained, tmp_path, damage)
    named = run / "checkpoints" / "step-0000002"
    config = ["--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'other'}"]
    fails("train.py", *config, f"resume={named}", says=("damaged", says))
    fails("train.py", "--config", trained / "tiny.yaml", f"run_dir={run}", "resume=must", says=says)
    fails("sample.py", "--checkpoint", run, "--out", tmp_path / "x.png", says=says)
    assert not (tmp_path / "x.png").exists()


def test_automatic_resume_falls_back(trained, tmp_path):
    run = tmp_path / "run"
    options = ["train.max_steps=3", "train.checkpoint_every=1"]
    config = ["--config", trained / "tiny.yaml", f"run_dir={run}", *options]
    assert command("train.py", *config).returncode == 0
    truncate(run / "checkpoints" / "step-0000003" / "training.safetensors")
    said = command("train.py", *config).stdout
    assert "skipping" in said
    assert "step-0000002 at step 2: the newest that verifies" in said


def test_a_damaged_newer_checkpoint_is_mentioned(trained, tmp_path):
    """By everything that takes a run folder, once: what it uses is older than what the user may think."""
    run, config = tmp_path / "run", ("--config", trained / "tiny.yaml")
    assert (
        command("train.py", *config, f"run_dir={run}", "train.max_steps=3", "train.checkpoint_every=1").returncode == 0
    )
    truncate(run / "checkpoints" / "step-0000003" / "training.safetensors")
    sampled = command("sample.py", "--checkpoint", run, "--seeds", "0-3", "--cfg", "2", "--out", tmp_path / "s.png")
    for said in (
        sampled,
        command("train.py", *config, f"run_dir={tmp_path / 'next'}", "train.max_steps=1", f"init_from={run}"),
        command_of(evaluate.main, "rfid", "--checkpoint", run, "--extractor", "digits", "--out", tmp_path / "r.json"),
        command_of(export.main, run, "--out", tmp_path / "exported"),
    ):
        assert said.returncode == 0, said.stderr
        assert said.stderr.count(f"skipping {run / 'checkpoints' / 'step-0000003'}: training.safetensors has ") == 1
    used = "step-0000002 (step 2), ema weights; euler, steps 2, w 2 for t in [0.0, 1.0], norm_first, last state"
    assert sampled.stdout.splitlines()[0] == f"{run / 'checkpoints'}/{used}"
    said = command("sample.py", "--checkpoint", tmp_path / "exported", "--seeds", "0-3", "--out", tmp_path / "e.png")
    used = f"{tmp_path / 'exported' / 'model.safetensors'} (step 2), ema weights; euler, steps 2, w 1, last state"
    assert said.stdout.splitlines()[0] == used


class Executes:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickle_that_executes_code(trained, tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"model": Executes()}, path)
    (tmp_path / "evil_plain.pt").write_bytes(pickle.dumps(Executes()))
    config = ["--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}"]
    fails("train.py", *config, f"resume={path}", says=("execute", "refused"))
    fails("sample.py", "--checkpoint", path, "--out", tmp_path / "x", says=("execute", "refused"))
    fails("sample.py", "--checkpoint", tmp_path / "evil_plain.pt", "--out", tmp_path / "x", says="evil_plain.pt")
    assert not (tmp_path / "executed").exists()
    assert not os.path.exists("executed")


def test_truncated_official_checkpoint(reference, tmp_path):
    path = tmp_path / "short.pt"
    path.write_bytes((reference / "tiny.pt").read_bytes()[:100_000])
    fails("sample.py", "--checkpoint", path, "--out", tmp_path / "x", says="damaged or not a checkpoint")


SAMPLING = {
    "interval": (["--cfg-interval", "0.9,0.1"], "low < high"),
    "interval text": (["--cfg-interval", "0.9"], "LOW,HIGH"),
    "class": (["--labels", "3,12"], "class 12"),
    "seeds": (["--seeds", "1,1"], "twice"),
    "seed text": (["--seeds", "many"], "ranges"),
    "steps": (["--solver", "heun", "--steps", "0"], "too few"),
    "guidance": (["--cfg", "nan"], "finite"),
    "huge seed": (["--seeds", "99999999999999999999"], "too large"),
    "folder": (["--reconstruct", "no/such"], "no such file or folder"),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling_options(trained, tmp_path, case):
    options, says = SAMPLING[case]
    fails("sample.py", "--checkpoint", trained / "run", "--out", tmp_path / "out", *options, says=says)
    assert not (tmp_path / "out").exists()


def test_never_resume_protects_a_run(trained):
    fails(
        "train.py", "--config", trained / "tiny.yaml", f"run_dir={trained / 'run'}", "resume=never", says="resume=never"
    )
