"""A training state put together: the model, how it computes, its optimizer."""

from __future__ import annotations

import functools

from unite_fast import checkpoint, interop
from unite_fast.config import Config
from unite_fast.config.yaml_text import to_dict
from unite_fast.efficiency.execution import Execution
from unite_fast.model.flops import attentions
from unite_fast.model.unite import FORWARDS, UNITE, build
from unite_fast.optim.groups import freeze
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan import cost
from unite_fast.training.state import Part, TrainState


def resolve(config: Config, ranks: Ranks) -> Execution:
    """How ``ranks`` compute a step. Raises UserError."""
    m, e, t = config.model, config.efficiency, config.train
    needed = functools.partial(cost.needed, m, config.objective, config.optim, e, t, ranks.world_size)
    return Execution.resolve(e, t, attentions(m), ranks, needed)


def fresh_state(
    config: Config, ranks: Ranks, model: UNITE | None = None, execution: Execution | None = None
) -> TrainState:
    """A new model (the same on every rank) with its optimizer, on the device; weights from ``init_from`` if given.

    model: taken instead of a new one; on the meta device the state takes no memory. execution: instead of what
    ``config`` says.
    """
    execution = execution or resolve(config, ranks)
    model = model or build(config.model, config.seed, ranks.device)
    if config.init_from:
        weights, saved = checkpoint.load_weights(config.init_from, "ema")
        if saved is not None:
            checkpoint.check_same_model(to_dict(saved), config.model, config.init_from)
        interop.load_weights(model, weights, config.init_from)
    freeze(model, config.optim.frozen)
    recipe = execution.apply(model)
    execution.shard(model, FORWARDS, config.comm.train_timeout)
    optimizer = Optimizer(model, config.optim, execution.efficiency.kernels, execution.muon_group)
    return TrainState({"": Part(model, optimizer, recipe)}, execution=execution)
