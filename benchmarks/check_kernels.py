"""Compiles every kernel for sm_90 without a GPU and reads the machine code: registers, spills, shared memory, widths.

    python benchmarks/check_kernels.py            table; exit status 1 if any kernel spills or fails to compile

The operations are called on CPU tensors with the model's shapes (widths 768, 1024, 1152) and a driver that only
compiles, so the launches, their specialisation and their options are the ones of a training step.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "ops")]

import cases  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def read_cubin(cubin: bytes) -> dict[str, dict[str, int]]:
    """By function: registers, spill instructions, stack and shared bytes, 128-bit and all global accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [DISASSEMBLER / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
        code = subprocess.run([DISASSEMBLER / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True)
    rows = {}
    usages = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    texts = dict(re.findall(r"\.text\.(\S+):(.*?)(?=\n\.text\.|\n\s*\.section|\Z)", code.stdout, flags=re.S))
    for name, registers, stack, shared, local in usages:
        text = texts.get(name, "")
        if not text:
            raise RuntimeError(f"no machine code found for {name}")
        # STL/LDL are the spills themselves; a stack that is only reserved would not show in them.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
        accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S+", text)
        rows[name] = {
            "registers": int(registers),
            "spills": spills + int(local),
            "stack": int(stack),
            "shared": int(shared),
            "wide": sum(".128" in access for access in accesses),
            "accesses": len(accesses),
        }
    return rows


def cuda_sources(folder: Path) -> list[tuple[str, dict[str, int]]]:
    """The CUDA C++ sources, compiled for sm_90a by nvcc."""
    from torch.utils.cpp_extension import include_paths

    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    rows = []
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
            rows.append((f"{source.stem}:{short[1] if short else name}", row))
    return rows


def triton_rows(names: list[str], widths: list[int]) -> list[tuple[str, dict[str, int]]]:
    rows = []
    for name in names:
        for width in widths if name in cases.CASES else widths[:1]:  # the others do not depend on the width
            for kernel in compiled_kernels(lambda name=name, width=width: cases.launch_model_shape(name, width)):
                ((function, row),) = read_cubin(kernel.asm["cubin"]).items()
                row["shared"] = kernel.metadata.shared
                rows.append((f"{name}:{function.strip('_')}@{width}", row))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=cases.COMPILED, default=list(cases.COMPILED))
    parser.add_argument("--widths", nargs="*", type=int, default=[768, 1024, 1152])
    parser.add_argument("--no-cuda-sources", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = triton_rows(args.only, args.widths)
    if not args.no_cuda_sources:
        with tempfile.TemporaryDirectory() as folder:
            rows += cuda_sources(Path(folder))
    print(f"{'kernel':<56}{'registers':>10}{'spills':>8}{'stack':>7}{'shared':>8}{'128-bit':>9}{'of':>5}")
    for name, row in rows:
        print(f"{name[:55]:<56}{row['registers']:>10}{row['spills']:>8}{row['stack']:>7}", end="")
        print(f"{row['shared']:>8}{row['wide']:>9}{row['accesses']:>5}")
    spilled = [name for name, row in rows if row["spills"]]
    print(f"{len(rows)} kernels, {len(spilled)} with spills" + "".join(f"\n  {name}" for name in spilled))
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
