"""Regional compilation: one graph per layer kind and size, whole, and none after the first step."""

from __future__ import annotations

import pytest
import torch
from stepping import load_tiny, trainer
from support import command
from torch._dynamo.utils import counters

from unite_fast.efficiency import compiling
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.encoder import Block, Layout, Modulation
from unite_fast.run.stats import read_metrics

# One block: T before, among and behind the class tokens, in two sequence lengths; one decoder layer.
BLOCKS, LAYERS = 6, 1


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Everything of torch.compile but the C++ compiler, which takes a minute: graphs, guards, joint backward."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


@pytest.fixture
def counted(monkeypatch):
    """Graphs and guards alone."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


@pytest.mark.parametrize(("kernels", "recompute"), [("fused", "none"), ("fused", "blocks")])
def test_the_number_of_compilations_does_not_grow_with_depth(counted, kernels, recompute):
    """fullgraph=True: a graph break would raise. After the first step a recompilation would as well."""
    compiled = []
    for depth in (3, 5):
        torch._dynamo.reset()
        counters.clear()
        step, batch = trainer(
            "efficiency.compile=all", f"efficiency.kernels={kernels}", f"efficiency.recompute={recompute}",
            f"model.encoder.depth={depth}", f"model.decoder.depth={depth - 2}",
        )  # fmt: skip
        step(batch())
        compiled.append(compiling.graphs())
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                step(batch())
        assert compiling.graphs() == compiled[-1]
    assert compiled == [BLOCKS + LAYERS] * 2
    assert not counters["graph_break"]


def test_uneven_flow_mini_batches_stay_within_the_limit(counted):
    """N = 3 in mini-batches of 2 and 1: three more sizes of a block, above torch's default limit."""
    step, batch = trainer(
        "efficiency.compile=all", "efficiency.kernels=fused", "efficiency.flow_mini_batch=2", "objective.flow_steps=3"
    )
    step(batch())
    assert compiling.graphs() == BLOCKS + 3 + LAYERS
    with torch.compiler.set_stance("fail_on_recompile"):
        step(batch())


def test_a_separate_denoiser_shares_the_blocks(counted):
    step, batch = trainer("efficiency.compile=all", "efficiency.kernels=fused", "model.separate_denoiser=true")
    step(batch())
    assert compiling.graphs() == BLOCKS + LAYERS


def test_without_gradients_nothing_compiles(traced):
    """Pictures and evaluation come in sizes of their own."""
    step, _ = trainer("efficiency.compile=all")
    with torch.no_grad():
        for batch in (1, 3):
            step.state.model.decode(step.state.model.tokenize(torch.rand(batch, 1, 8, 8)))
    assert compiling.graphs() == 0


def test_keys_of_a_compiled_model_are_plain(traced):
    plain, compiled = (trainer(f"efficiency.compile={mode}")[0].state for mode in ("none", "all"))
    assert [*plain.model.state_dict()] == [*compiled.model.state_dict()]
    assert [*plain.optimizer.parameters] == [*compiled.optimizer.parameters]


def losses(step, batch) -> list[float]:
    return [float(step(batch())["total"]) for _ in range(4)]


def test_traced_regions_compute_the_same(traced):
    """A block before the class tokens, and one behind them."""
    words = ("model.encoder.depth=2", "efficiency.precision=bf16", "efficiency.kernels=fused")
    words += ("efficiency.recompute=blocks",)
    plain, compiled = (trainer(f"efficiency.compile={mode}", *words) for mode in ("none", "all"))
    expected, actual = (losses(step, batch) for step, batch in (plain, compiled))
    assert actual == pytest.approx(expected, rel=1e-3)


def test_a_block_in_machine_code():
    """The C++ that the compiler writes, around the fused operations: values and gradients of the uncompiled block."""
    block = Block(32, 2, 64)
    x, y = torch.randn(2, 2, 6, 32).unbind(0)
    chunks = torch.randn(2, 192).chunk(6, dim=-1)
    following = Modulation(block.norm1.weight, *torch.randn(2, 64).chunk(2, dim=-1))
    angles = torch.rand(8, 8)
    layout = Layout(angles.cos(), angles.sin(), True, 2, None)
    results = []
    for run in (Block.forward, compiling.region(Block.forward)):
        block.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        out = run(block, *inputs, chunks, following, layout, "fused")
        (out[0].square().sum() + out[1].square().sum()).backward()
        results.append([*out, *(t.grad for t in inputs), *(p.grad for p in block.parameters() if p.grad is not None)])
    assert compiling.graphs() == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_perceptual_trunk(traced):
    perceptual = Perceptual(None)
    images, other = torch.rand(2, 1, 3, 16, 16).unbind(0)
    other.requires_grad_()
    expected = perceptual(images, other)
    (gradient,) = torch.autograd.grad(expected, other)
    perceptual.compile_trunk(compiling.region)
    actual = perceptual(images, other)
    assert compiling.graphs() == 2  # the real images pass without a graph
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, other)[0], gradient)
    assert not [name for name in perceptual.state_dict() if "_orig_mod" in name]


def test_a_run_reports_its_compilation(tiny, tmp_path):
    """Time and place of the cache, in the output; the checkpoint of a compiled run resumes without compilation."""
    run = tmp_path / "run"
    said = command("train.py", "--config", tiny, f"run_dir={run}", "train.max_steps=2", "efficiency.compile=decoder")
    assert said.returncode == 0, said.stderr
    assert f"compiled       {LAYERS} graphs; the first step took" in said.stdout
    assert f"cached in {compiling.cache()}" in said.stdout
    said = command("train.py", "--config", tiny, f"run_dir={run}", "train.max_steps=3")
    assert said.returncode == 0, said.stderr
    assert "resuming from" in said.stdout
    assert "compiled" not in said.stdout
    assert len(read_metrics(run / "metrics.jsonl")) == 3


def test_configuration_of_the_published_run():
    from unite_fast.config.yaml_text import load

    assert load("configs/imagenet_b.yaml").efficiency.compile == "decoder"
    assert load_tiny().efficiency.compile == "none"
