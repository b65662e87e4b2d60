"""A training state put together: the model, how it computes, its optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unite_fast import checkpoint, interop
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import transfer
from unite_fast.config import AdversarialConfig, Config, OptimConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.efficiency.execution import Execution
from unite_fast.efficiency.precision import Recipe
from unite_fast.model.discriminator import Discriminator
from unite_fast.model.flops import attentions
from unite_fast.model.unite import UNITE, build
from unite_fast.optim.groups import freeze
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan import cost
from unite_fast.training.state import Part, TrainState

DECODER = ("decoder.", "up_sample_decoder.")  # what is trained against a discriminator


def resolve(config: Config, ranks: Ranks) -> Execution:
    """How ``ranks`` compute a step. Raises UserError."""
    m, e, t = config.model, config.efficiency, config.train
    needed = functools.partial(cost.needed, m, config.objective, config.optim, e, t, ranks.world_size)
    return Execution.resolve(e, t, attentions(m), ranks, needed)


def find(path: str) -> tuple[Path, str]:
    """The checkpoint that ``init_from`` names, and its identity. Raises UserError."""
    located = checkpoint.locate(path)
    return located, checkpoint.identity(located)


def begin_from(
    path: str, found: tuple[Path, str], model: UNITE, strict: bool, class_names: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """Fills a new model from a checkpoint; lines on what was taken, and what to keep of where it came from.

    found: what ``find`` says of ``path``. strict: all or none. Raises UserError.
    """
    located, sha256 = found
    weights, saved = checkpoint.load_weights(located, "ema", located=True)
    kept = checkpoint.described(located, "ema", "" if saved is None else saved.name, sha256)
    if not strict:
        origin = transfer.Origin(path, saved and saved.model, checkpoint.class_names(located))
        return transfer.take(model, weights, origin, class_names), kept
    if saved is not None:
        checkpoint.check_same_model(to_dict(saved), model.config, path)
    interop.load_weights(model, weights, path)
    return [f"init_from {path}: took all weights"], kept


def fresh_state(
    config: Config,
    ranks: Ranks,
    model: UNITE | None = None,
    execution: Execution | None = None,
    class_names: Sequence[str] = (),
) -> TrainState:
    """A new model (the same on every rank) with its optimizer, on the device; weights from ``init_from`` if given.

    model: taken instead of a new one; on the meta device the state takes no memory. execution: instead of what
    ``config`` says. class_names: of the training set, by which the weights of classes are taken over.
    """
    execution = execution or resolve(config, ranks)
    model = model or build(config.model, config.seed, ranks.device)
    origin = {}
    if config.init_from:
        fine_tunes = config.objective.adversarial.weight > 0  # its frozen parts have to be those of a trained model
        found = ranks.decide(lambda: find(config.init_from))  # hashed by rank 0, while the others wait
        lines, origin = begin_from(config.init_from, found, model, config.init_strict or fine_tunes, class_names)
        if ranks.is_main:
            print(*lines, sep="\n")
    opponent = None
    if config.objective.adversarial.weight:
        opponent = Discriminator(model, config.objective.adversarial, config.seed)
    freeze(model, config.optim.frozen)
    recipe = execution.apply(model)
    execution.shard(model, config.comm.train_timeout)
    optimizer = Optimizer(model, config.optim, execution.efficiency.kernels, execution.muon_group)
    parts = {"": Part(model, optimizer, recipe)}
    if opponent is not None:
        _check_frozen(model)
        a, timeout = config.objective.adversarial, config.comm.train_timeout
        parts["discriminator"] = _discriminator(opponent, a, config.optim, execution, timeout)
    return TrainState(parts, origin=origin, execution=execution)


def _check_frozen(model: UNITE) -> None:
    """Raises UserError where more than the decoder would be trained against a discriminator."""
    learning = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(DECODER)]
    if learning:
        parts = dict.fromkeys(n.split(".")[0] for n, _ in model.named_parameters() if not n.startswith(DECODER))
        raise UserError(
            f"objective.adversarial trains the decoder alone, and {learning[0]} would be trained as well: set "
            f"optim.frozen=[{', '.join(parts)}]"
        )


def _discriminator(
    module: Discriminator, a: AdversarialConfig, optim: OptimConfig, execution: Execution, timeout: float
) -> Part:
    """With AdamW for all of it; the trunk of its own, where it has one, computes as the model does."""
    name = execution.efficiency.precision
    optim = dataclasses.replace(optim, muon=False, betas=a.betas, ema_extra=(), frozen=())
    recipe = execution.apply(module) if module.trunk is not None else Recipe(name, execution.ranks.device)
    recipe.keeps_casts = not execution.sharded
    execution.shard(module, timeout)
    return Part(module, Optimizer(module, optim, execution.efficiency.kernels), recipe, a.lr_ratio)
