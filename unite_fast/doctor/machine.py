"""What the doctor looks at: builds, driver, collectives, cores, memory, limits, disk, and the files of a configuration.

Each check is a function that returns one Finding; whatever a broken package raises is left to the caller.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import resource
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from unite_fast.fetch import WEIGHTS
from unite_fast.layers import attention
from unite_fast.modality.lpips import load_perceptual
from unite_fast.model.unite import UNITE
from unite_fast.optim import ema
from unite_fast.optim.groups import split_parameters
from unite_kernels import extension, probe

GIB = 2**30
OPEN_FILES = 4096  # shards, worker pipes and sockets of one rank
FREE_GIB = 20  # where no configuration tells how large a checkpoint is


class Finding(NamedTuple):
    state: str  # OK, WARN or FAIL
    what: str
    detail: str


def release(text: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(int(x) for x in text.split("+")[0].split(".")[:2])


# --- what is installed -----------------------------------------------------------------------------------------------


def torchvision_build() -> Finding:
    """torchvision 0.N + 15 belongs to torch 2.N; another one has no operators, which only shows when one is called.

    From 0.29 on it goes with torch 2.14 and whatever comes after, by its own requirements.
    """
    torch_release, found = release(torch.__version__), version("torchvision")
    lasting = torch_release >= (2, 14)
    wanted = f"0.{torch_release[1] + 15}"
    mend = "pip install 'torchvision>=0.29'" if lasting else f"pip install 'torchvision=={wanted}.*'"
    belongs = release(found) >= (0, 29) if lasting else release(found) == release(wanted)
    if torch_release[0] == 2 and not belongs:
        return Finding("FAIL", "torchvision build", f"{found} does not belong to torch {torch.__version__}; {mend}")
    module = importlib.import_module("torchvision")
    cuda = str(getattr(getattr(module, "version", None), "cuda", None) or "")
    if cuda.isdigit():  # some builds say 13000 for 13.0
        cuda = _dotted(int(cuda))
    if torch.version.cuda and cuda and cuda != torch.version.cuda:
        detail = f"for CUDA {cuda}, torch is for {torch.version.cuda}; {mend} from where torch comes from"
        return Finding("FAIL", "torchvision build", detail)
    kept = module.ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.9, 0.8]), 0.5)
    if kept.tolist() != [0]:
        return Finding("FAIL", "torchvision build", f"its operators give wrong results; {mend}")
    return Finding("OK", "torchvision build", f"{found} belongs to this torch; its operators run")


def _dotted(number: int) -> str:
    """13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> int:
    """The newest CUDA that the driver knows, 13000 for 13.0; 0 without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    return found.value if library.cuDriverGetVersion(ctypes.byref(found)) == 0 else 0


def driver() -> Finding:
    """Within a major version CUDA runs on older drivers, too."""
    found = driver_version()
    if not found:
        return Finding("WARN", "driver", "no NVIDIA driver; training runs on the CPU")
    has = _dotted(found)
    if torch.version.cuda is None:
        return Finding(
            "WARN", "driver", f"for CUDA {has}, but torch {torch.__version__} has no CUDA; install its build"
        )
    if found // 1000 < release(torch.version.cuda)[0]:
        detail = f"for CUDA {has}, torch needs {torch.version.cuda}; update the driver or install an older build"
        return Finding("FAIL", "driver", detail)
    return Finding("OK", "driver", f"for CUDA {has}; torch has {torch.version.cuda}")


def collectives() -> Finding:
    """A sum over a group of one, with the backend that training would use."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        return Finding(
            "FAIL", "collectives", f"this torch has no {backend}, so ranks cannot talk; install another build"
        )
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.ones((), device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        if backend == "nccl":
            backend += " " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
        return Finding("OK", "collectives", f"{backend}: a sum over one rank gives {float(value):g}")
    finally:
        dist.destroy_process_group()


def triton() -> Finding:
    return Finding("OK", "triton", f"{version('triton')}; {probe.triton_works()}")


def libraries(kernels: str = "auto") -> list[Finding]:
    """The compiled operations: built, loadable, and of the sources beside them. kernels: ``efficiency.kernels``."""
    findings = []
    for kind, status in extension.status().items():
        used = (kind == "cpu" or torch.cuda.is_available()) and (kernels == "fused" or extension.is_built(kind))
        state, detail = ("OK", "loads") if status.present else ("FAIL" if used else "WARN", status.reason)
        findings.append(Finding(state, f"C++ library ({kind})", detail))
    return findings


# --- the machine -----------------------------------------------------------------------------------------------------


def cores() -> float:
    """CPU cores that this process may use: its affinity, or less where a container has a quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(allowed, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return allowed


def shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("WARN", "shared memory", "no /dev/shm; set data.workers=0 if loading workers die")
    free = shutil.disk_usage("/dev/shm").free / GIB
    mend = "" if free > 1 else "; loading workers want 1 GiB: docker run --shm-size=8g"
    return Finding("WARN" if mend else "OK", "shared memory", f"{free:.1f} GiB free{mend}")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding("OK", "open files", f"at most {soft}")
    return Finding("WARN", "open files", f"at most {soft}; ulimit -n {OPEN_FILES} (the system allows {hard})")


def checkpoint_bytes(model_config: ModelConfig, optim: OptimConfig) -> int:
    """Of one checkpoint: weights, averages, momentum or two moments, all float32."""
    with torch.device("meta"):
        model = UNITE(model_config)
    muon, adamw = split_parameters(model, optim.muon)
    numbers = sum(t.numel() for t in model.state_dict().values())
    matrices, others = (sum(p.numel() for p in part.values()) for part in (muon, adamw))
    averages = len(ema.names(optim)) * (matrices + others)
    return 4 * (numbers + averages + matrices + 2 * others)


def disk(folder: Path | None = None, checkpoint: int = 0, kept: int = 0) -> Finding:
    """Room for the checkpoints, of so many bytes, that a run keeps, the one being written, and one being removed."""
    place = (folder or Path.cwd()).absolute()
    while not place.exists():
        place = place.parent
    free, wanted, what = shutil.disk_usage(place).free / GIB, float(FREE_GIB), "a run of UNITE-B"
    if folder:
        one = checkpoint / GIB
        wanted, what = one * (kept + 2), f"{kept + 2} checkpoints of {one:.2g} GiB"
    if free >= wanted:
        return Finding("OK", "disk", f"{free:.0f} GiB free")
    return Finding("WARN", "disk", f"{free:.1f} GiB free, {what} want {wanted:.1f}; free some or set run_dir=PATH")


def pretrained() -> list[Finding]:
    """The known weights, where the command puts them or in this folder."""
    findings = []
    for name, known in WEIGHTS.items():
        path = next((p for p in (Path("weights") / known.file, Path(known.file)) if p.is_file()), None)
        if path is None:
            found = Finding("WARN", f"weights {name}", f"not in weights/: python -m unite_fast fetch {name}")
        elif (digest := file_sha256(path)) != known.sha256:
            found = Finding(
                "FAIL", f"weights {name}", f"{path} has sha256 {digest[:12]}...; remove it and fetch it again"
            )
        else:
            found = Finding("OK", f"weights {name}", f"{path} has the published sha256")
        findings.append(found)
    return findings


# --- a configuration -------------------------------------------------------------------------------------------------


def workers(reading: DataConfig) -> Finding:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (
        torch.cuda.device_count() if torch.cuda.is_available() else 1
    )
    wanted, have = reading.workers * ranks, cores()
    said = f"{reading.workers} workers x {ranks} ranks on {have:g} cores"
    if wanted <= have or not reading.has_workers:
        return Finding("OK", "data workers", said)
    return Finding("WARN", "data workers", f"{said}; set data.workers={max(1, math.floor(have / ranks))}")


def perceptual(model: ModelConfig, objective: ObjectiveConfig) -> Finding:
    """The trunk's file with its hash, loaded as training would."""
    if objective.perceptual_weight == 0:
        return Finding("OK", "LPIPS trunk", "not needed: objective.perceptual_weight is 0")
    try:
        load_perceptual(objective, model.channels)
    except UserError as error:
        return Finding("FAIL", "LPIPS trunk", str(error))
    return Finding("OK", "LPIPS trunk", f"{objective.perceptual_trunk} has the expected sha256 and loads")


# --- optional packages: one tiny call each ---------------------------------------------------------------------------


def transformer_engine() -> str:
    module: Any = importlib.import_module("transformer_engine.pytorch")
    if not torch.cuda.is_available():
        return "imports; no GPU to try it on"
    layer = module.Linear(32, 32, device="cuda")
    layer(torch.zeros(16, 32, device="cuda")).sum().backward()
    return "a layer runs"


def dali() -> str:
    pipeline: Any = importlib.import_module("nvidia.dali.pipeline")
    functions: Any = importlib.import_module("nvidia.dali.fn")
    made = pipeline.Pipeline(batch_size=2, num_threads=1, device_id=None, seed=0)
    with made:
        made.set_outputs(functions.random.coin_flip(probability=1.0))
    made.build()
    return "a pipeline runs" if len(made.run()[0]) == 2 else "a pipeline gives no batch"


def attention_backends() -> list[Finding]:
    """What efficiency.attention can name, each tried at UNITE's head size of 64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = []
    for backend in attention.BACKENDS:
        why = attention.obstacle(backend, device, half=True, head_size=64)
        why = why or attention.trial(backend, device, half=True, keys=17, heads=2, head_size=64)
        findings.append(Finding("WARN" if why else "OK", f"attention {backend}", why or f"usable on {device.type}"))
    return findings
