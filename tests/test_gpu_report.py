"""benchmarks/gpu_report.py on rows that are made up here and nowhere else."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from unite_fast.config import yaml_text
from unite_kernels import launches

FILES = (
    "unite_fast/layers/attention.py", "unite_fast/efficiency/precision.py", "benchmarks/RECORDS.md",
    "kernels/unite_kernels/launch_tables/sm_90.json",
)  # fmt: skip
README = """| images/s | <!-- gpu:h200.ours -->**not measured**<!-- /gpu --> |
| official | <!-- gpu:h200.official -->**not measured**<!-- /gpu --> |
| times | <!-- gpu:h200.ratio -->**not measured**<!-- /gpu --> |
| card | <!-- gpu:h200.utilisation -->**not measured**<!-- /gpu --> |
| images/s on an H100 | <!-- gpu:h100.ours -->**not measured**<!-- /gpu --> |
"""
WHERE = {"device": "NVIDIA H200", "date": "2030-01-02T03:04:05+00:00", "commit": "abcdef0123", "dirty": False}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_report")


@pytest.fixture
def root(tmp_path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def row(benchmark: str, **facts) -> dict:
    return {"benchmark": benchmark, **WHERE, **facts}


def ours(rate: float, batch: int = 64, overrides: tuple[str, ...] = (), benchmark: str = "ours", **facts) -> dict:
    base = {"batch": batch, "overrides": list(overrides), "lpips": "eager", "cudnn_benchmark": False, "ok": True}
    return row(benchmark, **base | {"images_per_second": {"128": rate - 10, "1024": rate}, "loss": 2.0} | facts)


MACHINE = row("machine", capability=[9, 0], multiprocessors=132)


def attention(keys: int, backend: str, ms: float, queries: int = 0) -> list[dict]:
    facts = {"keys": keys, "queries": queries or keys, "head_size": 64, "backend": backend, "median_ms": ms}
    return [row("attention", **facts, **{"pass": kind}) for kind in ("fwd", "bwd")]


def test_figures_get_their_source_and_the_others_stay(report, root):
    overrides = ("efficiency.kernels=fused", "efficiency.cuda_graph=step")
    found = [
        MACHINE,
        ours(300.4),
        ours(351.2, 128, overrides, cudnn_benchmark=True),
        ours(0, ok=False, images_per_second=None),
    ]
    found += [row("official", form="official", batch=64, images_per_second={"128": 180.0, "1024": 201.0})]
    said = report.apply(report.Rows(found), root, True, "x")
    text = (root / "README.md").read_text()
    source = r"\(NVIDIA H200, 2030-01-02, abcdef0\)"
    assert re.search(
        rf"h200.ours -->351 \(341 at 128 images per update\), micro-batch 128, {', '.join(overrides)} {source}<!--",
        text,
    )
    assert re.search(rf"h200.official -->201 as published, micro-batch 64 {source}<!--", text)
    assert "<!-- gpu:h200.ratio -->**not measured**<!-- /gpu -->" in text
    assert "<!-- gpu:h100.ours -->**not measured**<!-- /gpu -->" in text
    assert re.search(r"h200.utilisation -->MFU 36.\d%, 7.6 minutes per epoch on 8 at that rate \(", text)
    assert "ratio: not measured" in said


def test_the_ratio_is_that_of_rounds_and_says_when_losses_disagree(report, root):
    spread = {"median": 1.5, "p20": 1.4, "p80": 1.6}
    facts = {"component": "whole step", "n": 9, "batch": 64, "faster_than": {"compiled": spread}}
    facts["images_per_second"] = {"ours": 300.0, "compiled": 200.0}
    found = [row("official", **facts, images_per_update=n, agrees=n == 128) for n in (128, 1024)]
    report.apply(report.Rows(found), root, True, "x")
    text = (root / "README.md").read_text()
    assert "1.50 (1.40 to 1.60) with its encoder compiled, n = 9, micro-batch 64; the losses DISAGREE (NVIDIA" in text


def test_red_checks_stand_beside_every_figure(report, root):
    found = [ours(300), row("check", check="swiglu against float64", ok=False, why="off")]
    report.apply(report.Rows(found), root, True, "x")
    assert "abcdef0; RED: swiglu against float64)<!-- /gpu -->" in (root / "README.md").read_text()
    assert "(RED: swiglu against float64)" in (root / "benchmarks" / "RECORDS.md").read_text()


def test_a_record_is_a_line_only_when_it_is_one(report, root):
    for rate, what in ((300, "first"), (290, "slower"), (330, "faster")):
        report.apply(report.Rows([ours(rate)]), root, True, what)
    lines = [
        line for line in (root / "benchmarks" / "RECORDS.md").read_text().splitlines() if "| NVIDIA H200 |" in line
    ]
    assert lines == [
        "| 300 | - | NVIDIA H200 | first | 2030-01-02 | abcdef0 |",
        "| 330 | +10.0% | NVIDIA H200 | faster | 2030-01-02 | abcdef0 |",
    ]


def table_of(path: Path, name: str) -> dict:
    body = re.search(rf"^{name}\b[^\n]*= (\{{\n.*?^\}})", path.read_text(), re.M | re.S)
    assert body is not None
    return eval(body[1])


def test_attention_table(report, root):
    found = [MACHINE, *attention(257, "flash", 1.0), *attention(257, "cudnn", 2.0), *attention(257, "math", 0.1)]
    found += [*attention(544, "cudnn", 1.0), *attention(544, "flash", 2.0), *attention(544, "efficient", 3.0)]
    found += attention(544, "flash", 0.1, queries=256)  # another shape
    path = root / "unite_fast" / "layers" / "attention.py"
    for _ in range(2):  # a second time takes the place of the first
        report.apply(report.Rows(found), root, True, "x")
        table = table_of(path, "PREFERRED")
        assert table[9, 0] == ((257, ("flash", "cudnn")), (1 << 30, ("cudnn", "flash")))
        assert table[8, 0] == ((1 << 30, ("flash",)),)
    assert path.read_text().count("    # NVIDIA H200, 2030-01-02, abcdef0\n    (9, 0): ") == 1
    report.apply(report.Rows([MACHINE, *attention(257, "flash", 9.0)]), root, True, "x")
    assert table_of(path, "PREFERRED") == table  # without the longest there is no plan


def test_layers_that_float8_slows_down(report, root):
    path = root / "unite_fast" / "efficiency" / "precision.py"

    def ceiling(outputs: int, inputs: int, half: float, scaled: float) -> dict:
        return row("ceiling", kind="fp8", shape=[100, outputs, inputs], ms={"half": half, "scaled": scaled})

    assert table_of(path, "SLOWER_IN_FLOAT8") == {}
    found = [MACHINE, ceiling(4096, 768, 2.0, 1.0), ceiling(768, 768, 1.0, 1.2), ceiling(768, 768, 1.0, 1.0)]
    report.apply(report.Rows(found), root, True, "x")
    assert table_of(path, "SLOWER_IN_FLOAT8") == {(9, 0): ((768, 768),)}
    report.apply(report.Rows([MACHINE, ceiling(768, 768, 1.0, 0.5)]), root, True, "x")
    assert table_of(path, "SLOWER_IN_FLOAT8") == {(9, 0): ()}


def test_launches(report, root):
    folder = root / "kernels" / "unite_kernels" / "launch_tables"
    key = launches.Key("swiglu", "backward", 2048)
    before = launches.read(folder / "sm_90.json")
    present = before.rows[key].launch
    fast = launches.Launch(rows=2, columns=256, warps=8, programs=6)
    lucky = launches.Launch(rows=8, columns=256, warps=8, programs=6)  # at one shape alone

    def launch(which: launches.Launch, shape: str, ms: float, op: str = "swiglu", width: int = 2048) -> dict:
        facts = {"op": op, "direction": "backward", "width": width, "shape": shape, "launch": vars(which)}
        return row("launch", **facts, ok=True, ms={"median": ms})

    found = [MACHINE, *(launch(present, s, 1.0) for s in ("base", "flow"))]
    found += [launch(fast, "base", 0.8), launch(fast, "flow", 1.1), launch(lucky, "base", 0.1)]
    tail = launches.Key("adaln_tail", "backward", 768)
    almost = launches.Launch(rows=1, warps=8, programs=2)
    found += [launch(before.rows[tail].launch, "base", 1.0, *tail[::2]), launch(almost, "base", 0.99, *tail[::2])]
    report.apply(report.Rows(found), root, True, "x")
    after = launches.read(folder / "NVIDIA_H200.json")
    assert after.rows[key] == launches.Row(fast, "2030-01-02")
    assert after.rows[tail] == before.rows[tail]
    assert {k: v for k, v in after.rows.items() if k != key} == {k: v for k, v in before.rows.items() if k != key}
    assert launches.read(folder / "sm_90.json") == before


def test_a_launch_is_compared_with_the_table_s_of_its_triton(report):
    """Whose programs are those of the Triton that ran the sweep."""
    key = launches.Key("qk_norm_rope", "forward", 768)
    table = launches.read(launches.FOLDER / "sm_90.json")
    present, fast = table.rows[key].with_triton("3.6"), launches.Launch(rows=8, columns=2, warps=4, programs=12)
    assert present != table.rows[key].launch

    def launch(which: launches.Launch, ms: float) -> dict:
        facts = {**key._asdict(), "shape": "base", "launch": vars(which), "ms": {"median": ms}}
        return row("launch", ok=True, triton="3.6.0", **facts)

    assert report.new_launches(report.Rows([launch(present, 1.0), launch(fast, 0.5)]), table) == {key: fast}


def test_choices(report, root):
    found = [ours(300), ours(310, cudnn_benchmark=True), ours(320, 128, cudnn_benchmark=True)]
    found += [ours(321, 128, ("efficiency.cuda_graph=step",), cudnn_benchmark=True)]
    found += [ours(300, benchmark="option", option=""), ours(330, benchmark="option", option="fp8", loss=2.02)]
    said = "\n".join(report.apply(report.Rows(found), root, True, "x"))
    assert "`train.micro_batch: 128`: 64: 310, 128: 321" in said
    assert "`efficiency.cuda_graph: none`: step: 321, none: 320" in said
    assert "in unite_fast/efficiency/precision.py): True: False: 300, True: 321" in said
    assert "fp8 (other numerics, opt-in): 1.100 times, first loss off by 1.0e-02" in said
    (choices,) = (root / "benchmarks" / "results").glob("*/choices.md")
    assert choices.read_text().startswith("# NVIDIA H200, 2030-01-02, abcdef0\n")


def test_nothing_is_changed_unless_asked(report, root):
    before = {name: (root / name).read_text() for name in (*FILES, "README.md")}
    report.apply(report.Rows([MACHINE, ours(300), *attention(544, "flash", 1.0)]), root, False, "x")
    assert {name: (root / name).read_text() for name in before} == before


def test_rows_that_are_no_measurement_are_refused(report):
    with pytest.raises(SystemExit, match="rehearsal"):
        report.Rows([row("ours") | {"rehearsal": True}])
    with pytest.raises(SystemExit, match="NVIDIA H100, NVIDIA H200"):
        report.Rows([row("ours"), row("ours") | {"device": "NVIDIA H100"}])
    with pytest.raises(SystemExit, match="none"):
        report.Rows([])


def test_eta_from_rows_as_they_are_measured(report, monkeypatch):
    """The ceilings of a toy step on this CPU, as gpu_check.py records them; every kind of them counts."""
    measure, work = importlib.import_module("roofline_measure"), importlib.import_module("step_work")
    training, cpu = importlib.import_module("training"), torch.device("cpu")
    monkeypatch.setattr(measure, "copy_bandwidth", lambda *_: 10.0)  # a quarter of a GB otherwise
    once = {"rounds": 1, "warmup": 0}
    timed = measure.interleaved
    monkeypatch.setattr(measure, "interleaved", lambda calls, device, _: timed(calls, device, **once))
    config = training.configuration("tiny", 3, 4, cpu, ("objective.perceptual_weight=1",))
    found = list(measure.rows(work.step(config, 4), cpu, torch.float32, 1))
    found = json.loads(json.dumps([row("ceiling", batch=4, **facts) for facts in found]))

    def slower(rows: list[dict], *kinds: str) -> list[dict]:
        """Half the rates of these kinds."""

        def halved(value):
            return {k: v / 2 for k, v in value.items()} if isinstance(value, dict) else value / 2

        rates = ("tflops", "tb_per_s")
        return [r | {k: halved(r[k]) for k in rates if k in r} if r["kind"] in kinds else r for r in rows]

    assert {tuple(facts["ms"]) for facts in found if facts["kind"] == "fp8"} == {("half", "scaled", "products")}
    eta = report.eta(report.Rows(found), 0.01)
    assert eta is not None
    assert eta > 0
    assert report.eta(report.Rows(found), 0.02) == pytest.approx(2 * eta)
    kinds = ("copy", "product", "attention", "convolution")
    assert report.eta(report.Rows(slower(found, *kinds)), 0.01) == pytest.approx(2 * eta)
    for kind in kinds:
        assert report.eta(report.Rows(slower(found, kind)), 0.01) > eta, kind
        rest = [facts for facts in found if facts["kind"] != kind]
        assert report.eta(report.Rows(rest), 0.01) is None, kind


def test_readme_has_every_marker(report):
    text = (ROOT / "README.md").read_text()
    for device, name in itertools.product(("h200", "h100"), report.FIGURES):
        assert len(re.findall(rf"<!-- gpu:{device}\.{name} -->.*?<!-- /gpu -->", text)) == 1, (device, name)


def test_a_figure_without_its_marker_is_said(report):
    text, said = report.fill("nothing here", report.Rows([ours(300)]))
    assert text == "nothing here"
    assert any(line.startswith("ours: 300") and "no marker <!-- gpu:h200.ours -->" in line for line in said)


def test_advice_names_keys_of_a_configuration_or_the_place(report):
    """Every line that is no other numerics: keys and values in quotation marks load, the others name a function."""
    graph = ("efficiency.cuda_graph=step",)
    found = [ours(300), ours(320, cudnn_benchmark=True), ours(330, lpips="compiled"), ours(340, overrides=graph)]
    lines = report.choices(report.Rows([*found, ours(350, 128, graph)]))
    loaded = [re.match(r"- `([a-z_.]+): (\w+)`: ", line) for line in lines]
    for line, key in zip(lines, loaded, strict=True):
        if key:
            yaml_text.load(ROOT / "configs" / "imagenet_b.yaml", [f"{key[1]}={key[2]}"])
            continue
        names, path = re.search(r"\((`.*`) in (\S+\.py)\)", line).groups()
        assert all(f"{name}" in (ROOT / path).read_text() for name in re.findall(r"`(\w+)`", names)), line
    assert [key[1] for key in loaded if key] == ["train.micro_batch", "efficiency.cuda_graph"]
    assert len(lines) == 4
    assert any(line.startswith("- `efficiency.cuda_graph: step`: step: 340, none: 330") for line in lines)


def test_a_report_that_fails_changes_nothing(report, root, monkeypatch):
    before = {name: (root / name).read_text() for name in (*FILES, "README.md")}

    def fail(_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(report, "choices", fail)
    with pytest.raises(RuntimeError):
        report.apply(report.Rows([MACHINE, ours(300), *attention(544, "flash", 1.0)]), root, True, "x")
    assert {name: (root / name).read_text() for name in before} == before


def test_the_pack_says_what_it_holds_and_what_is_missing(tmp_path):
    """No kernels: compiling them takes minutes. Without a clone the rest is packed all the same."""
    command = [sys.executable, "benchmarks/gpu_pack.py", "--no-kernels", "--out", str(tmp_path / "pack")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "missing  official: no clone was named" in result.stdout, result.stderr
    assert "MiB  in all, of 64" in result.stdout
    assert (tmp_path / "pack" / "packages" / "lpips" / "weights" / "v0.1" / "vgg.pth").is_file()
    assert {"commit", "dirty"} <= json.loads((tmp_path / "pack" / "commit.json").read_text()).keys()
    lacking = "missing  libraries" in result.stdout
    assert result.returncode == lacking
    clone = tmp_path / "clone"
    for name in ("models/unite.py", "assets/large.png", ".git/HEAD"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    result = subprocess.run(
        [*command, "--official-dir", str(clone)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "official: no clone" not in result.stdout
    packed = tmp_path / "pack" / "official"
    assert sorted(str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()) == ["models/unite.py"]


def test_make_reaches_the_program():
    command = ["make", "-s", "gpu-report", "ROWS=no/rows.jsonl", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no file no/rows.jsonl; give" in result.stderr
