"""What is needed to repeat a measurement or a run: code, versions, device. No paths, no environment."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from unite_fast import __version__

ROOT = Path(__file__).resolve().parents[2]
CODE = ("unite_fast", "kernels", "csrc", "train.py", "sample.py")


def git(*arguments: str) -> str:
    """What git says of this code; empty without git, outside a clone, or where the clone around it is another's.

    The clone may belong to another user: nothing of it is run.
    """
    options = ("-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")

    def said(*words: str) -> str:
        try:
            result = subprocess.run(["git", *options, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git in this image
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    top = said("rev-parse", "--show-toplevel")
    return said(*arguments) if top and Path(top).resolve() == ROOT else ""


def of(device: torch.device, world_size: int) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "unite_fast": __version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", *CODE)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
