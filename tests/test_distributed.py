"""Muon divided over ranks, overlapped averaging, FSDP2 and HSDP: the same run as on one rank, on real gloo ranks."""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from stepping import Dispatched, trainer
from support import TINY
from torch import Tensor

from unite_fast import checkpoint, data
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import find, saving
from unite_fast.config import Config
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.efficiency import compatibility, precision
from unite_fast.model.unite import UNITE
from unite_fast.objective import Objective
from unite_fast.optim import muon
from unite_fast.optim.groups import split_parameters
from unite_fast.parallel import overlap, sharding
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble, grids, start
from unite_fast.training.state import tensors_of
from unite_fast.training.step import TrainStep
from unite_kernels import copied_linear

ONE = Ranks(0, 1, torch.device("cpu"))
COMPARED = ("total", "l2", "flow", "grad_norm", "skipped")
COMMON = ("train.global_batch=24", "optim.ema_extra=[0.9, std0.1]")


def settings(*overrides: str) -> Config:
    config = from_dict(parse_yaml(TINY, "tiny"))
    for override in overrides:
        key, _, text = override.partition("=")
        nested = parse_yaml(text, key)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = from_dict(nested, key, config)
    return config


class Run:
    """Some steps of the tiny model on this rank's share of the digits."""

    def __init__(self, ranks: Ranks, *overrides: str) -> None:
        self.config = settings(*COMMON, *overrides)
        source = data.open_source(self.config.data, self.config.model)
        self.state = assemble.fresh_state(self.config, ranks)
        batch = self.config.train.global_batch
        objective = Objective.open(self.config.model, self.config.objective, self.config.efficiency)
        split = (batch // ranks.world_size // 2, 2)
        self.step = TrainStep(self.state, self.config, ranks, split, len(source), objective)
        self.stream = data.stream(source, 0, 0, batch, ranks.rank, ranks.world_size, ranks.device, 0, 30.0)
        self.ranks = ranks
        self.rows: list[list[float]] = []

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            metrics = self.step(next(self.stream))
            row = torch.stack([metrics[name].float() for name in COMPARED])
            self.ranks.average_([row])
            self.rows.append(row.tolist())
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Whole, on every rank."""
        found = tensors_of(self.state).items()
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in found}


def outcome(ranks: Ranks, overrides: tuple[str, ...], steps: int) -> tuple[list[list[float]], dict[str, Tensor]]:
    overlap.BUCKET_ELEMENTS = 8192  # so that there are several
    muon.BUCKET_ELEMENTS = 4096
    done = Run(ranks, *overrides).go(steps)
    return done.rows, done.tensors()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def close(actual, expected) -> None:
    """Over 20 steps, in float32."""
    for a, e in zip(actual[0], expected[0], strict=True):
        assert a == pytest.approx(e, rel=1e-3)
    for name, value in expected[1].items():
        torch.testing.assert_close(actual[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def alone():
    """The run on one process, after some steps."""
    return functools.cache(lambda steps: outcome(ONE, (), steps))


@pytest.mark.parametrize("ranks", [2, 3])
def test_muon_divided_and_averaging_overlapped_change_nothing(ranks, alone):
    """To the last bit: the same steps with both switched off, on every rank; and near those of one process."""
    both = on_ranks(ranks, outcome, (), 6)
    neither = on_ranks(ranks, outcome, ("efficiency.shard_muon=false", "efficiency.overlap_gradients=false"), 6)
    for rows, tensors in both:
        assert rows == neither[0][0]
        same(tensors, neither[0][1])
    close(both[0], alone(6))


def orthogonalised(ranks: Ranks, shapes: list[tuple[int, int]], dtype: str, sharded: bool = False) -> list[Tensor]:
    """The same matrices on every rank, or rows of them, each orthogonalised by one rank."""
    muon.BUCKET_ELEMENTS = 1
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    matrices = {str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    plan = muon.plan({n: m.shape for n, m in matrices.items()}, ranks.world_size, sharded)
    if sharded:
        rows = {n: plan.slot(m.shape)[0] for n, m in matrices.items()}
        matrices = {n: m[ranks.rank * rows[n] : (ranks.rank + 1) * rows[n]] for n, m in matrices.items()}
    group = torch.distributed.group.WORLD if ranks.world_size > 1 else None
    work = muon.Orthogonaliser(plan, 5, kind, ranks.device, group)
    for name, slot in work.slots(matrices).items():
        slot.copy_(matrices[name])
    work.start()
    found = {name: update for bucket in work.updates(matrices) for name, update in bucket.items()}
    return [found[name] for name in matrices]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_more_ranks_than_matrices_and_rows(dtype, sharded):
    """Rows that do not divide, and fewer rows than ranks: a rank then holds none of that matrix."""
    shapes = [(12, 20), (12, 20), (30, 7), (3, 20)]
    alone = orthogonalised(ONE, shapes, dtype)
    outcomes = on_ranks(4, orthogonalised, shapes, dtype, sharded)
    if sharded:
        outcomes = [[torch.cat(parts) for parts in zip(*outcomes, strict=True)]]
    for found in outcomes:
        for a, b in zip(found, alone, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_plan_of_unite_b():
    """115 matrices, 3.81 TFLOP; over 8 ranks nobody has over 10 % more than his share, and padding stays small."""
    with torch.device("meta"):
        model = UNITE(Config().model)
    shapes = {name: p.shape for name, p in split_parameters(model)[0].items()}
    flops = {name: muon.newton_schulz_flops(shape) for name, shape in shapes.items()}
    assert len(shapes) == 115
    assert sum(flops.values()) == pytest.approx(3.81e12, rel=2e-3)
    for ranks in (1, 2, 3, 8, 64, 200):
        plan = muon.plan(shapes, ranks)
        names = [name for piece in plan.pieces for name in piece.names]
        assert sorted(names) == sorted(shapes)
        places = [(p.bucket, p.owner, p.offset) for p in plan.pieces]
        assert len(set(places)) == len(places)
        load = [sum(flops[n] for p in plan.pieces if p.owner == rank for n in p.names) for rank in range(ranks)]
        if ranks == 8:
            assert max(load) < 1.1 * sum(load) / ranks
            assert sum(plan.sizes) * ranks < 1.2 * sum(map(math.prod, shapes.values()))
            assert len(plan.sizes) == muon.BUCKETS


def sent_early(ranks: Ranks) -> list[list[int]]:
    """For each of three steps: buckets sent before the last backward had ended, and all buckets."""
    overlap.BUCKET_ELEMENTS = 8192
    steps = Run(ranks)
    counts = []
    finish = overlap.Averager.finish

    def counted(averager: overlap.Averager) -> None:
        early = averager.sent
        finish(averager)
        counts.append([early, len(averager.buckets)])

    overlap.Averager.finish = counted
    steps.go(3)
    return counts


def test_buckets_leave_during_the_backward():
    for counts in on_ranks(2, sent_early):
        (first, total), *later = counts
        assert first == 0  # it is counted in the first step
        assert total > 5
        assert all(early == total for early, _ in later)


def copied(ranks: Ranks) -> dict[str, list[int]]:
    """Operations of a step that would move gradients between their tensors and what is sent."""
    run = Run(ranks).go(2)
    batch = next(run.stream)
    with Dispatched() as seen:
        run.step(batch)
    averager = run.step.averagers[""]
    moved = {n: seen.counts[n] for n in ("aten.cat", "aten._foreach_copy_", "aten.zero_")}
    inside = sum(v.numel() for bucket in averager.buckets for v in bucket.views)
    aligned = all(v.data_ptr() % 64 == 0 for bucket in averager.buckets for v in bucket.views)
    return {"moved": list(moved.values()), "inside": [inside, int(aligned), len(averager.buckets)]}


def test_gradients_live_where_they_are_sent_from():
    """No copy of a gradient: one fill per bucket. The concatenations are those of a process alone, of activations."""
    step, batch = trainer(*COMMON, "train.global_batch=12", "train.micro_batch=6")
    step(batch())
    again = batch()
    with Dispatched() as seen:
        step(again)
    for found in on_ranks(2, copied):
        cats, copies, zeros = found["moved"]
        inside, aligned, buckets = found["inside"]
        assert (cats, copies) == (seen.counts["aten.cat"], seen.counts["aten._foreach_copy_"])
        assert zeros == seen.counts["aten.zero_"] + buckets
        assert aligned
        assert inside == sum(p.numel() for n, p in step.state.optimizer.parameters.items() if "special_time" not in n)


def given_now_and_then(ranks: Ranks) -> list[list[float]]:
    """Gradients in steps 1 and 3, none in step 2."""
    weight = torch.nn.Parameter(torch.ones(3))
    averager, said = overlap.Averager([weight], ranks), []
    for step, times in enumerate((1, 0, 1)):
        averager.begin(step, last=True)
        for _ in range(times):
            (weight.sum() * (ranks.rank + 1)).backward()
        averager.drop_untouched()
        if weight.grad is not None:
            averager.finish()
            said.append(weight.grad.tolist())
        weight.grad = None
    return said


def test_a_step_without_gradients_leaves_none():
    """A part that is not trained in it is then not due, instead of updated with zeros."""
    assert on_ranks(2, given_now_and_then)[0] == [[1.5] * 3, [1.5] * 3]


def added_once_more(ranks: Ranks) -> list[str]:
    """Two additions in the first step; then one, and then three."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    averager = overlap.Averager(weights, ranks)
    said = []
    for step, additions in enumerate((2, 1, 3)):
        averager.begin(step, last=True)
        try:
            for _ in range(additions):
                sum(w.sum() * (ranks.rank + 1) for w in weights).backward()
            averager.finish()
            said.append(str(weights[0].grad.tolist()))
        except RuntimeError as error:
            said.append(str(error))
        for w in weights:
            w.grad = None
    return said


def test_a_gradient_that_was_sent_too_early_is_an_error():
    for first, second, third in on_ranks(2, added_once_more):
        assert first == "[3.0, 3.0, 3.0]"  # 2 x (1 + 2) / 2
        assert second == "[1.5, 1.5, 1.5]"  # sent by finish()
        assert "added 3 times in a micro-step and 2 times in the first one" in third


def saved(of: Run, folder: str) -> Path:
    """A checkpoint of the run's state, written by all ranks."""
    writer = saving.Writer(Path(folder), of.config, of.ranks)
    writer.save(of.state, {})
    writer.wait()
    of.ranks.barrier()
    return Path(folder) / f"step-{of.state.step:07d}"


def resumed(path: Path, ranks: Ranks, *overrides: str) -> Run:
    """A new run that goes on from a checkpoint."""
    again = Run(ranks, *overrides)
    checkpoint.resume(path, again.state, again.config.train.global_batch)
    for _ in range(again.state.step):
        next(again.stream)
    return again


def quantised(ranks: Ranks, reshard: str) -> list[list[str]]:
    """Shapes and dtypes of the weights that each of three steps of two micro-batches made float8 copies of."""
    write, seen = copied_linear.write_scaled_, []

    def counted(weight: Tensor, *copies: Any) -> None:
        seen.append(f"{tuple(weight.shape)} {weight.dtype}")
        write(weight, *copies)

    copied_linear.write_scaled_ = counted
    run, steps = Run(ranks, "train.strategy=fsdp2", f"train.reshard={reshard}", "efficiency.precision=fp8"), []
    for _ in range(3):
        run.go(1)
        steps.append(sorted(seen))
        seen.clear()
    large = sorted(f"{tuple(m.weight.shape)} {torch.bfloat16}" for m in run.state.model.modules() if quantises(m))
    return [large, *steps]


def quantises(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "products", None), precision.Scaled)


