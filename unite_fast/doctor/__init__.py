"""What this machine can run: python -m unite_fast.doctor [--json] [--config FILE [section.key=value ...]]

A line is OK, WARN or FAIL with how to mend it. With a configuration, what it needs is looked at as well: its images
and how fast they come, its weights, room for its checkpoints, enough cores for its workers. After a FAIL the exit code
is 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable

import torch

from unite_fast import data, modality
from unite_fast.base import launcher
from unite_fast.base.errors import UserError, first_line
from unite_fast.config import Config, batch_split, yaml_text
from unite_fast.doctor import machine
from unite_fast.doctor.machine import Finding, release
from unite_fast.efficiency import compatibility
from unite_fast.plan import throughput
from unite_fast.run import monitor

REQUIRED = ("torchvision", "lpips", "torch_fidelity", "torchdiffeq", "einops", "safetensors", "sklearn", "PIL", "yaml")
# Each with what installs it and, where an import alone says little, one tiny call.
OPTIONAL: dict[str, tuple[str, Callable[[], str] | None]] = {
    "transformer_engine": ("pip install 'transformer-engine[pytorch]'", machine.transformer_engine),
    "nvidia.dali": ("pip install nvidia-dali-cuda130", machine.dali),
    "simplejpeg": ("pip install simplejpeg", None),
    "pyarrow": ("pip install pyarrow", None),
    "tensorboard": ("pip install tensorboard", None),
    "wandb": ("pip install wandb", None),
    "rdkit": ("pip install rdkit", None),
    "pymatgen.core": ("pip install pymatgen", None),
    "smact": ("pip install smact", None),
}


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] < (3, 13)
    mend = "" if supported else "; it is tested on 3.11 and 3.12"
    return Finding("OK" if supported else "WARN", "python", platform.python_version() + mend)


def _torch() -> Finding:
    supported = (2, 11) <= release(torch.__version__) < (2, 16)
    mend = "" if supported else "; install 2.11 to 2.15"
    return Finding("OK" if supported else "FAIL", "torch", torch.__version__ + mend)


def _device() -> Finding:
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        return Finding("WARN", "device", f"CPU, {torch.get_num_threads()} threads on {machine.cores():g} cores: {why}")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(
        sorted({f"{p.name} ({p.total_memory / machine.GIB:.0f} GiB, sm_{p.major}{p.minor})" for p in found})
    )
    if old := [p.name for p in found if p.major < 8]:
        return Finding("FAIL", "device", f"{names}: {old[0]} is too old; bfloat16 needs sm_80")
    return Finding("OK", "device", f"{len(found)} x {names}, CUDA {torch.version.cuda}")


def _required(package: str) -> Finding:
    return Finding("OK", package, str(getattr(importlib.import_module(package), "__version__", "installed")))


def _optional(package: str) -> Finding:
    mend, trial = OPTIONAL[package]
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return Finding("WARN", package, f"not installed (optional): {mend}")
    finding = _required(package)
    return finding._replace(detail=f"{finding.detail}; {trial()}") if trial else finding


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        needed = torch.cuda.is_available()
        mend = "not installed: it comes with the CUDA build of torch, and efficiency.kernels=fused needs it on a GPU"
        return Finding("FAIL" if needed else "WARN", "triton", mend)
    return machine.triton()


def _guarded(check: Callable[[], Finding], what: str, state: str) -> Finding:
    """A broken package raises anything: that is a finding, too."""
    try:
        return check()
    except Exception as error:
        return Finding(state, what, f"{type(error).__name__}: {first_line(error)}; reinstall it")


def examine(room: Finding | None = None, kernels: str = "auto") -> list[Finding]:
    """What this machine can do, in the order in which it is printed. room: that on the disk, for a run of its own;
    kernels: its ``efficiency.kernels``."""
    findings = [_python(), _torch(), _device(), machine.driver()]
    findings += [_guarded(_triton, "triton", "FAIL" if torch.cuda.is_available() else "WARN")]
    findings += [_guarded(machine.collectives, "collectives", "FAIL")]
    findings += machine.libraries(kernels)
    findings += [machine.shared_memory(), machine.open_files(), room or machine.disk()]
    findings += [_guarded(functools.partial(_required, package), package, "FAIL") for package in REQUIRED]
    findings += [_guarded(machine.torchvision_build, "torchvision build", "FAIL")]
    findings += machine.attention_backends()
    findings += [_guarded(functools.partial(_optional, package), package, "WARN") for package in OPTIONAL]
    findings += machine.pretrained()
    return findings


def _asked(what: str, look: Callable[[], str]) -> Finding:
    """What a configuration asks for, looked at as training would."""
    try:
        return Finding("OK", what, look())
    except (UserError, data.WorkerError) as error:
        return Finding("FAIL", what, str(error))


def examine_run(config: Config) -> list[Finding]:
    """Whether what a run needs is there and goes together."""

    def options() -> str:
        world = launcher.world_size()
        batch_split(config.train, world)
        compatibility.check(config.efficiency, config.train, world)
        return "the batch divides, and efficiency and train.strategy go together"

    def source() -> str:
        """Its samples, and their rate, expected and measured, against what training would take."""
        opened = data.open_source(config.data, config.model)
        rate = throughput.supply(config, opened)
        return f"{len(opened):,} {modality.of(config.model).thing}s in {opened.num_classes} classes; {rate}"

    def scores() -> str:
        files = monitor.open_files(config)
        return "what they need is there and fits" if files else "none are asked for"

    return [
        _asked("options", options),
        machine.workers(config.data),
        _asked(f"data {config.data.source}", source),
        machine.perceptual(config.model, config.objective),
        _asked("scores while training", scores),
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--config", metavar="FILE", help="look at what this configuration needs, too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.overrides and not arguments.config:
        raise UserError(f"{arguments.overrides[0]}: an override needs --config FILE")
    config = yaml_text.load(arguments.config, arguments.overrides) if arguments.config else None
    if config is None:
        findings = examine()
    else:
        size = machine.checkpoint_bytes(config.model, config.optim)
        room = machine.disk(config.folder, size, config.train.keep_last)
        findings = examine(room, config.efficiency.kernels) + examine_run(config)
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:5}{finding.what:22}{finding.detail}")
    return 1 if any(finding.state == "FAIL" for finding in findings) else 0
