"""Small layers shared by the encoder and the decoder, and the tags that assign parameters to optimizers.

Shape letters: B batch, T tokens, D width, H heads, E head size (D / H).
"""

from __future__ import annotations

from typing import TypeVar

import torch
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
