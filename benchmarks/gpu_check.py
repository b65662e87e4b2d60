"""One command for a GPU machine: build, check every operation, time every component (8 minutes), then whole steps (8).

    make gpu-check        or: python benchmarks/gpu_check.py
    OFFICIAL_DIR=PATH make gpu-check        with the official code, of which PATH is a clone, beside ours

1. builds the compiled operations (setup.py build_ext --inplace); nothing is installed
2. runs tests/ops on the GPU; when one fails, their output is printed and nothing is timed
3. runs bench_kernels.py, each component in a process of its own: rows in benchmarks/results/<device>/kernels.jsonl
4. within a second limit, the tests of the training step on the GPU, then the programs of STEPS: the ladder of
   efficiency options, the official code where OFFICIAL_DIR names it, attention, Muon, LPIPS, the roofline

PARTS=kernels or PARTS=steps runs one half: 1 to 3, or the build and 4. The package lpips is needed for 4.
When the variable OUT names a folder, the device's rows are copied there after every program. Exit status: 0; 1 when
something failed or time ran out; 2 without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])  # the packages need not be installed
LIMIT = 480.0  # seconds for build, tests and components
STEP_LIMIT = 480.0  # seconds for whole steps, after that
WORKERS = 8  # of the tests, which compile some hundred kernels
# Shortest first, so that a limit that is met costs the fewest components.
COMPONENTS = (
    *("update", "corruption", "newton_schulz", "lpips_head"),
    *("qk_norm_rope", "swiglu", "adaln", "adaln_mid", "adaln_tail"),
)

# The most telling first.
STEPS = {
    "step ladder, N = 3": ("bench_step.py", "--models", "b", "--flow-steps", "3"),
    "official code": (
        *("compare_official.py", "--precision", "bf16", "--batch", "64", "--flow-steps", "3", "--rounds", "5"),
        *("--sample-steps", "10", "efficiency.compile=all", "efficiency.cuda_graph=step"),
    ),
    "step ladder, N = 14": ("bench_step.py", "--models", "b", "--flow-steps", "14", "--rounds", "5"),
    "attention": ("bench_attention.py",),
    "lpips": ("bench_lpips.py",),
    "muon": ("bench_muon.py",),
    "roofline": ("roofline.py",),
}


def test_command() -> list[str]:
    parallel = ["-n", str(WORKERS)] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "tests/ops", "-ra", *parallel]


def step_test_command() -> list[str]:
    """What of the training step only a GPU can show: graphs, no waiting, compiled layers, low precision, attention."""
    files = [f"tests/test_{name}.py" for name in ("graph", "efficiency", "compile", "precision", "attention")]
    return [*test_command()[:3], *files, *test_command()[4:]]


def bench_command(component: str) -> list[str]:
    return [sys.executable, "benchmarks/bench_kernels.py", "--device", "cuda", "--only", component]


def step_commands(official: str | None) -> dict[str, list[str]]:
    """The commands of STEPS; comparing with the official code only where its clone is."""
    commands = {}
    for name, (program, *words) in STEPS.items():
        if name == "official code":
            if not official:
                continue
            words += ["--official-dir", official]
        commands[name] = [sys.executable, f"benchmarks/{program}", "--device", "cuda", *words]
    return commands


class Clock:
    """Runs commands within what is left of the limit."""

    def __init__(self, limit: float) -> None:
        self.start, self.limit = time.monotonic(), limit
        path = os.environ.get("PYTHONPATH")
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([SOURCES, path]) if path else SOURCES}

    def passed(self) -> float:
        return time.monotonic() - self.start

    def run(self, title: str, command: list[str]) -> bool:
        """Whether ``command`` succeeded; its output goes through."""
        begun = self.passed()
        left = self.limit - begun
        print(f"== {title}", flush=True)
        try:
            code = subprocess.run(command, cwd=ROOT, env=self.environment, timeout=max(left, 0.1)).returncode
        except subprocess.TimeoutExpired:
            code = f"out of time ({self.limit:.0f} s in all)"
        print(f"== {title}: {'ok' if code == 0 else f'failed: {code}'}, {self.passed() - begun:.0f} s", flush=True)
        return code == 0


def collect(target: Path, since: float) -> list[Path]:
    """Copies the rows written after ``since`` (wall clock) into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    fresh = [path for path in sorted(RESULTS.glob("*/*.jsonl")) if path.stat().st_mtime >= since]
    return [Path(shutil.copy(path, target / f"{path.parent.name}-{path.name}")) for path in fresh]


def check(clock: Clock, out: str | None, official: str | None = None, parts: str = "kernels,steps") -> int:
    begun = time.time()
    failed: list[str] = []

    def time_all(commands: dict[str, list[str]], within: Clock) -> None:
        for name, command in commands.items():
            if not within.run(name, command):
                failed.append(name)
            if out:  # at once: what follows may outlive the machine's loan
                collect(Path(out), begun - 1.0)

    if not clock.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"]):
        return 1
    if "kernels" in parts:
        if not clock.run("tests of every operation", test_command()):
            print("the operations are wrong on this GPU: nothing is timed", flush=True)
            return 1
        time_all({name: bench_command(name) for name in COMPONENTS}, clock)
        print(f"{len(COMPONENTS) - len(failed)} of {len(COMPONENTS)} components timed in {clock.passed():.0f} s")
    if "steps" in parts:
        second = Clock(STEP_LIMIT)
        if not second.run("tests of the training step", step_test_command()):
            failed.append("tests of the training step")
        if not official:
            print("== official code: left out; OFFICIAL_DIR names no clone of it")
        time_all(step_commands(official), second)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    if not find_spec("torch"):
        print(f"gpu-check needs torch, which {sys.executable} does not have: set PYTHON", file=sys.stderr)
        return 2
    import torch  # here: the line above is the answer where it is missing

    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device; torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    environment = os.environ
    parts = environment.get("PARTS", "kernels,steps")
    return check(Clock(LIMIT), environment.get("OUT"), environment.get("OFFICIAL_DIR"), parts)


if __name__ == "__main__":
    sys.exit(main())
