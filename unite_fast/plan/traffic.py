"""What a rank sends in a step, from sizes alone, and what that takes over stated links: a model, not a measurement.

    gradients    ddp: all-reduced in float32. Sharded: reduce-scattered over the shards, then, with hsdp, a rank's part
                 all-reduced over the copies
    weights      sharded: all-gathered, the blocks' matrices in the precision of products, the rest in float32
    Muon         ddp: each rank's orthogonalised matrices all-gathered. Sharded: rows to the owner of a matrix and back

``train.reshard=pass`` repeats weights and gradients in every pass; what is counted here is ``step``. A few numbers per
step (norms, moments) are left out. tests/test_traffic.py holds this to what is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from unite_fast.config import EfficiencyConfig, ModelConfig, OptimConfig, TrainConfig
from unite_fast.efficiency import execution
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import freeze, split_parameters
from unite_fast.parallel.sharding import shard_size
from unite_fast.parallel.traffic import wire


class Collective(NamedTuple):
    """One kind of traffic in a step: ``payload`` bytes in all, in ``calls`` collectives among ``ranks``."""

    kind: str
    payload: int
    ranks: int
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return wire(self.kind, self.payload, self.ranks)


class Link(NamedTuple):
    """bandwidth: bytes/s that a rank sends. latency: seconds of a stage of a collective."""

    bandwidth: float
    latency: float


def step_traffic(
    m: ModelConfig, optim: OptimConfig, e: EfficiencyConfig, train: TrainConfig, ranks: int, muon_bytes: int = 2
) -> dict[str, Collective]:
    """By use: "gradients", "weights", "copies" (of hsdp), "muon". muon_bytes: of an element of Newton-Schulz."""
    every, trained, matrices, products, units = _sizes(m, optim)
    size = shard_size(train, ranks)
    if size == 1:
        return {
            "gradients": Collective("all_reduce", 4 * trained, ranks, math.ceil(trained / (1 << 23))),
            "muon": Collective("all_gather", muon_bytes * matrices, ranks, 4),
        }
    calls = units + 1
    weights = execution.gathered_bytes(e) * products + 4 * (every - products)
    found = {
        "weights": Collective("all_gather", weights, size, calls),
        "gradients": Collective("reduce_scatter", 4 * trained, size, calls),
        "muon": Collective("all_to_all", 2 * muon_bytes * matrices // size, size, 8),
    }
    if ranks > size:
        found["copies"] = Collective("all_reduce", 4 * trained // size, ranks // size, calls)
    return found


@functools.cache
def _sizes(m: ModelConfig, optim: OptimConfig) -> tuple[int, int, int, int, int]:
    """Elements of all parameters, of those that are trained, of Muon's, of the units of products; units."""
    with torch.device("meta"):
        model = UNITE(m)
    freeze(model, optim.frozen)
    muon, adamw = split_parameters(model, optim.muon)
    units = model.shard_units()
    products = [p for unit in units if unit.products for p in unit.parameters]
    groups = [list(model.parameters()), [*muon.values(), *adamw.values()], list(muon.values()), products]
    every, trained, matrices, large = (sum(p.numel() for p in group) for group in groups)
    return every, trained, matrices, large, len(units)


def seconds(found: Mapping[str, Collective], near: Link, far: Link, node: int) -> dict[str, float]:
    """Of each use, one after the other.

    near: a rank's link within a node of ``node`` ranks, far: its own one to other nodes. A group over whole nodes sends
    along rings that leave a node once, over as many links as it has: each far one carries that part of what a rank
    sends. Copies of a shard are on different nodes, each with its own link.
    """
    taken = {}
    for use, c in found.items():
        alone, inside = use == "copies", use != "copies" and c.ranks <= node
        bandwidth = far.bandwidth if alone else min(near.bandwidth, near.bandwidth if inside else node * far.bandwidth)
        stages = c.calls * math.ceil(math.log2(max(2, c.ranks)))
        taken[use] = c.sent / bandwidth + stages * (near if inside else far).latency
    return taken


def of_strategy(train: TrainConfig, strategy: str, node: int) -> TrainConfig:
    """``train`` under a strategy, with hsdp's shards on a node."""
    return dataclasses.replace(train, strategy=strategy, shard_size=node if strategy == "hsdp" else 0)  # type: ignore[arg-type]
