"""Noise: the random draws of a training step, decoder noise injection and flow corruption.

    noise injection   z' = mask ? t z + (1 - t) e : z          mask ~ Bernoulli(p), t ~ U(low, high), e ~ N(0, 1)
    flow corruption   z_t = t z + (1 - t) e                    t = a s / (1 + (a - 1) s),  s ~ law,  e ~ N(0, 1)
    laws              "logit_normal": s = logistic(mu + sigma n), n ~ N(0, 1);   "uniform": s ~ U(0, 1)
    label drop        y' = dropped ? null class : y            dropped ~ Bernoulli(label_drop), per sample and step

Shapes: z (B, ...) with any row; N flow steps give (N, B, ...). Every number comes from ``philox`` and depends on
(seed, stream, global sample index, position) alone. ``stream = 16 * flow_step + kind`` with the kinds below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox

TOKENIZER_NOISE = 0
TOKENIZER_TIME = 1
NOISING_MASK = 2
NOISING_TIME = 3
NOISING_NOISE = 4
FLOW_TIME = 5
FLOW_NOISE = 6
LABEL_DROP = 7
STREAMS_PER_STEP = 16

LAWS = ("logit_normal", "uniform")


def draw_tokenizer(seed: int, samples: Tensor, shape: tuple[int, ...], t_max: float) -> tuple[Tensor, Tensor]:
    """Register noise (B, *shape) and time (B,) ~ U(0, t_max) of the tokenization pass, float32."""
    noise = philox.normal(seed, TOKENIZER_NOISE, samples, shape)
    return noise, philox.uniform(seed, TOKENIZER_TIME, samples) * t_max


def draw_noising(
    seed: int, samples: Tensor, shape: tuple[int, ...], p: float, t_low: float, t_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (B,) bool with probability p, time (B,) ~ U(t_low, t_high) and noise (B, *shape) of the noise injection."""
    mask = philox.uniform(seed, NOISING_MASK, samples) < p
    t = philox.uniform(seed, NOISING_TIME, samples) * (t_high - t_low) + t_low
    return mask, t, philox.normal(seed, NOISING_NOISE, samples, shape)


def draw_flow(
    seed: int,
    samples: Tensor,
    steps: int,
    shape: tuple[int, ...],
    law: str,
    mu: float,
    sigma: float,
    shift: float,
    label_drop: float,
    first_step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted times (N, B), noise (N, B, *shape) and label drops (N, B) bool of flow steps first_step .. +steps."""
    if law not in LAWS:
        raise ValueError(f"unknown time law {law!r}: choose one of {', '.join(LAWS)}")
    times, noises, drops = [], [], []
    for step in range(first_step, first_step + steps):
        base = STREAMS_PER_STEP * step
        if law == "uniform":
            s = philox.uniform(seed, base + FLOW_TIME, samples)
        else:
            s = philox.logistic(philox.normal(seed, base + FLOW_TIME, samples) * sigma + mu)
        times.append(s * shift / (s * (shift - 1.0) + 1.0))
        noises.append(philox.normal(seed, base + FLOW_NOISE, samples, shape))
        drops.append(philox.uniform(seed, base + LABEL_DROP, samples) < label_drop)
    return torch.stack(times), torch.stack(noises), torch.stack(drops)
