"""Noise: the random draws of a training step, decoder noise injection and flow corruption.

    tokenizer         e ~ N(0, 1),  t ~ U(0, t_max)
    noise injection   z' = mask ? t z + (1 - t) e : z          mask ~ Bernoulli(p), t ~ U(low, high), e ~ N(0, 1)
    flow corruption   z_t = t z + (1 - t) e                    t = a s / (1 + (a - 1) s),  s ~ law,  e ~ N(0, 1)
    laws              "logit_normal": s = logistic(mu + sigma n), n ~ N(0, 1);   "uniform": s ~ U(0, 1)
    label drop        y' = dropped ? null class : y            dropped ~ Bernoulli(label_drop), per sample and step

Shapes: z (B, ...) with any row; N flow steps give (N, B, ...). Every number comes from ``philox`` and depends on
(seed, stream, global sample index, position) alone. ``stream = 16 * flow_step + kind`` with the kinds below.

Bytes moved, r = bytes of a latent element: tokenizer noise 4 per element; injection 2r; N flow steps (1 + N) r, in one
launch: the numbers are made in registers. The eager form writes and reads 4 bytes of noise per element besides its
temporaries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend as _backend
from . import launches, philox
from .jit import jit, next_power_of_2, tl, triton
from .philox_triton import logistic, normal, normals, uniform

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted times (N, B), noise (N, B, *shape) and label drops (N, B) bool of the flow steps."""
    if law not in LAWS:
        raise ValueError(f"unknown time law {law!r}: choose one of {', '.join(LAWS)}")
    times, noises, drops = [], [], []
    for step in range(steps):
        base = STREAMS_PER_STEP * step
        if law == "uniform":
            s = philox.uniform(seed, base + FLOW_TIME, samples)
        else:
            s = philox.logistic(philox.normal(seed, base + FLOW_TIME, samples) * sigma + mu)
        times.append(s * shift / (s * (shift - 1.0) + 1.0))
        noises.append(philox.normal(seed, base + FLOW_NOISE, samples, shape))
        drops.append(philox.uniform(seed, base + LABEL_DROP, samples) < label_drop)
    return torch.stack(times), torch.stack(noises), torch.stack(drops)


