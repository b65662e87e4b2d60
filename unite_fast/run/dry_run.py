"""What ``train.py --dry-run`` prints: sizes, FLOPs, memory, speed and data of a run. The model takes no memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from unite_fast import data, modality
from unite_fast.base import launcher
from unite_fast.config import Config, DataConfig, EfficiencyConfig, ModelConfig, ObjectiveConfig, batch_split
from unite_fast.efficiency import compatibility, execution
from unite_fast.model.unite import UNITE
from unite_fast.objective import Objective
from unite_fast.parallel.distributed import Ranks, device_type
from unite_fast.plan import cost, throughput
from unite_fast.run import assemble, monitor, start, summary


def activations_line(kept: Mapping[Any, int], stays: Mapping[str, int], micro_batch: int, rooms: int = 1) -> str:
    """What the passes keep for their backward, and the sum with what stays on a rank; bytes by name.

    rooms: of ``execution.rooms``.
    """
    peak = max(kept.values())
    by_pass = ", ".join(f"{name} {cost.amount(size)}" for name, size in kept.items())
    total = cost.amount(rooms * peak + sum(stays.values()))
    beside = " (twice: a graph keeps its own)" if rooms > 1 else ""
    return (
        f"activations    {cost.amount(peak)}{beside} of a micro-batch of {micro_batch}, without recomputation: "
        f"{by_pass}; {total} with what stays (counted from sizes)"
    )


def open_inputs(
    reading: DataConfig, model: ModelConfig, o: ObjectiveConfig, efficiency: EfficiencyConfig, init_from: str = ""
) -> tuple[data.Source | None, list[str]]:
    """The run's source, None where no path is given yet, and what is missing. A path that is wrong is a UserError."""
    of = modality.of(model)
    missing = [why for why in [of.missing(o)] if why]
    if not missing:
        Objective.open(model, o, efficiency)
    if o.adversarial.weight and not init_from:
        missing.append("init_from is not given: its weights are those that are fine-tuned")
    try:
        return data.open_source(reading, model), missing
    except data.NoPath:
        count, words = of.assumed
        return None, [*missing, f"data.path is not given: {count:,} {words} are assumed"]


def dry_run(config: Config, mfu: float | None = None, ranks: int = 0) -> str:
    """The plan of a run by ``ranks`` processes of one node, or by as many as were started. Raises UserError.

    mfu: utilisation for which speed is projected; None for a table of several.
    """
    start.check_paths(config.folder, config.resume, config.init_from, config.data)
    world = ranks or launcher.world_size()
    if ranks and config.train.strategy == "hsdp" and not config.train.shard_size:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, shard_size=ranks))
    split = batch_split(config.train, world)
    e, t = config.efficiency, config.train
    compatibility.check(e, t, world)
    device = torch.device(device_type(config.device))
    compatibility.check_device(e, t, config.objective, device, planned=True)
    source, missing = open_inputs(config.data, config.model, config.objective, e, config.init_from)
    try:
        monitor.open_files(config)
    except data.NoPath:
        if source is not None:
            raise
    planned = Ranks(0, world, device)
    with torch.device("meta"):
        model = UNITE(config.model)
    how, alone = assemble.resolve(config, planned), Ranks(0, 1, device)
    # The whole model, whoever else there is: shapes need no other ranks.
    state = assemble.fresh_state(
        dataclasses.replace(config, init_from=""), alone, model, dataclasses.replace(how, ranks=alone)
    )
    state.execution = how
    samples = len(source) if source else model.modality.assumed[0]
    lengths = source.lengths if source else None
    m, o = config.model, config.objective
    flops = cost.step_flops(m, o, config.optim.frozen, lengths)
    lines = [summary.describe(o, config.optim, t, state, planned, split, samples, flops, lengths)]
    kept = cost.activation_bytes(m, o, e, split[0], config.optim.frozen)
    stays = cost.persistent_parts(m, o, config.optim, e, t, world)
    lines.append(activations_line(kept, stays, split[0], execution.rooms(e)))
    lines += [
        f"projection     {throughput.device_name()}, {p.line()}"
        for p in throughput.project(config.model, config.objective, mfu, samples, config.optim.frozen, lengths)
    ]
    if source is not None:
        lines.append(
            f"data           {config.data.source}: {throughput.supply(config, source, mfu or throughput.MFUS[-1])}"
        )
    return "\n".join([*lines, *(f"note           {text}" for text in missing)])