@pytest.mark.parametrize("reshard", ["step", "pass"])
def test_float8_copies_are_made_once_a_step_of_what_is_gathered(reshard):
    for large, *steps in on_ranks(2, quantised, reshard):
        assert len(large) > 3
        assert steps == [large] * 3


def hashed_together(ranks: Ranks, folder: str) -> tuple[list[str], list[str], str]:
    """What this rank hashed, and then rank 0 alone; and, with a byte of the last file changed, what rank 0 says."""
    path, names = saved(Run(ranks, "train.strategy=fsdp2").go(1), f"{folder}/checkpoints"), []
    hash_of = find.file_sha256

    def counted(file: Path) -> str:
        names.append(file.name)
        return hash_of(file)

    find.file_sha256 = counted
    start.hash_together(path.parent.parent, "auto", ranks)
    own, names[:] = list(names), []
    if ranks.is_main:
        assert checkpoint.newest(path.parent)[0] == path
        content = bytearray((last := sorted(path.glob("training*"))[-1]).read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
    left = list(names)
    ranks.barrier()
    start.hash_together(path.parent.parent, "auto", ranks)
    return own, left, checkpoint.verify(path) if ranks.is_main else ""


def test_a_checkpoint_is_hashed_by_all_ranks(tmp_path):
    """Each file by one of them, none twice; what has changed is hashed anew."""
    found = on_ranks(2, hashed_together, str(tmp_path))
    every = [name for own, _, _ in found for name in own]
    assert sorted(every) == ["state.json", *(f"training-0000{i}-of-00002.safetensors" for i in (1, 2))]
    assert all(own for own, _, _ in found)
    assert found[0][1] == []
    assert "training-00002-of-00002.safetensors does not have the recorded sha256" in found[0][2]


def interrupted(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    overlap.BUCKET_ELEMENTS = 8192
    second = resumed(saved(Run(ranks).go(2), folder), ranks).go(2)
    return [Run(ranks).go(4).tensors(), second.tensors()]


def test_resume_on_three_ranks_is_exact(tmp_path):
    """With three ranks a sum depends on its place in a bucket; the first step after a resume uses the same ones."""
    for straight, second in on_ranks(3, interrupted, str(tmp_path)):
        same(straight, second)


def carried_over(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    """What fsdp2 saved, and what fsdp2 and ddp read of it."""
    sharded = Run(ranks, "train.strategy=fsdp2").go(2)
    path = saved(sharded, folder)
    found = [sharded.tensors(), *(resumed(path, ranks, f"train.strategy={s}").tensors() for s in ("fsdp2", "ddp"))]
    later = saved(resumed(path, ranks).go(1), folder)
    return [*found, resumed(later, ranks, "train.strategy=fsdp2").tensors()]


def test_a_checkpoint_is_whole_whatever_the_strategy(tmp_path):
    """Every moment, average and weight: fsdp2 -> fsdp2, ddp, one process; ddp -> fsdp2, one process."""
    for sharded, *others, last in on_ranks(2, carried_over, str(tmp_path)):
        for other in (*others, resumed(tmp_path / "step-0000002", ONE).tensors()):
            same(other, sharded)
        same(resumed(tmp_path / "step-0000003", ONE).tensors(), last)


def pictures(path: Path, run: Run, ranks: Ranks) -> None:
    c = run.config
    shown = grids.examples(c.data, c.model, ranks.device)
    grids.save_pictures(path, run.state, c.sample, c.objective.tokenizer_t_max, ranks, None, shown)


def pictured(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    """Three steps, with and without pictures after the second."""
    quiet = Run(ranks, "train.strategy=fsdp2").go(3)
    shown = Run(ranks, "train.strategy=fsdp2").go(2)
    pictures(Path(folder), shown, ranks)
    return [quiet.tensors(), shown.go(1).tensors()]


def test_pictures_of_a_sharded_model(tmp_path):
    """All ranks sample, rank 0 writes; the grid is that of one process, and training goes on as if nothing had been."""
    for quiet, shown in on_ranks(2, pictured, str(tmp_path)):
        same(quiet, shown)
    alone = Run(ONE).go(2)
    pictures(tmp_path / "one", alone, ONE)
    shown = [
        np.asarray(Image.open(p / "samples" / "step_0000002.png")).astype(int) for p in (tmp_path, tmp_path / "one")
    ]
    assert np.abs(shown[0] - shown[1]).max() <= 1


def poisoned(ranks: Ranks, strategy: str) -> list[dict[str, Tensor]]:
    """The state before and after a step in which one rank saw NaN, and the step count after one more."""
    damaged = Run(ranks, f"train.strategy={strategy}", "train.shard_size=2" if strategy == "hsdp" else "seed=0").go(2)
    before, stream = damaged.tensors(), damaged.stream
    batch = next(stream)
    images = batch.images.float()
    if ranks.rank == ranks.world_size - 1:
        images[0] = math.nan
    damaged.stream = itertools.chain([batch._replace(content={"images": images})], stream)
    return [before, damaged.go(1).tensors(), damaged.go(1).tensors()]


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (2, "fsdp2"), (4, "hsdp")])
def test_all_ranks_skip_together(ranks, strategy):
    for before, after, later in on_ranks(ranks, poisoned, strategy):
        same(before, after)
        assert int(after["optimizer_steps"]) == 2
        assert int(later["optimizer_steps"]) == 3


REFUSED = {
    "shards that do not divide": (("hsdp", "train.shard_size=3"), "does not divide 4 ranks; set train.shard_size to 1"),
    "size without hsdp": (("fsdp2", "train.shard_size=2"), "train.shard_size is for train.strategy=hsdp"),
    "smaller micro-batches": (("fsdp2", "train.on_oom=halve"), "train.on_oom=halve"),
    "captured steps": (
        ("fsdp2", "efficiency.cuda_graph=step"),
        "does not work with efficiency.cuda_graph=step: gathered weights lie elsewhere in each step, and a graph has "
        "fixed addresses; set efficiency.cuda_graph=none, or train.strategy=ddp",
    ),
    "copies of weights": (
        ("fsdp2", "efficiency.precision=fp8_te"),
        "keep whole weights; set efficiency.precision=fp8, or train.strategy=ddp",
    ),
    "replicas of shards": (("fsdp2", "train.replica_check_every=5"), "train.replica_check_every"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_are_refused(case, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (strategy, override), says = REFUSED[case]
    config = settings(f"train.strategy={strategy}", override)
    with pytest.raises(UserError, match=re.escape(says)):
        compatibility.check(config.efficiency, config.train, 4)


def test_shards_of_one_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert sharding.shard_size(settings("train.strategy=hsdp").train, 32) == 8
    assert sharding.shard_size(settings("train.strategy=hsdp", "train.shard_size=16").train, 32) == 16
    assert sharding.shard_size(settings("train.strategy=fsdp2").train, 32) == 32
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match=r"set train\.shard_size"):
        sharding.shard_size(settings("train.strategy=hsdp").train, 32)


@pytest.mark.parametrize(
    ("ranks", "steps", "overrides"),
    [
        (2, 20, ("train.strategy=fsdp2",)),
        (3, 3, ("train.strategy=fsdp2", "efficiency.recompute=blocks", "efficiency.kernels=fused")),
        (4, 6, ("train.strategy=hsdp", "train.shard_size=2")),
    ],
    ids=["fsdp2", "fsdp2 uneven", "hsdp"],
)
def test_sharded_strategies_are_the_same_run(ranks, steps, overrides, alone):
    outcomes = on_ranks(ranks, outcome, overrides, steps)
    for rows, tensors in outcomes:
        assert rows == outcomes[0][0]
        same(tensors, outcomes[0][1])
    close(outcomes[0], alone(steps))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl():
    """The same on GPUs: undivided, divided and overlapped, and sharded."""
    fused = "efficiency.kernels=fused"
    neither = ("efficiency.shard_muon=false", "efficiency.overlap_gradients=false", fused)
    expected = on_ranks(2, outcome, neither, 20, device="cuda")[0]
    for overrides in ((fused,), ("train.strategy=fsdp2", fused)):
        close(on_ranks(2, outcome, overrides, 20, device="cuda")[1], expected)
