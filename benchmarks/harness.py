"""Timing and record keeping shared by the benchmarks.

Variants of one thing are timed in turn within each round, so that whatever else the machine does meets all of them;
ratios are taken within a round and their median is reported. A row says where, on what and from which commit it came.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from unite_fast.base.provenance import git

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACK = ROOT / "gpu-pack"  # what travels to a lent machine, which has no history of git: gpu_pack.py


class Target:
    """Where rows go: by device and benchmark into RESULTS, or all into one file, as gpu_check.py has it."""

    file: Path | None = None
    facts: ClassVar[dict[str, object]] = {}  # in every row
    written: Callable[[], None] = staticmethod(lambda: None)  # called when a row is there


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80, each an observed value."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {name: ordered[round(q * last)] for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def _answer(*command: str) -> str | None:
    """What a program prints, or None when it is missing or fails: rows that took minutes must not be lost to it."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return models[0].strip() if models else platform.machine()


def _dirty() -> bool:
    sources = ("kernels", "csrc", "benchmarks/*.py", "unite_fast", "configs", "setup.py", "train.py")
    return bool(git("status", "--porcelain", "--", *sources))


@functools.cache
def _source() -> dict[str, object]:
    """The commit of the sources and whether they differ from it; of a copy without history what was packed with it."""
    if commit := git("rev-parse", "HEAD"):
        return {"commit": commit, "dirty": _dirty()}
    packed = PACK / "commit.json"
    return json.loads(packed.read_text()) if packed.is_file() else {"commit": None, "dirty": None}


def environment(device: torch.device) -> dict:
    """What a row must carry: date, commit, dirty flag, device, driver and versions."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds")} | _source() | _machine(device)


@functools.cache
def _machine(device: torch.device) -> dict[str, object]:
    driver = None
    if device.type == "cuda" and (said := _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")):
        driver = said.split()[0]
    triton = None
    if find_spec("triton"):
        import triton as module

        triton = module.__version__
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _milliseconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) * 1e3 / calls


def interleaved(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 25,
    sample_ms: float = 4.0,
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds per call of every variant, one sample a round, each sample long enough for the clock.

    warmup: calls of each before its first sample, and again to find its length. 0: a sample is one call.
    """
    calls = dict.fromkeys(variants, 1)
    for name, function in variants.items():
        for _ in range(warmup):
            function()
        if warmup:
            once = min(_milliseconds(function, 1, device) for _ in range(warmup))
            calls[name] = max(1, round(sample_ms / once))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        order = list(variants)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(_milliseconds(variants[name], calls[name], device))
    return times


def launches(function: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster ``fast`` is than ``slow``: quantiles of the ratios within rounds."""
    return quantiles([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def copy_bandwidth(device: torch.device, rounds: int = 15) -> float:
    """GB/s, read and written, of a copy too large for the caches (256 MB; 1 GB on a GPU): the yardstick of kernels."""
    count = (256 if device.type == "cuda" else 64) * 2**20
    source, target = (torch.ones(count, device=device) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.nbytes / quantiles(times)["median"] / 1e6


def require_equal(name: str, ours: list[torch.Tensor], reference: list[torch.Tensor], tolerance: float) -> None:
    """Stops the program unless each value is within ``tolerance`` of the reference's largest."""
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        error = (a.double() - b.double()).abs().max().item() / b.double().abs().max().item()
        if not error < tolerance:
            raise SystemExit(f"{name}: value {i} is off by {error:.2g} of its largest; no speed is reported")


def record(benchmark: str, device: torch.device, rows: list[dict]) -> Path:
    """Append rows to results/<device>/<benchmark>.jsonl, or to Target.file, at once, and return that path."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = Target.file or folder / f"{benchmark}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment(device) | {"benchmark": benchmark} | Target.facts
    with path.open("a") as file:
        file.writelines(json.dumps(where | row) + "\n" for row in rows)
    Target.written()
    return path
