"""Newton-Schulz orthogonalisation, the inner loop of the Muon optimizer, over a batch of equal shapes.

    X = G / max(|G|_F, eps), laid with the short side as rows (n <= k)
    steps times:  A = X X^T,  B = b A + c A A^T,  X = a X + B X

Shapes: G (batch, rows, cols) or (rows, cols); the result has G's shape in the computing dtype. Arithmetic per step:
2 n^2 k + 2 n^3 + 2 n^2 k FLOPs dense. Four forms:

    plain       batched torch products; in bfloat16 the same operations in the same order as torch.optim.Muon
    separate    one matrix after the other, so that its iterates stay in a CPU's caches; float32 symmetric products
                are computed in block rows up to the diagonal, and mirrored
    symmetric   X X^T and b A + c A A^T by a Triton kernel that computes one triangle and mirrors it: half their FLOPs
    gram        iterates on R = X X^T (n x n) and touches X once per ``GRAM_STEPS`` steps, then takes R afresh:
                cheaper the longer k is against n. Opt-in. Its n x n matrices are float32: the error against float64 is
                0.3 to 0.7 times torch.optim.Muon's (means of 12 seeds by shape, on a CPU, n to 130)
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import backend as _backend
from . import launches
from .jit import jit, tl, triton

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
METHODS = ("auto", "plain", "separate", "symmetric", "gram")
GRAM_STEPS = 3

# Short side from which "auto" takes the symmetric kernel on a CUDA device. UNMEASURED default: published timings of
# such kernels lose to the vendor library at 1024 and below; to be replaced by a table measured on the device.
SYMMETRIC_FROM = 2048
# Elements of a matrix from which "auto" takes them one by one on a CPU. A batch of UNITE-B's 4096 x 768 matrices is
# larger than any cache.
SEPARATE_FROM = 1 << 16
BLOCK_ROWS = 192  # of a symmetric product on a CPU, 0.83 of a dense product's time at 768 rows


# Short side from which bfloat16 is the faster dtype on a CPU with AMX tiles. All of UNITE-B's matrices: 4.7 s of CPU
# time in it against 20 s in float32 (Intel Xeon, one thread, other work beside it).
BFLOAT16_FROM = 256


def fastest_dtype(device: torch.device, short_side: int) -> torch.dtype:
    """The fastest dtype for matrices up to ``short_side``: bfloat16 where the device has units that multiply it."""
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _backend.has_tiles() and short_side >= BFLOAT16_FROM else torch.float32


def _plain(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
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


def _separate(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
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


OPS = {torch.bfloat16: "symmetric_product_bfloat16", torch.float32: "symmetric_product_float32"}  # in the table


@jit
def _symmetric_kernel(
    p_x,
    p_addend,
    p_out,
    n,
    k,
    alpha,
    beta,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    # Tile -> (row, column) of the lower triangle, row major: the float root is off by at most one, so it is corrected.
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    o_i = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_j = (column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_i, m_j = o_i < n, o_j < n
    sum_ij = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, tl.cdiv(k, DEPTH)):
        o_k = start * DEPTH + tl.arange(0, DEPTH)
        m_k = o_k < k
        x_i = tl.load(p_x + b * n * k + o_i[:, None] * k + o_k[None, :], mask=m_i[:, None] & m_k[None, :], other=0.0)
        x_j = tl.load(p_x + b * n * k + o_j[:, None] * k + o_k[None, :], mask=m_j[:, None] & m_k[None, :], other=0.0)
        sum_ij = tl.dot(x_i, tl.trans(x_j), sum_ij, input_precision="ieee")
    m = m_i[:, None] & m_j[None, :]
    o = b * n * n + o_i[:, None] * n + o_j[None, :]
    sum_ij *= alpha
    if ADD:
        sum_ij += beta * tl.load(p_addend + o, mask=m, other=0.0).to(tl.float32)
    out = sum_ij.to(p_out.dtype.element_ty)
    tl.store(p_out + o, out, mask=m)
    if row != column:
        o = b * n * n + o_j[:, None] * n + o_i[None, :]
        tl.store(p_out + o, tl.trans(out), mask=m_j[:, None] & m_i[None, :])


@torch.library.custom_op("unite_kernels::symmetric_product", mutates_args=())
def _symmetric_product(x: Tensor, addend: Tensor | None, alpha: float, beta: float) -> Tensor:
    batch, n, k = x.shape
    out = x.new_empty(batch, n, n)
    launch = launches.launch_of(OPS[x.dtype], "forward", n, x.device)
    rows = triton.cdiv(n, launch.columns)
    with torch.cuda.device_of(x):
        _symmetric_kernel[(rows * (rows + 1) // 2, batch)](
            *(x, addend, out, n, k, alpha, beta, launch.columns, launch.depth, addend is not None),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out


@_symmetric_product.register_fake
def _(x, addend, alpha, beta):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def symmetric_product(x: Tensor, addend: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha X X^T + beta addend, (batch, n, n), of X (batch, n, k) contiguous; the addend must be symmetric."""
    _backend.resolve("triton", x, addend)
    if x.dtype not in OPS:
        raise TypeError(f"x must be float32 or bfloat16, not {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"x must have shape (batch, n, k), not {tuple(x.shape)}")
    _backend.check_contiguous("x", x)
    if addend is not None:
        _backend.check_shape("addend", addend, (x.shape[0], x.shape[1], x.shape[1]))
        _backend.check_contiguous("addend", addend)
    return _symmetric_product(x, addend, alpha, beta)


def _symmetric(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    x = x.contiguous()
    for _ in range(steps):
        gram = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def _float_gram(x: Tensor) -> Tensor:
    """X X^T in float32. Rounded to bfloat16 it lost the small singular values: errors up to nine times Muon's."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.bmm(x, x.mT, out_dtype=torch.float32)
    return torch.bmm(x.float(), x.mT.float())


def _gram(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Each step multiplies X by Q = a I + b R + c R^2; Q and R are polynomials of the first R, so R becomes Q R Q."""
    a, b, c = coefficients
    for start in range(0, steps, GRAM_STEPS):
        count = min(GRAM_STEPS, steps - start)
        gram = _float_gram(x)
        total = None
        for step in range(count):
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            total = q if total is None else torch.bmm(q, total)
            if step + 1 < count:
                gram = torch.bmm(torch.bmm(q, gram), q)
        x = torch.bmm(total.to(x.dtype), x)
    return x


def newton_schulz(
    g: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    method: str = "auto",
) -> Tensor:
    """Approximate orthogonal factor of each matrix of ``g`` (batch, rows, cols) or (rows, cols), in ``dtype``."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
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
    if method == "auto":
        if x.device.type == "cpu":
            method = "separate" if x.shape[-2] * x.shape[-1] >= SEPARATE_FROM else "plain"
        else:
            method = "symmetric" if x.is_cuda and x.shape[-2] >= SYMMETRIC_FROM else "plain"
    forms = {"plain": _plain, "separate": _separate, "symmetric": _symmetric, "gram": _gram}
    x = forms[method](x, steps, coefficients)
    x = x.mT if tall else x
    return x if g.ndim == 3 else x[0]
