"""The order of benchmarks/gpu_check.py: no time without green tests, rows copied, a clear line without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checking import DEVICE

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_check", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def commands_run(gpu_check, monkeypatch, failing: str | None, said: str = "no such kernel\n") -> list[str]:
    """The commands of one run, in which the one holding the word ``failing`` says ``said`` and fails; benchmarks write
    a row."""
    seen = []

    def launch(command, environment, seconds):
        seen.append(" ".join(command[1:]))
        program = Path(command[1]).stem.removeprefix("bench_")
        if "--device" in command:
            (folder := gpu_check.RESULTS / "some-gpu").mkdir(parents=True, exist_ok=True)
            with (folder / f"{program}.jsonl").open("a") as file:
                file.write(command[-1] + "\n")
        return (1, said.splitlines(keepends=True)) if failing and failing in seen[-1] else (0, ["fine\n"])

    monkeypatch.setattr(gpu_check, "launch", launch)
    return seen


FUSED = "FAILED tests/ops/test_fused_ops.py::"
BLOCKS = {"qk_norm_rope", "swiglu", "adaln", "adaln_mid", "adaln_tail"}


@pytest.mark.parametrize(
    ("said", "red"),
    [
        ("collection ended in a crash\n", None),
        ("ERROR tests/ops/test_fused_ops.py - ImportError\n", BLOCKS),
        (f"{FUSED}test_float32_values[triton-shape0-adaln] - AssertionError: swiglu\n", {"adaln"}),
        (f"{FUSED}test_a[swiglu-triton]\n{FUSED}test_a[adaln_mid-triton]\n", {"swiglu", "adaln_mid"}),
        ("FAILED tests/ops/test_multi_tensor.py::test_ema_alone[cuda-fused] - assert 0\n", {"update"}),
        ("FAILED tests/ops/test_split_linear.py::test_values[rows0]\n", set()),
        ("FAILED tests/ops/test_new.py::test_values\n", None),
    ],
    ids=["crash", "file", "parameter", "two", "update", "none", "unknown"],
)  # fmt: skip
def test_what_is_wrong_is_not_timed(gpu_check, monkeypatch, capsys, said, red):
    """Components whose tests fail; all of them when it cannot be told. Whole steps have their own checks."""
    red = set(gpu_check.COMPONENTS) if red is None else red
    seen = commands_run(gpu_check, monkeypatch, "tests/ops", said)
    assert gpu_check.check(gpu_check.Clock(9.0), None) == 1
    timed = {command.split()[-1] for command in seen if "bench_kernels" in command}
    assert timed == set(gpu_check.COMPONENTS) - red
    assert len(seen) == 3 + len(timed) + len(gpu_check.step_commands(None))
    summary = capsys.readouterr().out.partition("== summary")[2]
    assert "FAILED   tests of every operation" in summary
    assert summary.count("not run ") == summary.count("its tests failed, so nothing is timed") == len(red)


def test_every_component_is_timed_and_its_rows_are_copied(gpu_check, monkeypatch, tmp_path):
    seen = commands_run(gpu_check, monkeypatch, None)
    assert gpu_check.check(gpu_check.Clock(9.0), str(tmp_path / "out")) == 0
    assert seen[0] == "setup.py build_ext --inplace"
    assert "pytest tests/ops" in seen[1]
    rows = (tmp_path / "out" / "some-gpu-kernels.jsonl").read_text().split()
    assert rows == list(gpu_check.COMPONENTS)
    assert {p.name for p in (tmp_path / "out").glob("*.jsonl")} == {
        f"some-gpu-{name}.jsonl" for name in ("kernels", "step", "attention", "lpips", "muon", "roofline")
    }
    assert not any("compare_official" in command for command in seen)


def test_the_official_code_is_compared_where_its_clone_is(gpu_check, monkeypatch):
    seen = commands_run(gpu_check, monkeypatch, None)
    assert gpu_check.check(gpu_check.Clock(9.0), None, "clones/official") == 0
    assert len(seen) == 3 + len(gpu_check.COMPONENTS) + len(gpu_check.STEPS)
    (command,) = (c for c in seen if "compare_official" in c)
    assert "--official-dir clones/official" in command


def test_the_steps_name_programs_and_options_that_exist(gpu_check):
    for name, command in gpu_check.step_commands(None).items():
        text = SOURCE.with_name(Path(command[1]).name).read_text()
        assert all(f'"{word}"' in text for word in command if word.startswith("--")), name


def test_a_component_that_fails_is_named_and_the_others_still_run(gpu_check, monkeypatch, capsys):
    seen = commands_run(gpu_check, monkeypatch, "swiglu")
    assert gpu_check.check(gpu_check.Clock(9.0), None) == 1
    assert len(seen) == 3 + len(gpu_check.COMPONENTS) + len(gpu_check.step_commands(None))
    summary = capsys.readouterr().out.partition("== summary")[2]
    assert summary.count("FAILED ") == 1
    assert "exit status 1: no such kernel" in summary
    assert summary.count("ok  ") == len(seen) - 1


def test_a_library_that_is_not_built_is_a_failure(gpu_check, monkeypatch, capsys):
    def launch(command, environment, seconds):
        return 0, ["unite_kernels._C_cuda is not built: nvcc is not on PATH\n"] if command[1] == "setup.py" else []

    monkeypatch.setattr(gpu_check, "launch", launch)
    assert gpu_check.check(gpu_check.Clock(9.0), None) == 1
    summary = capsys.readouterr().out.partition("== summary")[2]
    assert summary.count("FAILED ") == 1
    assert "nvcc is not on PATH" in summary


def test_a_half_alone(gpu_check, monkeypatch):
    seen = commands_run(gpu_check, monkeypatch, None)
    assert gpu_check.check(gpu_check.Clock(9.0), None, None, "steps") == 0
    assert "tests/test_graph.py" in seen[1]
    assert len(seen) == 2 + len(gpu_check.step_commands(None))


def test_a_command_ends_with_the_time_that_is_left_and_so_do_its_children(gpu_check, tmp_path):
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    begun = time.monotonic()
    result, lines = gpu_check.Clock(1.0).run("sleep", [sys.executable, "-c", code])
    assert time.monotonic() - begun < 1.4
    assert (result.state, lines) == ("FAILED", ["begun\n"])
    assert "out of time (1 s): begun" in result.why
    time.sleep(1.0)
    assert not (tmp_path / "alive").exists()


def test_nothing_begins_when_no_time_is_left(gpu_check):
    result, _ = gpu_check.Clock(0.0).run("never", ["no such program"])
    assert result.state == "not run"


def test_a_program_that_hangs_leaves_time_for_the_others(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "MOST", 0.3)
    result, _ = gpu_check.Clock(60.0).run("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert result.state == "FAILED"
    assert result.seconds < 5


def test_output_of_every_program_is_kept(gpu_check, monkeypatch, tmp_path):
    commands_run(gpu_check, monkeypatch, "swiglu")
    gpu_check.check(gpu_check.Clock(9.0), str(tmp_path))
    assert (tmp_path / "swiglu.log").read_text() == "no such kernel\n"
    assert (tmp_path / "tests-of-the-training-step.log").read_text() == "fine\n"


def test_the_components_are_those_of_the_benchmark(gpu_check):
    command = [sys.executable, SOURCE.with_name("bench_kernels.py"), "--help"]
    environment = gpu_check.Clock(0.0).environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    listed = result.stdout.partition("--only {")[2].partition("}")[0]
    assert set("".join(listed.split()).split(",")) == set(gpu_check.COMPONENTS)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_check, capsys):
    assert gpu_check.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
