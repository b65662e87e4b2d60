"""benchmarks/gpu_check.py rehearsed without a GPU, with parts that hang, crash, run out of memory or are wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import torch
from support import ROOT

from unite_fast.config import yaml_text

PROGRAM = ROOT / "benchmarks" / "gpu_check.py"
SPEED = 0.3  # of the clock, which jumps over the part that hangs: enough for the others, even beside much other work
FAULTS = {"smoke": "red", "ceilings": "crash", "ours again": "hang", "options": "oom"}


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    for folder in ("benchmarks", "tests/ops"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> SimpleNamespace:
    """One run of everything: exit status, output, rows, and the rows by part."""
    folder = tmp_path_factory.mktemp("rehearsal")
    clone = stand_in.write(folder / "official")
    command = [sys.executable, str(PROGRAM), "--rehearse", "--out", str(folder / "out"), "--speed", str(SPEED)]
    command += ["--official-dir", str(clone)]
    for part, kind in FAULTS.items():
        command += ["--fault", f"{part}={kind}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    rows = [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]
    by_part: dict[str, list[dict]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    return SimpleNamespace(status=result.returncode, said=result.stdout, rows=rows, by_part=by_part, out=folder / "out")


def ending(rehearsal: SimpleNamespace, part: str) -> dict:
    (row,) = [row for row in rehearsal.by_part[part] if row["benchmark"] == "part"]
    return row


def test_a_fault_costs_its_own_part_alone(rehearsal):
    check = importlib.import_module("gpu_check")
    assert rehearsal.status == 1
    for part in (*check.PLAN, *check.SECOND):
        row, found = ending(rehearsal, part.name), rehearsal.by_part[part.name]
        assert row["ok"] == (FAULTS.get(part.name, "red") == "red"), (row, rehearsal.said)
        assert row["seconds"] <= part.seconds + 5
        assert (row["seconds"] >= part.seconds - 1) == (FAULTS.get(part.name) == "hang")
        assert len(found) > 1, f"{part.name} left no row of its own"


def test_what_became_of_a_part_is_said(rehearsal):
    assert ending(rehearsal, "ceilings")["why"] == "SIGSEGV"
    assert ending(rehearsal, "ours again")["why"] == "cut off"
    assert "CUDA out of memory" in ending(rehearsal, "options")["why"]
    summary = (rehearsal.out / "summary.txt").read_text()
    assert "RED     swiglu against float64: made to fail" in summary
    assert "made to happen" in (rehearsal.out / "log.txt").read_text()


def test_red_checks_stop_no_timing(rehearsal):
    assert not any(row["ok"] for row in rehearsal.by_part["smoke"] if row["benchmark"] == "check")
    timed = [row for row in rehearsal.by_part["ours"] if row["benchmark"] == "ours" and row["ok"]]
    assert len(timed) >= 4
    for row in timed:
        passes, update, batch = row["ms"]["passes"]["median"], row["ms"]["update"]["median"], row["batch"]
        assert row["images_per_second"]["1024"] == pytest.approx(1024e3 / (1024 / batch * passes + update))


def test_the_official_code_is_prepared_early_and_timed_whatever_its_losses(rehearsal):
    kinds = [row["benchmark"] for row in rehearsal.by_part["official"]]
    assert kinds.index("official compiled") < kinds.index("official")
    timed = [row for row in rehearsal.by_part["official"] if row["benchmark"] == "official"]
    assert [row["form"] for row in timed] == ["official", "compiled"]
    checks = [row for row in rehearsal.by_part["official"] if row["benchmark"] == "check"]
    assert [row["ok"] for row in checks] == [False]  # the stand-in has losses of its own
    steps = [row for row in rehearsal.by_part["winners"] if row.get("component") == "whole step"]
    assert [row["images_per_update"] for row in steps] == [128, 1024]
    assert all(row["faster_than"].keys() == {"official", "compiled"} and not row["agrees"] for row in steps)


def test_rows_say_what_they_are_from(rehearsal):
    for row in rehearsal.rows:
        assert row["rehearsal"] is True
        if row["benchmark"] != "part":
            assert {"date", "commit", "device", "torch"} <= row.keys()


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, str(PROGRAM)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "needs a CUDA device" in result.stderr


def bench(tmp_path: Path, fault: str = "") -> object:
    parts = importlib.import_module("gpu_parts")
    settings = {"rehearse": True, "out": str(tmp_path), "run": str(tmp_path), "fault": fault, "official": None}
    return parts.Bench("x", settings, SimpleNamespace(set=lambda: None), SimpleNamespace(wait=lambda: None))


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """A function that reads what was recorded."""
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness.Target, "file", tmp_path / "rows.jsonl")
    return lambda: [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_the_official_code_takes_the_first_batch_that_fits(monkeypatch, tmp_path, rows):
    steps = importlib.import_module("gpu_parts.steps")
    monkeypatch.setattr(steps, "our_config", lambda code, batch, *_: batch)
    monkeypatch.setattr(steps, "images_for", lambda batch, device: SimpleNamespace(images=batch, labels=batch))
    monkeypatch.setattr(importlib.import_module("gpu_parts").Bench, "toy", False)
    monkeypatch.setattr(importlib.import_module("gpu_parts").Bench, "device", torch.device("cpu"))
    monkeypatch.setattr(importlib.import_module("gpu_parts").Bench, "official_batches", lambda self: (64, 48, 32))

    def passes(images, labels, recipe, form):
        if images > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if form == "compiled":
            raise RuntimeError("the compiler failed")

    code = SimpleNamespace(passes=passes, update=lambda: None)
    batch, _, forms = steps.compiled_for(bench(tmp_path), code, "bf16")
    assert (batch, forms) == (48, ["official"])
    assert [(row["benchmark"], row.get("batch"), row.get("form")) for row in rows()] == [
        ("official", 64, None), ("official", None, "compiled"), ("official compiled", 48, None)
    ]  # fmt: skip


def test_a_setting_that_does_not_fit_is_a_row(monkeypatch, tmp_path, rows):
    steps = importlib.import_module("gpu_parts.steps")

    def build(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(steps.Setting, "build", build)
    setting = steps.Setting(batch=128, overrides=[], lpips="default", cudnn_benchmark=False)
    assert steps.measure(bench(tmp_path), None, setting, "ours") is None
    (row,) = rows()
    assert (row["batch"], row["ok"]) == (128, False)
    assert "Tried to allocate" in row["why"]


def test_a_package_that_is_missing_is_a_red_row(monkeypatch, tmp_path, rows):
    machine = importlib.import_module("gpu_parts.machine")
    toy = bench(tmp_path)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: {"xdist": None}[name])
    machine.look(toy)
    found = {row["check"]: row for row in rows() if row["benchmark"] == "check"}
    assert found["package pytest-xdist"]["ok"]
    red = [name for name, row in found.items() if name.startswith("package") and not row["ok"]]
    assert len(red) == len(machine.PACKAGES) - 1 - len(machine.OFFICIAL)  # a rehearsal's official code is a stand-in
    assert found["package pyyaml"]["why"] == "KeyError: 'yaml'; pip install pyyaml"
    backlog = (ROOT / "benchmarks" / "GPU_BACKLOG.md").read_text()
    needed = backlog.partition("On the machine, which needs")[2].partition("no network")[0]
    assert all(package.lower() in needed.lower() for package in set(machine.PACKAGES.values()) - {"lpips"})


def test_the_first_setting_is_that_of_a_run(tmp_path):
    """What train.py does with configs/imagenet_b.yaml: the options of the step, and cuDNN's search."""
    steps, training = importlib.import_module("gpu_parts.steps"), importlib.import_module("training")
    first, gpu = steps.usual(bench(tmp_path)), torch.device("cuda")
    ours = training.configuration("b", 3, first["batch"], gpu, tuple(first["overrides"])).efficiency
    assert ours == yaml_text.load(ROOT / "configs" / "imagenet_b.yaml").efficiency
    with torch.backends.cudnn.flags():  # puts everything back
        steps.precision.setup(gpu, training=True)
        assert first["cudnn_benchmark"] == torch.backends.cudnn.benchmark


