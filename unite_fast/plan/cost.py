"""What a training step costs, from sizes alone: operations, and device memory: what stays, and what the forward passes
keep for their backward. The modality's example stands for a batch.

The activations are counted on fake tensors, which have shapes and no data: each tensor that autograd saves, once per
storage, without the parameters, as the operations of a GPU keep them. Compiled code keeps at most as much.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from unite_fast import modality
from unite_fast.config import (
    EfficiencyConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    batch_split,
)
from unite_fast.efficiency import execution, precision
from unite_fast.model.discriminator import Discriminator
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import UNITE
from unite_fast.objective import Draws, Objective, SeededDraws
from unite_fast.objective.adversarial import opened
from unite_fast.optim.groups import freeze, split_parameters
from unite_fast.parallel.sharding import shard_size
from unite_kernels.backend import as_on_a_gpu

WORKSPACE = 2 << 30  # bytes of libraries, contexts and what lives within one operation


def step_flops(
    m: ModelConfig,
    o: ObjectiveConfig,
    frozen: tuple[str, ...] = (),
    lengths: Tensor | None = None,
    pruned: bool = False,
) -> dict[str, float]:
    """FLOPs per sample that utilisation counts, by part: those of the model by definition (``model.flops``).

    frozen: of ``optim.frozen``, whose backward is left out. The total is then what is executed, on fake tensors.
    lengths: int64 (n,), the registers of each sample of a training set where they differ: the mean over them, since
    what pads a batch is no work. pruned: as executed.
    """

    def of(m: ModelConfig) -> dict[str, float]:
        if not frozen:
            return training_flops(m, o.flow_steps, o.perceptual_weight > 0, pruned)
        return {"total": counted_flops(m, o, frozen)}

    if lengths is None:
        return of(m)
    counts = enumerate(lengths.bincount().tolist())
    parts = [(of(dataclasses.replace(m, num_latents=size)), count) for size, count in counts if size and count]
    return {name: sum(part[name] * count for part, count in parts) / len(lengths) for name in parts[0][0]}


@functools.cache
def counted_flops(m: ModelConfig, o: ObjectiveConfig, frozen: tuple[str, ...] = ()) -> float:
    """Of the products and convolutions that a step of one sample executes, forward and backward, by torch's counter."""
    losses: Any = modality.of(m).losses(m, o, EfficiencyConfig(kernels="eager"), files=False)
    from torch.utils.flop_counter import FlopCounterMode  # warns where there is no Triton

    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = UNITE(m)
        target = _with_opponent(Objective(o, losses, EfficiencyConfig().kernels), model)
        freeze(model, frozen)
        batch = model.modality.example(m, 1)
        draws = target.draws(model, 0, batch.samples)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            target.backward(model, batch, draws)
    return float(counter.get_total_flops())


def _with_opponent(objective: Objective, model: UNITE) -> Objective:
    """``objective`` with the discriminator of a step in which both networks learn, if it has one."""
    if objective.adversarial is not None:
        a = objective.config.adversarial
        objective.join({"discriminator": Discriminator(model, a)})
        objective.begin(1 + max(a.discriminator_start, a.generator_start))
    return objective


