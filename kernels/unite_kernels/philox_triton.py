"""``philox`` on the device: the same operations in the same order, so the same bits.

Kernels that call these must be launched with ``enable_fp_fusion=False``: one fused multiply-add changes bits.
Square roots and divisions are the correctly rounded ones. The constants repeat ``philox``'s; the tests compare bits.
"""

from __future__ import annotations

from .jit import jit, tl


@jit
def words(seed, block, stream, sample):
    """Four uint32 words of each counter (block, stream, sample low, sample high), all of ``block``'s shape."""
    c0 = block.to(tl.uint32)
    zero = c0 ^ c0
    sample = sample.to(tl.int64)
    c2 = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed.to(tl.int64), c0, zero + stream.to(tl.uint32), c2, c3, n_rounds=10)


@jit
def log(u):
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    e = (bits >> 23).to(tl.float32)
    square = f * f
    y = f * 0.07149754 + -0.11571201
    y = y * f + 0.11661511
    y = y * f + -0.1241105
    y = y * f + 0.14249937
    y = y * f + -0.1666848
    y = y * f + 0.20000708
    y = y * f + -0.2499999
    y = y * f + 0.3333333
    tail = (square * f) * y + e * -2.12194440e-4
    return (f + (tail - square * 0.5)) + e * 0.693359375


@jit
def exp(x):
    x = tl.minimum(tl.maximum(x, -80.0), 80.0)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) - k * -2.12194440e-4
    y = r * 0.00019899276 + 0.0013933644
    y = y * r + 0.0083332984
    y = y * r + 0.041666467
    y = y * r + 0.16666667
    y = y * r + 0.5
    mantissa = (r * r * y + r) + 1.0
    return mantissa * ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@jit
def logistic(x):
    denominator = exp(-x) + 1.0
    return tl.div_rn(denominator * 0.0 + 1.0, denominator)


@jit
def cos_sin_turns(word):
    """cos and sin of 2 pi (word >> 8) / 2**24."""
    quadrant = word >> 30
    offset = (((word >> 8) & 0x3FFFFF).to(tl.int32) - 0x200000).to(tl.float32)
    a = offset * 3.7450703e-07  # pi / 2 / 2**22, rounded to float32
    z = a * a
    y = z * -2.7301070e-07 + 2.4800602e-05
    y = y * z + -1.3888888e-03
    y = y * z + 4.1666668e-02
    cos = (z * z * y - z * 0.5) + 1.0
    y = z * 2.7249964e-06 + -1.9840087e-04
    y = y * z + 8.3333319e-03
    y = y * z + -1.6666667e-01
    sin = a * z * y + a
    c = (cos - sin) * 0.70710678
    s = (cos + sin) * 0.70710678
    swap = (quadrant & 1) == 1
    cos = tl.where(swap, -s, c)
    sin = tl.where(swap, c, s)
    flip = quadrant >= 2
    return tl.where(flip, -cos, cos), tl.where(flip, -sin, sin)


@jit
def box_muller(w0, w1):
    u = (w0.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    radius = tl.sqrt_rn(log(u) * -2.0)
    cos, sin = cos_sin_turns(w1)
    return radius * cos, radius * sin


@jit
def uniform_of(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@jit
def uniform(seed, stream, sample):
    """One uniform of a sample: position 0 of the stream."""
    w0, _w1, _w2, _w3 = words(seed, (sample ^ sample), stream, sample)
    return uniform_of(w0)


@jit
def normal(seed, stream, sample):
    """One normal of a sample: position 0 of the stream."""
    w0, w1, _w2, _w3 = words(seed, (sample ^ sample), stream, sample)
    first, _second = box_muller(w0, w1)
    return first


@jit
def normals(seed, stream, sample, first_block, GROUPS: tl.constexpr):
    """4 * GROUPS adjacent normals of a sample's row, from position 4 * first_block."""
    w0, w1, w2, w3 = words(seed, first_block + tl.arange(0, GROUPS), stream, sample)
    a, b = box_muller(w0, w1)
    c, d = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * GROUPS,))
