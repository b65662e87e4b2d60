"""F01, F02, F04, F12 once more, with molecules and crystals: batches of similar sizes, padded to few of them."""

from __future__ import annotations

import pytest
import torch
from atoms_support import TINY, structures
from jobs import Job, equal
from test_numbers import skips_step_five

fault = pytest.mark.fault
STEPS = ("train.max_steps=12", "train.checkpoint_every=4", "train.keep_last=10")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("atoms") / "all.safetensors"
    structures().labelled(0).save(path)
    source = f"data: {{source: structures, path: {path}, heldout_path: {path}, atoms: {{pad_multiple: 2}}}}\n"
    return TINY.replace("num_classes: 2", "num_classes: 1").replace("epochs: 4", "epochs: 40") + source


@pytest.fixture(scope="module")
def straight(launcher, config, tmp_path_factory) -> Job:
    """12 undisturbed steps on two ranks."""
    done = Job(launcher, tmp_path_factory.mktemp("straight"), config)
    done.train(*STEPS)
    return done


def rows(job: Job) -> list[dict[str, float]]:
    from unite_fast.run.stats import read_metrics

    kept = ("step", "images_seen", "total", "types", "positions", "fractional", "flow", "grad_norm", "lr")
    return [{name: row[name] for name in kept} for row in read_metrics(job.run / "metrics.jsonl")]


@fault("F01", "resume exactness", "20 steps and 11 + 9 steps are bit-equal on two ranks, state and log")
def test_resume_is_exact(jobs, config, straight):
    job = jobs("resumed", config)
    job.train("train.max_steps=7", *STEPS[1:])
    assert "step-0000007 at step 7" in job.train(*STEPS)
    assert equal(job.tensors(12), straight.tensors(12))
    assert rows(job) == rows(straight)


@fault("F02", "kill -9 of one rank in a step", "the other rank ends; the next start gives the same bits")
def test_killed_rank(jobs, config, straight):
    job = jobs("killed", config)
    said = job.train(*STEPS, fault="kill@rank=1,step=7,phase=bwd", seconds=15, code=None)
    assert "another rank is gone" in said
    assert "step-0000004 at step 4" in job.train(*STEPS)
    assert equal(job.tensors(12), straight.tensors(12))
    assert rows(job) == rows(straight)


@fault("F04", "world size 2 -> 1 -> 2", "the same order and losses within rounding; no sample lost or doubled")
def test_other_world_sizes(jobs, config, straight):
    job = jobs("worlds", config)
    for steps, ranks in ((4, 2), (8, 1), (12, 2)):
        job.train(f"train.max_steps={steps}", *STEPS[1:], ranks=ranks)
    for ours, expected in zip(rows(job), rows(straight), strict=True):
        assert ours == pytest.approx(expected, rel=2e-3)
    for name, value in straight.tensors(12).items():
        torch.testing.assert_close(job.tensors(12)[name], value, rtol=2e-3, atol=2e-4, msg=name)


@fault("F12", "NaN in one micro-batch of one rank", "all ranks skip the step; counted; state and EMA unchanged")
def test_nan_loss_once(jobs, config):
    skips_step_five(jobs("poisoned", config), "nan@rank=1,step=5,phase=fwd")
