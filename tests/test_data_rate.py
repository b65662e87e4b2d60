"""The measured rate of a source, and the share of time spent waiting for it."""

from __future__ import annotations

import time

import pytest
import torch

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import open_source
from unite_fast.data.digits import Digits
from unite_fast.data.rate import Waits, measure

MODEL = ModelConfig(image_size=8, patch_size=2, channels=1, num_classes=10)


class Slow(Digits):
    """20 ms per batch."""

    def gather(self, indices, seed, device):
        time.sleep(0.02)
        return super().gather(indices, seed, device)


@pytest.fixture
def slow():
    source = open_source(DataConfig(source="digits", flip=False), MODEL)
    source.__class__ = Slow
    return source


def test_measure(slow):
    rate = measure(slow, batch=10, seconds=0.4)
    assert 20 < rate.images_per_second < 500  # 10 images in 20 ms, longer on a busy machine
    assert rate.images % 10 == 0
    assert 0.4 <= rate.seconds < 4
    assert rate.first_batch_seconds >= 0.02
    assert "2.0 times" in rate._replace(images_per_second=500.0).line(250)
    assert "times" not in rate.line()
    assert measure(slow, batch=10, seconds=0).images == 10
    with pytest.raises(UserError, match="does not divide"):
        measure(slow, batch=0)


def test_waits(slow):
    batches = Waits(iter(slow.batches(iter([]), 0, torch.device("cpu"), 0, 1.0)))
    with pytest.raises(StopIteration):
        next(batches)
    from unite_fast.data import stream

    batches = Waits(stream(slow, 0, global_batch=10))
    reference = next(stream(slow, 0, global_batch=10))
    for step in range(5):
        batch = next(batches)
        if step == 0:
            assert torch.equal(batch.images, reference.images)
    assert batches.share() > 0.5
    time.sleep(0.2)
    assert batches.share() < 0.05
    next(batches)
    time.sleep(0.06)
    assert 0.02 < batches.share() < 0.9
