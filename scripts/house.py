"""Counts how the package is built, now and at an earlier commit: the figures that a change of structure should lower.

    python scripts/house.py [COMMIT]     (of the same clone; default: the tree as it is, alone)

loose modules: files in unite_fast/ itself, beside __init__.py. Whole Config: functions with a parameter of that type.
Efficiency option: files in which one is compared with a word, so that they know what it means. Modality: files beside
its rooms that ask which modality or source there is, by its name or its class. Files of an example: those that the
worked diffs of docs/DESIGN.md touch.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"precision", "residual", "attention", "kernels", "compile", "cuda_graph", "recompute"}

# Where modalities and sources are made: what is in these may know them by name.
ROOMS = re.compile(r"unite_fast/(modality/|data/|config/keys.py|evaluation/atoms/|sampling/structures.py)")
CLASSES = {"Images", "ImageLosses", "Atoms", "AtomLosses", "AtomSource", "AtomFiles", "Digits", "Synthetic", "Packed"}


def tree(commit: str = "") -> dict[str, str]:
    """{path: text} of the package and the two programs, at a commit or as they lie here."""
    if not commit:
        paths = [*(ROOT / "unite_fast").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
        return {str(path.relative_to(ROOT)): path.read_text() for path in paths}

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    names = git("ls-tree", "-r", "--name-only", commit, "unite_fast", "train.py", "sample.py").split()
    return {name: git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def takes_config(function: ast.FunctionDef) -> bool:
    """Whether a parameter is a whole ``Config``."""
    a = function.args
    kinds = {ast.unparse(x.annotation) for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation}
    return any(re.fullmatch(r"(config\.)?Config( \| None)?", kind) for kind in kinds)


def compares_option(node: ast.AST) -> bool:
    """``e.precision == "fp32"``, ``"fp8" in e.precision``, ``e.compile in ("none", ...)``."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    option = any(isinstance(s, ast.Attribute) and s.attr in OPTIONS for s in sides)
    return option and any(isinstance(c, ast.Constant) and isinstance(c.value, str) for s in sides for c in ast.walk(s))


def asks_kind(node: ast.AST) -> bool:
    """``model.modality == "atoms"``, ``reading.source in (...)``, ``isinstance(losses, ImageLosses)``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
        return any(name in CLASSES for name in re.findall(r"\w+", ast.unparse(node.args[1])))
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    kind = any(isinstance(s, ast.Attribute) and s.attr in {"modality", "source", "thing"} for s in sides)
    words = any(isinstance(c, ast.Constant) and isinstance(c.value, str) for s in sides for c in ast.walk(s))
    return kind and (words or any(isinstance(s, ast.Name) and s.id.isupper() for s in sides))


def counts(files: dict[str, str]) -> dict[str, int]:
    """The figures of a tree, by name."""
    parsed = {name: ast.parse(text) for name, text in files.items()}
    package = [name for name in files if name.startswith("unite_fast/")]
    functions = [n for t in parsed.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    knowing = [name for name, t in parsed.items() if name in package and any(map(compares_option, ast.walk(t)))]
    asking = [n for n, t in parsed.items() if not ROOMS.match(n) and any(map(asks_kind, ast.walk(t)))]
    return {
        "loose modules": sum(name.count("/") == 1 and not name.endswith("__init__.py") for name in package),
        "functions that take the whole Config": sum(map(takes_config, functions)),
        "files that compare an efficiency option": len(knowing),
        "files that ask which modality or source it is": len(asking),
        "lines of the package": sum(files[name].count("\n") for name in package),
        "lines without molecules and crystals": sum(files[n].count("\n") for n in package if "atoms" not in n),
    }


def examples(text: str) -> dict[str, list[str]]:
    """{heading: files that its diff touches} of the worked examples of docs/DESIGN.md."""
    found = {}
    for heading, diff in re.findall(r"^### (.+?)\n.*?```diff\n(.*?)```", text, re.M | re.S):
        found[heading] = re.findall(r"^\+\+\+ b/(\S+)", diff, re.M)
    return found


def main(argv: list[str]) -> None:
    now = counts(tree())
    before = counts(tree(argv[0])) if argv else {}
    for name, value in now.items():
        print(f"{name:46}" + (f"{before[name]:>8,} -> " if before else "") + f"{value:>8,}")
    for heading, files in examples((ROOT / "docs" / "DESIGN.md").read_text()).items():
        print(f"{heading:46}{len(files):>8} files: {', '.join(files)}")


if __name__ == "__main__":
    main(sys.argv[1:])
