"""The wheel: what it contains, what its tag says, and that it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support import ROOT, command

import unite_fast

USE = """
import sys
from unite_fast.__main__ import program
from unite_fast.base import command
import unite_fast, unite_kernels
from unite_kernels import extension, backend
import torch
assert all("site" in module.__file__ for module in (unite_fast, unite_kernels)), unite_fast.__file__
assert command.run(program("train").main, ["--config", "digits", "--print-config"]) == 0
short = ["train.max_steps=1", "train.image_every=0", "evaluation.heldout_epoch=0", "run_dir=run"]
assert command.run(program("train").main, ["--config", "digits", *short]) == 0
assert command.run(program("train").main, ["--config", "digits", *short, "efficiency.kernels=fused"]) == 2
assert command.run(program("sample").main, ["--checkpoint", sys.argv[1], "--seeds", "0-1", "--out", "out"]) == 0
model = unite_fast.load(sys.argv[1])
assert model.decode(model.encode(model.sample("3")))[0].size == (8, 8)
assert backend.best(torch.device("cpu")) == "eager"
print(extension.obstacle("cpu"))
"""


def built(place: Path, **environment: str) -> tuple[Path, str]:
    """(a wheel, what its making said); nvcc is never found."""
    words = ["egg_info", "--egg-base", place, "build", "--build-base", place / "b"]
    words += ["bdist_wheel", "--dist-dir", place / "dist", "--bdist-dir", place / "x"]
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, words)], cwd=ROOT, env=kept | {"PATH": ""} | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = (place / "dist").iterdir()
    return found, result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built where there is neither compiler nor nvcc."""
    found, said = built(tmp_path_factory.mktemp("wheel"))
    assert "no C++ compiler 'g++'" in said
    return found


def test_a_compiled_library_and_its_tag(tmp_path):
    """With a stand-in for a compiler, which makes the files that it is asked for: the real one takes half a minute."""
    compiler = tmp_path / "cxx"
    program = 'import sys; open(sys.argv[sys.argv.index("-o") + 1], "wb").write(b"library")'
    compiler.write_text(f"#!{sys.executable} -S\n{program}\n")
    compiler.chmod(0o755)
    found, said = built(tmp_path, CXX=str(compiler))
    assert "the wheel has compiled libraries" in said
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert found.name == f"unite_fast-{unite_fast.__version__}-py3-none-{machine}.whl"
    with zipfile.ZipFile(found) as opened:
        assert opened.read("unite_kernels/_C_cpu.so") == b"library"
        assert {"unite_fast/py.typed", "unite_fast/programs/train.py"} <= set(opened.namelist())
        assert "Root-Is-Purelib: false" in opened.read(f"unite_fast-{unite_fast.__version__}.dist-info/WHEEL").decode()


def test_what_is_in_it(wheel):
    assert wheel.name == f"unite_fast-{unite_fast.__version__}-py3-none-any.whl"  # pure, and says so
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        info = f"unite_fast-{unite_fast.__version__}.dist-info"
        scripts = opened.read(f"{info}/entry_points.txt").decode()
        assert "Root-Is-Purelib: true" in opened.read(f"{info}/WHEEL").decode()
    assert {f"unite_fast/programs/{name}.py" for name in ("train", "sample")} <= names
    configs = {f"unite_fast/configs/{path.relative_to(ROOT / 'configs')}" for path in ROOT.glob("configs/**/*.yaml")}
    assert configs <= names
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("unite_fast/**/*.py")}
    modules |= {str(p.relative_to(ROOT / "kernels")) for p in ROOT.glob("kernels/**/*.py")}
    assert modules <= names
    assert {"unite_fast/py.typed", "unite_kernels/py.typed", "unite_kernels/launch_tables/sm_90.json"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "benchmarks"))]
    for verb in ("unite", "unite-train", "unite-sample"):
        assert f"{verb} = unite_fast.__main__:{verb.replace('-', '_')}" in scripts


def test_it_works_elsewhere(wheel, tiny, tmp_path):
    assert command("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", "train.max_steps=1").returncode == 0
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-P", "-c", USE, str(tmp_path / "run")]
    result = subprocess.run(words, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "name: digits" in result.stdout
    mend = "_C_cpu.so is not built; run `pip install --no-build-isolation"
    assert mend in result.stdout
    assert f"efficiency.kernels=auto: eager operations, which are slower, since {mend}" in result.stdout
    assert f"error: efficiency.kernels=fused: {mend}" in result.stderr


def test_a_compiler_that_does_not_exist_is_an_error(tmp_path):
    words = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode
    assert "error: CXX=no-such-compiler: there is no such compiler" in result.stderr
