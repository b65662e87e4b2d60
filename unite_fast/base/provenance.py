"""What is needed to repeat a measurement or a run: code, versions, device. No paths, no environment."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from unite_fast import __version__


def git(*arguments: str) -> str:
    """What git says of this code; empty without git, or outside a clone."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
    except OSError:  # no git in this image
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def of(device: torch.device, world_size: int) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "unite_fast": __version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
