"""Helpers shared by the tests: paths, a tiny configuration that trains in seconds, how to run programs."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sample
import train
import unite_fast.base.command

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT.parent / "shared" / "reference"

TINY = """\
name: tiny
model:
  image_size: 8
  patch_size: 2
  channels: 1
  num_classes: 10
  latent_dim: 4
  num_latents: 8
  encoder: {depth: 3, width: 32, heads: 2, in_context_start: 1, in_context_len: 2}
  decoder: {depth: 1, width: 32, heads: 2, mlp_hidden: 64, in_features: 32}
objective: {perceptual_weight: 0, pixel_loss: l2, pixel_weight: 4, flow_weight: 0.03, flow_steps: 2}
optim: {lr: 2e-3, warmup_epochs: 0.1, flat_epochs: 0, decay_epochs: 0, final_lr: 1e-5}
data: {source: digits, flip: false}
sample: {solver: euler, steps: 2}
evaluation: {precision: fp32}
train: {global_batch: 16, micro_batch: 8, epochs: 1, log_every: 1, image_every: 0, checkpoint_every: 1000}
efficiency: {precision: fp32}
"""


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(program: str, *arguments: object) -> Outcome:
    """Runs train.py or sample.py in this process, as its main block does: quick, since torch is loaded once."""
    return command_of({"train.py": train.main, "sample.py": sample.main}[program], *arguments)


def command_of(main: Callable[[list[str]], int | None], *arguments: object) -> Outcome:
    """Runs a ``main`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = unite_fast.base.command.run(main, [str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def trained(config: Path, run: Path, *overrides: str) -> str:
    """Trains as ``config`` says into the folder ``run``, in this process; what is printed."""
    said = command("train.py", "--config", config, f"run_dir={run}", *overrides)
    assert said.returncode == 0, said.stderr
    return said.stdout + said.stderr


def tiny_run(folder: Path, *overrides: str) -> Path:
    """``folder``, with tiny.yaml and a run of it in ``run``."""
    (folder / "tiny.yaml").write_text(TINY)
    trained(folder / "tiny.yaml", folder / "run", *overrides)
    return folder


def process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of the project in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    words = [sys.executable, *(str(a) for a in arguments)]
    return subprocess.run(
        words, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
