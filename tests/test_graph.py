"""CUDA graphs of the step: recorded and replayed steps equal plain ones; what cannot be captured is refused by name."""

from __future__ import annotations

import dataclasses
import functools

import atoms_support
import pytest
import torch
from ranks import on_ranks
from stepping import backward, load_tiny, trainer
from support import command
from tape import Tape
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.data import stream
from unite_fast.data.atoms.source import AtomSource
from unite_fast.efficiency import compatibility, graph
from unite_fast.model.unite import build
from unite_fast.objective import Draws, Objective
from unite_fast.parallel import overlap
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.step import TrainStep

STEPS = 20
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)


def run(
    *overrides: str, device: str = "cpu", ranks: Ranks | None = None
) -> tuple[list[list[float]], dict[str, Tensor], TrainStep]:
    """(losses of every step, weights, averages and states at the end, the step)."""
    step, batch = trainer(*overrides, device=device, ranks=ranks)
    losses = []
    for _ in range(STEPS):
        metrics = step(batch())
        losses.append([float(metrics[name]) for name in ("total", "l2", "flow", "latent_std", "grad_norm", "lr")])
    o = step.state.optimizer
    ema = {f"{kind}.{name}": value for kind, values in o.averages.items() for name, value in values.items()}
    end = {**o.parameters, **o.state_dict(), **ema, "steps": o.steps, "longest": step.skips.longest}
    return losses, {name: value.detach().clone() for name, value in end.items()}, step


@pytest.fixture(scope="module")
def plain():
    """A run without graphs, once."""
    return functools.cache(run)


@pytest.mark.parametrize("mode", ["flow", "step"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("efficiency.kernels=fused", "optim.ema_extra=[0.9, std0.1]"),  # two micro-batches, two flow steps
        ("efficiency.kernels=eager", "efficiency.flow_mini_batch=2", "train.micro_batch=16"),
        ("efficiency.kernels=fused", "efficiency.precision=bf16", "efficiency.recompute=blocks"),
    ],
    ids=["fused", "eager", "bf16"],
)
def test_replayed_steps_equal_plain_ones(tape, plain, mode, overrides):
    """Learning rate and sample positions change from step to step; losses, weights and states are equal to the bit."""
    expected, end, _ = plain(*overrides)
    actual, replayed, step = run(*overrides, f"efficiency.cuda_graph={mode}")
    assert set(replayed) == set(end)
    assert actual == expected
    for name, value in end.items():
        assert torch.equal(replayed[name], value), name
    (captured,) = (step.graphs.flow if mode == "flow" else step.graphs.micro).values()
    assert isinstance(captured.recording, Tape)
    assert (step.graphs.last.recording is not None) == (mode == "step")


def test_one_graph_for_each_number_of_registers(tape):
    """Molecules padded to few sizes, as in plain steps, to the bit."""
    ends = []
    for mode in ("none", "step", "flow"):
        settings = atoms_support.config()
        settings = dataclasses.replace(settings, efficiency=dataclasses.replace(settings.efficiency, cuda_graph=mode))
        source = AtomSource(atoms_support.structures(), 7, ("molecules", "crystals"), pad_multiple=3)
        state = assemble.fresh_state(settings, Ranks(0, 1, torch.device("cpu")))
        objective = Objective.open(settings.model, settings.objective, settings.efficiency)
        step = TrainStep(state, settings, Ranks(0, 1, torch.device("cpu")), (4, 2), len(source), objective)
        state.model.train()
        batches = stream(source, 0, global_batch=8)
        losses = [float(step(next(batches))["total"]) for _ in range(16)]
        ends.append((losses, {name: p.detach().clone() for name, p in state.model.named_parameters()}))
        captured = {} if step.graphs is None else step.graphs.micro or step.graphs.flow
        assert set(captured) == (set() if mode == "none" else {3, 6, 7})
        assert all(one.recording is not None for one in captured.values())
    for losses, parameters in ends[1:]:
        assert losses == ends[0][0]
        assert all(torch.equal(value, ends[0][1][name]) for name, value in parameters.items())


