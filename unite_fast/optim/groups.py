"""Which optimizer updates which parameter, decided by the tags in ``layers`` and by shape."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from unite_fast.base.errors import UserError


def optimizer_of(parameter: nn.Parameter) -> str:
    """ "muon" for matrices, "adamw" for vectors and for what was tagged where it was born."""
    return getattr(parameter, "optimizer", "muon" if parameter.ndim >= 2 else "adamw")


def freeze(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Parameters whose names begin with one of ``prefixes`` (``optim.frozen``) get no gradients and no optimizer.

    Before the optimizer is made. Raises UserError for a prefix that fits none.
    """
    for prefix in prefixes:
        found = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{prefix.rstrip('.')}.")]
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"optim.frozen: no parameter's name begins with {prefix}; the model's parts are {parts}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.frozen leaves no parameter to train")


def split_parameters(model: nn.Module, muon: bool = True) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's, AdamW's) trainable parameters by name, each in the order of the state dict."""
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[optimizer_of(parameter) if muon else "adamw"][name] = parameter
    return groups["muon"], groups["adamw"]
