"""The worked examples of docs/DESIGN.md, applied to a copy of the tree and run; the commands under one name."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_layout
from support import ROOT, TINY

from unite_fast import __main__ as verbs
from unite_fast.base.errors import UserError

DESIGN = (ROOT / "docs" / "DESIGN.md").read_text()
DIFFS = dict(re.findall(r"^### (.+?)\n.*?```diff\n(.*?)```", DESIGN, re.M | re.S))
ARRAYS = "np.savez('a.npz', images=np.zeros((40, 8, 8, 1), np.uint8), labels=np.arange(40) % 10)"
RUNS = {  # what is run before, options of a training of two steps, what its last line of metrics must have
    "A kernel": ("tests/ops/test_squared_relu.py", "", ""),  # or the new test
    "A loss term": ("", "objective.edge_weight=0.5", "edge"),
    "A source": (f"import numpy as np; {ARRAYS}", "data.source=arrays data.path=a.npz", "flow"),
    "A modality": ("", "model.modality=negatives", "flow"),
}


def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    assert DIFFS.keys() == RUNS.keys()


# Forked for each folder, with all but the project imported. Of each a line: the exit status, and what it said.
TRAININGS = """
import json, os, sys
import sklearn.datasets, torch, torch._dynamo
for folder, words in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.path[:0] = [folder, f"{folder}/kernels"]
        code = 99
        try:
            import train, unite_fast.base.command
            assert train.__file__.startswith(folder) and unite_fast.__file__.startswith(folder)
            code = unite_fast.base.command.run(train.main, words)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> dict[str, Path]:
    """By example: a copy of the tree with it."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")).resolve() for name in RUNS}
    for name, folder in folders.items():
        for part in ("unite_fast", "train.py", "kernels", "tests/ops", "conftest.py", "pyproject.toml"):
            (folder / part).parent.mkdir(exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["git", "apply", "-"], input=DIFFS[name], text=True, cwd=folder, check=True)
    return folders


@pytest.fixture(scope="module")
def trained(applied) -> dict[str, int]:
    """Exit statuses of two steps of each example that is no kernel."""
    names, asked = [name for name in sorted(RUNS) if RUNS[name][1]], []
    for name in names:
        before, options, _ = RUNS[name]
        (applied[name] / "tiny.yaml").write_text(TINY)
        if before:
            subprocess.run([sys.executable, "-c", before], cwd=applied[name], check=True)
        words = ["--config", "tiny.yaml", "train.max_steps=2", "device=cpu", *options.split()]
        asked.append([str(applied[name]), words])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", TRAININGS, json.dumps(asked)]
    done = subprocess.run(command, cwd=applied[names[0]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, map(int, done.stdout.split()), strict=True))


def test_an_operation_applies_and_is_tested(applied):
    folder, (tests, _, _) = applied["A kernel"], RUNS["A kernel"]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'kernels'}"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    tested = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    assert tested.stdout.startswith("." * 7)  # all of them


@pytest.mark.parametrize("name", sorted(name for name in RUNS if RUNS[name][1]))
def test_an_example_applies_and_runs(name, applied, trained):
    assert trained[name] == 0, (applied[name] / "said.txt").read_text()
    header = (applied[name] / "runs" / "tiny" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert RUNS[name][2] in header


def names_in(path: Path) -> set[str]:
    """What a Python file defines, calls and has as a word: functions, classes, attributes, keywords, strings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found |= {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return found | {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_new_thing_has_an_example():
    """In a row of the table, below it, or both; a file, and a name in it."""
    table = DESIGN.split("## Where a new thing goes")[1].split("\n### ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    below = {
        "fused operation": "A kernel",
        "loss term": "A loss term",
        "modality": "A modality",
        "data source": "A source",
    }
    assert {len(row) for row in rows} == {4}, "a row of DESIGN's table without where, what holds it, an example"
    for new, _, _, example in rows:
        pointers = re.findall(r"`([\w/]+\.py)::([\w.]+)`", example)
        assert pointers or below[new.strip()] in DIFFS, new
        for file, name in pointers:
            (path,) = [place for place in (ROOT / file, ROOT / "unite_fast" / file) if place.is_file()]
            assert name in names_in(path), f"{new}: {file} has no {name}"


def test_the_layers_are_those_of_the_layout():
    table = DESIGN.split("## Layers")[1].split("## Where")[0]
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines() if row.startswith("| `")]
    assert rows == list(map(set, test_layout.LAYERS))


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|cpp|yaml))`", DESIGN):
        places = [ROOT / name, *(ROOT / room / name for room in ("unite_fast", "benchmarks"))]
        assert any(place.exists() for place in places) or list(ROOT.glob(f"unite_fast/*/{name}")), name


def test_every_measurement_is_named():
    assert not {p.name for p in (ROOT / "benchmarks").glob("*.py") if f"`{p.name}`" not in DESIGN}


def test_the_house_does_not_grow_back():
    module = house()
    found = module.counts(module.tree())
    assert found["loose modules"] <= 6
    assert found["functions that take the whole Config"] <= 20
    assert found["files that compare an efficiency option"] == 2  # efficiency/execution.py and compatibility.py
    assert found["files that ask which modality or source it is"] == 0
    for name, files in module.examples(DESIGN).items():
        assert len(files) <= {"A modality": 3}.get(name, 2), name


def test_every_command_has_a_verb(capsys):
    """And explains itself."""
    for verb, (module, _) in verbs.VERBS.items():
        with pytest.raises(SystemExit) as ended:
            verbs.main([verb, "--help"])
        assert ended.value.code == 0, verb
        assert "usage: " in capsys.readouterr().out
        assert importlib.util.find_spec(module) is not None
    assert set(verbs.OTHER_NAMES.values()) <= verbs.VERBS.keys()
    assert verbs.main([]) == 0
    assert "evaluate " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verbs.main(["evaluate", "--help"])
    assert "{atoms,fid,table,search,heldout,rfid}" in capsys.readouterr().out
    for program in ("train", "sample"):
        with pytest.raises(SystemExit) as ended:
            verbs.main([program, "--help"])
        assert ended.value.code == 0, program
    with pytest.raises(UserError, match="no command 'evalute'; choose one of train, sample, doctor"):
        verbs.main(["evalute"])