def test_a_skipped_step_is_skipped_in_replay(tape):
    """A gradient that is not finite: decided on the device, so a graph decides anew each time."""
    step, batch = trainer("efficiency.cuda_graph=step", "efficiency.kernels=fused")
    for number in range(8):
        b = batch()
        if number == 6:
            b.images[0] = torch.nan
        weight = step.state.model.decoder.decoder_pred.weight
        before = weight.detach().clone()
        metrics = step(b)
        assert bool(metrics["skipped"]) == (number == 6)
        assert torch.equal(before, weight) == (number in (0, 6)), number  # the first step has learning rate 0
    assert step.skips.drain() == (1, [6 * 16])


def test_gradients_stay_where_they_are(tape):
    step, batch = trainer("efficiency.cuda_graph=step")
    addresses = []
    for _ in range(5):
        step(batch())
        addresses.append({n: g.data_ptr() for n, g in step.graphs.gradients.buffers.items()})
    assert all(a == addresses[0] for a in addresses)
    without = set(step.state.optimizer.parameters) - set(addresses[0])
    assert without == {"encoder.t_embedder.special_time_emb"}


def on_a_rank(
    ranks: Ranks, mode: str, overrides: tuple[str, ...]
) -> tuple[list[list[float]], dict[str, Tensor], list[bool], int]:
    """As ``run``, which graphs were recorded, and how many steps had sent gradients before their backward ended."""
    graph.RECORDINGS["cpu"] = Tape
    early = 0
    finish = overlap.Averager.finish

    def counted(averager: overlap.Averager) -> None:
        nonlocal early
        early += averager.sent > 0
        finish(averager)

    overlap.Averager.finish = counted
    rows, end, step = run("efficiency.kernels=fused", f"efficiency.cuda_graph={mode}", *overrides, ranks=ranks)
    captured = (*step.graphs.micro.values(), step.graphs.last) if step.graphs else ()
    recorded = [one.recording is not None for one in captured]
    return rows, end, recorded, early


# Steps that send gradients before their backward has ended; the first learns when a gradient is done.
EARLY = {"step": 0, "accumulation": STEPS - 1}


@pytest.mark.parametrize(
    ("overrides", "modes"),
    [
        (("train.micro_batch=4",), ("step", "accumulation")),  # two micro-batches
        (("train.micro_batch=1", "efficiency.precision=bf16"), ("accumulation",)),  # captured in the first of the steps
    ],
    ids=["two", "eight"],
)
def test_several_ranks_average_and_update_outside_the_graph(overrides, modes):
    """As without graphs, to the bit; the last micro-batch is replayed, too, or its gradients are sent meanwhile."""
    expected = on_ranks(2, on_a_rank, "none", overrides)
    for mode in modes:
        for (rows, end, _, _), (rows2, end2, recorded, early) in zip(
            expected, on_ranks(2, on_a_rank, mode, overrides), strict=True
        ):
            assert rows == rows2
            assert all(torch.equal(end[name], end2[name]) for name in end)
            assert recorded == [True, False]
            assert early == EARLY[mode]


def test_a_flow_pass_has_accumulation_nodes_of_its_own(monkeypatch):
    """Autograd keeps one such node per parameter and the stream of its birth, as long as any graph holds it."""
    model = build(load_tiny().model)
    reconstruct = Objective.reconstruction

    def node(parameter: Tensor):
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    def marked(*arguments):
        results = reconstruct(*arguments)
        for parameter in model.parameters():
            if parameter.requires_grad:
                node(parameter).metadata["born"] = "in the reconstruction"
        assert node(model.latent_tokens).metadata  # alive: the loss holds it
        return results

    def flow_pass(z, zt, t, labels):
        assert not any(node(p).metadata for p in model.parameters() if p.requires_grad)
        return z.new_zeros(())

    monkeypatch.setattr(Objective, "reconstruction", marked)
    o = load_tiny().objective
    draws = Draws.make(model, o, 0, torch.arange(2))
    backward(model, torch.rand(2, 1, 8, 8), torch.arange(2), draws, o, flow_pass=flow_pass)


