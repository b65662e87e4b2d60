"""Averages of any width from those that a run's checkpoints hold: ``--weights posthoc_std0.07``, ``posthoc_0.9995``.

Every checkpoint of the run up to the one that was chosen takes part (``train.keep_every`` keeps some along the way),
with every average that it holds; two widths, as optim.ema_extra=[std0.05,std0.1], over a dozen checkpoints are plenty.
An average that was added when a run resumed is taken for one that was kept from the start: choose such a run's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.checkpoint import shards
from unite_fast.checkpoint.shards import Stored
from unite_fast.config.checks import is_width
from unite_fast.optim import ema

WORST = 0.05  # relative error of the profile above which it is not that average


class Kept(NamedTuple):
    """What one checkpoint holds."""

    name: str  # of its folder, for messages
    updates: int
    averages: dict[str, float | str]  # their names, and what they are
    tensors: Mapping[str, Stored]


def entry_of(weights: str) -> float | str | None:
    """The average that a name asks for; None for a name of another kind. Raises UserError."""
    if not weights.startswith("posthoc"):
        return None
    text = weights.removeprefix("posthoc_")
    if is_width(text):
        return text
    if not re.fullmatch(r"0?\.\d+", text) or float(text) == 0:
        raise UserError(f"weights {weights!r}: write posthoc_std0.01 to posthoc_std0.28, or posthoc_ and a decay")
    return float(text)


def combined(checkpoints: Sequence[Kept], weights: str) -> dict[str, Tensor]:
    """The weights by name, float32, of the average after the last checkpoint's updates.

    Raises UserError where what is kept cannot make it.
    """
    entry, last = entry_of(weights), checkpoints[-1]
    assert entry is not None
    kept = [(c, name) for c in checkpoints for name in c.averages]
    factors, error = ema.combination([(c.averages[name], c.updates) for c, name in kept], entry, last.updates)
    if error > WORST:
        raise UserError(
            f"{weights}: {len(kept)} averages in {len(checkpoints)} checkpoints up to {last.name} come no nearer to it "
            f"than {error:.0%}; keep more along the way (train.keep_every), or widths around it (optim.ema_extra)"
        )
    sums: dict[str, Tensor] = {}
    for (c, average), factor in zip(kept, factors.tolist(), strict=True):
        names = [name for name in c.tensors if name.startswith(f"{average}.")]
        for name, tensor in shards.read(dict(c.tensors), names).items():
            own = name.removeprefix(f"{average}.")
            sums[own] = sums.get(own, torch.zeros(tensor.shape, dtype=torch.float64)) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in sums.items()}