class Saved:
    """Counts the bytes of the storages that autograd keeps while it is entered."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.kept: list[Tensor] = []  # so that no storage's place is taken by another
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


@functools.cache
def activation_bytes(
    m: ModelConfig, o: ObjectiveConfig, e: EfficiencyConfig, micro_batch: int, frozen: tuple[str, ...] = ()
) -> dict[str, int]:
    """Bytes kept for backward by each pass, without recomputation: "reconstruction", "flow" (of one mini-batch), and
    with a discriminator "generator" and "discriminator", each beside what the decoder keeps.

    Only the largest of them is ever there. frozen: of ``optim.frozen``.
    """
    losses: Any = modality.of(m).losses(m, o, e, files=False)
    sizes: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = UNITE(m)
        model.use_kernels(e.kernels)
        execution.use_residual(model, e.residual)
        target = _with_opponent(Objective(o, losses, e.kernels), model)
        freeze(model, frozen)
        parameters = [*model.parameters(), *losses.parameters()]
        for name, run in _passes(target, model, e, micro_batch).items():
            saved = Saved(parameters)
            with precision.autocast(e.precision, torch.device("cpu")), saved_tensors_hooks(saved.pack, lambda x: x):
                kept = run()
            del kept
            sizes[name] = saved.bytes
    return sizes


def _passes(target: Objective, model: UNITE, e: EfficiencyConfig, micro_batch: int) -> dict[str, Callable[[], object]]:
    """The forward passes of a step, by the names of ``activation_bytes``."""
    o, opponent = target.config, target.adversarial
    batch = model.modality.example(model.config, micro_batch)
    draws = Draws.make(model, o, 0, batch.samples)
    passes: dict[str, Callable[[], object]] = {"reconstruction": lambda: target.reconstruction(model, batch, draws)}
    if o.flow_steps:
        count = micro_batch * min(e.flow_mini_batch, o.flow_steps)
        zt, t, labels = torch.empty(count, *model.latent_shape), torch.empty(count), torch.arange(count)
        repeated = None if batch.sizes is None else batch.sizes.repeat(count // micro_batch)
        passes["flow"] = lambda: target.flow_loss(model, zt, zt, t, labels, repeated)
    if opponent is not None:
        seeded, images = SeededDraws(model, o, 0, batch.samples, "eager"), batch.content["images"]

        def against(judging: bool) -> object:
            _, prediction = target.decoded(model, batch, draws)
            shown = opponent.shown(images, opened(prediction), seeded)
            return prediction, (opponent.judged if judging else opponent.generator)(model, shown)

        passes |= {"generator": lambda: against(False), "discriminator": lambda: against(True)}
    return passes


def persistent_parts(
    m: ModelConfig,
    o: ObjectiveConfig,
    optim: OptimConfig,
    e: EfficiencyConfig,
    train: TrainConfig,
    world_size: int,
) -> dict[str, int]:
    """Bytes of one rank: trainable parameters, gradients, optimizer's state, averages; float32; and copies. With
    ``optim.frozen`` the parameters that are so, too.

    Sharded, all are a rank's part; with ``train.reshard=step`` the whole weights that a step gathers and its whole
    gradients are there beside it, with ``pass`` those of a block at a time, which are left out. The linear layers'
    copies (``efficiency.precision``) take 2 bytes per weight, one in bfloat16 or two in float8; sharded there are those
    in float8 alone. Beside a CUDA graph, gradients have a second place, from which they are sent.
    """
    with torch.device("meta"):
        model = UNITE(m)
        opponent = Discriminator(model, o.adversarial) if o.adversarial.weight else None
    freeze(model, optim.frozen)
    muon, adamw = split_parameters(model, optim.muon)
    if opponent is not None:  # all of it AdamW's
        adamw |= {f"discriminator.{name}": p for name, p in split_parameters(opponent, muon=False)[1].items()}
    matrices, others = (sum(p.numel() for p in group.values()) for group in (muon, adamw))
    each = 4 * (matrices + others)
    averages = 1 + len(optim.ema_extra)
    parts = {"parameters": each, "gradients": each, "optimizer": 4 * (matrices + 2 * others)}
    shards = shard_size(train, world_size)
    parts = {name: size // shards for name, size in (parts | {"EMA": averages * each}).items()}
    if optim.frozen:
        parts["frozen"] = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad) // shards
    sharded, networks = execution.sharded(train, world_size), [model] if opponent is None else [model, opponent]
    if sharded and train.reshard == "step":
        products = sum(p.numel() for unit in model.shard_units() if unit.products for p in unit.parameters)
        others = sum(p.numel() for network in networks for p in network.parameters()) - products
        parts["whole weights"] = execution.gathered_bytes(e) * products + 4 * others
        parts["whole gradients"] = each
    if execution.sends_copies(e, train, world_size):
        parts["gradients on their way"] = each
    if copies := sum(execution.copy_bytes(layer, e, sharded) for network in networks for layer in network.modules()):
        parts["copies"] = copies
    return parts


def needed(
    m: ModelConfig, o: ObjectiveConfig, optim: OptimConfig, e: EfficiencyConfig, train: TrainConfig, world_size: int
) -> int:
    """Bytes of a rank that recomputes nothing: what stays, a micro-batch's activations, and what libraries take."""
    stays = sum(persistent_parts(m, o, optim, e, train, world_size).values())
    micro_batch, _ = batch_split(train, world_size)
    kept = max(activation_bytes(m, o, e, micro_batch, optim.frozen).values())
    return stays + execution.rooms(e) * kept + WORKSPACE


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