def test_the_tape_keeps_what_a_graph_would_keep():
    """It can fail: a host's number and a replaced tensor stay as recorded; what is in place does not."""
    rate, count = 1.0, torch.zeros(())

    def function(x: Tensor) -> dict[str, Tensor]:
        count.add_(1)
        return {"y": x * rate + count}

    captured = graph.Captured("a function", function, graph.Place.on(torch.device("cpu")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graph.RECORDINGS, "cpu", Tape)
        values = []
        for i in range(6):
            rate = float(i)
            values.append(float(captured(x=torch.tensor(1.0))["y"]))
    assert values == [0 + 1, 1 + 2, 2 + 3, 3 + 4, 3 + 5, 3 + 6]
    with pytest.raises(RuntimeError, match="a function: x was captured as"):
        captured(x=torch.ones(2))
    with pytest.raises(RuntimeError, match="captured with x, not z"):
        captured(z=torch.ones(()))


REFUSED = {
    "a GPU is needed": ("efficiency.cuda_graph=step", "device=cpu"),
    "train.on_oom=halve": ("efficiency.cuda_graph=step", "train.on_oom=halve"),
    "leaves no flow": ("efficiency.cuda_graph=flow", "objective.flow_steps=0"),
    "stop_gradient=false": ("efficiency.cuda_graph=flow", "objective.stop_gradient=false"),
    "must be a multiple": ("efficiency.cuda_graph=flow", "objective.flow_steps=3", "efficiency.flow_mini_batch=2"),
}


def check(*overrides: str) -> None:
    config = load_tiny(*overrides)
    compatibility.check_device(config.efficiency, config.train, config.objective, torch.device("cpu"))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_captured_is_refused_by_name(monkeypatch, reason):
    if reason != "a GPU is needed":
        monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)
    with pytest.raises(UserError, match=reason):
        check(*REFUSED[reason])


@pytest.mark.parametrize(
    ("world", "override", "reason"),
    [
        (1, "train.micro_batch=4", "one process"),
        (2, "efficiency.overlap_gradients=false", "averages after the backward"),
        (2, "train.micro_batch=8", "one micro-batch"),
        (2, "train.strategy=fsdp2", "does not work with efficiency.cuda_graph=accumulation"),
    ],
)
def test_a_graph_of_all_micro_batches_but_the_last_needs_others(world, override, reason):
    config = load_tiny("efficiency.cuda_graph=accumulation", "train.global_batch=16", "train.micro_batch=4", override)
    with pytest.raises(UserError, match=reason):
        compatibility.check(config.efficiency, config.train, world)


def test_launch_blocking_is_refused(tape, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(UserError, match="CUDA_LAUNCH_BLOCKING"):
        check("efficiency.cuda_graph=step")


def test_train_says_why_not(tiny, tmp_path):
    outcome = command(
        "train.py", "--config", tiny, f"run_dir={tmp_path}/run", "device=cpu", "efficiency.cuda_graph=flow"
    )
    assert outcome.returncode == 2
    assert "a GPU is needed" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_another_micro_batch_is_refused(tape):
    step, batch = trainer("efficiency.cuda_graph=step")
    for _ in range(3):
        step(batch())
    step.micro_batch = 4
    with pytest.raises(RuntimeError, match="the micro-batch that it began with"):
        step(batch())


@CUDA
@pytest.mark.parametrize("mode", ["flow", "step"])
@pytest.mark.parametrize("compiled", ["none", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_on_a_gpu(mode, compiled, precision):
    """20 steps with and without graphs: the same kernels in the same order, so nearly always the same bits."""
    options = ("efficiency.kernels=fused", f"efficiency.compile={compiled}", f"efficiency.precision={precision}")
    expected, end, _ = run(*options, device="cuda")
    actual, replayed, step = run(*options, f"efficiency.cuda_graph={mode}", device="cuda")
    (captured,) = (step.graphs.flow if mode == "flow" else step.graphs.micro).values()
    assert isinstance(captured.recording, graph.CudaRecording)
    for a, e in zip(actual, expected, strict=True):
        assert a == pytest.approx(e, rel=1e-4 if precision == "fp32" else 2e-2)
    for name, value in end.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-2, atol=1e-3, msg=name)


@CUDA
def test_graphs_never_wait():
    step, batch = trainer("efficiency.kernels=fused", "efficiency.cuda_graph=step", device="cuda")
    for _ in range(5):
        step(batch())
    batches = [batch() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in batches:
            step(b)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
def test_launches_of_a_replayed_step():
    """The host launches a few copies and two graphs; the work on the device stays what it was."""
    step, batch = trainer(
        "efficiency.kernels=fused", "efficiency.cuda_graph=step", "train.micro_batch=16", device="cuda"
    )
    for _ in range(5):
        step(batch())
    b = batch()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(b)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if "Launch" in event.name]
    assert sum(name.startswith("cudaGraphLaunch") for name in launched) == 2
    assert len(launched) <= 120
