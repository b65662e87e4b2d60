"""Random poses of a batch, each sample its own: a rotation, and for crystals a translation.

Rotations are uniform on SO(3) (Haar); there are no reflections, which would change the hand of a molecule. A crystal is
moved by a vector that is uniform in its cell, its fractional coordinates stay in [0, 1). The published preparation of
the all-atom diffusion transformer draws one rotation per batch, from quaternions with positive components alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unite_fast.data.atoms.structures import Padded

LANES = 6  # uniform numbers per sample: three for the rotation, three for the translation


def rotations(uniforms: Tensor) -> Tensor:
    """Matrices (B, 3, 3), uniform on SO(3), of numbers (B, 3) in [0, 1): Shoemake's quaternions. float32."""
    u, v, w = uniforms.float().unbind(-1)
    low, high = (1 - u).sqrt(), u.sqrt()
    a, b = 2 * math.pi * v, 2 * math.pi * w
    x, y, z, s = low * a.sin(), low * a.cos(), high * b.sin(), high * b.cos()
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * s), 2 * (x * z + y * s)], -1),
        torch.stack([2 * (x * y + z * s), 1 - 2 * (x * x + z * z), 2 * (y * z - x * s)], -1),
        torch.stack([2 * (x * z - y * s), 2 * (y * z + x * s), 1 - 2 * (x * x + y * y)], -1),
    )
    return torch.stack(rows, -2)


def turned(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Row vectors (B, N, 3), each sample's turned by its matrix (B, 3, 3), in full float32."""
    return (vectors[:, :, None, :] * rotation[:, None, :, :]).sum(-1)


def reordered(batch: Padded, uniforms: Tensor) -> Padded:
    """``batch`` with each sample's atoms in the order of its numbers (B, M) in [0, 1); padding stays behind."""
    order = torch.where(batch.mask, uniforms, 2.0).argsort(dim=1, stable=True)
    places = order[..., None].expand(-1, -1, 3)
    return batch._replace(
        species=batch.species.gather(1, order),
        positions=batch.positions.gather(1, places),
        fractional=batch.fractional.gather(1, places),
    )


def posed(batch: Padded, uniforms: Tensor) -> Padded:
    """``batch`` in random poses given by numbers (B, 6) in [0, 1), on the same device; padding stays zero."""
    rotation = rotations(uniforms[:, :3])
    crystal = batch.lattice.flatten(1).any(1)[:, None, None]
    there = batch.mask[..., None]
    lattice = turned(batch.lattice, rotation)
    moved = (batch.fractional + uniforms[:, None, 3:].float()) % 1.0
    moved = torch.where(moved < 1.0, moved, 0.0)  # what rounds up
    fractional = torch.where(crystal & there, moved, 0.0)
    periodic = (fractional[..., None] * lattice[:, None]).sum(-2)
    positions = torch.where(crystal, periodic, turned(batch.positions, rotation))
    return batch._replace(positions=positions, fractional=fractional, lattice=lattice)
