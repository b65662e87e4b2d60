"""Rows of several uint8 arrays gathered into one: a batch of images out of memory-mapped shards.

    out[i] = parts[part[i]][row[i]]

Moves every row once (read and written). ``gather_rows`` is C++: threads of its own, the Python lock released, pages
that are not in memory announced to the kernel before the first copy. ``gather_rows_reference`` is the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unite_kernels import extension


def gather_rows_reference(parts: list[Tensor], part: Tensor, row: Tensor, out: Tensor) -> None:
    """As ``gather_rows``, row by row."""
    for i, (p, r) in enumerate(zip(part.tolist(), row.tolist(), strict=True)):
        out[i] = parts[p][r]


def gather_rows(parts: list[Tensor], part: Tensor, row: Tensor, out: Tensor, threads: int = 1) -> None:
    """Fills ``out`` (B, ...) uint8 on the CPU (pinned or not) from ``parts``, each (n_k, ...) uint8.

    part, row: int64 (B,) on the CPU. Raises RuntimeError for other dtypes or layouts, rows of different sizes, an
    index out of range, or when the compiled library is missing; ``out`` is then untouched.
    """
    extension.load_cpu()
    torch.ops.unite_kernels_cpu.gather_rows(parts, part, row, out, threads)
