"""Makes the folder that travels to a lent GPU, so that nothing is built, downloaded or looked up there.

    make gpu-pack OFFICIAL_DIR=clone        or: python benchmarks/gpu_pack.py --official-dir clone

gpu-pack/libraries    the compiled operations; they load in any torch from 2.11 on and any Python
gpu-pack/triton       Triton's cache of the step's and the sweeps' kernels for sm_90. It is used by a Triton of the same
                      version for the same Python alone; another compiles anew (PYTHON=... chooses whose this is)
gpu-pack/official     the reader's clone of the official code, without its pictures and history
gpu-pack/packages     lpips, which few images have
gpu-pack/commit.json  whose rows these will be: a copy without git cannot tell

Lists what was packed with its size and says what is missing and how to mend it. Exit status: 1 when the libraries are
missing or all that travels, working tree included, is more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

from harness import PACK, ROOT, _source

from unite_fast.base.provenance import git

LIMIT = 64 * 2**20  # bytes
LIBRARIES = ROOT / "kernels" / "unite_kernels"
PACKAGES = ("lpips",)
LEFT_OUT = shutil.ignore_patterns(".git", "assets", "*.png", "*.jpg", "*.jpeg", "*.gif", "__pycache__")


def pack_libraries(folder: Path) -> list[str]:
    """Copies what setup.py built; what is missing."""
    sys.path.insert(0, str(ROOT / "kernels"))
    from unite_kernels import extension

    folder.mkdir(parents=True)
    missing = []
    for kind in ("cpu", "cuda"):
        library = LIBRARIES / f"_C_{kind}.so"
        why = extension.stale(kind) if library.exists() else "it is not built"
        if why:
            missing.append(f"libraries: {library.name}: {why}; run {extension.BUILD}")
            continue
        for path in (library, library.with_suffix(".sources")):
            if path.exists():
                shutil.copy(path, folder)
    return missing


def pack_kernels(folder: Path) -> list[str]:
    """Compiles for sm_90 into ``folder``, in processes of their own, whose environment says where Triton's cache is."""
    folder.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    programs = {
        "kernels of the step": ["check_kernels.py", "--no-cuda-sources", "--widths", "768"],
        "kernels of the sweeps": ["sweep_launches.py", "--compile", "--file", str(folder / "launches.json")],
    }
    missing = []
    for what, (program, *words) in programs.items():
        command = [sys.executable, str(ROOT / "benchmarks" / program), *words]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip() or result.stdout.strip() or "?").splitlines()[-1]
            missing.append(f"triton: {what}: {program} failed: {last}")
    return missing


def pack_official(folder: Path, clone: Path | None) -> list[str]:
    if clone is None:
        return ["official: no clone was named; git clone the official code and give OFFICIAL_DIR=PATH"]
    if not (clone / "models" / "unite.py").is_file():
        return [f"official: {clone} has no models/unite.py; give a clone of the official code"]
    shutil.copytree(clone, folder, ignore=LEFT_OUT)
    return []


def pack_packages(folder: Path) -> list[str]:
    """The installed files of pure Python packages."""
    folder.mkdir(parents=True)
    missing = []
    for name in PACKAGES:
        try:
            found = files(name) or []
        except PackageNotFoundError:
            missing.append(f"packages: {name} is not installed here; pip install {name}")
            continue
        for path in found:
            if ".." not in path.parts and "__pycache__" not in path.parts:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path.locate(), target)
    return missing


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def tree_size() -> int:
    """Of the working tree as it travels: tracked files, and those that git does not ignore."""
    listed = git("ls-files", "-co", "--exclude-standard").splitlines()
    return sum((ROOT / name).stat().st_size for name in listed if (ROOT / name).is_file())


def pack(folder: Path, official: Path | None, kernels: bool) -> list[str]:
    """Makes ``folder`` anew; what is missing."""
    shutil.rmtree(folder, ignore_errors=True)
    missing = pack_libraries(folder / "libraries")
    missing += pack_kernels(folder / "triton") if kernels else ["triton: left out, as asked"]
    missing += pack_official(folder / "official", official)
    missing += pack_packages(folder / "packages")
    source = _source()
    if source["dirty"]:
        missing.append("commit: the sources differ from it; commit them, so that rows name what was measured")
    (folder / "commit.json").write_text(json.dumps(source))
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACK)
    parser.add_argument("--official-dir", type=Path, default=os.environ.get("OFFICIAL_DIR") or None)
    parser.add_argument("--no-kernels", action="store_true", help="leave Triton's cache out, which takes minutes")
    arguments = parser.parse_args()
    missing = pack(arguments.out, arguments.official_dir, not arguments.no_kernels)
    sizes = {path.name: size(path) for path in sorted(arguments.out.iterdir())}
    sizes["working tree"] = tree_size()
    for name, amount in sizes.items():
        print(f"{amount / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  in all, of {LIMIT / 2**20:.0f}")
    if (arguments.out / "triton").is_dir():
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        print(f"Triton's cache is of Triton {version('triton')} for {python}")
    for line in missing:
        print(f"missing  {line}")
    lacking = any(line.startswith("libraries") for line in missing)
    if total > LIMIT:
        print(f"more than {LIMIT / 2**20:.0f} MiB: remove what need not travel", file=sys.stderr)
    return 1 if lacking or total > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
