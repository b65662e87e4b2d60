"""Precision recipes: the one place that decides which dtype runs where."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def setup(device: torch.device) -> None:
    """Process-wide switches: denormals are flushed on CPUs, where they cost a factor in AdamW and EMA."""
    if device.type == "cpu":
        torch.set_flush_denormal(True)


def autocast(recipe: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of every forward pass. bf16: matrix products in bfloat16; weights, residual and losses fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe == "bf16")


def uncached(recipe: str, device: torch.device) -> AbstractContextManager[object]:
    """As ``autocast``, within it as well, but every use casts the weights anew: a CUDA graph has no earlier cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe == "bf16", cache_enabled=False)
