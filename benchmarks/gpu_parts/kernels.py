"""What the tables that the code reads come from: attention backends by shape, launches of the backward kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bench_attention
import sweep_launches
from harness import PACK, ROOT

from gpu_parts import Bench

OURS = ("math", "efficient", "flash", "cudnn")  # fa2 to fa4 are packages that a machine may lack


def attention(bench: Bench) -> None:
    batch, rounds = (1, 2) if bench.toy else (min(64, bench.batches()[0]), 10)
    names = ["math", "flash"] if bench.toy else list(OURS)
    shapes = [(33, 0)] if bench.toy else [(keys, 0) for keys in bench_attention.KEYS]
    for keys, queries in (*shapes, (33, 16) if bench.toy else bench_attention.PRUNED[::-1]):
        for row in bench_attention.bench(bench.device, batch, keys, 64, rounds, names, queries):
            bench.row("attention", **row)


def compile(bench: Bench) -> None:
    """All kernels that the sweeps launch, into the cache, while the GPU does other things."""
    words = ["--compile", "--processes", "1" if bench.toy else "6", *(["--toy"] if bench.toy else [])]
    words += ["--file", str(Path(bench.settings["run"]) / "launches.json")]
    bench.prepared.set()
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep_launches.py"), *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(said.stdout + said.stderr)
    last = (said.stderr.strip() or said.stdout.strip() or "?").splitlines()[-1][:200]
    bench.check("kernels of the sweeps compile", "" if said.returncode == 0 else last, said=last)


def fitting(bench: Bench) -> Path:
    """The candidates that compile, with how many programs of each a multiprocessor holds: found here, or packed."""
    here, packed = Path(bench.settings["run"]) / "launches.json", PACK / "triton" / "launches.json"
    return packed if packed.is_file() and not here.is_file() else here


def sweeps(bench: Bench) -> None:
    for row in sweep_launches.sweep(bench.device, fitting(bench), bench.toy):
        bench.row("launch", **row)
