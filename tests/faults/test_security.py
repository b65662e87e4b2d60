"""F38-F42, F45 and the security table: files, packages and downloads that cannot be trusted or are not there."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from jobs import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from support import Outcome

from unite_fast.run.rank_log import redact

fault = pytest.mark.fault
BLOCK = """
import importlib.machinery, sys
real = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.split('.')[0] in {names!r} else real(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""
BILLION = "x0: &x0 [y]\n" + "".join(f"x{i}: &x{i} [" + ", ".join([f"*x{i - 1}"] * 9) + "]\n" for i in range(1, 12))
OPTIONAL = ("flash_attn", "transformer_engine", "nvidia", "wandb", "tensorboard", "triton")


RUNS = """
import contextlib, io, json
from unite_fast.base.command import run
for words in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = run(program.main, words)
    print(json.dumps([code, out.getvalue(), error.getvalue()]))
"""


def python(code: str, *runs: Sequence[object]) -> list[Outcome]:
    """What becomes of ``program.main`` with the words of each run, in one process that begins with ``code``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    words = [sys.executable, "-c", f"import sys\n{code}\n{RUNS}", json.dumps([[*map(str, run)] for run in runs])]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


@fault("F38", "optional packages that are missing", "the run works; doctor lists them with the remedy")
def test_without_optional_packages(job):
    words = ("--config", job.config, f"run_dir={job.run}")
    runs = [
        ("train.max_steps=2",),
        ("train.tensorboard=true", "train.max_steps=3"),
        ("train.wandb=true", "train.max_steps=3"),
    ]
    plain, *others = python(BLOCK.format(names=OPTIONAL) + "import train as program", *((*words, *run) for run in runs))
    assert plain.returncode == 0, plain.stderr
    for result, name in zip(others, ("tensorboard", "wandb"), strict=True):
        assert result.returncode == 2
        assert result.stderr == f"error: train.{name}=true needs {name}; pip install {name}\n"


@pytest.mark.parametrize("blocked", [(), OPTIONAL, ("lpips",)])
@fault("F38", "optional packages that are missing", "doctor, as a table and as JSON; what is required is a FAIL")
def test_doctor(blocked):
    runs = [("--json",)] if blocked else [("--json",), ()]
    result, *table = python(BLOCK.format(names=blocked) + "from unite_fast import doctor as program", *runs)
    found = {f["what"]: f for f in json.loads(result.stdout)}
    assert {"python", "torch", "device", "shared memory", "lpips", "tensorboard", "wandb"} <= set(found)
    if "wandb" in blocked:
        assert found["wandb"] == {
            "state": "WARN", "what": "wandb", "detail": "not installed (optional): pip install wandb",
        }  # fmt: skip
    if "lpips" in blocked:
        assert found["lpips"]["state"] == "FAIL"
        assert result.returncode == 1
    if not blocked:
        assert [line[5:27].strip() for line in table[0].stdout.splitlines()] == list(found)


@fault("F39", "no network, no weights", "a line that says what is missing; no connection is tried; no file is left")
def test_offline(job):
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('a connection was tried')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse\n"
        "import train as program"
    )
    words = ("--config", job.config, f"run_dir={job.run}", "train.max_steps=1")
    (result,) = python(code, (*words, "objective.perceptual_weight=1", "model.channels=3"))
    assert result.returncode == 2
    assert "no VGG16 weights are named" in result.stderr
    assert "objective.perceptual_trunk" in result.stderr
    assert not job.run.exists()
    (result,) = python(code, words)
    assert result.returncode == 0, result.stderr


@fault("F40", "weights with another hash", "refused with both hashes; the file is neither loaded nor changed")
def test_wrong_hash(job, tmp_path):
    path = tmp_path / "vgg16.pth"
    path.write_bytes(pickle.dumps(Executes()))
    before = path.read_bytes()
    said = job.train("objective.perceptual_weight=1", "model.channels=3", f"objective.perceptual_trunk={path}",
                     ranks=1, code=2)  # fmt: skip
    assert "has sha256" in said
    assert "expected" in said
    assert path.read_bytes() == before
    assert not (tmp_path / "executed").exists()


class Executes:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@fault("F41", "a checkpoint that executes code", "not executed; the line explains --trust-pickle")
def test_pickle(job, launcher, tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"model": {}, "extra": Executes()}, path)
    said = job.train(f"resume={path}", ranks=1, code=2)
    assert "refused, nothing was run" in said
    assert f"python -m unite_fast.export {path} --trust-pickle --out FOLDER" in said
    rank = launcher.start(["export", path, "--out", tmp_path / "out"], {}, tmp_path / "said.txt", tmp_path)
    assert rank.wait() == 2
    assert not (tmp_path / "executed").exists()
    rank = launcher.start(["export", path, "--out", tmp_path / "out", "--trust-pickle"], {}, tmp_path / "s", tmp_path)
    rank.wait()
    assert (tmp_path / "executed").exists()  # that is what the option means


@fault("F41", "a folder of torch.distributed.checkpoint", "among a run's checkpoints it is passed over, and said")
def test_distributed_checkpoint_in_a_run(job):
    job.train("train.max_steps=2", ranks=1)
    folder = job.run / "checkpoints" / "step-0000009"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Executes()))
    said = job.train("train.max_steps=3", ranks=1)
    assert f"skipping {folder}: it is a folder of torch.distributed.checkpoint" in said
    assert "step-0000002 at step 2: the newest that verifies" in said
    assert not (ROOT / "executed").exists()


@fault("F41", "a folder of torch.distributed.checkpoint", "its pickled metadata is not read")
def test_distributed_checkpoint(job, tmp_path):
    folder = tmp_path / "step-0000005"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Executes()))
    said = job.train(f"resume={folder}", ranks=1, code=2)
    assert "whose metadata is a pickle; this program executes nothing while it loads" in said
    assert not (ROOT / "executed").exists()


@fault("F42", "evil YAML", "exit 2 with line or limit; 1e-4 is a number")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: !!python/object/apply:os.mkdir [executed]", "line 1"),
        ("a: " + "[" * 5000 + "]" * 5000, "nesting"),
        ("x: " + "y" * 1_100_000, "larger than"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "line 2: key 'optim' stands twice"),
        (BILLION, "line 2: references (*name) are not read"),
        ("optim: {lrr: 1e-4}", "did you mean 'optim.lr'"),
        ("optim: {lr: .nan}", "must be a number"),
    ],
)
def test_evil_yaml(job, text, says):
    job.config.write_text(text)
    started = time.monotonic()
    said = job.train(ranks=1, code=2)
    assert says in said
    assert said.count("\n") == 1
    assert time.monotonic() - started < 15
    assert not (ROOT / "executed").exists()


@fault("F42", "evil YAML", "1e-4 is a number")
def test_small_number(job):
    job.config.write_text("optim: {lr: 1e-4}")
    assert "lr: 0.0001" in job.train("--print-config", ranks=1)


@fault("F45", "sampling interrupted", "the rerun makes what is missing; the file is the same")
def test_interrupted_sampling(launcher, straight, tmp_path):
    def start(out: str):
        words = ["sample.py", "--checkpoint", straight.run, "--out", tmp_path / out, "--seeds", "0-39", "--batch", "4",
                 "--solver", "heun", "--steps", "40"]  # fmt: skip
        return launcher.start(words, {}, tmp_path / f"{out}.txt")

    whole = start("whole.npz")
    assert whole.wait() == 0, whole.said()
    cut = start("cut.npz")
    parts, deadline = tmp_path / "cut.npz.parts", time.monotonic() + 30
    while len(list(parts.glob("*.png"))) < 16:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cut.kill(signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut.npz").exists()
    done = len(list(parts.glob("*.png")))
    assert done < 40
    again = start("cut.npz")
    assert again.wait() == 0
    assert (
        f"made {40 - done} of 40" in again.said() or f"made {41 - done} of 40" in again.said()
    )  # one was half-written
    one, two = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "cut.npz")
    for key in ("arr_0", "labels", "seeds"):
        assert np.array_equal(one[key], two[key]), key


def test_export(launcher, straight, tmp_path):
    """The exported file loads anywhere, holds the EMA weights, and no path of this machine."""
    rank = launcher.start(["export", straight.run, "--out", tmp_path / "out"], {}, tmp_path / "said.txt")
    assert rank.wait() == 0, rank.said()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    saved = straight.tensors(20)
    for name, value in tensors.items():
        assert torch.equal(value, saved.get(f"ema.{name}", saved[f"model.{name}"])), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["model"]["encoder"]["width"] == 16
    assert metadata["step"] == "20"
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert str(straight.run.parent).encode() not in content, file
        assert b"/tmp" not in content
        assert os.path.expanduser("~").encode() + b"/" not in content


def test_logs_hold_no_secrets(straight):
    assert (
        redact("WANDB_API_KEY=abc123 and hf_token: 'x9' stay")
        == "WANDB_API_KEY=[redacted] and hf_token: '[redacted]' stay"
    )
    for path in (straight.run / "logs").iterdir():
        assert "MASTER_PORT" not in path.read_text()
    assert sorted(p.name for p in (straight.run / "logs").iterdir()) == ["rank_000.log", "rank_001.log"]
