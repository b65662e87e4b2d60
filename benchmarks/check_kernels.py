"""Compiles every kernel for sm_90 without a GPU, reads the machine code, and holds it to what it has reached.

    python benchmarks/check_kernels.py            table; exit status 1 if a kernel does not compile, spills or fell back
    python benchmarks/check_kernels.py --record   the same, and what was found becomes what has to be reached

The operations are called on CPU tensors with the model's shapes (widths 768, 1024, 1152) and a driver that only
compiles, so the launches, their specialisation and their options are the ones of a training step. What has been reached
is in kernel_limits.json, per minor version of Triton; kernel_limits.py judges. Programs per multiprocessor must be
those that the table of launches fits its grids to with this Triton; where more fit, which leaves slots empty, that is
said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "ops"), str(ROOT / "benchmarks")]

import cases  # noqa: E402
import kernel_limits  # noqa: E402
import machine_code  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

from unite_kernels import launches  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VERSION = launches.minor_of(triton.__version__)
LIMITS = Path(__file__).with_name("kernel_limits.json")
# Column heads; what has a loop has them all.
HEADS = {
    "registers": "registers", "spills": "spills", "stack": "stack", "shared": "shared", "programs": "programs/SM",
    "instructions": "instr.", "barriers": "barriers", "shuffles": "shuffles", "loads": "loads", "stores": "stores",
    "wide": "128-bit", "in_flight": "in flight/SM",
}  # fmt: skip


class CompileOnly:
    """The part of a Triton driver that a compilation asks for."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def compiled_kernels(call) -> list:
    """Runs ``call`` with every launch replaced by its compilation; the compiled kernels in launch order."""
    found = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(CompileOnly())
    jit.JITFunction.run = compile_only
    try:
        call()
    finally:
        jit.JITFunction.run = run
    return found


def tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the CUDA toolkit's readers of binaries prints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [DISASSEMBLER / name, option, file.name]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes) -> dict[str, dict[str, Any]]:
    """By function: registers, spill instructions, stack and shared bytes, and its loop (``machine_code.Loop``)."""
    return machine_code.read(tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", "-c", cubin))


def memory_of(kernel: Any) -> dict[str, int]:
    """Spills, stack and shared bytes of a compiled Triton kernel. Disassembling takes a hundred times as long as
    reading sizes, and without a stack or local memory nothing is spilled."""
    ((_, _, stack, _, local),) = machine_code.USAGE.findall(tool("cuobjdump", "-res-usage", kernel.asm["cubin"]))
    if int(stack) or int(local):
        ((_, row),) = read_cubin(kernel.asm["cubin"]).items()
        return {key: row[key] for key in ("spills", "stack")} | {"shared": kernel.metadata.shared}
    return {"spills": 0, "stack": 0, "shared": kernel.metadata.shared}


def read_kernel(kernel: Any) -> dict[str, Any]:
    """The same of a compiled Triton kernel, with what follows from its launch: programs, bytes in flight of an SM."""
    (row,) = read_cubin(kernel.asm["cubin"]).values()
    warps, row["shared"] = kernel.metadata.num_warps, kernel.metadata.shared
    row["programs"] = machine_code.programs_at_once(row["registers"], warps, row["shared"])
    names = kernel.src.fn.arg_names
    constants = {names[index[0]]: value for index, value in kernel.src.constants.items()}
    row["in_flight"] = int(row["in_flight"] * 32 * warps * row["programs"] * lanes_used(constants))
    return row


def lanes_used(constants: dict[str, Any]) -> float:
    """The part of a tile that is no padding, from the sizes that a kernel is compiled for."""
    used = 1.0
    for size, block in (("WIDTH", "BLOCK"), ("CHANNELS", "BLOCK"), ("HEADS", "BLOCK_HEADS"), ("HEAD_DIM", "DIM")):
        if size in constants and block in constants:
            tiles = -(-constants[size] // constants[block])
            used *= constants[size] / (tiles * constants[block])
    return used


def cuda_sources(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The CUDA C++ sources, compiled for sm_90a by nvcc."""
    from torch.utils.cpp_extension import include_paths

    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        if not nvcc.exists():
            raise RuntimeError(f"{source.name} needs nvcc: set CUDA_HOME to the CUDA toolkit")
        cubin = folder / (source.stem + ".cubin")
        command = [nvcc, "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-DUSE_CUDA"]
        command += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{path}" for path in include_paths()] + [source, "-o", cubin]
        subprocess.run(command, check=True)
        for name, row in read_cubin(cubin.read_bytes()).items():
            short = re.search(r"\d([a-z][a-z_]*_kernel)", name)  # the identifier inside the mangled name
            del row["in_flight"]  # of a thread; how many there are is known when it is launched
            yield f"{source.stem}:{short[1] if short else name}", row


def triton_rows(names: list[str], widths: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        for width in widths if name in cases.CASES else widths[:1]:  # the others do not depend on the width
            for kernel in compiled_kernels(lambda name=name, width=width: cases.launch_model_shape(name, width)):
                row = read_kernel(kernel)
                yield f"{name}:{kernel.metadata.name.strip('_').removesuffix('_kernel')}@{width}", row


def fitted_programs(name: str) -> int:
    """What the table of launches says of a kernel's programs; 0 where it says nothing."""
    op, direction, width = re.fullmatch(r"(\w+):(\w+)@(\d+)", name).groups()  # type: ignore[union-attr]
    if op not in cases.CASES or direction not in ("forward", "backward"):
        return 0
    return launches.launch_of(op, direction, cases.launch_width(op, int(width)), torch.device("cpu")).programs


def show(name: str, row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        if key not in row or (key not in ("registers", "spills", "stack", "shared", "programs") and not row["loop"]):
            return ""
        if key == "wide":
            return f"{100 * row[key]:.0f} %"
        return f"{row[key] / 1024:.0f} KiB" if key == "in_flight" else str(row[key])

    return f"{name[:40]:<41}" + "".join(f"{number(key):>{len(head) + 2}}" for key, head in HEADS.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=cases.COMPILED, default=list(cases.COMPILED))
    parser.add_argument("--widths", nargs="*", type=int, default=[768, 1024, 1152])
    parser.add_argument("--no-cuda-sources", action="store_true")
    parser.add_argument("--record", action="store_true", help="write what is found to kernel_limits.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads(LIMITS.read_text()) if LIMITS.is_file() else {}
    limits = {} if args.record else kernel_limits.limits_of(recorded, VERSION)
    print(f"Triton {triton.__version__}; of the loop, per iteration: instructions to stores, bytes in 128-bit accesses")
    print(f"{'kernel':<41}" + "".join(f"{head:>{len(head) + 2}}" for head in HEADS.values()))
    worse: list[str] = []
    remarks: list[str] = []
    new: dict[str, dict[str, float]] = {}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, row in (
            *triton_rows(args.only, args.widths),
            *(() if args.no_cuda_sources else cuda_sources(Path(folder))),
        ):
            count += 1
            print(show(name, row), flush=True)
            fitted = fitted_programs(name) if "programs" in row else 0
            worse += [f"{name}: {what}" for what in kernel_limits.shortcomings(row, limits.get(name), fitted)]
            remarks += [f"{name}: {what}" for what in kernel_limits.remarks(row, fitted)]
            if row["loop"] and "programs" in row:
                new[name] = kernel_limits.worst([kernel_limits.held(row), *([new[name]] if name in new else [])])
    if args.record:
        kernel_limits.write(LIMITS, {**recorded, VERSION: {**recorded.get(VERSION, {}), **new}})
    print("".join(f"remark: {what}\n" for what in dict.fromkeys(remarks)), end="")
    print(f"{count} kernels, {len(worse)} shortcomings" + "".join(f"\n  {what}" for what in worse))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
