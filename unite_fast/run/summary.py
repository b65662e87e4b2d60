"""What a run is, in words: the lines that it prints at its start, and the files of its folder that say so."""

from __future__ import annotations

from unite_fast import data
from unite_fast.base import files, provenance
from unite_fast.config import Config
from unite_fast.config.yaml_text import to_yaml
from unite_fast.efficiency import graph, precision
from unite_fast.layers import attention
from unite_fast.model.flops import training_flops
from unite_fast.parallel import overlap, sharding
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan import memory
from unite_fast.run.session import folder
from unite_fast.run.start import last_step
from unite_fast.training.state import TrainState


def write_description(config: Config, ranks: Ranks, source: data.Source) -> None:
    """Writes into the run folder what the run is. Raises UserError when the disk refuses."""
    path = folder(config)
    with files.refusals(f"run folder {path}", "; choose another with run_dir=PATH"):
        files.write(path / "config.resolved.yaml", to_yaml(config))
        described = provenance.of(ranks.device, ranks.world_size) | {"pipeline": source.pipeline_id(ranks.device.type)}
        files.write_json(path / "provenance.json", described)


def strategy_line(config: Config, ranks: Ranks) -> str:
    """How the ranks share the model and the work, as resolved."""
    t, e, world = config.train, config.efficiency, ranks.world_size
    if world == 1:
        return "one process"
    if t.strategy == "ddp":
        parts = f"divided over {world} ranks" if e.shard_muon else "whole on every rank"
        return f"ddp, gradients averaged {'during' if overlap.wanted(config) else 'after'} the backward, Muon {parts}"
    size = sharding.shard_size(config, world)
    return f"{t.strategy}, {world // size} x {size} shards, Muon divided over {size} ranks"


def describe(config: Config, state: TrainState, ranks: Ranks, split: tuple[int, int], images: int) -> str:
    """Sizes, FLOPs, batch split, memory and length of a run: its first lines, and those of ``--dry-run``."""
    model, t, o, e = state.model, config.train, config.objective, config.efficiency
    count = model.trainable_parameters()
    parts = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        "patch embedding": model.embedder,
    }
    sizes = ", ".join(f"{n} {sum(p.numel() for p in m.parameters() if p.requires_grad):,}" for n, m in parts.items())
    flops = training_flops(config.model, o.flow_steps, o.perceptual_weight > 0)
    executed = training_flops(config.model, o.flow_steps, o.perceptual_weight > 0, pruned=True)["total"]
    by_part = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in flops.items())
    moments = len(state.optimizer.muon)
    orthogonal = str(state.optimizer.newton_schulz_dtype(ranks.device)).removeprefix("torch.")
    stay = memory.persistent_parts(config, ranks.world_size)
    kept = ", ".join(f"{name} {memory.amount(size)}" for name, size in stay.items())
    recompute = memory.recompute(config, ranks)
    total = last_step(config, state, images)
    unfused = e.precision in precision.SCALED and e.compile != "all" and ranks.device.type == "cuda"
    compiled = f"{e.compile} (every cast to float8 is a pass of its own; all fuses them)" if unfused else e.compile
    return "\n".join(
        (
            f"parameters     {count:,} trainable ({sizes}, ...)",
            f"optimizers     Muon {moments} tensors (Newton-Schulz in {orthogonal}), "
            f"AdamW {len(state.optimizer.adamw)} tensors",
            f"FLOPs/image    {by_part} GFLOP (forward and backward, N = {o.flow_steps}; MFU counts these)",
            f"executed       {executed / 1e9:.4g} GFLOP/image: the encoder's last block computes the registers alone",
            f"batch          {t.global_batch} = {ranks.world_size} ranks x {split[1]} accumulation x {split[0]}",
            f"memory         {memory.amount(sum(stay.values()))} per rank that stay: {kept}",
            f"recompute      {'blocks' if recompute.blocks else 'none'} ({recompute.reason})",
            f"length         {images:,} images/epoch, {t.epochs:g} epochs, {total:,} steps",
            f"device         {ranks.device}, precision {state.recipe}, attention {attention.describe(model)}, "
            f"kernels {e.kernels}, compile {compiled}, CUDA graph {graph.describe(e.cuda_graph, ranks.world_size)}",
            f"strategy       {strategy_line(config, ranks)}",
        )
    )
