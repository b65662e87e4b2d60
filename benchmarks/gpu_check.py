"""What to do with fifteen minutes of one GPU. Everything that can be done without it is done before: `make gpu-pack`.

    make gpu-check OUT=rows                the first command, PLAN below: at most 560 seconds
    make gpu-check OUT=rows AGAIN=1        the second, at once, on the same machine: at most 150 seconds
    make gpu-check REHEARSE=1              both without a GPU, at toy sizes, on a clock that runs faster
    python benchmarks/gpu_report.py rows   afterwards, anywhere: figures, tables and a record from the rows

One deadline, one process per part, in the order of what matters most. A part that fails, hangs or runs out of memory
costs its own rows alone; a check that fails marks figures red and stops no timing. Rows are in OUT/rows.jsonl the
moment they exist, the output of each part in OUT/log.txt when it has ended, what became of them in OUT/summary.txt.

The official code (OFFICIAL_DIR, a clone; or gpu-pack/official) compiles in a process of its own from the first second
on, then gives its memory back to the device and waits for its turn. The kernels of the sweeps are compiled likewise.
The official code takes the first of 128, 64, 48, 32 images that fits, and ours the same, then more where that fits; a
GPU of less than 100 GB takes 32, under a heading of its own. Caches and settings stay in gpu-run/, where the second
command finds compiled code and the winners of the first.

Exit status: 0; 1 when a part failed, was cut off or a check was red; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACK, RUN = ROOT / "gpu-pack", ROOT / "gpu-run"  # what travelled here; what stays here between the commands
DEADLINE, AGAIN = 560.0, 150.0  # seconds of the first and the second command
SPEED = 4.0  # of a rehearsal's clock


class Part(NamedTuple):
    """A function of gpu_parts/, as module.function, and the most seconds that it gets when its turn has come."""

    name: str
    seconds: float
    function: str
    early: bool = False  # started at second 0; waits for its turn when it is prepared
    after: str = ""  # an early part that should be prepared before this one begins, since it would disturb timing
    patience: float = 40.0  # seconds that it waits for that


PLAN = (
    Part("machine", 20, "machine.look"),  # versions, clocks, libraries
    Part("smoke", 45, "smoke.run"),  # each operation against float64 at one shape; a step, fused against eager
    Part("tests", 40, "smoke.tests"),  # graphs and steps that never wait
    Part("ceilings", 30, "ceilings.run", after="official"),  # copy, products in the step's layouts, FP8
    Part("ours", 110, "steps.ours", after="official"),  # batch, LPIPS compiled, cudnn.benchmark, graph, kernel table
    Part("official", 150, "steps.official", early=True),  # as published, then as an expert runs it
    Part("ours again", 25, "steps.ours_again"),  # the same settings: the drift of an hour in minutes
    Part("attention", 50, "kernels.attention"),  # backends by shape: PREFERRED
    Part("compile", 60, "kernels.compile", early=True),  # for the sweeps, on the CPUs
    Part("sweeps", 80, "kernels.sweeps"),  # launches by device: launch_tables/
    Part("options", 50, "steps.options"),  # FP8 and bf16-residual steps
)
SECOND = (Part("winners", 150, "steps.winners"),)  # the best settings and the official code, ABAB in one process


class Clock:
    """Seconds since the start, of which a rehearsal's pass faster."""

    def __init__(self, deadline: float, speed: float) -> None:
        self.start, self.deadline, self.speed = time.monotonic(), deadline, speed

    def passed(self) -> float:
        return (time.monotonic() - self.start) * self.speed

    def left(self) -> float:
        return self.deadline - self.passed()

    def jump(self, seconds: float) -> None:
        """A rehearsal does not wait for a part that was made to hang."""
        self.start -= max(seconds, 0.0) / self.speed


