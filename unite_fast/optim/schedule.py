"""The learning rate as a function of images seen: a linear warm-up, a flat part, a cosine to the final rate.

The official code counts the epochs of its schedule in micro-batches and advances once per step, so each lasts as many
true epochs as are accumulated: its 20, 30 and 50 are 40, 60 and 100 in the published run, which ends before the second
decay that it configures. Here epochs are true ones.
"""

from __future__ import annotations

import math

from unite_fast.config import OptimConfig


def lr_scale(optim: OptimConfig, global_batch: int) -> float:
    """max(1, batch / reference): the factor on every learning rate of the schedule, as in the official code."""
    return max(1.0, global_batch / optim.lr_reference_batch) if optim.lr_reference_batch else 1.0


def learning_rate(
    o: OptimConfig, images_seen: int, images_per_epoch: int, global_batch: int, total_epochs: float
) -> float:
    """The rate of the next optimizer step; the first step of a warm-up has rate 0."""
    return lr_scale(o, global_batch) * _rate(o, images_seen / images_per_epoch, total_epochs)


def _rate(o: OptimConfig, epoch: float, total_epochs: float) -> float:
    if epoch < o.warmup_epochs:
        return o.lr * epoch / o.warmup_epochs
    flat = max(o.warmup_epochs, o.flat_epochs)
    if epoch < flat:
        return o.lr
    length = (o.decay_epochs or total_epochs) - flat
    progress = min(1.0, (epoch - flat) / length) if length > 0 else 1.0
    return o.final_lr + (o.lr - o.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
