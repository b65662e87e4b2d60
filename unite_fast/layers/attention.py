"""Scaled dot-product attention behind one function: the only place that knows the backends.

    sdpa        torch's own choice; any device, dtype and mask
    math        torch's plain operations; likewise
    efficient   torch's memory-efficient kernel; CUDA; key masks; head sizes that are multiples of 8 (4 in float32)
    flash       torch's FlashAttention 2; CUDA in half precision; head sizes that are multiples of 8 up to 256; on CPUs
                any dtype, with key masks
    cudnn       cuDNN's kernel through torch; CUDA in half precision, sm_80 and later; head sizes up to 128 that are
                multiples of 8; key masks
    fa2         the package flash-attn; as flash
    fa3         the package flash_attn_interface (FlashAttention 3) in the place of torch's flash kernel; sm_90
    fa4         the package flash-attn-4, likewise; sm_90 and sm_100; head sizes that are multiples of 8
    products    torch's forward, and a backward of large products (unite_kernels/attention.py); CPUs, no key masks
    auto        at start, per number of keys, from PREFERRED

Head sizes 64 (UNITE-S to -L) and 72 (UNITE-XL) are within all of these. A backend that needs half precision computes
the half-precision passes; float32 ones (pictures, evaluation) go to sdpa. Kernels that know no key mask get the visible
keys packed, without a host sync: see ``_packed``. The backward passes of flash, cudnn, fa2, fa3 and fa4 add up the
queries' gradient in an order that varies, so two runs on a GPU differ in the last bits.

Shape letters: B batch, H heads, T queries, S keys, E head size, N all tokens of a packed batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unite_fast.base.errors import UserError, first_line
from unite_fast.config import EfficiencyConfig, choices
from unite_kernels import attention as products
from unite_kernels import backend as kernels

BACKENDS = tuple(name for name in choices(EfficiencyConfig, "attention") if name != "auto")
HALF_ONLY = ("flash", "cudnn", "fa2", "fa3", "fa4")  # on CUDA devices
PACKS_MASKS = ("flash", "fa2", "fa3", "fa4")  # on CUDA devices
SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}
PLUGGED = {"fa3": "FA3", "fa4": "FA4"}  # implementations that torch puts in the place of its flash kernel
MODULES = {
    "fa2": ("flash_attn.flash_attn_interface", "pip install flash-attn"),
    "fa3": ("flash_attn_interface", "build the folder hopper/ of the flash-attention repository"),
    "fa4": ("flash_attn.cute.interface", "pip install --pre flash-attn-4"),
}

# What auto takes, in half precision: per compute capability, (most keys, backends, the first that runs). Not measured:
# chosen from figures that others published for an H100, in which cuDNN's kernels are ahead of FlashAttention 2 in both
# directions at head sizes 64 and 128, with longer sequences than ours. FlashAttention 3 and 4 are not candidates before
# they are measured: `make gpu-check` measures 544, 288 and 257 keys, `make gpu-report` writes the row of the device.
PREFERRED: dict[tuple[int, int], tuple[tuple[int, tuple[str, ...]], ...]] = {
    # not measured
    (9, 0): ((1 << 30, ("cudnn", "flash")),),
    # not measured
    (8, 0): ((1 << 30, ("flash",)),),
}

Size = tuple[int, int, int]  # (keys, heads, head size) of an attention
Plan = str | tuple[tuple[int, str], ...]  # one backend, or (most keys, backend) in rising order


class Keys(NamedTuple):
    """Which keys may be attended to, prepared once for all layers of a pass by ``visible_keys``."""

    visible: Tensor  # bool (B, S)
    order: Tensor | None = None  # int64 (B S,): the visible ones of the whole batch, then the hidden ones
    hidden: Tensor | None = None  # bool (B S, 1, 1), in that order
    starts: Tensor | None = None  # int32 (B + 1,): where each sample's keys begin among the visible ones


def visible_keys(key_mask: Tensor, backend: Plan) -> Keys:
    """For ``attention`` with a key mask, bool (B, S). Kernels that know no mask need the order of the visible keys."""
    packs = key_mask.is_cuda and _of(backend, key_mask.shape[1]) in PACKS_MASKS
    return packed_keys(key_mask) if packs else Keys(key_mask)


def packed_keys(key_mask: Tensor) -> Keys:
    """With what ``_packed`` needs."""
    hidden = ~key_mask.flatten()
    order = torch.argsort(hidden.to(torch.uint8), stable=True)
    starts = F.pad(key_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Keys(key_mask, order, hidden[order][:, None, None], starts)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Keys | Tensor | None = None, backend: Plan = "sdpa") -> Tensor:
    """softmax(q kT / sqrt(E)) v.

    q (B, H, T, E), k and v (B, H, S, E), one dtype. key_mask: optional bool (B, S), true where a key may be attended
    to, or what ``visible_keys`` made of it for this backend; rows whose keys are all masked are undefined. backend:
    what ``resolve`` returned. Returns (B, H, T, E).
    """
    keys = visible_keys(key_mask, backend) if isinstance(key_mask, Tensor) else key_mask
    name = _of(backend, k.shape[2])
    if q.is_cuda and q.dtype == torch.float32 and name in HALF_ONLY:
        name = "sdpa"
    if keys is not None and q.is_cuda and name in PACKS_MASKS:
        return _packed(q, k, v, keys, name)
    if name == "fa2":
        from flash_attn import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if name == "products" and keys is None:
        return products.attention(q, k, v)
    mask = None if keys is None else keys.visible[:, None, None, :]
    if name in ("sdpa", "products"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with sdpa_kernel(SDPA[name]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, backend: Plan = "sdpa"
) -> Tensor:
    """Attention within each of B sequences that lie end to end: q (N, H, E), k and v (M, H, E) -> (N, H, E).

    starts_q, starts_k: int32 (B + 1,), where each sequence begins and, last, where all end; rows beyond are ignored and
    their results undefined. max_q, max_k: at least the longest sequences. The flash family computes it packed; for
    the other backends and float32 the sequences are padded and masked.
    """
    name = _of(backend, max_k)
    if q.is_cuda and q.dtype == torch.float32 and name in HALF_ONLY:
        name = "sdpa"
    if name == "fa2":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, starts_q, starts_k, max_q, max_k)
    if name in PACKS_MASKS and q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        y = varlen_attn(q, k, v, starts_q, starts_k, max_q, max_k)
        assert isinstance(y, Tensor)  # a tuple only when asked for more than the output
        return y
    padded = _pad(q, starts_q, max_q), _pad(k, starts_k, max_k), _pad(v, starts_k, max_k)
    visible = torch.arange(max_k, device=k.device) < starts_k.diff()[:, None]
    y = attention(*padded, visible, name).transpose(1, 2)  # (B, max_q, H, E)
    sequence, place = _places(starts_q, len(q))
    return y[sequence, place.clamp(max=max_q - 1)]


def _places(starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of ``rows`` packed rows, its sequence and its place in it."""
    row = torch.arange(rows, device=starts.device)
    sequence = (torch.searchsorted(starts, row, right=True) - 1).clamp(max=len(starts) - 2)
    return sequence, row - starts[sequence]


