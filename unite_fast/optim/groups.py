"""Which optimizer updates which parameter, decided by the tags in ``layers`` and by shape."""

from __future__ import annotations

from torch import nn


def optimizer_of(parameter: nn.Parameter) -> str:
    """ "muon" for matrices, "adamw" for vectors and for what was tagged where it was born."""
    return getattr(parameter, "optimizer", "muon" if parameter.ndim >= 2 else "adamw")


def split_parameters(model: nn.Module, muon: bool = True) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's, AdamW's) trainable parameters by name, each in the order of the state dict."""
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[optimizer_of(parameter) if muon else "adamw"][name] = parameter
    return groups["muon"], groups["adamw"]
