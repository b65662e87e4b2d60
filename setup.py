"""Packages and the compiled operations.

    unite_kernels/_C_cpu.so     csrc/cpu, plain g++ (or $CXX), always
    unite_kernels/_C_cuda.so    csrc/cuda, nvcc, when nvcc is found: sm_90a, and PTX for other devices from sm_80

Both use only libtorch's stable C ABI, so one build loads in torch 2.11 and later on any Python, and takes seconds. The
headers come from the torch of the environment, so install with

    pip install --no-build-isolation -e .        or, without pip:    python setup.py build_ext --inplace

In an isolated build environment there is no torch; the Python code is then installed alone. A library that cannot be
built prints one line saying why and fails nothing: the eager forms remain, and the doctor names the reason. A CXX that
was asked for and does not exist is an error.

A wheel also holds train.py, sample.py and configs/, as unite_fast/programs and unite_fast/configs. Its tag says what is
in it: py3-none-any without a compiled library, else py3-none-linux_x86_64 or so, of the machine it was built on, which
is no manylinux tag because it needs the libraries of that torch's version or later. (No Python symbol is in one.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PROGRAMS = (ROOT / "train.py", ROOT / "sample.py")
CPU, CUDA = "unite_kernels._C_cpu", "unite_kernels._C_cuda"
STABLE_ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.11
CPU_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Vectorise sums where the code says so and sqrt without errno; nothing that changes IEEE results.
ROW_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
ROW_SOURCES = ("rows_adaln", "rows_attention", "rows_attention_mlp", "rows_lpips", "rows_multi_tensor", "rows_philox")
OP_SOURCES = ("adaln", "attention_mlp", "lpips", "random", "multi_tensor", "gather", "library")
# The row functions are compiled once per instruction set and chosen at run time: one file for every machine.
X86_SETS = {"x86_v4": ["-march=x86-64-v4"], "x86_v3": ["-march=x86-64-v3"], "baseline": ["-march=x86-64"]}
CUDA_FLAGS = [
    *("-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"),
]


def sources_digest() -> str:
    """Of what the libraries are compiled from, as unite_kernels.extension computes it."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class NotBuilt(Exception):
    """Why a library is not built, and what to install."""


def torch_directory() -> Path:
    spec = find_spec("torch")  # found, not imported: an import costs seconds
    if spec is None or spec.origin is None:
        raise NotBuilt("torch is not in the build environment; install torch, then use --no-build-isolation")
    return Path(spec.origin).parent


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def call(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise NotBuilt(f"this command failed:\n    {' '.join(command)}\n{result.stdout}{result.stderr}".rstrip())


def call_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(call, commands))


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        if "CXX" in os.environ:
            sys.exit(f"error: CXX={name}: there is no such compiler; name another, or unset CXX")
        raise NotBuilt(f"no C++ compiler {name!r}; install g++ 11 or later, or set CXX")
    return name


def build_cpu(target: Path, temporary: Path) -> None:
    torch, cxx = torch_directory(), compiler()
    include = ["-isystem", str(torch / "include")]
    sets = X86_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    commands, objects = [], []

    def add(source: str, object_name: str, flags: list[str]) -> None:
        objects.append(str(temporary / f"{object_name}.o"))
        commands.append([cxx, "-c", f"csrc/cpu/{source}.cpp", "-o", objects[-1], *CPU_FLAGS, *flags])

    for source in OP_SOURCES:
        add(source, source, [*STABLE_ABI, *include, "-ffp-contract=off"])
    add("dispatch", "dispatch", ["-std=c++20"])
    for name, flags in sets.items():
        for source in ROW_SOURCES:
            contract = "off" if source == "rows_philox" else "fast"  # its bits must equal those of philox.py
            options = [*ROW_FLAGS, *flags, f"-DUNITE_ISA={name}", f"-ffp-contract={contract}"]
            add(source, f"{source}_{name}", ["-std=c++20", *options])
    call_all(commands)
    call([cxx, "-shared", "-pthread", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"])


def build_cuda(target: Path, temporary: Path) -> None:
    torch, program = torch_directory(), nvcc()
    if program is None:
        raise NotBuilt("nvcc is not on PATH; install the CUDA toolkit, or set CUDA_HOME")
    libraries = torch / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        # A CPU build of torch: link against an empty library of that name, so that the result loads in a CUDA build.
        empty = temporary / "empty.cpp"
        empty.write_text("")
        soname = ["-Wl,-soname,libtorch_cuda.so", "-o", str(temporary / "libtorch_cuda.so")]
        call([compiler(), "-shared", *soname, str(empty)])
        libraries = temporary
    objects, commands = [], []
    include = ["-isystem", str(torch / "include")]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(str(temporary / f"{source.stem}.cu.o"))
        commands.append(
            [program, "-c", f"csrc/cuda/{source.name}", "-o", objects[-1], *STABLE_ABI, *include, *CUDA_FLAGS]
        )
    call_all(commands)
    # The CUDA runtime is linked in, so that the toolkit's version need not be that of torch. --no-as-needed keeps
    # libtorch_cuda on the list of needed libraries when its symbols come from the empty one.
    search = [f"-L{libraries}", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cuda", "-ltorch_cpu"]
    call([program, "-shared", "-cudart=static", "-o", str(target), *objects, *search])


class BuildLibraries(build_ext):
    """Libraries for torch.ops.load_library: no Python symbols, hence plain file names and our own commands."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        temporary = (Path(self.build_temp) / ext.name).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(parents=True, exist_ok=True)
        fresh = temporary / target.name
        try:
            (build_cpu if ext.name == CPU else build_cuda)(fresh, temporary)
        except NotBuilt as reason:
            target.unlink(missing_ok=True)  # an old library would hide the failure
            print(f"{ext.name} is not built: {reason}", flush=True)
            return
        os.replace(shutil.copy(fresh, target.with_suffix(".new")), target)  # a loaded library must not be overwritten
        print(f"{ext.name} is built", flush=True)

    def copy_extensions_to_source(self) -> None:
        """Into a checkout, with the hash of the sources beside each library, by which the doctor tells a stale one."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            if (Path(self.build_lib) / name).exists():  # else it was not built now
                (ROOT / "kernels" / name).with_suffix(".sources").write_text(sources_digest())


class BuildPackages(build_py):
    """With the programs and the configurations that lie beside the package in a checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "unite_fast"
        for folder, found in {"programs": PROGRAMS, "configs": sorted((ROOT / "configs").rglob("*.yaml"))}.items():
            shutil.rmtree(package / folder, ignore_errors=True)
            for path in found:
                target = package / folder / path.relative_to(ROOT if folder == "programs" else ROOT / "configs")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


class Wheel(bdist_wheel):
    """Tagged after what was really compiled."""

    def run(self) -> None:
        self.run_command("build_ext")
        built = Path(self.get_finalized_command("build_ext").build_lib)
        self.root_is_pure = not any((built / "unite_kernels").glob("_C_*.so"))
        if self.root_is_pure:
            self.distribution.ext_modules = []  # else its Python files would be installed as those of one platform
        print("the wheel is pure" if self.root_is_pure else "the wheel has compiled libraries", flush=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    packages=[*find_packages(".", include=["unite_fast*"]), *find_packages("kernels", include=["unite_kernels*"])],
    package_dir={"unite_kernels": "kernels/unite_kernels"},
    package_data={"unite_fast": ["py.typed"], "unite_kernels": ["launch_tables/*.json", "py.typed"]},
    ext_modules=[Extension(name, sources=[], optional=True) for name in (CPU, CUDA)],
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPackages, "bdist_wheel": Wheel},
)
