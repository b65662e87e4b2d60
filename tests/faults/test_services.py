"""F37: TensorBoard and Weights & Biases that are away, in whole runs with stand-ins for their packages."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
from jobs import equal

import train
from unite_fast.base import command
from unite_fast.run.stats import read_metrics

fault = pytest.mark.fault


class Away(Exception):
    pass


class StandIn:
    """What the tests need of wandb: records calls, and raises in the one named ``fails``."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls, self.id = fails, [], "abc123"

    def _call(self, name: str, *values) -> None:
        self.calls.append((name, *values))
        if name == self.fails:
            raise Away("the service is away\nand more lines")

    def init(self, **options):
        self._call("init", options)
        return self

    def log(self, row, step):
        self._call("log", row, step)

    def finish(self):
        self._call("finish")


def installed(monkeypatch, stand_in: StandIn) -> StandIn:
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = stand_in.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return stand_in


def run(job, *overrides: str) -> int:
    words = ["--config", str(job.config), f"run_dir={job.run}", "train.wandb=true", *overrides]
    return command.run(train.main, words)


def test_rows_reach_weights_and_biases(job, monkeypatch):
    wandb = installed(monkeypatch, StandIn())
    options = ("train.wandb_project=p", "train.wandb_name=n", "train.wandb_offline=true")
    assert run(job, "train.max_steps=3", *options) == 0
    name, asked = wandb.calls[0]
    assert (name, asked["project"], asked["name"], asked["mode"], asked["id"]) == ("init", "p", "n", "offline", None)
    assert asked["dir"] == str(job.run)
    assert asked["config"]["model"]["encoder"]["width"] == 16
    assert [call[2] for call in wandb.calls if call[0] == "log"] == [1, 2, 3]
    assert wandb.calls[1][1]["total"] == read_metrics(job.run / "metrics.jsonl")[0]["total"]
    assert wandb.calls[-1] == ("finish",)
    again = installed(monkeypatch, StandIn())
    assert run(job, "train.max_steps=5") == 0
    asked = again.calls[0][1]
    assert (asked["id"], asked["name"], asked["mode"], asked["resume"]) == ("abc123", "tiny", "online", "allow")
    assert [call[2] for call in again.calls if call[0] == "log"] == [4, 5]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@fault("F37", "a logging service that raises", "one warning; every row stays in the files; the same end")
def test_service_that_raises(job, jobs, monkeypatch, capsys, fails):
    wandb = installed(monkeypatch, StandIn(fails))
    assert run(job, "train.max_steps=4") == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == said.count("the service is away") == 1
    assert "and more lines" not in said
    assert len(wandb.calls) == {"init": 1, "log": 6, "finish": 6}[fails]
    assert [row["step"] for row in read_metrics(job.run / "metrics.jsonl")] == [1, 2, 3, 4]
    without = jobs("without")
    without.train("train.max_steps=4", ranks=1)
    assert equal(job.tensors(4), without.tensors(4))


def test_tensorboard_gets_the_rows_if_it_is_there(job, monkeypatch):
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(job.run / "tensorboard")

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append(("close", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    package = types.ModuleType("tensorboard")
    package.__spec__ = importlib.machinery.ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    words = ["--config", str(job.config), f"run_dir={job.run}", "train.tensorboard=true", "train.max_steps=2"]
    assert command.run(train.main, words) == 0
    assert [step for name, _, step in written if name == "total"] == [1, 2]
    assert written[-1][0] == "close"
