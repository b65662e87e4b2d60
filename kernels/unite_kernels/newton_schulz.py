"""Newton-Schulz orthogonalisation, the inner loop of the Muon optimizer, over a batch of equal shapes.

    X = G / max(|G|_F, eps), laid with the short side as rows (n <= k)
    steps times:  A = X X^T,  B = b A + c A A^T,  X = a X + B X

Shapes: G (batch, rows, cols) or (rows, cols); the result has G's shape in the computing dtype. Arithmetic per step:
2 n^2 k + 2 n^3 + 2 n^2 k FLOPs dense. Three forms:

    plain       batched torch products; in bfloat16 the same operations in the same order as torch.optim.Muon
    symmetric   X X^T and b A + c A A^T by a Triton kernel that computes one triangle and mirrors it: half their FLOPs
    gram        iterates on R = X X^T (n x n) alone and touches X once per restart: cheaper the longer k is against n.
                In bfloat16 the recursion R <- B R B drifts from the true X X^T, so R is taken afresh after
                ``GRAM_STEPS`` steps. Opt-in: the same polynomial, other roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
METHODS = ("auto", "plain", "symmetric", "gram")
GRAM_STEPS = 3

# Short side from which "auto" takes the symmetric kernel on a CUDA device. UNMEASURED default: published timings of
# such kernels lose to the vendor library at 1024 and below; to be replaced by a table measured on the device.
SYMMETRIC_FROM = 2048


def _plain(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
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
    if g.ndim not in (2, 3):
        raise ValueError(f"expected (rows, cols) or (batch, rows, cols), not {tuple(g.shape)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be float32 or bfloat16, not {dtype}")
    x = (g if g.ndim == 3 else g[None]).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    x = _plain(x, steps, coefficients)
    x = x.mT if tall else x
    return x if g.ndim == 3 else x[0]
