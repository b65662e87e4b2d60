"""Counter-based random numbers: the same bits on a CPU and a GPU, for any batch split.

Philox4x32-10 (Salmon et al., SC 2011) turns (key, counter) into four 32-bit words. Here

    key     = seed                                      (64 bits)
    counter = (block, stream, sample_low, sample_high)

where ``sample`` is the global index of a training sample, ``stream`` names the use (each kind of draw
has its own) and ``block`` counts groups of four values inside the sample's row. A value therefore
depends on (seed, stream, sample, position) alone: not on history, batch size, or world size.

Uniforms keep 24 bits, so they are exact in float32. Normals are Box-Muller pairs. Their logarithm,
sine and cosine, and the exponential of the logistic function, are polynomials made of float32 +, *, /
and sqrt, each correctly rounded and never contracted to a fused multiply-add: whoever repeats them in
this order (Triton with ``enable_fp_fusion=False``, C++ with ``-ffp-contract=off``) gets equal bits.
Their error is below 3e-7 relative; the largest normal is 6.66.

This file is the eager reference. It holds no kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF

# Chebyshev fits, rounded to float32 (lowest order first).
LOG = (0.3333333, -0.2499999, 0.20000708, -0.1666848, 0.14249937, -0.1241105, 0.11661511, -0.11571201, 0.07149754)
COS = (4.1666668e-02, -1.3888888e-03, 2.4800602e-05, -2.7301070e-07)
SIN = (-1.6666667e-01, 8.3333319e-03, -1.9840087e-04, 2.7249964e-06)
EXP = (0.5, 0.16666667, 0.041666467, 0.0083332984, 0.0013933644, 0.00019899276)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts; the high one has 9 significant bits


def philox4x32(seed: int, block: Tensor, stream: int, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds. ``block`` and ``sample`` are broadcastable int64; returns four int64 tensors < 2**32."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    block, sample = torch.broadcast_tensors(block, sample)
    c0, c1 = block & MASK, torch.full_like(block, stream & MASK)
    c2, c3 = sample & MASK, (sample >> 32) & MASK
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1  # wraps modulo 2**64, so the low and high halves are exact
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def log(u: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32: u = m 2**e, sqrt(1/2) <= m < sqrt(2)."""
    bits = u.view(torch.int32) - 0x3F3504F3  # the bit pattern of sqrt(1/2)
    exponent = bits >> 23
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    square = f * f
    tail = (square * f) * _polynomial(f, LOG) + e * LN2_LOW
    return (f + (tail - square * 0.5)) + e * LN2_HIGH


def exp(x: Tensor) -> Tensor:
    """Exponential of float32, clamped to [-80, 80]: x = k ln 2 + r, |r| <= ln(2)/2."""
    x = x.clamp(-80.0, 80.0)
    k = torch.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    mantissa = (r * r * _polynomial(r, EXP) + r) + 1.0
    return mantissa * ((k.to(torch.int32) + 127) << 23).view(torch.float32)


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), float32."""
    return 1.0 / (exp(-x) + 1.0)


def _cos_sin_turns(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi (word >> 8) / 2**24: the two top bits are the quadrant, the other 22 an angle in it."""
    quadrant = word >> 30
    offset = (((word >> 8) & 0x3FFFFF) - 0x200000).to(torch.float32)  # in [-2**21, 2**21), exact
    a = offset * (math.pi / 2 / 4194304.0)  # angle from the middle of the quadrant, within pi/4
    z = a * a
    cos = (z * z * _polynomial(z, COS) - z * 0.5) + 1.0
    sin = a * z * _polynomial(z, SIN) + a
    half = 0.70710678
    c, s = (cos - sin) * half, (cos + sin) * half  # turn by pi/4: from the middle to the start of the quadrant
    swap = (quadrant & 1) == 1
    cos, sin = torch.where(swap, -s, c), torch.where(swap, c, s)
    flip = quadrant >= 2
    return torch.where(flip, -cos, cos), torch.where(flip, -sin, sin)


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    u = (w0.to(torch.float32) + 1.0) * 2.3283064365386963e-10  # (0, 1], 2**-32
    # In float64 and rounded once: the float32 torch.sqrt of some CPU builds misses the nearest value 15 % of the time.
    radius = torch.sqrt((log(u) * -2.0).double()).float()
    cos, sin = _cos_sin_turns(w1)
    return radius * cos, radius * sin


def _words(seed: int, stream: int, samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = torch.arange((count + 3) // 4, device=samples.device, dtype=torch.int64)
    return philox4x32(seed, blocks[None, :], stream, samples.to(torch.int64)[:, None])


def uniform(seed: int, stream: int, samples: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 in [0, 1), shape (len(samples), *shape). ``samples`` holds global sample indices, int64 (B,)."""
    count = math.prod(shape)
    lanes = torch.stack(_words(seed, stream, samples, count), dim=-1).flatten(1)[:, :count]
    return ((lanes >> 8).to(torch.float32) * 5.9604644775390625e-08).reshape(len(samples), *shape)


def normal(seed: int, stream: int, samples: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal float32, shape (len(samples), *shape). ``samples`` holds global sample indices, int64 (B,)."""
    count = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, stream, samples, count)
    lanes = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1).flatten(1)[:, :count]
    return lanes.reshape(len(samples), *shape)
