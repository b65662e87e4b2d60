"""The order of benchmarks/gpu_check.py: no time without green tests, rows copied, a clear line without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
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


def commands_run(gpu_check, monkeypatch, failing: str | None) -> list[str]:
    """The commands of one run, in which the one holding the word ``failing`` fails; benchmarks write a row."""
    seen = []

    def run(command, **options):
        seen.append(" ".join(command[1:]))
        program = Path(command[1]).stem.removeprefix("bench_")
        if "--device" in command:
            (folder := gpu_check.RESULTS / "some-gpu").mkdir(parents=True, exist_ok=True)
            with (folder / f"{program}.jsonl").open("a") as file:
                file.write(command[-1] + "\n")
        return subprocess.CompletedProcess(command, 1 if failing and failing in seen[-1] else 0)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    return seen


def test_nothing_is_timed_when_a_test_fails(gpu_check, monkeypatch, capsys):
    seen = commands_run(gpu_check, monkeypatch, "tests/ops")
    assert gpu_check.check(gpu_check.Clock(9.0), None) == 1
    assert len(seen) == 2
    assert "nothing is timed" in capsys.readouterr().out


def test_every_component_is_timed_and_its_rows_are_copied(gpu_check, monkeypatch, tmp_path):
    seen = commands_run(gpu_check, monkeypatch, None)
    assert gpu_check.check(gpu_check.Clock(9.0), str(tmp_path / "out")) == 0
    assert seen[0] == "setup.py build_ext --inplace"
    assert "pytest tests/ops" in seen[1]
    rows = (tmp_path / "out" / "some-gpu-kernels.jsonl").read_text().split()
    assert rows == list(gpu_check.COMPONENTS)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
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
    assert "failed: swiglu" in capsys.readouterr().out


def test_a_half_alone(gpu_check, monkeypatch):
    seen = commands_run(gpu_check, monkeypatch, None)
    assert gpu_check.check(gpu_check.Clock(9.0), None, None, "steps") == 0
    assert "tests/test_graph.py" in seen[1]
    assert len(seen) == 2 + len(gpu_check.step_commands(None))


def test_a_command_ends_with_the_time_that_is_left(gpu_check, capsys):
    assert not gpu_check.Clock(0.2).run("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert "out of time" in capsys.readouterr().out


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