def ours_without_timing(monkeypatch, tmp_path, speeds) -> dict:
    """The settings that ``ours`` keeps, where one has the images/s that ``speeds(setting)`` says, 0 if it fails."""
    steps = importlib.import_module("gpu_parts.steps")

    def times_of(_bench, _origin, setting):
        if not (rate := speeds(setting)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {**setting, "ok": True, "images_per_second": {"1024": rate}}

    def build(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory in the kernel table")

    monkeypatch.setattr(steps, "times_of", times_of)
    monkeypatch.setattr(steps, "begin", lambda _: None)
    monkeypatch.setattr(steps.Setting, "build", build)
    found = bench(tmp_path)
    steps.kept(found, "official", {"batch": 1})
    steps.ours(found)
    return {name: steps.kept(found, name) for name in ("shared", "best")}


def test_a_graph_wins_as_other_choices_do(monkeypatch, tmp_path, rows):
    def graphed(setting) -> bool:
        return "efficiency.cuda_graph=step" in setting["overrides"]

    kept = ours_without_timing(monkeypatch, tmp_path, lambda s: (2 + graphed(s)) * s["batch"])
    assert all(graphed(kept[name]) for name in kept)
    assert (kept["shared"]["batch"], kept["best"]["batch"]) == (1, 2)
    kept = ours_without_timing(
        monkeypatch, tmp_path, lambda s: 0 if graphed(s) and s["batch"] == 2 else graphed(s) + s["batch"] ** 2
    )
    assert graphed(kept["shared"])
    assert (graphed(kept["best"]), kept["best"]["batch"]) == (False, 2)
    assert any(row["benchmark"] == "kernel" and not row["ok"] for row in rows())  # out of memory there costs a row


def test_what_won_is_kept_when_a_later_choice_ends_the_part(monkeypatch, tmp_path, rows):
    def speeds(setting):
        if "efficiency.cuda_graph=step" in setting["overrides"]:
            raise KeyboardInterrupt
        return 1 + (setting["lpips"] == "eager")

    with pytest.raises(KeyboardInterrupt):
        ours_without_timing(monkeypatch, tmp_path, speeds)
    steps = importlib.import_module("gpu_parts.steps")
    assert [steps.kept(bench(tmp_path), name)["lpips"] for name in ("shared", "best")] == ["eager", "eager"]


def test_a_step_that_runs_out_of_memory_says_so_as_torch_does(monkeypatch):
    """A run ends with an error of its own; what tries batch sizes must see the one that it catches."""
    training = importlib.import_module("training")
    config = training.configuration("tiny", 3, 2, torch.device("cpu"), ())
    step = training.OurStep(config, training.Origin(config.model, torch.device("cpu"), perceptual=False))

    def accumulate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step.step, "accumulate", accumulate)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory in step 1 with train\.micro_batch=2"):
        step.passes()


def test_what_is_tested_on_the_gpu_is_there():
    """An operation that is new is tested there without being listed."""
    smoke = importlib.import_module("gpu_parts.smoke")
    for test in smoke.TESTS + smoke.TOY_TESTS:
        name, _, function = test.partition("::")
        assert not function or f"def {function}(" in (ROOT / name).read_text(), test
    assert "tests/ops/test_copied_linear.py" in smoke.TESTS
    for name in smoke.NOT_HERE:
        assert (ROOT / "tests" / "ops" / f"{name}.py").is_file(), name


def test_a_process_ends_with_what_it_started(tmp_path):
    """A part that is cut off leaves nothing on the GPU."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import gpu_check, os, pathlib, time
if __name__ == "__main__":
    gpu_check.environment(True)
    os.environ["PYTHONPATH"] += os.pathsep + {str(tmp_path)!r}
    gpu_check.sys.path.append({str(tmp_path)!r})
    context = gpu_check.multiprocessing.get_context("forkserver")
    settings = dict(out={str(tmp_path)!r}, run={str(tmp_path)!r}, rehearse=True, fault="", official=None)
    job = gpu_check.Job(gpu_check.Part("child", 1, "child.run"), settings, context)
    begun = time.monotonic()
    while not pathlib.Path({str(tmp_path)!r}, "begun").exists() and time.monotonic() < begun + 60:
        time.sleep(0.05)
    print(job.join(0.1))
"""
    (tmp_path / "main.py").write_text(code)
    package = ROOT / "benchmarks" / "gpu_parts"
    (tmp_path / "child.py").write_text("")
    child = "import time; time.sleep(2); open('alive', 'w')"
    run = (
        "import subprocess, sys, pathlib\n"
        "def run(bench):\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {child!r}], cwd=bench.out)\n"
        "    (bench.out / 'begun').touch()\n"
        "    child.wait()\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys, types\nmodule = types.ModuleType('gpu_parts.child')\nexec({run!r}, module.__dict__)\n"
        "sys.modules['gpu_parts.child'] = module\n"
    )
    assert package.is_dir()
    result = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.stdout.strip() == "cut off", result.stderr
    import time

    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()
