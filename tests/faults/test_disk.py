"""F11, F36, F37, F46: a disk that is full, slow or read-only, and what is kept on it."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from jobs import STRAIGHT, equal

from unite_fast import checkpoint
from unite_fast.checkpoint import saving
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.stats import read_metrics
from unite_fast.training.state import STEPS, Part, TrainState, tensors_of

fault = pytest.mark.fault


@fault("F11", "disk full in one save", "the run goes on with a warning; earlier checkpoints stay; later saves work")
def test_full_once(job, straight):
    said = job.train(*STRAIGHT, fault="enospc@step=10,phase=ckpt.write,times=2")
    assert "checkpoint of step 10: [Errno 28] No space left on device; trying again" in said
    assert "checkpoint of step 10 is not saved" in said
    assert job.steps() == [5, 15, 20]
    assert job.leftovers() == []
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F11", "disk full in one save", "after removing old checkpoints the same save succeeds")
def test_full_until_pruned(job):
    said = job.train(*STRAIGHT, fault="enospc@step=20,phase=ckpt.write,times=1")
    assert "trying again after removing old ones" in said
    assert "is not saved" not in said
    assert job.steps() == [10, 15, 20]


@fault("F11", "disk full in one save", "of one rank alone: no rank commits what is not whole")
def test_full_on_one_rank(job, straight):
    said = job.train(*STRAIGHT, fault="enospc@rank=1,step=10,phase=ckpt.write,times=2")
    assert said.count("checkpoint of step 10 is not saved") == 1
    assert job.steps() == [5, 15, 20]
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F11", "disk full for good", "after 3 refused saves all ranks end with one line, exit 1; the old ones stay")
def test_full_for_good(job, straight):
    said = job.train(*STRAIGHT[:1], "train.checkpoint_every=2", code=1,
                     fault="enospc@step=6,steps=100,phase=ckpt.write")  # fmt: skip
    assert "the disk refused 3 checkpoints in a row" in said
    assert job.status["state"] == "failed"
    assert job.status["last_good"] == 4
    assert job.steps() == [2, 4]
    assert job.leftovers() == []


@fault("F11", "a real limit on the size of files", "the same, by RLIMIT_FSIZE")
def test_real_limit(job):
    limit = {"FILE_SIZE_LIMIT": "200000"}
    said = job.train("train.max_steps=9", "train.checkpoint_every=1", ranks=1, environment=limit, code=1)
    assert "File too large" in said
    assert "the disk refused 3 checkpoints in a row" in said
    assert job.steps() == []
    assert job.leftovers() == []


@fault("F36", "a save that is still running", "one in flight; the exit waits; what is saved is one step's state")
def test_slow_save(job, straight):
    started = time.monotonic()
    job.train(*STRAIGHT, fault="sleep@phase=ckpt.write,seconds=0.5")
    assert time.monotonic() - started > 2  # four saves, one after the other
    held = [row["checkpoint_stall"] for row in read_metrics(job.run / "metrics.jsonl")]
    assert [i + 1 for i, seconds in enumerate(held) if seconds > 0] == [6, 11, 16]
    log = (job.run / "logs" / "rank_001.log").read_text()
    assert log.count("held the loop for") == 4
    assert job.steps() == [5, 10, 15, 20]
    for step in job.steps():
        assert equal(job.tensors(step), straight.tensors(step)), step


@fault("F36", "a save that is still running", "the step goes on meanwhile: the save does not see later changes")
def test_snapshot(tmp_path, monkeypatch):
    state, config = untrained()
    writer = saving.Writer(tmp_path, config, Ranks(0, 1, torch.device("cpu")))
    entered, expected = [], {k: v.clone() for k, v in tensors_of(state).items() if k != STEPS}
    on = threading.Event()

    def slow(phase: str, step: int, tensors: object = ()) -> None:
        entered.append((phase, on.wait(60)))

    monkeypatch.setattr(saving.faults, "strike", slow)
    state.step = 1
    started = time.monotonic()
    writer.save(state, {})  # which comes back while the save waits for ``on``
    assert writer.stall() < 0.7
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    state.step = 2
    threading.Timer(0.3, on.set).start()
    writer.save(state, {})  # waits for the first
    assert 0.25 < writer.stall() < time.monotonic() - started
    assert writer.stall() == 0
    assert entered[:2] == [("ckpt.write", True), ("ckpt.commit", True)]
    assert (tmp_path / "step-0000001" / "manifest.json").is_file()
    writer.wait()
    assert equal(checkpoint.read(tmp_path / "step-0000001"), expected)
    assert not equal(checkpoint.read(tmp_path / "step-0000002"), expected)


def untrained():
    from unite_fast.config.yaml_text import from_dict, parse_yaml
    from unite_fast.model.unite import build
    from unite_fast.optim.optimizer import Optimizer

    from jobs import TINY  # isort: skip

    config = from_dict(parse_yaml(TINY, "tiny"))
    model = build(config.model)
    return TrainState({"": Part(model, Optimizer(model, config.optim))}), config


@fault("F37", "metrics that cannot be written", "one warning; training goes on, to the same end")
def test_metrics_unwritable(job, straight):
    (job.run / "metrics.jsonl").mkdir(parents=True)
    (job.run / "metrics.csv").mkdir()
    said = job.train(*STRAIGHT)
    assert said.count("metrics cannot be written") == 1
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F46", "crash in the removal of old checkpoints", "two whole ones at every instant; the rest is cleaned")
def test_killed_while_pruning(job, straight):
    words = (STRAIGHT[0], "train.checkpoint_every=5", "train.keep_last=2")
    job.train(*words, fault="kill@rank=0,step=5,phase=ckpt.prune", code=None)
    assert job.steps() == [10, 15]
    assert job.leftovers() == ["step-0000005.removed.incomplete"]
    job.train(*words)
    assert job.steps() == [15, 20]
    assert job.leftovers() == []
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F46", "crash in the removal of old checkpoints", "damaged ones do not count; keep_every ones stay")
def test_what_is_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        saving.commit(tmp_path, step, {"a": torch.ones(3)}, {"a": torch.ones(3)}, {"step": step})
    (tmp_path / "step-0000005" / "state.json").write_text("cut")
    saving.prune(tmp_path, 2, keep_every=2)
    assert [checkpoint.step_of(p) for p in checkpoint.newest_first(tmp_path)] == [5, 4, 3, 2]
    saving.prune(tmp_path, 2)
    assert [checkpoint.step_of(p) for p in checkpoint.newest_first(tmp_path)] == [5, 4, 3]
