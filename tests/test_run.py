"""What surrounds a run: how it stops, what it shows, when Python collects garbage; and steps that own their state."""

from __future__ import annotations

import gc
import signal
import time
from unittest.mock import Mock

import pytest
import torch
from ranks import on_ranks
from stepping import load_tiny, trainer
from support import command
from tape import Tape
from torch import Tensor

import train
from unite_fast import data
from unite_fast.base.errors import RunError
from unite_fast.data.rate import Rate
from unite_fast.efficiency import graph
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import garbage, grids, stats
from unite_fast.run.stop import Stop
from unite_fast.training.step import TrainStep
from unite_fast.training.weights import weights_of


def stopped(ranks: Ranks, failing: int, signals: dict[int, int]) -> tuple[str, str]:
    """What a rank learns when the rank ``failing`` cannot go on and others got signals in the same step."""
    stop = Stop(ranks, 0, time.monotonic())
    if ranks.rank == failing:
        stop.fail("the disk is full")
    if ranks.rank in signals:
        stop._handle(signals[ranks.rank], None)
    stop.agreed()
    return stop.agreed()


@pytest.mark.parametrize(
    ("failing", "signals", "state", "says"),
    [
        (1, {2: signal.SIGTERM}, "failed", ("rank 1 cannot go on", "the disk is full", "rank 1 cannot go on")),
        (-1, {0: signal.SIGTERM, 2: signal.SIGUSR1}, "preempted", ("SIGTERM on rank 0",) * 3),
        (-1, {1: signal.SIGUSR1, 2: signal.SIGTERM}, "preempted", ("SIGUSR1 on rank 1",) * 3),
    ],
    ids=["failure and signal", "two signals", "the other two"],
)
def test_the_rank_that_is_named_is_the_one_that_has_the_reason(failing, signals, state, says):
    for (found, reason), said in zip(on_ranks(3, stopped, failing, signals), says, strict=True):
        assert found == state
        assert said in reason


@pytest.mark.parametrize(("held", "shown"), [((0, 2), [0, 2] * 4), (range(1, 10), list(range(1, 10)))])
def test_grids_show_classes_that_have_images(held, shown, monkeypatch):
    """Held-out images need not be of all classes."""
    config = load_tiny()
    source = data.open_source(config.data, config.model, "heldout")
    monkeypatch.setattr(source, "labels", torch.tensor(held)[source.labels % len(held)])
    monkeypatch.setattr(data, "open_source", lambda *_: source)
    batch, names, held_out = grids.examples(config.data, config.model, torch.device("cpu"))
    assert (names, held_out) == ([str(label) for label in shown], True)
    images, labels = batch.images, batch.labels
    assert labels.tolist() == shown
    assert images.shape == (len(shown), 1, 8, 8)
    assert not torch.equal(images[0], images[2])


def test_two_states_train_side_by_side():
    """In turn or one after the other: the same."""

    def steps(step: TrainStep, batch, count: int) -> list[float]:
        return [float(step(batch())["total"]) for _ in range(count)]

    expected = [steps(*trainer(f"seed={seed}"), 4) for seed in (0, 1)]
    (one, first), (two, second) = (trainer(f"seed={seed}") for seed in (0, 1))
    mixed = [steps(one, first, 2), steps(two, second, 2), steps(one, first, 2), steps(two, second, 2)]
    assert [mixed[0] + mixed[2], mixed[1] + mixed[3]] == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("kept", [False, True])
