"""The C++ operations behind a bare autograd.Function: the kernels without the registered ops' Python layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

EPS = 1e-6
OPS = torch.ops.unite_kernels_cpu


def _split(values: tuple, count: int) -> tuple[tuple, tuple]:
    return values[:count], values[count:]


def _qk_forward(inputs: tuple, heads: int) -> tuple[tuple, tuple]:
    out, rstd = OPS.qk_norm_rope_fwd(inputs[0], list(inputs[1:3]), *inputs[4:], heads, 0, EPS)
    return (*out.unbind(), inputs[0][..., 2 * out.shape[-1] :]), (rstd,)


def _qk_backward(grads: tuple, inputs: tuple, rstd: torch.Tensor, heads: int) -> tuple:
    given = [grad.contiguous() for grad in grads]
    weights = list(inputs[1:3])
    dx, dweights, dbias = OPS.qk_norm_rope_bwd(given, inputs[0], weights, *inputs[4:], rstd, heads, 0, True)
    return dx, *dweights.unbind(), dbias, None, None


# name -> (forward(inputs, heads) -> (outputs, saved), backward(gradients, inputs, outputs, saved, heads) -> gradients)
FUNCTIONS = {
    "adaln": (
        lambda i, h: _split(OPS.adaln_fwd(*i, EPS), 1),
        lambda g, i, o, s, h: OPS.adaln_bwd(*g, i[0], i[1], i[3], *s),
    ),
    "adaln_mid": (
        lambda i, h: _split(OPS.adaln_mid_fwd(*i, EPS), 2),
        lambda g, i, o, s, h: OPS.adaln_mid_bwd(*g, o[0], *i[1:4], *i[5:], *s),
    ),
    "adaln_tail": (
        lambda i, h: _split(OPS.adaln_tail_fwd(*i, EPS), 2),
        lambda g, i, o, s, h: OPS.adaln_tail_bwd(*g, *i[:5], *i[6:], *s),
    ),
    "qk_norm_rope": (
        lambda i, h: _qk_forward(i, h),
        lambda g, i, o, s, h: _qk_backward(g, i, s[0], h),
    ),
    "swiglu": (
        lambda i, h: ((OPS.swiglu_fwd(*i),), ()),
        lambda g, i, o, s, h: OPS.swiglu_bwd(*g, *i),
    ),
}


def direct(name: str, heads: int) -> Callable:
    """``inputs`` -> outputs of component ``name``, differentiable."""
    forward_call, backward_call = FUNCTIONS[name]

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs, saved = forward_call(inputs, heads)
            ctx.save_for_backward(*inputs, *outputs, *saved)
            ctx.counts = len(inputs), len(outputs)
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            n, m = ctx.counts
            tensors = ctx.saved_tensors
            return backward_call(gradients, tensors[:n], tensors[n : n + m], tensors[n + m :], heads)

    return lambda inputs: Direct.apply(*inputs)
