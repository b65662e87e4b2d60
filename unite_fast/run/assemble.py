"""A training state put together: the model, how it computes, its optimizer."""

from __future__ import annotations

import torch
import torch.distributed as dist

from unite_fast import checkpoint, interop
from unite_fast.base.errors import UserError
from unite_fast.config import Config
from unite_fast.config.yaml_text import to_dict
from unite_fast.efficiency import compiling, precision
from unite_fast.layers import attention
from unite_fast.layers.vit import DecoderLayer
from unite_fast.model.encoder import Block
from unite_fast.model.unite import FORWARDS, UNITE, build
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel import sharding
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan import memory
from unite_fast.training.state import TrainState
from unite_kernels import backend


def check_kernels(config: Config, device: torch.device) -> None:
    """Whether ``efficiency.kernels`` can train on ``device``, before the first step asks for it. Raises UserError."""
    kernels = config.efficiency.kernels
    if why := backend.obstacle(kernels, device, update=True):
        raise UserError(f"efficiency.kernels={kernels}: {why}; or set efficiency.kernels=eager")


def fresh_state(config: Config, ranks: Ranks, model: UNITE | None = None) -> TrainState:
    """A new model (the same on every rank) with its optimizer, on the device; weights from ``init_from`` if given.

    model: taken instead of a new one; on the meta device the state takes no memory.
    """
    model = model or build(config.model, config.seed, ranks.device)
    if config.init_from:
        weights, saved = checkpoint.load_weights(config.init_from, "ema")
        if saved is not None:
            checkpoint.check_same_model(to_dict(saved), config, config.init_from)
        interop.load_weights(model, weights, config.init_from)
    recompute = memory.recompute(config, ranks).blocks
    model.use_kernels(config.efficiency.kernels)
    for encoder in model.encoders():
        encoder.recompute = recompute
    model.decoder.recompute = recompute
    if config.efficiency.compile != "none":
        model.decoder.run_layer = compiling.region(DecoderLayer.forward)
    if config.efficiency.compile == "all":
        block = compiling.region(Block.forward)
        for encoder in model.encoders():
            encoder.run_block = block
    sharded = config.train.strategy != "ddp" and ranks.world_size > 1
    recipe = precision.apply(model, config.efficiency, ranks.device, sharded)
    half = config.efficiency.precision != "fp32"
    attention.use(model, attention.resolve(config.efficiency.attention, config.model, ranks.device, half))
    sharding.apply(model, model.shard_units(), FORWARDS, config, ranks)
    group = dist.group.WORLD if config.efficiency.shard_muon and ranks.world_size > 1 else None
    return TrainState(model, Optimizer(model, config.optim, config.efficiency.kernels, group), recipe=recipe)
