"""What the machine is, and whether what travelled with us loads on it."""

from __future__ import annotations

import importlib
import platform
import subprocess

import torch

from gpu_parts import Bench
from unite_kernels import extension

# What the parts import and what installs it; xdist for the tests.
PACKAGES = {
    "triton": "triton", "torchvision": "torchvision", "lpips": "lpips", "pytest": "pytest", "xdist": "pytest-xdist",
    "einops": "einops", "safetensors": "safetensors", "yaml": "pyyaml", "timm": "timm", "torchdiffeq": "torchdiffeq",
}  # fmt: skip
OFFICIAL = ("timm",)  # the official code alone


def obstacle(module: str) -> str:
    """Why a package of PACKAGES cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # one that is broken fails in ways of its own
        said = (str(error).splitlines() or [""])[0][:160]
        return f"{type(error).__name__}: {said}; pip install {PACKAGES[module]}"
    return ""


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
            bench.check(f"library {kind}", extension.obstacle(kind))
    for module, package in PACKAGES.items():
        if module not in OFFICIAL or (bench.official and not bench.toy):  # a rehearsal's official code is a stand-in
            bench.check(f"package {package}", obstacle(module))
