"""What a rank sends in a step: collectives and bytes, counted, by strategy."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from support import ROOT
from test_distributed import Run, settings
from torch import Tensor

from unite_fast.checkpoint import saving
from unite_fast.config import EfficiencyConfig, TrainConfig, batch_split
from unite_fast.efficiency import precision
from unite_fast.model.unite import UNITE, build
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.traffic import Traffic, wire
from unite_fast.plan import cost
from unite_fast.plan.traffic import Collective, Link, seconds, step_traffic
from unite_fast.run.dry_run import activations_line

# N = 14 flow steps in mini-batches of 3, two micro-batches: twelve backward passes through the encoder in a step.
PASSES = ("objective.flow_steps=14", "efficiency.flow_mini_batch=3")
UNITS = 8  # of the tiny model: root; encoder, its modulations, three blocks; decoder, one layer
CASES = {
    "ddp": (),
    "step": ("train.strategy=fsdp2",),
    "step, bf16": ("train.strategy=fsdp2", "efficiency.precision=bf16"),
    "pass": ("train.strategy=fsdp2", "train.reshard=pass"),
}
HSDP = {"hsdp": ("train.strategy=hsdp", "train.shard_size=2")}

Count = dict[str, dict[str, int]]  # calls, payload, sent: by kind


def counted(ranks: Ranks, cases: dict[str, tuple[str, ...]]) -> dict[str, Count]:
    """Of the second step; the first one plans."""
    found = {}
    for name, overrides in cases.items():
        run = Run(ranks, *PASSES, *overrides).go(1)
        batch = next(run.stream)
        with Traffic() as seen:
            run.step(batch)
        small = {f"all_gather {kind}": n for (of, kind), n in seen.by_dtype.items() if of == "all_gather"}
        found[name] = {"calls": dict(seen.calls), "payload": dict(seen.payload) | small, "sent": dict(seen.sent)}
    return found


def trainable() -> int:
    """Bytes of the gradients of a step; one parameter has none."""
    parameters = Run(Ranks(0, 1, torch.device("cpu"))).state.optimizer.parameters
    return 4 * sum(p.numel() for name, p in parameters.items() if "special_time_emb" not in name)


@pytest.fixture(scope="module")
def two() -> dict[str, Count]:
    first, second = on_ranks(2, counted, CASES)
    assert first == second
    return first


def near(size: int, expected: int) -> bool:
    """A little above: rows that ranks do not divide are padded, and parameters without gradients are gathered, too."""
    return expected <= size < 1.05 * expected


def test_gathered_once_and_reduced_once(two):
    """However many passes a step has: the least that a sharded step can send."""
    for name in ("step", "step, bf16"):
        calls, payload = two[name]["calls"], two[name]["payload"]
        assert (calls["all_gather"], calls["reduce_scatter"]) == (UNITS, UNITS)
        assert near(payload["reduce_scatter"], trainable())
    assert near(two["step"]["payload"]["all_gather"], trainable())


def test_matrices_are_gathered_in_bfloat16(two):
    whole, half = two["step"]["payload"], two["step, bf16"]["payload"]
    small = half["all_gather float32"]
    assert half["all_gather bfloat16"] * 2 + small == whole["all_gather"]
    assert half["all_gather bfloat16"] > small / 2  # of the tiny model; of UNITE-B it is nearly everything


def test_passes_that_keep_nothing_send_more(two):
    """Twelve passes forward and backward, two of them through the decoder as well; the root is held."""
    calls = two["pass"]["calls"]
    assert calls["all_gather"] > 10 * UNITS
    assert 12 * 5 <= calls["reduce_scatter"] <= 12 * UNITS


def test_ddp_sends_each_gradient_once(two):
    """And the two moments of the latents; Muon's shares once."""
    found = two["ddp"]
    assert found["calls"] == {"all_reduce": 2, "all_gather": 1}
    assert near(found["payload"]["all_reduce"], trainable())
    assert found["sent"]["all_reduce"] == found["payload"]["all_reduce"]  # 2 (n - 1) / n of it, n = 2


