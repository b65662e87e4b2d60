"""The commands that the documents show: where they stand, and what the real parsers make of them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from support import ROOT
from torch.distributed.run import get_args_parser

import sample
import train
from unite_fast import __main__ as verbs
from unite_fast import config
from unite_fast.base.errors import UserError
from unite_fast.efficiency import compatibility

DOCUMENTS = (
    "README.md", "docs/*.md", "benchmarks/*.md", "configs/**/*.yaml", "scripts/*.py", "train.py", "sample.py",
    "unite_fast/**/*.py",
)  # fmt: skip
PROGRAMS = ("python", "torchrun", "make", "pip", "unite", "unite-train", "unite-sample", "sbatch")
SHELL = re.compile(r"^```(?:|bash|sh|shell)\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMENT = re.compile(r"^#   (\S.*(?:(?<=\\)\n#\s+.*)*)", re.M)  # of a YAML file: an indented line of its head
INDENTED = re.compile(r"^    (\S.*(?:(?<=\\)\n\s+.*)*)", re.M)  # of a docstring
PLACES = {"X": "1", "N": "2", "W": "2"}  # what stands for a number
NO_ARGPARSE = ("scripts/new_user.py", "scripts/house.py")  # they read their words by hand


class Command(NamedTuple):
    where: str
    text: str
    shown: bool  # to be copied, from a block; else a mention within a sentence, which may leave out what is required


class Parsed(BaseException):
    """Raised in place of what a program does after it has read its words."""


def all_commands() -> list[Command]:
    found: dict[Command, None] = {}
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                where = str(path.relative_to(ROOT))
                found |= dict.fromkeys(Command(where, *one) for one in commands_of(path.read_text(), path.suffix))
    return list(found)


def commands_of(text: str, suffix: str) -> Iterator[tuple[str, bool]]:
    """(command, whether it is shown) of a document, in its order, a line each, without comments."""
    if suffix == ".md":
        blocks, mentions = [m[1] for m in SHELL.finditer(text)], INLINE.findall(SHELL.sub("", text))
    elif suffix == ".py":
        said = re.sub(
            r"(?<=\s)\[[^]]*\]", "", text.split('"""')[1] if text.startswith('"""') else ""
        )  # what may be left out
        blocks, mentions = INDENTED.findall(said), []
    else:
        blocks, mentions = [re.sub(r"\\\n#\s*", "", chunk) for chunk in COMMENT.findall(text)], INLINE.findall(text)
    for chunk, shown in [*((chunk, True) for chunk in blocks), *((chunk, False) for chunk in mentions)]:
        for line in re.sub(r"\\?\\\n\s*", "", chunk).splitlines():
            for part in re.split(r" && | {3,}or {3,}|; ", line) if "python -c" not in line else [line]:
                words = words_of(part)
                if len(words) > 1 and words[0] in PROGRAMS and words[1] != "...":
                    yield shlex.join(words), shown


def words_of(line: str) -> list[str]:
    """As a shell splits them: no comment, no NAME=VALUE before the program, no remark after three blanks."""
    line = re.split(r"(?<=\S) {3,}(?![-#\\])", line.strip())[0]
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words and re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
        words[0] = "python"
    return [PLACES.get(w, w) for w in (re.sub(r"=([NXW])$", lambda m: f"={PLACES[m[1]]}", w) for w in words)]


def check(command: str, shown: bool = True, ranks: int = 1) -> None:
    """Raises AssertionError for a command that its program, the configuration or the files of the checkout refuse."""
    program, *words = [word for word in shlex.split(command) if word != "..."]
    words = words[:-1] if words and words[-1] in ("--config", "--data") else words  # what followed was ...
    for word in words:
        name = word.split("=", 1)[-1]
        if re.match(r"(configs|scripts|tests|benchmarks|docs|examples)/\S", name):
            assert (ROOT / name).exists(), f"{command}: there is no {name}"
    if not shown and not [word for word in words[1:] if word.startswith("-") or "=" in word] and program == "python":
        exists(words, command)
    elif program == "torchrun":
        refused(get_args_parser().parse_args, words, command, whole=True)
        known = get_args_parser().parse_args(words)
        inner = ["python", *["-m"] * known.module, known.training_script, *known.training_script_args]
        check(shlex.join(inner), ranks=int(known.nproc_per_node))
    elif program == "make":
        for line in recipe(tuple(words)):
            if shown:
                check(line)
    elif program == "pip":
        check_pip(words)
    elif program in ("unite-train", "unite-sample"):
        of_program(program.removeprefix("unite-"), words, command, ranks)
    elif program == "unite":
        of_verb(words, command)
    elif program == "python":
        of_python(words, command, ranks)


def exists(words: list[str], command: str) -> None:
    """The program of a mention that leaves out its options."""
    if words[:2] == ["-m", "unite_fast"]:
        assert words[2] in (*verbs.VERBS, *verbs.OTHER_NAMES, "VERB"), command
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]), command
    else:
        assert (ROOT / words[0]).is_file(), command


def of_python(words: list[str], command: str, ranks: int) -> None:
    if words[0] == "-c":
        compile(words[1], command, "exec")
    elif words[0] in ("train.py", "sample.py"):
        of_program(words[0].removesuffix(".py"), words[1:], command, ranks)
    elif words[:2] == ["-m", "unite_fast"]:
        of_verb(words[2:], command)
    elif words[0] == "-m" and words[1].startswith("unite_fast."):
        refused(importlib.import_module(main_of(words[1])).main, words[2:], command)
    elif words[0] == "-m" and words[1] == "torch.distributed.run":
        check(shlex.join(["torchrun", *words[2:]]))
    elif words[0] == "-m":
        assert words[1] in ("pytest", "pip", "ruff", "basedpyright", "venv"), command
    elif words[0] == "setup.py":
        assert words[1] in ("build_ext", "bdist_wheel"), command
    else:
        assert (ROOT / words[0]).is_file(), f"{command}: there is no {words[0]}"
        if words[0] not in NO_ARGPARSE:
            of_script(words[0], words[1:], command)


def main_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    if spec.submodule_search_locations is None or "main" in dir(importlib.import_module(module)):
        return module
    return f"{module}.__main__"


def of_verb(words: list[str], command: str) -> None:
    if words[0] in ("VERB", "--help"):
        return
    refused(verbs.main, words, command)


def of_program(name: str, words: list[str], command: str, ranks: int) -> None:
    """train reads its configuration and overrides as well: their keys and values are checked, files are not opened."""

    def plan(argv: list[str]) -> None:
        settings = train.parse(argv)[1]
        config.batch_split(settings.train, ranks)
        compatibility.check(settings.efficiency, settings.train, ranks)

    with contextlib.chdir(ROOT):
        refused(plan if name == "train" else sample.parse, words, command, whole=True)


def of_script(path: str, words: list[str], command: str) -> None:
    with mock.patch.object(sys, "argv", [path, *words]), mock.patch.object(sys, "path", [*sys.path]):
        sys.path.insert(0, str((ROOT / path).parent))
        refused(lambda _: runpy.run_path(str(ROOT / path), run_name="__main__"), [], command)


def refused(main, words: list[str], command: str, whole: bool = False) -> None:
    """Runs a program up to the end of its parsing (whole: to its end); what it refuses is an AssertionError."""
    said = io.StringIO()

    def stop_after(method):
        def parse(self, *args, **kwargs):
            found = method(self, *args, **kwargs)
            raise Parsed(found)

        return parse

    stops = contextlib.ExitStack()
    if not whole:
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            stops.enter_context(mock.patch.object(argparse.ArgumentParser, name, stop_after(method)))
    try:
        with stops, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(words)
    except Parsed:
        return
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"{command}: {said.getvalue() or stop.code}") from None
    except UserError as error:
        raise AssertionError(f"{command}: {error}") from None
    assert whole or "--help" in words, f"{command}: nothing parsed its words"


def recipe(words: tuple[str, ...]) -> list[str]:
    """The commands that ``make WORDS`` would run, without those of an installation."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    target = next(word for word in words if "=" not in word)
    lines = re.sub(r"\\\n\s*", "", done.stdout).splitlines()
    parts = [part for line in lines if "pip" not in line and "-c '" not in line for part in line.split(" && ")]
    found = [part for part in map(words_of, parts) if part and part[0] in PROGRAMS]
    assert found or target in ("install", "clean"), f"make {target} runs nothing"
    return [shlex.join(part) for part in found]


def check_pip(words: list[str]) -> None:
    """Extras and files exist; nothing of ours is asked from an index by name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--constraint", "-c", "--requirement", "-r"):
            assert (ROOT / following).is_file(), f"pip: there is no {following}"
        for extras in re.findall(r"^(?:unite-fast|\.)\[(.*)\]$", word):
            assert set(extras.split(",")) <= set(settings["optional-dependencies"]), f"pip: no extra in {word}"
        assert not re.fullmatch(r"unite-fast(\[.*\])?", word), "pip: unite-fast is in no index"
