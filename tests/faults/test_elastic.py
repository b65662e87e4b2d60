"""F47: a run that goes on with other numbers of ranks and other shards."""

from __future__ import annotations

import pytest
import torch
from jobs import STRAIGHT

fault = pytest.mark.fault


@fault("F47", "world size 4 -> 2 -> 4, other shards", "the same order, losses within rounding; even shares saved")
def test_elastic(job, straight):
    hsdp = ("train.strategy=hsdp", "train.shard_size=2")
    job.train("train.max_steps=6", *STRAIGHT[1:], *hsdp, ranks=4)
    sizes = [path.stat().st_size for path in job.files(6)]
    job.train("train.max_steps=13", *STRAIGHT[1:], "train.strategy=fsdp2", ranks=2)
    job.train(*STRAIGHT, *hsdp, ranks=4)
    assert len(sizes) == 4
    assert max(sizes) < 2 * min(sizes)
    assert len(job.rows()) == 20
    for ours, expected in zip(job.rows(), straight.rows(), strict=True):
        assert ours[:2] == expected[:2]
        assert ours == pytest.approx(expected, rel=2e-3)
    for name, value in straight.tensors(20).items():
        torch.testing.assert_close(job.tensors(20)[name], value, rtol=2e-3, atol=2e-4, msg=name)
