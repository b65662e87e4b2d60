"""One command for a GPU machine: build, check every operation, time every component (8 minutes), then whole steps (8).

    make gpu-check        or: python benchmarks/gpu_check.py
    OFFICIAL_DIR=PATH make gpu-check        with the official code, of which PATH is a clone, beside ours

1. builds the compiled operations (setup.py build_ext --inplace); nothing is installed
2. runs tests/ops on the GPU; a component whose tests fail is not timed, none is when it cannot be told whose they are
3. runs bench_kernels.py, each component in a process of its own: rows in benchmarks/results/<device>/kernels.jsonl
4. within a second limit, the tests of the training step on the GPU, then the programs of STEPS: the ladder of
   efficiency options, the official code where OFFICIAL_DIR names it, attention, Muon, LPIPS, the roofline

What fails or takes too long costs its own rows alone; the last lines say what became of each part. PARTS=kernels or
PARTS=steps runs one half: 1 to 3, or the build and 4. The package lpips is needed for 4. When the variable OUT names a
folder, the device's rows and each program's output are copied there after every program. Exit status: 0; 1 when
something failed or time ran out; 2 without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])  # the packages need not be installed
LIMIT = 480.0  # seconds for build, tests and components
STEP_LIMIT = 480.0  # seconds for whole steps, after that
MOST = 240.0  # seconds of one program, so that one that hangs leaves time for others
WORKERS = 8  # of the tests, which compile some hundred kernels
# Shortest first, so that a limit that is met costs the fewest components.
COMPONENTS = (
    *("update", "corruption", "newton_schulz", "lpips_head"),
    *("qk_norm_rope", "swiglu", "adaln", "adaln_mid", "adaln_tail"),
)
# Whose tests a file has; of tests/ops/test_fused_ops.py a test names its component.
TESTED = {
    "test_multi_tensor": ("update",),
    "test_corruption": ("corruption",),
    "test_newton_schulz": ("newton_schulz",),
    "test_lpips_head": ("lpips_head",),
    "test_fused_ops": COMPONENTS[4:],
    **dict.fromkeys(("test_split_linear", "test_extension", "test_gpu_check", "test_bytes"), ()),  # of none on a GPU
}

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


def launch(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, list[str]]:
    """The exit status, None when time ran out, and the lines of the output, which go through as they come.

    The processes that it has started end with it: left behind, they would slow down what is timed next.
    """
    lines: list[str] = []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip

    def forward() -> None:
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    code: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(seconds, 0.1))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(10)
    return code, lines


class Result(NamedTuple):
    """Of one part: "ok", "FAILED" or "not run"."""

    state: str
    name: str
    seconds: float
    why: str = ""

    def line(self) -> str:
        return f"{self.state:8} {self.name:30} {self.seconds:5.0f} s  {self.why}".rstrip()


class Clock:
    """Runs commands within what is left of the limit."""

    def __init__(self, limit: float) -> None:
        self.start, self.limit = time.monotonic(), limit
        path = os.environ.get("PYTHONPATH")
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([SOURCES, path]) if path else SOURCES}

    def passed(self) -> float:
        return time.monotonic() - self.start

    def run(self, title: str, command: list[str]) -> tuple[Result, list[str]]:
        """What became of ``command``, and its output, which goes through as well."""
        begun = self.passed()
        given = min(MOST, self.limit - begun)
        if given <= 0:
            return Result("not run", title, 0.0, f"out of time ({self.limit:.0f} s in all)"), []
        print(f"== {title}", flush=True)
        code, lines = launch(command, self.environment, given)
        why = "" if code == 0 else f"out of time ({given:.0f} s)" if code is None else f"exit status {code}"
        if why and (last := next((text for line in reversed(lines) if (text := line.strip())), "")):
            why += f": {last[:160]}"
        result = Result("FAILED" if why else "ok", title, self.passed() - begun, why)
        print(f"== {result.line()}", flush=True)
        return result, lines


def red_components(lines: list[str]) -> set[str]:
    """The components that pytest's summary says failures of; all of them when a line names none that is known."""
    red: set[str] = set()
    for line in lines:
        if found := re.match(r"(?:FAILED|ERROR) tests/ops/(\w+)\.py(.*)", line):
            theirs = TESTED.get(found[1], COMPONENTS)
            words = re.split(r"[\[\]-]", found[2].split(" - ")[0])
            red |= set(theirs).intersection(words) or set(theirs)
    return red if any(line.startswith(("FAILED tests/ops/", "ERROR tests/ops/")) for line in lines) else set(COMPONENTS)


def collect(target: Path, since: float) -> list[Path]:
    """Copies the rows written after ``since`` (wall clock) into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    fresh = [path for path in sorted(RESULTS.glob("*/*.jsonl")) if path.stat().st_mtime >= since]
    return [Path(shutil.copy(path, target / f"{path.parent.name}-{path.name}")) for path in fresh]


def check(clock: Clock, out: str | None, official: str | None = None, parts: str = "kernels,steps") -> int:
    begun = time.time()
    results: list[Result] = []

    def do(within: Clock, name: str, command: list[str]) -> tuple[Result, list[str]]:
        result, lines = within.run(name, command)
        results.append(result)
        if out:  # at once: what follows may run out of time
            collect(Path(out), begun - 1.0)
            (Path(out) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.log").write_text("".join(lines))
        return result, lines

    built, lines = do(clock, "build", [sys.executable, "setup.py", "build_ext", "--inplace"])
    if missing := [line.strip() for line in lines if " is not built: " in line]:  # which is no failure of setup.py's
        results[-1] = built._replace(state="FAILED", why="; ".join(missing))
    if "kernels" in parts:
        tested, lines = do(clock, "tests of every operation", test_command())
        red = set() if tested.state == "ok" else red_components(lines)
        for name in COMPONENTS:
            if name in red:
                results.append(Result("not run", name, 0.0, "its tests failed, so nothing is timed"))
            else:
                do(clock, name, bench_command(name))
    if "steps" in parts:
        second = Clock(STEP_LIMIT)
        do(second, "tests of the training step", step_test_command())
        if not official:
            print("== official code: left out; OFFICIAL_DIR names no clone of it")
        for name, command in step_commands(official).items():
            do(second, name, command)
    print("== summary\n" + "\n".join(result.line() for result in results), flush=True)
    return 0 if all(result.state == "ok" for result in results) else 1


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
