"""F01-F10, F44: a run that is continued is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from jobs import ROOT, STRAIGHT, TINY, equal

fault = pytest.mark.fault


@fault("F01", "resume exactness", "20 steps and 11 + 9 steps are bit-equal on two ranks, state and log")
def test_resume_is_exact(job, straight):
    job.train("train.max_steps=11", *STRAIGHT[1:])
    said = job.train(*STRAIGHT)
    assert "step-0000011 at step 11: the newest that verifies" in said
    assert equal(job.tensors(20), straight.tensors(20))
    assert job.counters(20) == straight.counters(20)
    assert job.rows() == straight.rows()


def torchrun(job, *arguments: str, restarts: int = 1, fault: str = "", options: tuple[str, ...] = ()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    if fault:
        environment |= {"UNITE_FAST_TESTING": "1", "UNITE_FAST_FAULT": fault}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}",
             "--standalone", *options, "train.py", "--config", str(job.config),
             f"run_dir={job.run}", *arguments]  # fmt: skip
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


@fault("F02", "kill -9 of one rank in a step", "torchrun restarts all; resumes by itself; final state as F01")
def test_killed_rank_under_torchrun(job, straight):
    # The save of step 10 waits for that of step 5, so by then at least that one is whole.
    process = torchrun(job, *STRAIGHT, fault="kill@rank=1,step=12,phase=bwd")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.search(r"step-00000(05 at step 5|10 at step 10): the newest that verifies", said)
    assert equal(job.tensors(20), straight.tensors(20))
    assert job.rows() == straight.rows()
    assert job.status["state"] == "finished"


@fault("F02", "kill -9 of one rank in a step", "the other rank ends within 15 s, in one line")
def test_killed_rank_ends_the_other(job):
    said = job.train("train.max_steps=20", fault="kill@rank=1,step=7,phase=bwd", seconds=15, code=None)
    assert "another rank is gone" in said
    assert "Traceback" not in said
    assert job.status["state"] == "failed"
    assert job.status["step"] == 6


@fault("F03", "kill -9 of all ranks in a checkpoint", "nothing half-written has a checkpoint's name; resume; cleaned")
@pytest.mark.parametrize(("rank", "phase"), [(0, "ckpt.write"), (1, "ckpt.write"), (0, "ckpt.commit")])
def test_killed_in_a_checkpoint(job, straight, rank, phase):
    job.train(*STRAIGHT, fault=f"kill@rank={rank},step=10,phase={phase}", code=None)
    assert job.steps() == [5]
    assert job.leftovers() == ["step-0000010.incomplete"]
    said = job.train(*STRAIGHT)
    assert "step-0000005 at step 5" in said
    assert job.leftovers() == []
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F04", "world size 2 -> 1 -> 2", "the same order and losses within rounding; no sample lost or doubled")
def test_other_world_sizes(job, straight):
    job.train("train.max_steps=6", *STRAIGHT[1:], ranks=2)
    job.train("train.max_steps=13", *STRAIGHT[1:], ranks=1)
    job.train(*STRAIGHT, ranks=2)
    assert len(job.rows()) == 20
    for ours, expected in zip(job.rows(), straight.rows(), strict=True):
        assert ours == pytest.approx(expected, rel=2e-3)
    for name, value in straight.tensors(20).items():
        torch.testing.assert_close(job.tensors(20)[name], value, rtol=2e-3, atol=2e-4, msg=name)


@fault("F04", "world size 2 -> 1 -> 2", "one epoch visits every sample once, whatever the world sizes")
def test_every_sample_once():
    from unite_fast.data import Order
    from unite_fast.data.order import share

    n, batch, order, seen, position = 96, 16, Order(96, 7), [], 0
    for world in (2, 2, 1, 4, 1, 2):
        for rank in range(world):
            seen += order.indices(*share(position, batch, rank, world)).tolist()
        position += batch
    assert sorted(seen) == list(range(n))


@fault("F05", "accumulation changed on resume", "the same order, the same learning rate at the same images seen")
def test_other_accumulation(job, straight):
    job.train("train.max_steps=10", *STRAIGHT[1:])
    job.train(*STRAIGHT, "train.micro_batch=2")
    ours, expected = job.rows(), straight.rows()
    assert [(r[0], r[1], r[6]) for r in ours] == [(r[0], r[1], r[6]) for r in expected]
    for a, b in zip(ours, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@fault("F06", "completeness of the optimizer's state", "saved by 2 ranks, loaded by 1: every moment, as with 1 rank")
def test_optimizer_state_is_whole(job, jobs, straight):
    one = jobs("one")
    one.train(*STRAIGHT, ranks=1)
    single, pair = one.tensors(20), straight.tensors(20)
    trained = {n.removeprefix("ema.") for n in pair if n.startswith("ema.")}
    for name in trained:
        assert f"momentum.{name}" in pair or {f"exp_avg.{name}", f"exp_avg_sq.{name}"} <= set(pair), name
    assert set(single) == set(pair)
    for name, value in single.items():
        torch.testing.assert_close(pair[name], value, rtol=2e-3, atol=2e-4, msg=name)
    shutil.copytree(straight.run, job.run)
    job.train("train.max_steps=22", ranks=1)
    assert job.counters(22)["optimizer_steps"] == 22


@fault("F06", "completeness of the optimizer's state", "saved sharded, loaded whole and conversely: the same run")
def test_other_strategies(job, straight):
    job.train("train.max_steps=6", *STRAIGHT[1:], "train.strategy=fsdp2")
    job.train("train.max_steps=13", *STRAIGHT[1:], ranks=1)
    job.train(*STRAIGHT, "train.strategy=fsdp2")
    assert len(job.rows()) == 20
    for ours, expected in zip(job.rows(), straight.rows(), strict=True):
        assert ours == pytest.approx(expected, rel=2e-3)
    for name, value in straight.tensors(20).items():
        torch.testing.assert_close(job.tensors(20)[name], value, rtol=2e-3, atol=2e-4, msg=name)


def damage_half(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@fault("F07", "truncated checkpoint", "named with its sizes; the one before is taken; resume=must with none fails")
def test_truncated(job, straight):
    damaged(job, straight, damage_half, "bytes, expected")


@fault("F08", "flipped bit in a checkpoint", "sha256 tells; the one before is taken; never trained on")
def test_flipped_bit(job, straight):
    damaged(job, straight, damage_bit, "does not have the recorded sha256")


def damaged(job, straight, damage, says):
    shutil.copytree(straight.run, job.run)
    newest = job.files(20)[-1]
    damage(newest)
    said = job.train(*STRAIGHT)
    assert f"skipping {newest.parent}: {newest.name}" in said
    assert says in said
    assert "step-0000015 at step 15" in said
    assert equal(job.tensors(20), straight.tensors(20))
    for step in job.steps():
        damage(job.files(step)[0])
    said = job.train(*STRAIGHT, "resume=must", code=2)
    assert says in said


@fault("F09", "missing manifest, junk folders", "ignored with the reason; fresh only when nothing is valid, and said")
def test_junk(job, straight):
    checkpoints = job.run / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-9999999").mkdir()
    (checkpoints / "step-0000008").write_text("")
    (checkpoints / "step-0000009").mkdir()
    (checkpoints / "step-0000009" / "manifest.json").write_text('{"state.json": 3}')
    said = job.train("train.max_steps=2", "train.checkpoint_every=1", ranks=1)
    assert "step-9999999: it has no readable manifest.json" in said
    assert "step-0000009: it has no readable manifest.json" in said
    assert "starting fresh: no usable checkpoint" in said
    (checkpoints / "step-0000002" / "manifest.json").unlink()
    said = job.train("train.max_steps=2", ranks=1)
    assert "step-0000001 at step 1" in said


@fault("F10", "checkpoint of another model", "exit 2 with the tensors that differ; nothing is loaded")
def test_other_model(job, straight):
    shutil.copytree(straight.run, job.run)
    said = job.train(*STRAIGHT, "model.encoder.width=32", code=2)
    assert "holds another model" in said
    assert "model.encoder.width is 16 there and 32 here" in said
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F44", "clock that jumps, saves at step 0", "folders are named by step; a run stopped before a step saves none")
def test_clock_and_step_zero(job, straight, monkeypatch):
    import train
    from unite_fast.base import command

    monkeypatch.setattr("time.time", lambda: 0.0)
    counter = iter(range(10**9, 0, -1))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(counter)))
    words = ["--config", str(job.config), f"run_dir={job.run}"]
    assert command.run(train.main, [*words, "train.max_steps=4", "train.checkpoint_every=2"]) == 0
    assert job.steps() == [2, 4]
    assert job.status["time"] == 0.0
    assert not list((job.run / "checkpoints").glob("step-0000000*"))
    saved = json.loads((job.run / "checkpoints" / "step-0000004" / "state.json").read_text())
    assert saved["step"] == 4
    assert job.config.read_text() == TINY
