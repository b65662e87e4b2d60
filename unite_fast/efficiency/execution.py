"""How a training step is computed: the options that change its speed and memory but not its results, in one place.

    settled     what is left to the device; all that follows takes no "auto" for kernels
    resolve     what the options mean on this device and for these ranks; what cannot run there
    apply       puts it into a model: nothing else sets these attributes of its modules
    lines       says it

What does not go together is refused before (``compatibility``).

A module takes part by having an attribute of one of these names: ``recompute`` (bool: activations again in backward),
``residual`` (dtype of its stream in training), ``attention`` (``layers.attention``'s plan), ``products`` (of a linear
layer, ``precision``), ``run_block`` or ``run_layer`` (what calls its ``blocks`` or ``decoder_layers``); the fused
operations are those of ``model.use_kernels``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from unite_fast.base.errors import UserError
from unite_fast.config import EfficiencyConfig, TrainConfig
from unite_fast.efficiency import compatibility, compiling, precision
from unite_fast.efficiency.precision import Recipe
from unite_fast.layers import attention
from unite_fast.parallel import sharding
from unite_fast.parallel.distributed import Ranks
from unite_kernels import backend, copied_linear

FILL = 0.92  # share of the device that may be planned for: the allocator leaves gaps
CPU = Ranks(0, 1, torch.device("cpu"))


class Recompute(NamedTuple):
    """Whether blocks compute their activations again in backward, and why."""

    blocks: bool
    reason: str


AS_MADE = Recompute(False, "as asked")


def settled(e: EfficiencyConfig, device: torch.device) -> tuple[EfficiencyConfig, str]:
    """With what kernels=auto is on ``device``; and a line where that is eager, since the other is not installed."""
    if e.kernels != "auto":
        return e, ""
    kernels = backend.best(device, update=True)
    why = "" if kernels == "fused" else backend.obstacle("fused", device, update=True)
    said = f"efficiency.kernels=auto: eager operations, which are slower, since {why}" if why else ""
    return dataclasses.replace(e, kernels=kernels), said


def sharded(train: TrainConfig, world_size: int) -> bool:
    """Whether a rank holds a part of the weights alone."""
    return train.strategy != "ddp" and world_size > 1


def copy_bytes(layer: Any, efficiency: EfficiencyConfig, shards: bool) -> int:
    """Of the low-precision copy that ``layer`` computes with, 0 for none: a linear layer of whole weights has one, and
    of gathered ones (``shards``) what is in float8. As planned: no layer is known to be slower in it."""
    if efficiency.precision == "fp32" or not hasattr(layer, "products"):
        return 0
    if shards and not (efficiency.precision in precision.SCALED and precision.fits_float8(layer)):
        return 0
    rows, columns = copied_linear.padded_shape(layer.weight.shape, layer.groups, layer.wide_inputs)
    return 2 * rows * (columns if shards else columns + 1)  # gathered biases are cast where they are used


def rooms(efficiency: EfficiencyConfig) -> int:
    """How often a micro-batch's activations have memory of their own: a graph keeps its, and the last micro-batch of
    ``efficiency.cuda_graph=accumulation`` runs beside it."""
    return 2 if efficiency.cuda_graph == "accumulation" else 1


def sends_copies(efficiency: EfficiencyConfig, train: TrainConfig, world_size: int) -> bool:
    """Whether gradients are copied to where they are averaged, since a graph has another place for them."""
    return efficiency.cuda_graph != "none" and world_size > 1 and not sharded(train, world_size)


def gathered_bytes(efficiency: EfficiencyConfig) -> int:
    """Of one element of a large matrix, as FSDP2 and HSDP gather it."""
    return 4 if efficiency.precision == "fp32" else 2


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are computed. The default is that of a model as it is made: eager, float32, one process.

    attention: of ``layers.attention.resolve``.
    """

    efficiency: EfficiencyConfig = field(default_factory=lambda: EfficiencyConfig(precision="fp32"))
    train: TrainConfig = field(default_factory=TrainConfig)
    ranks: Ranks = CPU
    attention: attention.Plan = "sdpa"
    recompute: Recompute = AS_MADE

    @classmethod
    def resolve(
        cls,
        e: EfficiencyConfig,
        t: TrainConfig,
        attentions: Sequence[attention.Size],
        ranks: Ranks,
        needed: Callable[[], int],
    ) -> Execution:
        """What these mean for ``ranks``. attentions: a step's. needed: bytes of a rank that recomputes nothing.

        Raises UserError.
        """
        compatibility.check(e, t, ranks.world_size)
        plan = attention.resolve(e.attention, attentions, ranks.device, e.precision != "fp32")
        return cls(e, t, ranks, plan, decide_recompute(e.recompute, ranks.device, needed))

    @property
    def overlaps(self) -> bool:
        """Whether gradients leave during the last backward: as asked, unless it may start again or is captured."""
        plain = self.efficiency.cuda_graph in ("none", "accumulation")
        return self.efficiency.overlap_gradients and self.train.on_oom == "fail" and plain

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs run a part of the step."""
        return self.efficiency.cuda_graph != "none"

    @property
    def captures_flow_alone(self) -> bool:
        return self.efficiency.cuda_graph == "flow"

    @property
    def captures_update(self) -> bool:
        """Whether the update is captured, too: where it does not talk to other ranks."""
        return self.efficiency.cuda_graph == "step" and self.ranks.world_size == 1

    @property
    def compiles(self) -> bool:
        """Whether the decoder's layers are compiled, and the networks among the losses."""
        return self.efficiency.compile != "none"

    @property
    def sharded(self) -> bool:
        return sharded(self.train, self.ranks.world_size)

    @property
    def muon_group(self) -> dist.ProcessGroup | None:
        """The ranks that divide Muon's work on whole matrices; None: each does all of it."""
        return dist.group.WORLD if self.efficiency.shard_muon and self.ranks.world_size > 1 else None

    # --- into a model ---

    def apply(self, model: Any) -> Recipe:
        """Prepares ``model``, which is on the device, for training; parameters may be written to afterwards, but not
        replaced. Raises UserError."""
        self.serve(model)
        for module in model.modules():
            if hasattr(module, "recompute"):
                module.recompute = self.recompute.blocks
        if self.compiles:
            compile_stacks(model, all_of_them=self.efficiency.compile == "all", hooked=self.sharded)
        return prepare(model, self.efficiency, self.ranks.device, self.sharded)

    def serve(self, model: Any) -> None:
        """As ``apply``, for a model that evaluates alone."""
        model.use_kernels(self.efficiency.kernels)
        for module in model.modules():
            if hasattr(module, "attention"):
                module.attention = self.attention

    def shard(self, model: Any, timeout: float) -> None:
        """After ``apply``: the strategy's part."""
        if self.sharded:
            half, units = self.efficiency.precision != "fp32", model.shard_units()
            sharding.apply(model, units, model.forwards(), self.train, half, timeout, self.ranks)
            for block in (unit.modules[0] for unit in units if unit.products):
                _quantise_gathered(block)

    def passes(self, modules: Sequence[nn.Module]) -> sharding.Passes:
        """For the steps of ``modules``, which have been sharded or not."""
        return sharding.Passes(modules if self.sharded else (), self.train.reshard)

    # --- in words ---

    def lines(self, recipe: Recipe) -> dict[str, str]:
        """What was resolved, by the names of a run's first lines. recipe: what ``apply`` returned."""
        e, device, recomputed = self.efficiency, self.ranks.device, "blocks" if self.recompute.blocks else "none"
        unfused = e.precision in precision.SCALED and e.compile != "all" and device.type == "cuda"
        compiled = f"{e.compile} (every cast to float8 is a pass of its own; all fuses them)" if unfused else e.compile
        captured = e.cuda_graph
        if captured == "step":
            captured += (
                " (micro-batch, update)" if self.captures_update else " (the micro-batch; averaging and update outside)"
            )
        elif captured == "accumulation":
            captured += " (the micro-batches before the last)"
        return {
            "recompute": f"{recomputed} ({self.recompute.reason})",
            "device": f"{device}, precision {recipe}, attention {attention.describe(self.attention)}, "
            f"kernels {e.kernels}, compile {compiled}, CUDA graph {captured}",
            "strategy": self._strategy(),
        }

    def _strategy(self) -> str:
        """How the ranks share the model and the work."""
        world, strategy = self.ranks.world_size, self.train.strategy
        if world == 1:
            return "one process"
        if not self.sharded:
            parts = f"divided over {world} ranks" if self.efficiency.shard_muon else "whole on every rank"
            return f"ddp, gradients averaged {'during' if self.overlaps else 'after'} the backward, Muon {parts}"
        size, once = sharding.shard_size(self.train, world), self.train.reshard == "step"
        often = "once a step" if once else "in every pass"
        gathered = f"gathered in {'float32' if self.efficiency.precision == 'fp32' else 'bfloat16'} {often}"
        return f"{strategy}, {world // size} x {size} shards, {gathered}, Muon divided over {size} ranks"


