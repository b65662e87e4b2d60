"""The house's walls: imports point down, heavy packages have one door, files stay readable, nothing names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

# Each module may import the layers before its own, and its own package; the modules of one layer are strangers.
LAYERS = (
    {"base"},
    {"config"},
    {"parallel", "data", "layers"},
    {"efficiency", "modality", "optim"},
    {"model"},
    {"flow"},
    {"objective", "interop", "sampling"},
    {"plan", "training"},
    {"checkpoint"},
    {"analysis"},
    {"evaluation"},
    {"run"},
    {"analyse", "evaluate", "export", "fetch", "library", "report", "sweep"},
    {"doctor"},
    {"__main__"},
)
DOORS: dict[str, str | tuple[str, ...]] = {
    "torchdiffeq": "sampling/__init__.py",
    "lpips": "modality/lpips.py",
    "torch_fidelity": "evaluation/",
    "nvidia": "data/",
    "flash_attn": "layers/attention.py",
    "transformer_engine": "efficiency/precision.py",
    "matplotlib": "analysis/plots.py",
    "wandb": "run/stats.py",
    "ase": "data/atoms/files.py",
    "pymatgen": ("data/atoms/", "evaluation/atoms/"),
    "qm9pack": "data/atoms/qm9.py",
    "rdkit": ("data/atoms/", "evaluation/atoms/"),
    "smact": "evaluation/atoms/",
    "openbabel": "evaluation/atoms/molecules.py",
}
FILES = sorted((ROOT / "unite_fast").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0 or "kernels" in path.parts, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_its_top(path: Path) -> list[ast.stmt]:
    """Imports that run when the module is imported; a type checker's alone are none."""
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


def layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT / "unite_fast").with_suffix("").parts[0]
    if own == "__init__":
        assert not at_its_top(path)
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "unite_fast" or len(parts) == 1 or parts[1] in (own, "__version__"):
            continue
        assert layer(parts[1]) < layer(own), f"{own} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_have_one_door(path):
    here = str(path.relative_to(ROOT / "unite_fast"))
    for package, door in DOORS.items():
        if any(name.split(".")[0] == package for name in imports(path)):
            assert here.startswith(door), f"{package} belongs in {door}"


def test_kernels_know_nothing_of_the_model():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.startswith("unite_fast") for name in imports(path)), path


def test_programs_are_short():
    for name, limit in {"train.py": 250, "sample.py": 150}.items():
        assert len((ROOT / name).read_text().splitlines()) <= limit, name


def test_the_step_is_one_block():
    """From a batch to new weights, on a page and in a row; what is done once or in need stands behind it."""
    block = (ROOT / "unite_fast" / "training" / "step.py").read_text().split("    # ---")[1]
    assert len(block.splitlines()) <= 60
    functions = [words.split("(")[0].split()[-1] for words in block.splitlines() if words.startswith("    def ")]
    assert functions == ["__call__", "accumulate", "micro_step", "update"]


def test_programs_compute_alike():
    """What takes a device also sets the process-wide switches of floating-point arithmetic."""
    programs = [
        path for path in (*FILES, ROOT / "train.py", ROOT / "sample.py") if "distributed.start(" in path.read_text()
    ]
    assert len(programs) >= 4
    for path in programs:
        assert "precision.setup(" in path.read_text(), path


def test_what_a_model_computes_with_is_set_in_one_place():
    """Attributes of modules that execution options change, outside the modules' own constructors and methods."""
    planted = r"(?<!self)\.(recompute|residual|run_block|run_layer|products|attention) = "
    assert [path.name for path in FILES if re.search(planted, path.read_text())] == ["execution.py"]


def test_files_stay_readable():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"file_digest\(|read_bytes\(\)\)\.hexdigest", "files.py"),
        (r"splitlines\(\) or \[type\(error\)", "errors.py"),
        (r"O_NOFOLLOW|\.write_(text|bytes)\(", "files.py"),
    ],
)
def test_helpers_are_written_once(pattern, home):
    assert [path.name for path in FILES if re.search(pattern, path.read_text())] == [home]


def test_no_machine_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(^|[^\w./-])/(home|root|work|tmp|Users)/[\w.-]+")
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".cpp", ".cu", ".h", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_importing_does_no_work():
    """No device call, no process group, no environment write, no heavy optional package at import."""
    code = (
        "import os, sys; before = dict(os.environ); import train, sample, torch; "
        "heavy = {'torchvision', 'lpips', 'torchdiffeq', 'sklearn', 'wandb', 'tensorboard', "
        "'ase', 'pymatgen', 'rdkit', 'smact'} & set(sys.modules); "
        "assert dict(os.environ) == before; assert not torch.distributed.is_initialized(); assert not heavy, heavy"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
