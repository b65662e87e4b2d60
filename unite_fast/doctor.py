"""What this machine can run: python -m unite_fast.doctor [--json] [--config FILE [section.key=value ...]].

A line is OK, WARN or FAIL with how to mend it. With a configuration, its source of images is opened and timed, too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from unite_fast import config_io, data, throughput
from unite_fast.command import run
from unite_fast.config import Config, UserError
from unite_kernels import extension

OPTIONAL = {
    "triton": "comes with the CUDA build of torch",
    "flash_attn": "pip install 'unite-fast[flash]'",
    "transformer_engine": "pip install 'unite-fast[fp8]'",
    "nvidia.dali": "pip install 'unite-fast[dali]'",
    "tensorboard": "pip install 'unite-fast[log]'",
    "wandb": "pip install 'unite-fast[log]'",
}
REQUIRED = ("torchvision", "lpips", "torch_fidelity", "torchdiffeq", "einops", "safetensors", "sklearn", "PIL", "yaml")


class Finding(NamedTuple):
    state: str  # OK, WARN or FAIL
    what: str
    detail: str


def _version(package: str) -> str:
    module = importlib.import_module(package)
    return str(getattr(module, "__version__", "installed"))


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "OK" if supported else "WARN",
        "python",
        platform.python_version() + ("" if supported else ": tested on 3.11 and 3.12"),
    )


def _torch() -> Finding:
    release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    supported = (2, 11) <= release < (2, 15)
    return Finding(
        "OK" if supported else "FAIL", "torch", torch.__version__ + ("" if supported else ": needs 2.11 to 2.14")
    )


def _device() -> Finding:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding(
            "OK", "device", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
        )
    why = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
    return Finding("WARN", "device", f"CPU, {torch.get_num_threads()} threads: {why}")


def _required(package: str) -> Finding:
    try:
        return Finding("OK", package, _version(package))
    except Exception as error:  # a broken binary package raises anything
        return Finding("FAIL", package, f"{type(error).__name__}: {str(error).splitlines()[0]}; reinstall it")


def _optional(package: str) -> Finding:
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return Finding("WARN", package, f"not installed (optional): {OPTIONAL[package]}")
    finding = _required(package)
    return finding if finding.state == "OK" else finding._replace(state="WARN")


def _libraries() -> list[Finding]:
    findings = []
    for name, status in extension.status().items():
        needed = name == "cpu" or torch.cuda.is_available()
        state = "OK" if status.present else ("FAIL" if needed else "WARN")
        findings.append(Finding(state, f"C++ library ({name})", status.reason or "loads"))
    return findings


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("WARN", "shared memory", "no /dev/shm; set data.workers=0 if loading workers die")
    free = shutil.disk_usage("/dev/shm").free / 2**30
    state = "OK" if free > 1 else "WARN"
    return Finding(
        state, "shared memory", f"{free:.1f} GiB free" + ("" if free > 1 else "; loading workers want 1 GiB")
    )


def _data(config: Config) -> Finding:
    """Images/s of the configured source, expected and measured, against what training would take."""
    try:
        source = data.open_source(config.data, config.model)
        return Finding("OK", f"data {config.data.source}", throughput.supply(config, source))
    except (UserError, data.WorkerError) as error:
        return Finding("FAIL", f"data {config.data.source}", str(error))


def examine(config: Config | None = None) -> list[Finding]:
    """All findings, in the order in which they are printed."""
    checks: list[Callable[[], Finding]] = [_python, _torch, _device, _shared_memory]
    findings = [check() for check in checks]
    findings += [_required(package) for package in REQUIRED]
    findings += _libraries() + [_optional(package) for package in OPTIONAL]
    return findings + ([_data(config)] if config else [])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m unite_fast.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--config", metavar="FILE", help="time this configuration's source of images")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.overrides and not arguments.config:
        raise UserError(f"{arguments.overrides[0]}: an override needs --config FILE")
    config = config_io.load(arguments.config, arguments.overrides) if arguments.config else None
    findings = examine(config)
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:5}{finding.what:22}{finding.detail}")
    return 1 if any(finding.state == "FAIL" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(run(main))