def test_hsdp_sums_copies_of_a_shard():
    for found in on_ranks(4, counted, HSDP):
        count = found["hsdp"]
        assert (count["calls"]["all_gather"], count["calls"]["reduce_scatter"]) == (UNITS, UNITS)
        assert count["calls"]["all_reduce"] == UNITS + 2  # and the norm, and the moments
        plan = planned(HSDP["hsdp"], 4)["copies"]
        assert count["sent"]["all_reduce"] == pytest.approx(plan.sent, rel=0.05)
        assert near(count["payload"]["all_reduce"], trainable() // 2)


def planned(overrides: tuple[str, ...], ranks: int) -> dict[str, Collective]:
    c = settings(*PASSES, *overrides)
    return step_traffic(c.model, c.optim, c.efficiency, c.train, ranks, muon_bytes=4)


def test_the_plan_sends_what_is_sent(two):
    """By use, against what was counted: to the padding, and the few numbers that are no gradients."""
    ddp, step, half = (planned(CASES[name], 2) for name in ("ddp", "step", "step, bf16"))
    for name, kind, plan in (
        ("ddp", "all_reduce", ddp["gradients"]), ("ddp", "all_gather", ddp["muon"]),
        ("step", "all_gather", step["weights"]), ("step", "reduce_scatter", step["gradients"]),
        ("step", "all_to_all", step["muon"]), ("step, bf16", "all_gather", half["weights"]),
    ):  # fmt: skip
        assert two[name]["sent"][kind] == pytest.approx(plan.sent, rel=0.03), (name, kind)
    assert step["weights"].calls == UNITS


def test_links_of_a_node_are_used_together():
    """Within a node, over whole nodes, between the copies of a shard: 8 GB from each rank."""
    near, far = Link(400e9, 0.0), Link(40e9, 0.0)

    def time(use: str, ranks: int) -> float:
        c = Collective("broadcast", round(8e9 * ranks / (ranks - 1)), ranks, 1)
        return seconds({use: c}, near, far, 8)[use]

    assert time("gradients", 8) == pytest.approx(0.02)
    assert time("gradients", 16) == pytest.approx(0.025)
    assert time("copies", 4) == pytest.approx(0.2)


def test_ten_gigabytes_of_weights():
    """Planned on the meta device: no rank writes more of a checkpoint than its share and one tensor, and what it
    gathers and holds of a sharded step does not grow with the ranks."""
    c = settings("model.encoder={depth: 36, width: 2048, heads: 32}", "efficiency.precision=bf16")
    with torch.device("meta"):
        weights = dict(UNITE(c.model).named_parameters())
    size = {name: 4 * p.numel() for name, p in weights.items()}
    total = sum(size.values())
    assert total > 10e9
    train = dataclasses.replace(c.train, strategy="fsdp2")
    for ranks in (8, 64, 512):
        for rank in (0, ranks // 2, ranks - 1):
            written = sum(size[name] for name in saving.share(weights, rank, ranks))
            assert written <= total / ranks + max(size.values())
        plan = step_traffic(c.model, c.optim, c.efficiency, train, ranks)
        assert plan["weights"].sent == pytest.approx(total / 2, rel=0.15)
        held = cost.persistent_parts(c.model, c.objective, c.optim, c.efficiency, train, ranks)
        assert held["optimizer"] < 2 * total / ranks
        assert held["whole weights"] == plan["weights"].payload


def test_a_plan_counts_what_float8_and_graphs_keep():
    """Of weights that ranks share, float8 copies alone; beside a graph of several ranks, gradients once more."""
    c = settings("efficiency.precision=fp8")
    graph = dataclasses.replace(c.efficiency, cuda_graph="step")
    sharded = dataclasses.replace(c.train, strategy="fsdp2")

    def parts(e: EfficiencyConfig, train: TrainConfig, ranks: int) -> dict[str, int]:
        return cost.persistent_parts(c.model, c.objective, c.optim, e, train, ranks)

    model = build(c.model)
    recipe, _ = precision.make(model, "fp8", torch.device("cpu"), shards=True)
    kept = sum(copy.nbytes for products in recipe.gathered for copy in (products.copies[0], products.copies[2]))
    assert kept > 0
    assert parts(c.efficiency, sharded, 2)["copies"] == kept
    assert parts(c.efficiency, c.train, 2)["copies"] > kept
    assert parts(graph, c.train, 2)["gradients on their way"] == parts(graph, c.train, 2)["gradients"]
    assert "gradients on their way" not in {**parts(graph, c.train, 1), **parts(c.efficiency, c.train, 2)}


def test_activations_are_there_twice_where_a_micro_batch_runs_beside_a_graph():
    c = settings()
    needed = [
        cost.needed(c.model, c.objective, c.optim, dataclasses.replace(c.efficiency, cuda_graph=mode), c.train, 2)
        for mode in ("step", "accumulation")
    ]
    kept = cost.activation_bytes(c.model, c.objective, c.efficiency, batch_split(c.train, 2)[0])
    assert needed[1] - needed[0] == max(kept.values())
    assert "(twice: a graph keeps its own)" in activations_line(kept, {}, 4, rooms=2)


def test_the_scaling_tables_are_what_is_made(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    scaling = importlib.import_module("scaling")
    assert scaling.TARGET.read_text() == scaling.text(), "run python scripts/scaling.py"


def all_kinds(ranks: Ranks) -> dict[str, list[int]]:
    tensor, parts = torch.zeros(8), torch.zeros(4)
    with Traffic() as seen:
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.all_gather_into_tensor(tensor, parts)
        dist.reduce_scatter_tensor(parts, tensor)
        dist.all_to_all_single(tensor, tensor.clone())
        dist.all_reduce(Tensor([1.0]), async_op=True).wait()
    return {kind: [seen.calls[kind], seen.payload[kind], seen.sent[kind]] for kind in seen.calls}


def test_every_kind_is_counted():
    """(calls, bytes of the whole, bytes that a rank sends)."""
    once = [1, 32, 16]
    assert on_ranks(2, all_kinds)[0] == {
        "all_reduce": [2, 36, 36], "broadcast": once, "all_gather": once, "reduce_scatter": once, "all_to_all": once,
    }  # fmt: skip
    assert wire("all_reduce", 800, 8) == 1400
