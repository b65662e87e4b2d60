"""Small layers of which the encoder and the decoders are made, and the tags that assign parameters to optimizers.

Shape letters: B batch, T tokens, D width, H heads, E head size (D / H).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def use_adamw(module: M) -> M:
    """Tags the parameters of ``module`` for AdamW. Untagged matrices go to Muon, untagged vectors to AdamW."""
    for parameter in module.parameters():
        parameter.optimizer = "adamw"  # type: ignore[attr-defined]
    return module


def adamw_parameter(value: Tensor) -> nn.Parameter:
    """A trainable table that AdamW updates although it has two or more dimensions."""
    parameter = nn.Parameter(value)
    parameter.optimizer = "adamw"  # type: ignore[attr-defined]
    return parameter


class Products(Protocol):
    """How a recipe computes columns ``start`` to ``stop`` of a linear layer from x (..., K) and weight (N, K).

    bias: that of these columns, or None; it gets a gradient if it wants one. outputs: N, or more where the recipe pads
    (``Linear``).
    """

    outputs: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor: ...


class Linear(nn.Linear):
    """A linear layer that a precision recipe (efficiency/precision.py) may compute in its own way while training.

    ``large``: one of the layers that hold most of the FLOPs, which FP8 recipes take.
    ``groups``, ``wide_inputs``: where a recipe may pad, so that products have sizes that GPUs are fast at: zero columns
    behind each of that many equal groups of the output's columns, or behind the input's.
    """

    products: Products | None = None

    def __init__(
        self, inputs: int, outputs: int, large: bool = False, groups: int = 0, wide_inputs: bool = False
    ) -> None:
        super().__init__(inputs, outputs)
        self.large, self.groups, self.wide_inputs = large, groups, wide_inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.products is not None and self.training:
            return self.products(x, self.weight, self.bias, 0, self.out_features)
        return F.linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """The product alone, padded or not, for a caller that adds the bias itself."""
        if self.products is not None and self.training:
            return self.products(x, self.weight, None, 0, self.products.outputs)
        return F.linear(x, self.weight)

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Those columns of the layer's output, contiguous. The bias has no gradient of it: the operation that is given
        the output, and holds its gradient, makes the bias's."""
        bias = self.bias.detach()[start:stop]
        if self.products is not None and self.training:
            return self.products(x, self.weight, bias, start, stop)
        whole = stop - start == self.out_features  # a slice's gradient would be padded
        return F.linear(x, self.weight if whole else self.weight[start:stop], bias)


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """(P,) positions -> (P, width) table [sin, cos], omega_i = 10000**(-2i / width), computed in float64."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.to(torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(side: int, width: int) -> Tensor:
    """(side * side, width) float32: the column's sin-cos in the first half of the width, the row's in the second."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [sincos_1d(axis.flatten(), width // 2) for axis in (column, row)]
    return torch.cat(halves, dim=1).float()


def rotary_table(positions: int, head_size: int) -> tuple[Tensor, Tensor]:
    """cos and sin of p * 10000**(-2i / head_size): two float32 tables of shape (positions, head_size / 2)."""
    frequency = 1.0 / 10000.0 ** (torch.arange(0, head_size, 2).float() / head_size)
    angle = torch.arange(positions).float()[:, None] * frequency
    return angle.cos(), angle.sin()


class RMSNorm(nn.Module):
    """The weight (D,) of a root-mean-square norm; the fused operations that take it compute the norm itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
