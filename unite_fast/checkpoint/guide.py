"""The weaker model of autoguidance (``sampling.guide``), from the checkpoint that a command's options name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unite_fast import checkpoint
from unite_fast.base.errors import UserError, idle
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.guide import T, check_latents


class Guide(NamedTuple):
    model: UNITE
    identity: str  # of its weights


def add_options(add: Callable[..., Any]) -> None:
    """add: ``add_argument`` of a command that samples, whose option --cfg is the scale."""
    add("--autoguidance", metavar="CHECKPOINT", help="guide by a weaker model of the same latents in place of no "
        "class: another average or a late checkpoint of the run")  # fmt: skip
    add("--autoguidance-weights", metavar="NAME", help="of that model (default: as --weights)")


def asked(
    arguments: argparse.Namespace, model: UNITE, names: Sequence[str], ranks: Ranks, kernels: str
) -> Guide | None:
    """What the options ask for, with the kernels of ``model``; None without them. Raises UserError."""
    path = arguments.autoguidance
    if not path:
        if arguments.autoguidance_weights:
            raise idle("--autoguidance-weights", "without --autoguidance")
        return None
    found = load(path, arguments.autoguidance_weights or arguments.weights, model, names)
    found.model.use_kernels(kernels)
    share = ranks.together(lambda: check_latents(model, found.model, path))
    if ranks.is_main:
        print(f"guided by {path}, which explains {share:.0%} of the variance of latents at t = {T:g}")
    return found


def load(path: str, weights: str, model: UNITE, names: Sequence[str]) -> Guide:
    """The model that ``path`` holds, on the device of ``model``, which it is to guide. names: of that one's classes.

    Raises UserError unless both have latents and classes of the same kind.
    """
    located = checkpoint.locate(path)
    found, _ = checkpoint.load_model(located, weights)
    for key in ("modality", "num_latents", "latent_dim", "num_classes"):
        if (theirs := getattr(found.config, key)) != (own := getattr(model.config, key)):
            raise UserError(f"--autoguidance {path}: its model.{key} is {theirs}, that of the guided model {own}")
    other = checkpoint.class_names(located)
    if names and other and list(names) != list(other):
        which = next(i for i, (a, b) in enumerate(zip(names, other, strict=True)) if a != b)
        raise UserError(f"--autoguidance {path}: its class {which} is {other[which]}, that of the guided model "
                        f"{names[which]}")  # fmt: skip
    return Guide(found.to(next(model.parameters()).device), f"guided by {checkpoint.identity(located)} {weights}")