class Job:
    """A part in a process of its own, which it shares with nothing: it can be killed with all that it has started."""

    def __init__(self, part: Part, settings: dict, context: multiprocessing.context.ForkServerContext) -> None:
        from gpu_parts import enter

        self.part = part
        self.log = Path(settings["run"]) / f"{part.name.replace(' ', '-')}.log"
        self.hangs = self.log.with_suffix(".hangs")  # written by a fault
        for path in (self.log, self.hangs):
            path.unlink(missing_ok=True)
        self.prepared, self.turn = context.Event(), context.Event()
        arguments = (part.name, part.function, settings, self.log, self.prepared, self.turn)
        self.process: ForkServerProcess = context.Process(target=enter, args=arguments, daemon=False)
        self.process.start()

    def join(self, seconds: float) -> str:
        """Waits, then ends it: an empty string, or what went wrong."""
        until = time.monotonic() + max(seconds, 0.0)
        while self.process.exitcode is None and time.monotonic() < until and not self.hangs.exists():
            self.process.join(min(0.2, max(until - time.monotonic(), 0.0)))
        late = self.process.exitcode is None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)
        if late:
            return "cut off"
        code = self.process.exitcode or 0
        if code == 0:
            return ""
        if code < 0:
            return signal.Signals(-code).name
        said = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"exit status {code}: {said[-1].strip()[:160]}" if said else f"exit status {code}"


def wait_for(early: Job, clock: Clock, patience: float) -> bool:
    """Whether an early part has prepared itself, or ended, within ``patience`` seconds."""
    until = clock.passed() + patience
    while clock.passed() < min(until, clock.deadline):
        if early.prepared.is_set() or early.process.exitcode is not None:
            return True
        time.sleep(0.05)
    return False


class Orchestra:
    """Runs a plan; ``rows`` is where everything ends up."""

    def __init__(self, plan: tuple[Part, ...], clock: Clock, settings: dict) -> None:
        self.plan, self.clock, self.settings = plan, clock, settings
        self.out = Path(settings["out"])
        self.results: list[dict] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["gpu_parts.preload"])  # torch is imported once, for all parts

    def run(self) -> int:
        early = {part.name: self.begin(part) for part in self.plan if part.early}
        for part in self.plan:
            beside = ""
            if part.after in early and not wait_for(early[part.after], self.clock, part.patience):
                beside = f"while {part.after} was still compiling"
            begun, left = self.clock.passed(), self.clock.left()
            if left < 1 and part.name not in early:
                self.note(part, begun, "not run: out of time")
                continue
            job = early.get(part.name) or self.begin(part)
            job.turn.set()
            why = job.join(min(part.seconds, left) / self.clock.speed)
            if job.hangs.exists():
                self.clock.jump(begun + min(part.seconds, left) - self.clock.passed())
            self.note(part, begun, why, beside)
            with contextlib.suppress(OSError), (self.out / "log.txt").open("a") as log:
                log.write(f"== {part.name}\n{job.log.read_text(errors='replace')}\n")
        return self.summary()

    def begin(self, part: Part) -> Job:
        return Job(part, self.settings | {"fault": self.settings["faults"].get(part.name, "")}, self.context)

    def note(self, part: Part, begun: float, why: str, beside: str = "") -> None:
        seconds = self.clock.passed() - begun
        row = {"benchmark": "part", "part": part.name, "ok": not why, "why": why, "beside": beside}
        row |= {"seconds": round(seconds, 1), "at": round(begun, 1), "rehearsal": self.settings["rehearse"]}
        self.results.append(row)
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{begun:5.0f} s  {'ok' if not why else 'FAILED':7} {part.name:12} {seconds:4.0f} s  {why or beside}",
            flush=True,
        )

    def summary(self) -> int:
        rows = [json.loads(line) for line in (self.out / "rows.jsonl").read_text().splitlines()]
        red = [row for row in rows if row.get("benchmark") == "check" and not row["ok"]]
        lines = [
            f"{'ok' if r['ok'] else 'FAILED':7} {r['part']:12} {r['seconds']:5.0f} s  {r['why'] or r['beside']}"
            for r in self.results
        ]
        lines += [f"RED     {row['check']}: {row['why']}" for row in red]
        lines.append(f"{len(rows)} rows, {self.clock.passed():.0f} s")
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(["== summary", *lines]), flush=True)
        shutil.copy(self.out / "rows.jsonl", Path(self.settings["run"]) / "rows.jsonl")  # OUT may be emptied
        return 1 if red or not all(row["ok"] for row in self.results) else 0


