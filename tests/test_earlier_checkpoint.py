"""A checkpoint of an earlier version, commit 041eeaa, loads and goes on as that version itself went on.

    earlier_checkpoint/step-0000005    what it saved of a run of 8 steps; its configuration is in state.json
    earlier_checkpoint/expected.json   what it computed from there: the log of steps 6 and 8, means over two steps,
                                       and of each tensor at step 8 norm and product with cos(0), cos(1), ...

Learning rates are the same to the bit; the first row of the log, too, on the CPU that they were recorded on. Gradients
and updates are not, by the order of sums: one product makes queries, keys and values since, and long matrices are
orthogonalised through their Gram matrix.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import command
from torch import Tensor

from unite_fast import checkpoint
from unite_fast.config.yaml_text import to_yaml

FOLDER = Path(__file__).parent / "earlier_checkpoint"
SAVED, EXPECTED = FOLDER / "step-0000005", json.loads((FOLDER / "expected.json").read_text())
ROUNDING = 1e-5  # relative to a tensor's norm, after three steps: 2.5e-6 on the CPU of the recording


def here() -> list[str]:
    """What bits depend on: torch, and the instructions and the model of the CPU."""
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model" in line]
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *models[:2]]


def summary(tensor: Tensor) -> list[float]:
    values = tensor.double().flatten()
    return [float(values.norm()), float(values @ torch.arange(len(values)).double().cos())]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run that goes on from it, under the configuration that it holds."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(SAVED, folder / "checkpoints" / SAVED.name)
    (folder / "config.yaml").write_text(to_yaml(checkpoint.saved_config(SAVED)))
    done = command("train.py", "--config", folder / "config.yaml", f"run_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "step-0000005 at step 5" in done.stdout
    return folder


def test_what_is_told_of_each_step(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 8]
    for row, expected in zip(rows, EXPECTED["metrics"], strict=True):
        assert row["lr"] == expected["lr"]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5), name
    if here() == EXPECTED["recorded on"]:
        first, expected = rows[0], EXPECTED["metrics"][0]
        assert {name: first[name] for name in expected} == expected


def test_every_tensor_after_three_steps(run):
    tensors = load_file(run / "checkpoints" / "step-0000008" / "training.safetensors")
    assert tensors.keys() == EXPECTED["tensors"].keys()
    wrong = {}
    for name, tensor in tensors.items():
        norm, product = EXPECTED["tensors"][name]
        found = summary(tensor)
        worst = max(abs(found[0] - norm), abs(found[1] - product))
        if worst > ROUNDING * norm:
            wrong[name] = worst / norm
    assert not wrong


if __name__ == "__main__":  # python tests/test_earlier_checkpoint.py RUN, of the earlier version's run from step 5
    import sys

    run_folder = Path(sys.argv[1])
    kept = ("total", "l2", "flow", "latent_std", "grad_norm", "lr", "skipped")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: row["l1" if name == "l2" else name] for name in kept} for row in lines]
    last = load_file(run_folder / "checkpoints" / "step-0000008" / "training.safetensors")
    recorded = {"recorded on": here(), "metrics": metrics, "tensors": {n: summary(t) for n, t in last.items()}}
    (FOLDER / "expected.json").write_text(json.dumps(recorded, indent=0))