def blend(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The form for given noise: t z + (1 - t) noise in float32, returned in z's dtype.

    z (B, ...), t (B,) or (N, B), noise t.shape + z.shape[1:].
    """
    t = t.reshape(*t.shape, *([1] * (z.ndim - 1)))
    return (z.float() * t + noise * (1.0 - t)).to(z.dtype)


def _launch(size: int, device: torch.device) -> tuple[int, int]:
    """Philox calls of a program, each giving four values, and its warps; one call per thread."""
    launch = launches.launch_of("corruption", "forward", size, device)
    groups = min(launch.columns, next_power_of_2((size + 3) // 4))
    return groups, max(1, min(launch.warps, groups // 32))


@jit(do_not_specialize=["seed"])
def _tokenizer_kernel(
    p_samples,
    p_noise,
    p_t,
    seed,
    t_max,
    size,
    TOKENIZER_NOISE: tl.constexpr,
    TOKENIZER_TIME: tl.constexpr,
    GROUPS: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sample = tl.load(p_samples + b)
    zero = (sample ^ sample).to(tl.int32)
    if part == 0:
        tl.store(p_t + b, uniform(seed, zero + TOKENIZER_TIME, sample) * t_max)
    o = part * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    noise = normals(seed, zero + TOKENIZER_NOISE, sample, part * GROUPS, GROUPS)
    tl.store(p_noise + b * size + o, noise, mask=o < size)


@jit(do_not_specialize=["seed"])
def _inject_kernel(
    p_z,
    p_samples,
    p_out,
    p_scale,
    seed,
    p_mask,
    t_low,
    t_range,
    size,
    NOISING_MASK: tl.constexpr,
    NOISING_TIME: tl.constexpr,
    NOISING_NOISE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sample = tl.load(p_samples + b)
    zero = (sample ^ sample).to(tl.int32)
    masked = uniform(seed, zero + NOISING_MASK, sample) < p_mask
    t = uniform(seed, zero + NOISING_TIME, sample) * t_range + t_low
    if part == 0:
        tl.store(p_scale + b, tl.where(masked, t, 1.0))
    o = part * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    m = o < size
    z = tl.load(p_z + b * size + o, mask=m, other=0.0)
    noise = normals(seed, zero + NOISING_NOISE, sample, part * GROUPS, GROUPS)
    mixed = (z.to(tl.float32) * t + noise * (1.0 - t)).to(p_out.dtype.element_ty)
    tl.store(p_out + b * size + o, tl.where(masked, mixed, z), mask=m)


# A number that is specialised to 1 has no dtype to be cast from.
@jit(do_not_specialize=["seed", "null_label", "batch"])
def _flow_kernel(
    p_z,
    p_labels,
    p_samples,
    p_out,
    p_t,
    p_label,
    seed,
    mu,
    sigma,
    shift,
    shift_less_1,
    label_drop,
    null_label,
    size,
    batch,
    STEPS: tl.constexpr,
    UNIFORM: tl.constexpr,
    FLOW_TIME: tl.constexpr,
    FLOW_NOISE: tl.constexpr,
    LABEL_DROP: tl.constexpr,
    STREAMS_PER_STEP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sample = tl.load(p_samples + b)
    o = part * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    m = o < size
    z = tl.load(p_z + b * size + o, mask=m, other=0.0).to(tl.float32)
    for n in tl.range(0, STEPS):
        base = n * STREAMS_PER_STEP
        if UNIFORM:
            s = uniform(seed, base + FLOW_TIME, sample)
        else:
            s = logistic(normal(seed, base + FLOW_TIME, sample) * sigma + mu)
        t = tl.div_rn(s * shift, s * shift_less_1 + 1.0)
        row = n * batch.to(tl.int64) + b
        if part == 0:
            label = tl.load(p_labels + b)
            dropped = uniform(seed, base + LABEL_DROP, sample) < label_drop
            tl.store(p_t + row, t)
            tl.store(p_label + row, tl.where(dropped, null_label.to(tl.int64), label))
        noise = normals(seed, base + FLOW_NOISE, sample, part * GROUPS, GROUPS)
        tl.store(p_out + row * size + o, (z * t + noise * (1.0 - t)).to(p_out.dtype.element_ty), mask=m)


@torch.library.custom_op("unite_kernels::tokenizer_draws", mutates_args=())
def _tokenizer_draws(samples: Tensor, seed: int, size: int, t_max: float, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        t = _backend.cpu_op("philox_uniform")(seed, TOKENIZER_TIME, samples, 1)[:, 0] * t_max
        return _backend.cpu_op("philox_normal")(seed, TOKENIZER_NOISE, samples, size), t
    noise, t = _tokenizer_outputs(samples, size)
    groups, warps = _launch(size, samples.device)
    with torch.cuda.device_of(samples):
        _tokenizer_kernel[(triton.cdiv(size, 4 * groups), len(samples))](
            *(samples, noise, t, seed, t_max, size, TOKENIZER_NOISE, TOKENIZER_TIME, groups),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return noise, t


def _tokenizer_outputs(samples: Tensor, size: int) -> tuple[Tensor, Tensor]:
    batch = len(samples)
    return samples.new_empty(batch, size, dtype=torch.float32), samples.new_empty(batch, dtype=torch.float32)


@_tokenizer_draws.register_fake
def _(samples, seed, size, t_max, backend):
    return _tokenizer_outputs(samples, size)


@torch.library.custom_op("unite_kernels::noise_injection", mutates_args=())
def _noise_injection(
    z: Tensor, samples: Tensor, seed: int, p: float, t_low: float, t_high: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("noise_injection")(z, samples, seed, p, t_low, t_high)
    out, scale = torch.empty_like(z), z.new_empty(len(z), dtype=torch.float32)
    size = z[0].numel()
    groups, warps = _launch(size, z.device)
    with torch.cuda.device_of(z):
        _inject_kernel[(triton.cdiv(size, 4 * groups), len(z))](
            *(z, samples, out, scale, seed, p, t_low, t_high - t_low, size),
            *(NOISING_MASK, NOISING_TIME, NOISING_NOISE, groups),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out, scale


@_noise_injection.register_fake
def _(z, samples, seed, p, t_low, t_high, backend):
    return torch.empty_like(z), z.new_empty(len(z), dtype=torch.float32)


def _noise_injection_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _noise_injection_backward(ctx, dz, _dscale):
    (scale,) = ctx.saved_tensors
    return (dz * scale.reshape(-1, *([1] * (dz.ndim - 1)))).to(dz.dtype), None, None, None, None, None, None


_noise_injection.register_autograd(_noise_injection_backward, setup_context=_noise_injection_setup)


@torch.library.custom_op("unite_kernels::flow_corruption", mutates_args=())
def _flow_corruption(
    z: Tensor,
    labels: Tensor,
    samples: Tensor,
    seed: int,
    steps: int,
    uniform_law: bool,
    mu: float,
    sigma: float,
    shift: float,
    label_drop: float,
    null_label: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpp":
        return _backend.cpu_op("flow_corruption")(
            z, labels, samples, seed, steps, uniform_law, mu, sigma, shift, label_drop, null_label
        )
    out, t, kept = _flow_outputs(z, labels, steps)
    size = z[0].numel()
    groups, warps = _launch(size, z.device)
    with torch.cuda.device_of(z):
        _flow_kernel[(triton.cdiv(size, 4 * groups), len(z))](
            *(z, labels, samples, out, t, kept, seed, mu, sigma, shift, shift - 1.0, label_drop),
            *(null_label, size, len(z), steps, uniform_law, FLOW_TIME, FLOW_NOISE, LABEL_DROP, STREAMS_PER_STEP),
            groups,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out, t, kept


def _flow_outputs(z: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    t = z.new_empty(steps, len(z), dtype=torch.float32)
    return z.new_empty(steps, *z.shape), t, labels.new_empty(steps, len(z))


@_flow_corruption.register_fake
def _(z, labels, samples, seed, steps, uniform_law, mu, sigma, shift, label_drop, null_label, backend):
    return _flow_outputs(z, labels, steps)


def _check(z: Tensor, samples: Tensor, seed: int) -> None:
    _backend.check_float("z", z)
    _backend.check_contiguous("z", z)
    _check_samples(samples, len(z), seed)


def _check_samples(samples: Tensor, batch: int, seed: int) -> None:
    if samples.dtype != torch.int64:
        raise TypeError(f"samples must be int64, not {samples.dtype}")
    _backend.check_shape("samples", samples, (batch,))
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), not {seed}")


def draw_tokenizer(
    seed: int, samples: Tensor, shape: tuple[int, ...], t_max: float, backend: str = "eager"
) -> tuple[Tensor, Tensor]:
    """Register noise (B, *shape) and time (B,) ~ U(0, t_max) of the tokenization pass, float32. samples int64 (B,)."""
    backend = _backend.resolve(backend, samples)
    _check_samples(samples, len(samples), seed)
    if backend != "eager":
        noise, t = _tokenizer_draws(samples.contiguous(), seed, math.prod(shape), t_max, backend)
        return noise.reshape(len(samples), *shape), t
    noise = philox.normal(seed, TOKENIZER_NOISE, samples, shape)
    return noise, philox.uniform(seed, TOKENIZER_TIME, samples) * t_max


def noise_injection(
    z: Tensor, samples: Tensor, seed: int, p: float, t_low: float, t_high: float, backend: str = "fused"
) -> Tensor:
    """z (B, ...) with noise mixed into each sample with probability p. ``samples`` int64 (B,); gradient of z."""
    backend = _backend.resolve(backend, z, samples)
    _check(z, samples, seed)
    if backend != "eager":
        return _noise_injection(z, samples.contiguous(), seed, p, t_low, t_high, backend)[0]
    mask, t, noise = draw_noising(seed, samples, tuple(z.shape[1:]), p, t_low, t_high)
    return torch.where(mask.reshape(-1, *([1] * (z.ndim - 1))), blend(z, t, noise), z)


def flow_corruption(
    z: Tensor,
    labels: Tensor,
    samples: Tensor,
    seed: int,
    steps: int,
    law: str,
    mu: float,
    sigma: float,
    shift: float,
    label_drop: float,
    null_label: int,
    backend: str = "fused",
) -> tuple[Tensor, Tensor, Tensor]:
    """Corrupted latents (N, B, ...), times (N, B) float32 and labels (N, B) of N = ``steps`` flow steps.

    z (B, ...) is detached (the flow loss sends no gradient to the tokenizer); labels and samples int64 (B,).
    """
    backend = _backend.resolve(backend, z, labels, samples)
    _check(z, samples, seed)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, not {labels.dtype}")
    _backend.check_shape("labels", labels, (len(z),))
    if law not in LAWS:
        raise ValueError(f"unknown time law {law!r}: choose one of {', '.join(LAWS)}")
    if z.requires_grad:
        raise ValueError("flow corruption takes detached latents: call .detach() on z")
    if backend != "eager":
        return _flow_corruption(
            *(z, labels.contiguous(), samples.contiguous(), seed, steps, law == "uniform"),
            *(mu, sigma, shift, label_drop, null_label, backend),
        )
    t, noise, dropped = draw_flow(seed, samples, steps, tuple(z.shape[1:]), law, mu, sigma, shift, label_drop)
    return blend(z, t, noise), t, torch.where(dropped, null_label, labels)