def _quantise_gathered(block: nn.Module) -> None:
    """Before ``block`` runs, when its weights have been gathered: the float8 copies of a step.

    Outside what is compiled, and after the hook that gathers, which was there first.
    """

    def write(*_: Any) -> None:
        for layer in layers if block.training else ():
            layer.products.write_gathered(layer.weight)

    layers: list[Any] = [m for m in block.modules() if isinstance(getattr(m, "products", None), precision.Scaled)]
    if layers:
        block.register_forward_pre_hook(write)


def decide_recompute(choice: str, device: torch.device, needed: Callable[[], int]) -> Recompute:
    """``efficiency.recompute``. It changes memory and time, never the results, so ranks may differ in it."""
    if choice != "auto":
        return Recompute(choice == "blocks", "as asked")
    if device.type != "cuda":
        return Recompute(False, "auto: a CPU has no memory of its own to fit into")
    bytes_needed, there = needed(), FILL * torch.cuda.mem_get_info(device)[1]
    reason = f"auto: {bytes_needed / 2**30:.1f} GiB without it, {there / 2**30:.1f} GiB to use"
    return Recompute(bytes_needed > there, reason)


def prepare(model: nn.Module, efficiency: EfficiencyConfig, device: torch.device, shards: bool = False) -> Recipe:
    """The recipe's products in the linear layers of ``model`` and the dtype of its residual. Raises UserError.

    shards: its parameters will be replaced by shards (``parallel.sharding``).
    """
    name = efficiency.precision
    if shards and name in precision.TE:
        raise UserError(
            f"efficiency.precision={name} needs whole weights on every rank; use train.strategy=ddp, or bf16 or fp8"
        )
    recipe, products = precision.make(model, name, device, shards)
    recipe.keeps_casts = not shards
    if efficiency.residual != "fp32":
        recipe.beside = f" with a {efficiency.residual} residual"
    use_residual(model, efficiency.residual)
    for module in model.modules():
        if module in products:
            module.products = products[module]  # type: ignore[assignment]
    return recipe


def use_residual(model: nn.Module, dtype: str) -> None:
    """``efficiency.residual``: of the streams of encoder and decoder in training."""
    for module in model.modules():
        if hasattr(module, "residual"):
            module.residual = torch.bfloat16 if dtype == "bf16" else None  # type: ignore[assignment]


def compile_stacks(model: nn.Module, all_of_them: bool = True, inference: bool = False, hooked: bool = False) -> None:
    """Compiles the layers of ``model``'s stacks in place: one compilation for all layers of a kind (``compiling``).

    all_of_them: the encoder's blocks as well, not the decoder's layers alone. hooked: what is compiled is called by
    each layer's own call, around which a strategy puts what gathers its weights.
    """
    made: dict[type, Any] = {}
    names = {"run_layer": "decoder_layers"} | ({"run_block": "blocks"} if all_of_them else {})
    for module in model.modules():
        for runner, layers in names.items():
            if hasattr(module, runner):
                stack: Any = getattr(module, layers)
                kind = type(stack[0])
                if kind not in made:
                    made[kind] = compiling.region(kind.forward, inference)
                if not hooked:
                    setattr(module, runner, made[kind])
                    continue
                for layer in stack:
                    layer.forward = functools.partial(made[kind], layer)