def _pad(x: Tensor, starts: Tensor, longest: int) -> Tensor:
    """(N, H, E) -> (B, H, longest, E). Places after a sequence's end repeat some row: they have to be masked."""
    row = starts[:-1, None] + torch.arange(longest, device=x.device)
    return x[row.clamp(max=len(x) - 1)].transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, keys: Keys, backend: str) -> Tensor:
    """Masked attention by a kernel that knows only sequence lengths: the visible keys are moved to the front.

    Shapes do not depend on the mask: the hidden keys stay behind the last sequence, where no kernel reads, as zeros.
    """
    if keys.order is None or keys.hidden is None or keys.starts is None:
        raise ValueError(f"the keys were prepared for another backend than {backend}")
    b, h, t, e = q.shape
    k, v = (torch.where(keys.hidden, 0, x.transpose(1, 2).flatten(0, 1)[keys.order]) for x in (k, v))
    starts_q = torch.arange(0, b * t + 1, t, device=q.device, dtype=torch.int32)
    q = q.transpose(1, 2).flatten(0, 1)
    y = attention_varlen(q, k, v, starts_q, keys.starts, t, keys.visible.shape[1], backend)
    return y.view(b, t, h, e).transpose(1, 2)


def _of(plan: Plan, keys: int) -> str:
    return plan if isinstance(plan, str) else next(name for most, name in plan if keys <= most)