def test_garbage_is_collected_when_the_run_says_so(tiny, tmp_path, monkeypatch, kept):
    """What is kept from before stays frozen, and nothing else does."""
    monkeypatch.setattr(garbage, "kept", kept)
    gc.freeze() if kept else gc.unfreeze()
    before = gc.get_freeze_count()
    seen, collected, update = [], [], TrainStep.update

    def spied(step: TrainStep, *arguments: Tensor) -> dict[str, Tensor]:
        seen.append(gc.isenabled())
        return update(step, *arguments)

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(len(seen))

    monkeypatch.setattr(TrainStep, "update", spied)
    gc.callbacks.append(watch)
    try:
        outcome = command(
            "train.py", "--config", tiny, f"run_dir={tmp_path / 'r'}", "train.max_steps=7", "train.log_every=3"
        )
    finally:
        gc.callbacks.remove(watch)
    assert outcome.returncode == 0, outcome.stderr
    assert seen == [False] * 7
    assert [step for step in collected if 0 < step < 7] == [1, 3, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() in (range(1, before + 1) if kept else [0])


def leftovers(_: Ranks, graphs: str) -> int:
    """How many tensors three steps leave to the collector."""
    graph.RECORDINGS["cpu"] = Tape
    step, batch = trainer(f"efficiency.cuda_graph={graphs}", "efficiency.precision=bf16")
    for _ in range(5):
        step(batch())
    gc.collect()
    gc.disable()
    for _ in range(3):
        step(batch())
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return sum(isinstance(x, Tensor) for x in gc.garbage)


@pytest.mark.parametrize("graphs", ["none", "step"])
def test_a_step_leaves_no_tensors_to_the_collector(graphs):
    """Else they would stay on the device until the next collection. In a process without other tests' leavings."""
    assert on_ranks(1, leftovers, graphs) == [0]


@pytest.mark.parametrize("thing", ["image", "structure"])
def test_a_log_line_calls_samples_what_they_are(thing):
    row = dict.fromkeys(("step", "total", "latent_std", "grad_norm", "lr", "skipped", "data_wait", "mfu"), 0.0)
    row |= {"images_seen": 32.0, "images_per_second": 7.0, "seconds_left": 1.0}
    said = stats.progress_line(row, 9, (), thing)
    assert f"  {thing}s 32  " in said
    assert f"  7.0 {thing}s/s  " in said
    narrow = stats.progress_line(row, 9, (), thing, 79)
    assert len(narrow) < 79
    assert [part in narrow for part in ("step 0/9", "loss 0.0000", "left 0:00:01", "mfu", "data")] == [True] * 3 + [
        False
    ] * 2
    rate = Rate(7.0, 32, 4.6, 0.1)
    assert rate.line(2.0, thing).startswith(f"7 {thing}s/s (")
    assert rate.line(2.0, thing).endswith(f" 3.5 times the 2 {thing}s/s that training takes")


def test_a_dev_run_that_saved_nothing_names_its_folder(tmp_path):
    settings = load_tiny(f"run_dir={tmp_path / 'run-dev'}")
    step, _ = trainer()
    with pytest.raises(RunError, match=rf"^--fast-dev-run left no usable checkpoint in {tmp_path / 'run-dev'}$"):
        train.check_round_trip(settings, step.state, step.ranks)


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ((), "set train.micro_batch=4 (or efficiency.recompute=blocks)"),
        (("efficiency.recompute=blocks",), "set train.micro_batch=4"),
        (
            ("efficiency.flow_mini_batch=2", "objective.flow_steps=2"),
            "set train.micro_batch=4 (or efficiency.recompute=blocks or efficiency.flow_mini_batch=1)",
        ),
        (
            ("efficiency.recompute=blocks", "train.micro_batch=1"),
            "the model needs a larger GPU",
        ),
    ],
    ids=["plain", "recomputed", "flow mini-batches", "the smallest"],
)
def test_out_of_memory_names_what_is_left_to_try(overrides, mend, monkeypatch):
    step, batch = trainer("train.micro_batch=8", *overrides)
    monkeypatch.setattr(step, "accumulate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RunError) as caught:
        step(batch())
    assert str(caught.value).partition("; ")[2] == mend


def test_other_weights_are_the_models_only_within():
    """Also where what is done with them fails."""
    state = trainer()[0].state
    raw = {name: p.detach().clone() for name, p in state.optimizer.parameters.items()}
    others = {name: p + 1 for name, p in raw.items()}

    def fail() -> None:
        with weights_of(state, others):
            assert all(torch.equal(p, others[name]) for name, p in state.optimizer.parameters.items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(p, raw[name]) for name, p in state.optimizer.parameters.items())
