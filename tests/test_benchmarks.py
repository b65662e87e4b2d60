"""The benchmark programs on sizes that a CPU takes, and the counts behind the roofline."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from unite_fast.config import yaml_text
from unite_fast.layers import vit
from unite_fast.model import encoder
from unite_fast.model.flops import training_flops

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
    """A function that runs a benchmark's main here: (name, *arguments) -> what it printed. Results go to tmp_path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)

    def run(name: str, *arguments: str) -> str:
        module = importlib.import_module(name)
        if hasattr(module, "RESULTS"):
            monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()
        return capsys.readouterr().out

    return run


def module(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.parametrize(
    "path", [ROOT / "configs" / f"imagenet_{size}.yaml" for size in ("b", "l", "xl")], ids=lambda p: p.stem
)
@pytest.mark.parametrize("flow_steps", [3, 14])
def test_kernels_of_a_step_have_its_flops(path, flow_steps, monkeypatch):
    """The list that the roofline sums over, by part, against the analytic count; Newton-Schulz against the budget."""
    step_work = module("step_work", monkeypatch)
    config = yaml_text.load(
        path, [f"objective.flow_steps={flow_steps}", "train.global_batch=64", "train.micro_batch=64"]
    )
    work, images = step_work.step(config, 64), 64
    expected = training_flops(config.model, flow_steps, True)
    for part in ("tokenize", "flow", "decode", "perceptual"):
        found = sum(w.flops * w.count for w in work if w.part == part) / images
        assert found == pytest.approx(expected[part], rel=1e-3), part
    if path.stem == "imagenet_b":
        assert sum(w.flops * w.count for w in work if w.part == "update") / 1e12 == pytest.approx(3.81, abs=0.01)


def test_least_bytes_are_the_budgets(monkeypatch):
    """Of elementwise traffic per token and block of the encoder what docs/DESIGN.md says, 37 KB forward; of LPIPS 0.50
    GB per image. The backward of QK-norm takes the values' gradient along: no bias gradient is a pass, nothing copied.
    """
    (budget,) = re.findall(r"separate operations, (\d+) KB fused", (ROOT / "docs" / "DESIGN.md").read_text())
    step_work = module("step_work", monkeypatch)
    config = yaml_text.load(ROOT / "configs" / "imagenet_b.yaml")
    blocks = 12 * 512 + 8 * 32 + 3 * (12 * 256 + 8 * 32)  # tokens times blocks of an image
    work = [w for w in step_work.step(config, 1) if w.kind == "elementwise" and w.part in ("tokenize", "flow")]
    assert sum(w.bytes * w.count for w in work) / blocks / 1e3 == pytest.approx(int(budget), abs=0.5)
    assert sum(w.bytes * w.count for w in work if not w.backward) / blocks / 1e3 == pytest.approx(37, abs=0.5)
    kinds = {w.kind for w in step_work.step(config, 1) if w.part in ("tokenize", "flow")}
    assert kinds == {"gemm", "attention", "elementwise"}
    lpips = sum(w.bytes * w.count for w in step_work.step(config, 1) if w.part == "perceptual")
    assert lpips / 1e9 == pytest.approx(0.50, abs=0.005)


def test_attention_is_measured_on_what_a_step_hands_it(monkeypatch):
    """Sizes and strides of queries, keys and values, in the blocks of the encoder, its last, and the decoder."""
    inputs = module("attention_inputs", monkeypatch)
    batch, heads, tokens, size, kept = 2, 3, 9, 8, 4
    found = []

    def seen(q, k, v, *_):
        found.append([(x.shape, x.stride()) for x in (q, k, v)])
        return torch.zeros(q.shape)

    monkeypatch.setattr(encoder, "attention", seen)
    monkeypatch.setattr(vit, "attention", seen)
    x, tables = torch.randn(batch, tokens, heads * size), torch.ones(tokens, size // 2)
    layout = encoder.Layout(tables, tables, True, 1, None)
    block = encoder.SelfAttention(heads * size, heads)
    block(x, layout, "fused")
    block(x, layout, "fused", kept)
    vit.DecoderLayer(heads * size, heads, 2 * heads * size)(x)
    shape = batch, heads, tokens, size
    for expected, options in zip(found, ({}, {"queries": kept}, {"decoder": True}), strict=True):
        made = inputs.queries_keys_values(shape, torch.device("cpu"), torch.float32, **options)
        assert [(x.shape, x.stride()) for x in made] == expected, options


def test_roofline_predicts_and_says_so(program, tmp_path):
    said = program("roofline", "--images-per-second", "103")
    assert "PREDICTIONS" in said
    rows = [json.loads(line) for line in (tmp_path / "roofline" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    *scenarios, measured = rows
    assert all(row["prediction"] for row in scenarios)
    rates = {row["scenario"]: row["images_per_second"] for row in scenarios}
    assert list(rates.values()) == sorted(rates.values())  # from the official code to the limit
    assert rates["ours, excellent"] == pytest.approx(406, rel=0.05)  # the budget's best engineering
    assert rates["everything compiled"] == pytest.approx(305, rel=0.1)
    # The budget's limit leaves out the update, the copies and what ends a convolution.
    assert rates["limit"] == pytest.approx(597 / (1 + 597 * 0.2e-3), rel=0.05)
    for row in scenarios:
        assert sum(row["ms_per_image"].values()) == pytest.approx(1e3 / row["images_per_second"])
    assert 0 < measured["eta"] < 0.25  # the official code, against the device's limit


def test_roofline_measures_ceilings_where_it_runs(program):
    tiny = ["model.image_size=32", "model.patch_size=8", "model.num_latents=16", "model.encoder=small",
            "model.decoder=small", "objective.perceptual_weight=0"]  # fmt: skip
    said = program("roofline", "--measure", "--no-record", "--batch", "2", *tiny)
    assert "measured on" in said
    assert "every kernel at its ceiling here" in said
    assert "attention   16 tokens" in said


def test_step_ladder_on_a_tiny_model(program, monkeypatch):
    ladder = module("bench_step", monkeypatch)
    rungs = [name for name in ladder.RUNGS if name != "+compile"]  # a minute of C++ on a CPU
    said = program("bench_step", "--no-record", "--rounds", "2", "--batch", "2", "--rungs", ",".join(rungs))
    assert "1.00x eager" in said
    assert "+fused" in said
    assert "images/s" not in said  # ratios alone on a CPU
    for name in rungs:
        assert f"\n  {name} " in said, f"{name}: neither timed nor skipped with a reason"


def test_a_rung_that_computes_something_else_is_not_timed(program, monkeypatch):
    ladder = module("bench_step", monkeypatch)
    rungs = {
        "eager": ((), 0.0),
        "wrong": (("objective.pixel_weight=3",), 1e-2),
        "fp9": (("efficiency.precision=fp9",), 1.0),
    }
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    said = program("bench_step", "--no-record", "--rounds", "2", "--batch", "2", "--rungs", "wrong,fp9")
    assert "wrong        skipped: its first loss is" in said
    assert "fp9          skipped: CommonError: override efficiency.precision=fp9" in said


def test_what_does_not_fit_beside_eager_is_timed_alone(program, monkeypatch, tmp_path):
    """Rows are written one by one, so that what follows costs none of them."""
    ladder = module("bench_step", monkeypatch)
    timed = ladder.interleaved

    def tight(variants, device, rounds, **options):
        if "+flow batch" in variants and "eager" in variants:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(variants, device, rounds, **options)

    monkeypatch.setattr(ladder, "interleaved", tight)
    rungs = {name: ladder.RUNGS[name] for name in ("eager", "+flow batch", "+fused")}
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    said = program("bench_step", "--rounds", "2", "--batch", "2")
    assert "+flow batch  does not fit beside eager" in said
    assert said.count("timed alone") == 2
    (file,) = tmp_path.glob("*/step.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["rung"] for row in rows] == list(rungs)
    assert [bool(row["faster_than_eager"]) for row in rows] == [True, False, False]


def test_lpips_forms_agree(program):
    said = program("bench_lpips", "--no-record", "--rounds", "1", "--batch", "1", "--size", "32")
    assert "no_graph" in said
    assert "x official" in said


def test_muon_is_that_of_torch(program, monkeypatch):
    muon = module("bench_muon", monkeypatch)
    monkeypatch.setattr(muon, "parameter_shapes", lambda *_: ([torch.Size((8, 24))] * 3, [torch.Size((5,))] * 2))
    monkeypatch.setattr(module("bench_newton_schulz", monkeypatch), "parameter_shapes", muon.parameter_shapes)
    said = program("bench_muon", "--no-record", "--rounds", "2")
    assert "torch_muon" in said
    once = muon.Theirs.step
    monkeypatch.setattr(muon.Theirs, "step", lambda self: (once(self), once(self)))
    with pytest.raises(SystemExit, match="is off by"):
        program("bench_muon", "--no-record", "--rounds", "2")


def test_plots(program, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plots = module("plots", monkeypatch)
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    assert "drawn" in program("roofline", "--plot", "--no-record")
    rows = [
        {"model": "b", "flow_steps": 3, "rung": r, "faster_than_eager": {"median": m}}
        for r, m in (("eager", 1), ("x", 2))
    ]
    assert plots.step_ladder(rows, "some GPU").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "imagenet_b_n3_prediction.png").stat().st_size > 10_000


def quoted_commands(text: str) -> list[list[str]]:
    """The words of every command that a text quotes, up to a pipe or "then"."""
    quoted = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun|nsys|make) [^`]+)`", text)
    return [shlex.split(command) for command in quoted]


def comments(path: Path) -> str:
    """Those of a configuration, as one text."""
    return " ".join(line.strip().lstrip("# ") for line in path.read_text().splitlines() if line.strip().startswith("#"))


def test_configurations_name_only_quoted_commands():
    """A program of benchmarks/ with words behind it stands in a quotation, where the next test reads it."""
    for path in (ROOT / "configs").glob("*.yaml"):
        unquoted = re.sub(r"`[^`]*`", "", comments(path))
        assert "benchmarks/bench_" not in unquoted, path.name


def test_what_commands_of_the_backlog_name(monkeypatch):
    """And of the configurations: rungs, models and tests that exist. What their programs take: test_commands.py."""
    ladder = module("bench_step", monkeypatch)
    backlog = (BENCHMARKS / "GPU_BACKLOG.md").read_text()
    told = [comments(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    assert any(quoted_commands(text) for text in told)
    commands = [words for text in (backlog, *told) for words in quoted_commands(text)]
    assert len(commands) > 25
    for words in commands:
        for option, known in (("--rungs", ladder.RUNGS), ("--models", ladder.MODELS)):
            if option in words and any(word.endswith("bench_step.py") for word in words):
                assert set(words[words.index(option) + 1].split(",")) <= set(known), words
        if "pytest" in words and "-k" in words:
            files, wanted = [w for w in words if w.startswith("tests/")], words[words.index("-k") + 1]
            assert any(f"def test_{wanted}" in (ROOT / f).read_text() for f in files), words
    keys = re.findall(r"`((?:[a-z]+\.[a-z_]+=[^`\s]+ ?)+)`", backlog)
    for group in keys:
        yaml_text.load(ROOT / "configs" / "imagenet_b.yaml", shlex.split(group))