def obstacle(backend: str, device: torch.device, half: bool, head_size: int) -> str:
    """Why ``backend`` cannot run on ``device`` in half precision (or float32), with what mends it; empty if it can."""
    cuda = device.type == "cuda"
    if backend in MODULES and (missing := _missing(backend)):
        return missing
    if backend in ("efficient", "cudnn", *MODULES) and not cuda:
        return "it needs a CUDA device"
    if backend == "products":
        return "it is for CPUs" if cuda else kernels.obstacle("cpp", device)
    if backend in ("sdpa", "math") or not cuda:
        return ""
    capability = torch.cuda.get_device_capability(device)
    wanted = {"fa3": ((9, 0),), "fa4": ((9, 0), (10, 0), (10, 3))}.get(backend)
    if capability not in wanted if wanted else backend in HALF_ONLY and capability < (8, 0):
        listed = " or ".join(f"sm_{a}{b}" for a, b in wanted or ((8, 0),))
        return f"it needs {listed}, this device is sm_{capability[0]}{capability[1]}"
    if backend in HALF_ONLY and not half:
        return "it computes in half precision only; set efficiency.precision=bf16"
    limit = {"cudnn": 128, "efficient": 1 << 16}.get(backend, 256)
    if head_size % 8 or head_size > limit:
        return f"its head sizes are multiples of 8 up to {limit}, this model's is {head_size}"
    return ""


def _missing(backend: str) -> str:
    module, mend = MODULES[backend]
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError as error:
        found = False
        if error.name != module.split(".")[0]:  # the package is there and lacks another
            return f"{module} needs {error.name}, which is not installed; {mend}"
    except (ImportError, OSError) as error:
        return f"{module} cannot be imported ({first_line(error)}); {mend}"
    return "" if found else f"{module} is not installed; {mend}"


def trial(backend: str, device: torch.device, half: bool, keys: int, heads: int, head_size: int) -> str:
    """Runs ``backend`` forward and backward on one small batch; why it failed, or an empty string."""
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v = (torch.zeros(1, heads, keys, head_size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # torch says in warnings why it refuses
            activate(backend)
            attention(q, k, v, backend=backend).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except (RuntimeError, ImportError, AssertionError, ValueError) as error:
        reasons = [str(w.message).split(" (Triggered")[0] for w in caught if "not used because" not in str(w.message)]
        return "; ".join([first_line(error), *reasons[:4]])
    return ""


def activate(backend: str) -> None:
    """Makes torch's flash kernel in this process the one that ``backend`` means, where it means one."""
    from torch.nn import attention as registry

    wanted = PLUGGED.get(backend)
    if wanted is not None and registry.current_flash_attention_impl() != wanted:
        registry.activate_flash_attention_impl(wanted)
    elif backend == "flash" and registry.current_flash_attention_impl() is not None:
        registry.restore_flash_attention_impl()


def resolve(choice: str, sizes: Sequence[Size], device: torch.device, half: bool) -> Plan:
    """What ``efficiency.attention=choice`` means for attentions of these sizes on ``device``.

    half: whether the passes are in bfloat16. A backend that was asked for and cannot run raises UserError with the
    reason. ``auto`` takes what its table prefers; where that has no row for the device, or in float32, sdpa. On CPUs
    with units for products in bfloat16 (AMX) it takes products.
    """
    if choice == "auto":
        if device.type != "cuda" or not half:
            return "products" if half and kernels.has_tiles() and not obstacle("products", device, half, 0) else "sdpa"
        rows = PREFERRED.get(torch.cuda.get_device_capability(device), ())
        plan = tuple((most, _first_that_runs(names, sizes, device)) for most, names in rows)
        return plan[0][1] if len(plan) == 1 else plan or "sdpa"
    for keys, heads, head_size in sizes:
        why = obstacle(choice, device, half, head_size)
        if not why and device.type == "cuda":
            why = trial(choice, device, half, keys, heads, head_size)
        if why:
            raise UserError(f"efficiency.attention={choice}: {why}; or choose auto")
    return choice


def _first_that_runs(names: tuple[str, ...], sizes: Sequence[Size], device: torch.device) -> str:
    for name in names:
        if not any(
            obstacle(name, device, True, head_size) or trial(name, device, True, keys, heads, head_size)
            for keys, heads, head_size in sizes
        ):
            return name
    return "sdpa"


def describe(plan: Plan) -> str:
    """A plan in words."""
    return plan if isinstance(plan, str) else ", ".join(f"{name} up to {most} keys" for most, name in plan)
