"""F12-F15, F26, F27, F33-F35: numbers that go wrong, ranks that differ, evaluation that fails, memory that ends."""

from __future__ import annotations

import json
import math

import pytest
from jobs import STRAIGHT, equal

from unite_fast.run.stats import read_metrics

fault = pytest.mark.fault
EVERY = ("train.checkpoint_every=1", "train.keep_last=30")


def skips_step_five(job, fault):
    """Step 5 changes nothing on any rank; the steps before and after it are counted."""
    job.train("train.max_steps=7", *EVERY, "train.replica_check_every=1", fault=fault)
    before, after = job.tensors(4), job.tensors(5)
    assert equal(before, after)
    assert job.counters(5)["optimizer_steps"] == job.counters(4)["optimizer_steps"] == 4
    assert not equal(job.tensors(5), job.tensors(6))
    rows = read_metrics(job.run / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 0, 0]
    assert math.isnan(rows[4]["total"])
    assert all(
        math.isfinite(v) for row in rows[:4] + rows[5:] for k, v in row.items() if k != "mfu"
    )  # no peak on a CPU


@fault("F12", "NaN in one micro-batch of one rank", "all ranks skip the step; counted; state and EMA unchanged")
def test_nan_loss_once(job):
    skips_step_five(job, "nan@rank=1,step=5,phase=fwd")


@fault("F14", "infinite gradient, finite loss", "skipped as F12")
def test_infinite_gradient(job):
    skips_step_five(job, "inf@rank=1,step=5,phase=bwd")


@fault("F12", "NaN in one micro-batch of one rank", "the fused update skips as the eager one does")
def test_nan_loss_fused(job):
    job.train("train.max_steps=3", *EVERY, "efficiency.kernels=fused", fault="nan@rank=1,step=2,phase=fwd")
    assert equal(job.tensors(1), job.tensors(2))
    assert not equal(job.tensors(2), job.tensors(3))


@fault("F13", "NaN from a step on", "ends as diverged after K; the last good checkpoint stays; batches written")
def test_nan_for_good(job, straight):
    said = job.train(*STRAIGHT, "train.max_skipped=3", fault="nan@rank=1,step=8,steps=100,phase=fwd", code=1)
    assert "was not finite in 3 steps in a row" in said
    assert job.status["state"] == "diverged"
    assert job.status["step"] == 10
    assert job.steps() == [5]
    assert equal(job.tensors(5), straight.tensors(5))
    bad = json.loads((job.run / "bad_batches.json").read_text())
    assert [b["step"] for b in bad] == [8, 9, 10]
    assert all(len(b["samples"]) == b["images"] == 16 for b in bad)


@fault("F15", "NaN in the weights at a save", "the save is refused, naming the tensor; diverged; resume from before")
def test_nan_weights(job, straight):
    said = job.train(*STRAIGHT, fault="nan@step=10,phase=opt", code=1)
    assert "is not finite at step 10; nothing was saved" in said
    assert job.status["state"] == "diverged"
    assert job.steps() == [5]
    job.train(*STRAIGHT)
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F26", "a weight differs on one rank", "the replica check ends the run, naming the first tensor")
def test_replicas_differ(job):
    said = job.train(*STRAIGHT, "train.replica_check_every=2", fault="perturb@rank=1,step=6,phase=opt", code=1)
    assert "no longer hold the same model at step 6: model." in said
    assert job.status["state"] == "failed"
    assert job.steps() == [5]


@fault("F27", "ranks with different configurations", "refused at the start with the keys that differ, exit 2")
def test_ranks_differ(job):
    said = job.train(*STRAIGHT, own={1: ["optim.lr=3e-3", "seed=1"]}, code=2)
    assert "seed is 0 on rank 0, 1 on rank 1; optim.lr is 0.002 on rank 0, 0.003 on rank 1" in said
    assert said.count("error:") == 1
    assert not job.run.exists()


@fault("F33", "pictures that raise", "noted, training is unaffected; or the end, by train.on_eval_error=fail")
def test_failing_evaluation(job, jobs, straight):
    said = job.train(*STRAIGHT, "train.image_every=4", fault="raise@step=8,phase=eval")
    assert "pictures at step 8 failed, training goes on: injected fault" in said
    assert sorted(p.name for p in (job.run / "samples").iterdir()) == [
        f"step_{n:07d}.png" for n in (4, 12, 16, 20)
    ]  # fmt: skip
    assert equal(job.tensors(20), straight.tensors(20))
    strict = jobs("strict")
    said = strict.train(*STRAIGHT, "train.image_every=4", "train.on_eval_error=fail", ranks=1, code=1,
                        fault="raise@step=8,phase=eval")  # fmt: skip
    assert "pictures at step 8 failed: injected fault" in said
    assert strict.status["state"] == "failed"


@fault("F34", "evaluation between steps", "the same parameters with and without it")
def test_evaluation_changes_nothing(job, straight):
    job.train(*STRAIGHT, "train.image_every=3")
    assert len(list((job.run / "samples").iterdir())) == 7
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F35", "out of memory", "a message with a smaller micro-batch, exit 1; or halved by itself, the same batch")
def test_out_of_memory(job, jobs, straight):
    said = job.train(*STRAIGHT, ranks=1, fault="oom@step=3,phase=fwd", code=1)
    assert "out of memory in step 3 with train.micro_batch=8; set train.micro_batch=4" in said
    halved = jobs("halved")
    said = halved.train(*STRAIGHT, "train.on_oom=halve", fault="oom@rank=1,step=3,phase=fwd,times=1")
    assert "going on with 4, the global batch stays" in said
    for ours, expected in zip(halved.rows(), straight.rows(), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
