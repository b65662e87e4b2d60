"""The learning rate as a function of images seen."""

from __future__ import annotations

import math

from unite_fast.config import OptimConfig


def lr_scale(optim: OptimConfig, global_batch: int) -> float:
    """max(1, batch / reference): the factor on every learning rate of the schedule (SPEC section 3)."""
    return max(1.0, global_batch / optim.lr_reference_batch) if optim.lr_reference_batch else 1.0


def learning_rate(
    optim: OptimConfig,
    images_seen: int,
    images_per_epoch: int,
    global_batch: int,
    total_epochs: float,
    accumulation: int,
) -> float:
    """The rate of the next optimizer step; the first step of a warm-up has rate 0.

    Epochs are true epochs, ``total_epochs`` always. With ``epoch_unit="micro_batches"`` those of ``optim`` are the
    official code's, which last ``accumulation`` times as long because it counts micro-batches per epoch but advances
    once per step.
    """
    length = images_per_epoch * (accumulation if optim.epoch_unit == "micro_batches" else 1)
    end = total_epochs * images_per_epoch / length
    return lr_scale(optim, global_batch) * _rate(optim, images_seen / length, end)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def _rate(o: OptimConfig, epoch: float, total_epochs: float) -> float:
    if epoch < o.warmup_epochs:
        return o.lr * epoch / o.warmup_epochs
    if o.schedule == "constant":
        return o.lr
    if o.schedule == "cosine":  # arXiv 2603.22283, table 8
        end = o.decay_epochs or total_epochs
        return _cosine(o.lr, o.final_lr, (epoch - o.warmup_epochs) / max(end - o.warmup_epochs, 1e-9))
    # two_stage: flat, cosine to mid_lr, flat, cosine to final_lr; each boundary at or after the one before.
    flat = max(o.warmup_epochs, o.flat_epochs)
    decay = max(flat, o.decay_epochs)
    second_flat = max(decay, o.second_flat_epochs)
    second_decay = max(second_flat, o.second_decay_epochs)
    if epoch < flat:
        return o.lr
    if epoch < decay:
        return _cosine(o.lr, o.mid_lr, (epoch - flat) / (decay - flat))
    if epoch < second_flat:
        return o.mid_lr
    if epoch < second_decay:
        return _cosine(o.mid_lr, o.final_lr, (epoch - second_flat) / (second_decay - second_flat))
    return o.final_lr
