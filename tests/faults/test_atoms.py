"""F01, F02, F04, F12 once more, with molecules and crystals: batches of similar sizes, padded to few of them."""

from __future__ import annotations

import re

import pytest
import torch
from atoms_support import TINY, structures
from jobs import Job, equal
from test_numbers import skips_step_five

fault = pytest.mark.fault
COLUMNS = ("step", "images_seen", "total", "types", "positions", "fractional", "flow", "grad_norm", "lr")
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


def ends_as(job: Job, straight: Job) -> None:
    """Its last checkpoint and its log have the same bits."""
    assert equal(job.tensors(12), straight.tensors(12))
    assert job.counters(12) == straight.counters(12)
    assert job.rows(COLUMNS) == straight.rows(COLUMNS)


@fault("F01", "resume exactness", "12 steps and 7 + 5 steps are bit-equal on two ranks, state and log")
def test_resume_is_exact(jobs, config, straight):
    job = jobs("resumed", config)
    job.train("train.max_steps=7", *STEPS[1:])
    assert "step-0000007 at step 7" in job.train(*STEPS)
    ends_as(job, straight)


@fault("F02", "kill -9 of one rank in a step", "the other rank ends; the next start gives the same bits")
def test_killed_rank(jobs, config, straight):
    job = jobs("killed", config)
    # The save of step 8 waits for that of step 4, so by then at least that one is whole.
    said = job.train(*STEPS, fault="kill@rank=1,step=9,phase=bwd", seconds=15, code=None)
    assert "another rank is gone" in said
    assert re.search(r"step-00000(04 at step 4|08 at step 8)", job.train(*STEPS))
    ends_as(job, straight)


@fault("F04", "world size 2 -> 1 -> 2", "the same order and losses within rounding; no sample lost or doubled")
def test_other_world_sizes(jobs, config, straight):
    job = jobs("worlds", config)
    for steps, ranks in ((4, 2), (8, 1), (12, 2)):
        job.train(f"train.max_steps={steps}", *STEPS[1:], ranks=ranks)
    for ours, expected in zip(job.rows(COLUMNS), straight.rows(COLUMNS), strict=True):
        assert ours == pytest.approx(expected, rel=2e-3)
    for name, value in straight.tensors(12).items():
        torch.testing.assert_close(job.tensors(12)[name], value, rtol=2e-3, atol=2e-4, msg=name)


@fault("F12", "NaN in one micro-batch of one rank", "all ranks skip the step; counted; state and EMA unchanged")
def test_nan_loss_once(jobs, config):
    skips_step_five(jobs("poisoned", config), "nan@rank=1,step=5,phase=fwd")
