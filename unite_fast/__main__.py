"""python -m unite_fast VERB ...: every command of the package under one name; each is also a module of its own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from unite_fast.base import command
from unite_fast.base.verbs import OTHER_NAMES, VERBS, check


def program(name: str) -> ModuleType:
    """train.py or sample.py: of a wheel in the package, of a checkout beside it."""
    package = Path(__file__).resolve().parent
    file = package / "programs" / f"{name}.py"
    file = file if file.is_file() else package.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"unite_fast.programs.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unite() -> None:
    """The command ``unite``."""
    sys.exit(command.run(main))


def unite_train() -> None:
    """The command ``unite-train``: what ``python train.py`` is in a checkout."""
    sys.exit(command.run(program("train").main))


def unite_sample() -> None:
    """The command ``unite-sample``."""
    sys.exit(command.run(program("sample").main))


def main(argv: list[str]) -> int | None:
    """Runs the command that ``argv`` names. Raises UserError for one that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{command.called('VERB')} ...\n\n{__doc__}\n")
        said = {"train": "train a model", "sample": "samples, or reconstructions of a user's files"}
        said |= {verb: words for verb, (_, words) in VERBS.items()}
        print("\n".join(f"  {verb:12} {words}" for verb, words in said.items()))
        print(f"\nEach explains itself: {command.called('VERB')} --help.")
        return 0
    check(argv[0])
    if argv[0] in command.PROGRAMS:
        return program(argv[0]).main(argv[1:])
    return importlib.import_module(VERBS[OTHER_NAMES.get(argv[0], argv[0])][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(command.run(main))
