"""Newton-Schulz orthogonalisation, the inner loop of the Muon optimizer, over a batch of equal shapes.

    X = G / max(|G|_F, eps), laid with the short side as rows (n <= k)
    steps times:  A = X X^T,  B = b A + c A A^T,  X = a X + B X

Shapes: G (batch, rows, cols) or (rows, cols); the result has G's shape in the computing dtype. Arithmetic per step:
2 n^2 k + 2 n^3 + 2 n^2 k FLOPs dense. Three forms, of which device, dtype and sizes choose one (``form_of``):

    plain       batched torch products; in bfloat16 the same operations in the same order as torch.optim.Muon
    separate    one matrix after the other, so that its iterates stay in a CPU's caches; float32 symmetric products
                are computed in block rows up to the diagonal, and mirrored
    gram        iterates on R = X X^T (n x n) and touches X once per ``GRAM_STEPS`` steps, then takes R afresh:
                cheaper the longer k is against n. For float32, in which CPUs without AMX work
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from . import backend as _backend

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
GRAM_STEPS = 3
# k / n from which gram is taken. On a CPU, plain or separate over gram: 1.2 to 1.5 from 2.7 to 5.3 at n = 64, 1.06 to
# 1.36 at n = 768, 0.7 to 0.8 for squares (Intel Xeon, one thread, medians of 41 and 5). In bfloat16 it loses.
GRAM_FROM = 2.5
# Elements of a matrix from which they are taken one by one on a CPU. A batch of UNITE-B's 4096 x 768 matrices is
# larger than any cache.
SEPARATE_FROM = 1 << 16
BLOCK_ROWS = 192  # of a symmetric product on a CPU, 0.83 of a dense product's time at 768 rows
# Short side from which bfloat16 is the faster dtype on a CPU with AMX tiles. All of UNITE-B's matrices: 4.7 s of CPU
# time in it against 20 s in float32 (Intel Xeon, one thread, other work beside it).
BFLOAT16_FROM = 256
Form = Callable[[Tensor, int], Tensor]  # (X (batch, n, k), steps) -> X


def fastest_dtype(device: torch.device, short_side: int) -> torch.dtype:
    """The fastest dtype for matrices up to ``short_side``: bfloat16 where the device has units that multiply it."""
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _backend.has_tiles() and short_side >= BFLOAT16_FROM else torch.float32


def _plain(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x


def _symmetric_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left right, known to be symmetric: block rows up to the diagonal, then their mirror image."""
    n = len(out)
    for low in range(0, n, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, n)
        torch.mm(left[low:high], right[:, :high], out=out[low:high, :high])
        if low:
            out[:low, low:high] = out[low:high, :low].T


def _separate(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    n = x.shape[1]
    gram, update = x.new_empty(n, n), x.new_empty(n, n)
    result = torch.empty_like(x)  # with x's strides: a tall matrix is worked on as it lies
    for matrix, out in zip(x.unbind(0), result.unbind(0), strict=True):
        current, spares = matrix, itertools.cycle((torch.empty_like(out), torch.empty_like(out)))
        for step in range(steps):
            target = out if step == steps - 1 else next(spares)
            if x.dtype == torch.float32:
                _symmetric_into(gram, current, current.T)
                _symmetric_into(update, gram, gram)
                update.mul_(c).add_(gram, alpha=b).diagonal().add_(a)
                torch.mm(update, current, out=target)
            else:  # every rounding as in torch.optim.Muon
                torch.mm(current, current.T, out=gram)
                torch.addmm(gram, gram, gram, beta=b, alpha=c, out=update)
                torch.addmm(current, update, current, beta=a, out=target)
            current = target
    return result


def _gram(x: Tensor, steps: int) -> Tensor:
    """Each step multiplies X by Q = a I + b R + c R^2; Q and R are polynomials of the first R, so R becomes Q R Q."""
    a, b, c = COEFFICIENTS
    for start in range(0, steps, GRAM_STEPS):
        count = min(GRAM_STEPS, steps - start)
        gram = torch.bmm(x, x.mT)
        total = None
        for step in range(count):
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            total = q if total is None else torch.bmm(q, total)
            if step + 1 < count:
                gram = torch.bmm(torch.bmm(q, gram), q)
        x = torch.bmm(total, x)
    return x


def form_of(x: Tensor) -> Form:
    """The fastest form for X (batch, n, k), n <= k."""
    n, k = x.shape[-2:]
    if x.device.type != "cpu":
        return _plain
    if x.dtype == torch.float32 and k >= GRAM_FROM * n:
        return _gram
    return _separate if n * k >= SEPARATE_FROM else _plain


def newton_schulz(
    g: Tensor,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Approximate orthogonal factor of each matrix of ``g`` (batch, rows, cols) or (rows, cols), in ``dtype``."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if g.ndim not in (2, 3):
        raise ValueError(f"expected (rows, cols) or (batch, rows, cols), not {tuple(g.shape)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be float32 or bfloat16, not {dtype}")
    x = (g if g.ndim == 3 else g[None]).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    x = form_of(x)(x, steps)
    x = x.mT if tall else x
    return x if g.ndim == 3 else x[0]