def environment(rehearse: bool) -> None:
    """Of all parts: our packages, those that travelled, caches that the second command finds again."""
    paths = [ROOT / "benchmarks", ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "ops", PACK / "packages"]
    sys.path[:0] = [str(path) for path in paths if str(path) not in sys.path]
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # of parts that were ended
    more = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *more])
    if rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(RUN / "inductor"), "TRITON_CACHE_DIR": str(RUN / "triton")}
        if (PACK / "triton").is_dir():
            shutil.copytree(PACK / "triton", RUN / "triton", dirs_exist_ok=True)
    for library in (PACK / "libraries").glob("*"):  # built where there was time; a build here would take a minute
        target = ROOT / "kernels" / "unite_kernels" / library.name
        if not target.exists():
            shutil.copy(library, target)


def obstacle() -> str:
    """Why nothing can be measured here. (Importing torch would tell as well, seconds later.)"""
    if not find_spec("torch"):
        return f"gpu-check needs torch, which {sys.executable} does not have: set PYTHON"
    try:
        seen = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        seen = False
    return "" if seen else "gpu-check needs a CUDA device and sees none here; REHEARSE=1 runs it without"


def fault(text: str) -> tuple[str, str]:
    part, _, kind = text.partition("=")
    if part not in {p.name for p in (*PLAN, *SECOND)} or kind not in ("hang", "crash", "oom", "red"):
        raise argparse.ArgumentTypeError(f"{text}: give PART=hang, crash, oom or red")
    return part, kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or RUN / "out", help="folder of the rows")
    parser.add_argument("--official-dir", type=Path, default=os.environ.get("OFFICIAL_DIR") or None)
    parser.add_argument("--again", action="store_true", help="the second command")
    parser.add_argument("--deadline", type=float, help=f"seconds; {DEADLINE:.0f}, of the second command {AGAIN:.0f}")
    parser.add_argument("--only", help="parts, comma-separated: " + ", ".join(p.name for p in (*PLAN, *SECOND)))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; --fault breaks parts")
    parser.add_argument("--speed", type=float, default=SPEED, help="of a rehearsal's clock")
    parser.add_argument("--fault", type=fault, action="append", default=[], metavar="PART=hang|crash|oom|red")
    arguments = parser.parse_args()
    if not arguments.rehearse and (why := obstacle()):
        print(why, file=sys.stderr)
        return 2
    deadline = arguments.deadline or (AGAIN if arguments.again else DEADLINE)
    clock = Clock(deadline, arguments.speed if arguments.rehearse else 1.0)
    run = Path(arguments.out).resolve() / "run" if arguments.rehearse else RUN
    for folder in (arguments.out, run):
        Path(folder).mkdir(parents=True, exist_ok=True)
    environment(arguments.rehearse)
    official = arguments.official_dir or (PACK / "official" if (PACK / "official").is_dir() else None)
    settings = {
        "out": str(Path(arguments.out).resolve()), "rehearse": arguments.rehearse, "faults": dict(arguments.fault),
        "run": str(run), "official": official and str(Path(official).resolve()),
        "deadline": clock.start + deadline / clock.speed,
    }  # fmt: skip
    plan = (*PLAN, *SECOND) if arguments.rehearse else SECOND if arguments.again else PLAN
    if arguments.only:
        plan = tuple(part for part in plan if part.name in arguments.only.split(","))
    return Orchestra(plan, clock, settings).run()


if __name__ == "__main__":
    sys.exit(main())
