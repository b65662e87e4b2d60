"""How many bits weights need, by group: what the paper's argument from description length counts (section 4).

The paper names no bin width, so ours are three, and a conclusion counts where all three agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WIDTHS = (2.0**-14, 2.0**-12, 2.0**-10)
GROUPS = {
    "normalisation": ("adaLN_modulation", "norm", "t_embedder", "y_embedder"),
    "functional": (".attn.", ".mlp.", ".decoder_layers."),
}
PARTS = ("encoder", "denoiser", "decoder")
DEFINITION = {
    "entropy": "of a tensor: the entropy in bits of its histogram with bins of the width, centred on multiples of it, "
    "times its elements; a group's is the sum over its tensors, in MB of 8,000,000 bits",
    "normalisation": "adaLN modulations, RMSNorm and LayerNorm gains and biases, embeddings of t and y",
    "functional": "attention and MLP: projections and their biases",
    "other": "positions, class tokens, first and last projections",
    "start": "of the weights that the run's seed gives, before the first step",
}


def bits(tensor: Tensor, width: float) -> float:
    """Entropy of a tensor's histogram times its number of elements."""
    bins = torch.round(tensor.detach().double().flatten() / width)
    counts = torch.unique(bins, return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum()) * tensor.numel()


def group_of(name: str) -> str:
    """Of a parameter: the QK-norms within attention are norms."""
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other")


def part_of(name: str) -> str:
    return next((part for part in PARTS if name.startswith(f"{part}.")), "rest")


def measure(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """{part: {group: {"elements", "mb": a number per width}}} of parameters by their stock names."""
    found: dict[str, Any] = {}
    for name, tensor in parameters.items():
        row = found.setdefault(part_of(name), {}).setdefault(group_of(name), {"elements": 0, "mb": [0.0] * len(WIDTHS)})
        row["elements"] += tensor.numel()
        row["mb"] = [mb + bits(tensor, width) / 8e6 for mb, width in zip(row["mb"], WIDTHS, strict=True)]
    return found


def of_model(model: torch.nn.Module, start: torch.nn.Module | None) -> dict[str, Any]:
    """{"widths", "trained", "start"} of trainable parameters; start: the same model before its first step, if known."""
    found: dict[str, Any] = {"widths": list(WIDTHS)}
    for name, module in (("trained", model), ("start", start)):
        if module is not None:
            found[name] = measure({n: p for n, p in module.named_parameters() if p.requires_grad})
    return found
