"""Unit cells: three lengths and three angles, or a matrix whose rows are the vectors a, b, c.

The matrix of six parameters is pymatgen's (``Lattice.from_parameters``): c along z, a in the xz plane.
"""

from __future__ import annotations

import torch
from torch import Tensor


def parameters(lattices: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (..., 3) in Å and angles alpha, beta, gamma (..., 3) in degrees of matrices (..., 3, 3).

    A matrix of zeros, which stands for a molecule, gives zeros. float64 inside; the dtype of ``lattices`` outside.
    """
    rows = lattices.double()
    lengths = rows.norm(dim=-1)
    units = rows / lengths.clamp_min(1e-12).unsqueeze(-1)
    a, b, c = units.unbind(-2)
    cosines = torch.stack([(b * c).sum(-1), (a * c).sum(-1), (a * b).sum(-1)], -1)
    angles = torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))
    angles = torch.where(lengths.sum(-1, keepdim=True) > 0, angles, torch.zeros_like(angles))
    return lengths.to(lattices.dtype), angles.to(lattices.dtype)


def matrix(lengths: Tensor, angles: Tensor) -> Tensor:
    """(..., 3, 3), rows a, b, c, of lengths (..., 3) in Å and angles (..., 3) in degrees."""
    a, b, c = lengths.double().unbind(-1)
    radians = torch.deg2rad(angles.double())
    (cos_alpha, cos_beta, cos_gamma), (sin_alpha, sin_beta, _) = radians.cos().unbind(-1), radians.sin().unbind(-1)
    star = torch.arccos(((cos_alpha * cos_beta - cos_gamma) / (sin_alpha * sin_beta)).clamp(-1, 1))
    zero = torch.zeros_like(a)
    rows = (
        torch.stack([a * sin_beta, zero, a * cos_beta], -1),
        torch.stack([-b * sin_alpha * star.cos(), b * sin_alpha * star.sin(), b * cos_alpha], -1),
        torch.stack([zero, zero, c], -1),
    )
    return torch.stack(rows, -2).to(lengths.dtype)
