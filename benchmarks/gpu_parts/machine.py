"""What the machine is, and whether what travelled with us loads on it."""

from __future__ import annotations

import platform
import subprocess

import torch

from gpu_parts import Bench
from unite_kernels import extension


def look(bench: Bench) -> None:
    device = bench.device
    facts: dict[str, object] = {"python": platform.python_version(), "torch_cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
        facts |= {"cudnn": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability(device)}
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu,memory.used"
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        facts["clocks"] = dict(zip(query.split(","), said.stdout.strip().split(", "), strict=False))
    bench.row("machine", **facts)
    for kind in ("cpu", "cuda"):
        if kind == "cpu" or device.type == "cuda":
            bench.check(f"library {kind}", extension.obstacle(kind) or extension.stale(kind))
