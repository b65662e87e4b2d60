"""Every option of every command acts or is refused: none is accepted and forgotten."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from support import command_of, tiny_run

import sample
import train
from unite_fast import config
from unite_fast.__main__ import VERBS
from unite_fast.base.errors import UserError
from unite_fast.config import idle, yaml_text

MODULES = {"train.py": train, "sample.py": sample}
MODULES |= {verb: importlib.import_module(module) for verb, (module, _) in VERBS.items()}
# Read elsewhere than in the command's own file.
ELSEWHERE = {
    "autoguidance_weights": "unite_fast.checkpoint.guide",
    "debug": "unite_fast.base.command",
    "extractor": "unite_fast.evaluation.statistics", "inception": "unite_fast.evaluation.statistics",
    "inception_sha256": "unite_fast.evaluation.statistics", "layers": "unite_fast.evaluation.statistics",
    "mfu": "unite_fast.run.options", "ranks": "unite_fast.run.options",
}  # fmt: skip

# Beside what an option would do nothing: (command, arguments, the option that is named).
IDLE = [
    ("train.py", "--config tiny.yaml data.path=x", "override data.path"),
    ("train.py", "--config tiny.yaml data.heldout_path=x", "override data.heldout_path"),
    ("train.py", "--config tiny.yaml data.timeout=9", "override data.timeout"),
    ("train.py", "--config tiny.yaml data.on_error=skip", "override data.on_error"),
    ("train.py", "--config tiny.yaml model.atoms.registers=fixed", "override model.atoms.registers"),
    ("train.py", "--config tiny.yaml objective.perceptual_range=-1_1", "override objective.perceptual_range"),
    ("train.py", "--config tiny.yaml objective.adversarial.trunk=trained", "override objective.adversarial.trunk"),
    ("train.py", "--config tiny.yaml objective.noising_sigma=0.5", "override objective.noising_sigma"),
    ("train.py", "--config tiny.yaml objective.noising=add objective.noising_t=[0,1]", "override objective.noising_t"),
    ("train.py", "--config tiny.yaml objective.flow_time=uniform objective.flow_time_std=2", "objective.flow_time"),
    ("train.py", "--config tiny.yaml objective.flow_steps=0 objective.flow_weight=2", "override objective.flow_weight"),
    ("train.py", "--config tiny.yaml optim.muon=false optim.muon_momentum=0.9", "override optim.muon_momentum"),
    ("train.py", "--config tiny.yaml train.wandb_name=x", "override train.wandb_name"),
    ("train.py", "--config tiny.yaml resume=must init_from=x", "override init_from"),
    *(
        ("train.py", f"--config atoms.yaml {key}={value}", f"override {key}: it does nothing beside model.modality=")
        for key, value in {
            "model.patch_positions": "learned", "data.crop": "fast", "data.flip": "false",
            "evaluation.reference": "r.npz", "evaluation.extractor": "digits", "evaluation.inception": "x",
        }.items()
    ),
    ("train.py", "--config tiny.yaml evaluation.scorer=rdkit_tight", "override evaluation.scorer"),
    ("train.py", "--config tiny.yaml objective.flow_steps=0 efficiency.flow_mini_batch=2", "flow_mini_batch"),
    ("train.py", "--config tiny.yaml train.shard_size=2", "train.shard_size"),
    ("train.py", "--config tiny.yaml train.reshard=pass", "train.reshard"),
    ("train.py", "--config tiny.yaml --mfu 0.4", "--mfu"),
    ("train.py", "--config tiny.yaml --ranks 8", "--ranks"),
    ("train.py", "--config tiny.yaml --print-config --dry-run", "--dry-run"),
    ("train.py", "--config tiny.yaml --print-config --fast-dev-run 2", "--fast-dev-run"),
    ("train.py", "--config tiny.yaml --dry-run --fast-dev-run 2", "--fast-dev-run"),
    ("train.py", "--config tiny.yaml --fast-dev-run 2 train.max_steps=9", "override train.max_steps"),
    *(
        ("sample.py", f"--checkpoint run --out out --reconstruct photos {words}", words.split()[0])
        for words in (
            "--overwrite", "--seeds 0-3", "--labels equal", "--cfg 2", "--cfg-interval 0,1", "--cfg-order both",
            "--solver heun", "--steps 5", "--last state", "--compile", "--graph",
        )
    ),
    ("sample.py", "--checkpoint run --out out --cfg-interval 0.1,1", "--cfg-interval"),
    ("sample.py", "--checkpoint run --out out --cfg-order both", "--cfg-order"),
    ("sample.py", "--checkpoint run --out out --graph --device cpu", "--graph"),
    *(
        ("evaluate", f"{words} --checkpoint run --extractor digits --out o.json", words.split()[1])
        for words in (
            "rfid --data photos", "rfid --inception x", "rfid --inception-sha256 0123456789", "rfid --layers 64,logits",
            "fid --kid-subset 9 --reference r.npz", "fid --cfg-interval 0,1 --reference r.npz --count 20",
            "table --cfg-interval 0,1 --reference r.npz --count 20",
            "fid --cfg-order both --reference r.npz --count 20",
            "fid --graph --device cpu --reference r.npz --count 20",
            "search --cfg 2 --grid 1,2,1 --reference r.npz --count 20",
        )
    ),
    *(
        ("statistics", f"--config tiny.yaml --extractor digits --out s.npz {words}", words.split()[-2:][0])
        for words in ("--inception x", "--inception-sha256 0123456789", "--layers 64,logits")
    ),
    ("statistics", "--config tiny.yaml --extractor digits --out s.npz optim.lr=1", "override optim.lr=1"),
    ("analyse", "run --only entropy --pairs 7", "--pairs"),
    ("analyse", "run --only entropy --times 0.5", "--times"),
    ("analyse", "run --data photos", "--data"),
    ("doctor", "data.path=x", "data.path=x"),
    ("export", "run --out e --trust-pickle", "--trust-pickle"),
    ("pack", "photos packed --quality 80", "--quality"),
    ("pack-atoms", "files atoms.xyz --split adit_sizes", "--split"),
    ("pack-atoms", "qm9 --workers 3", "--workers"),
    ("score-atoms", "atoms.xyz --of atoms.xyz --real atoms.xyz", "--real"),
    ("score-atoms", "atoms.xyz --of atoms.xyz --training atoms.xyz", "--training"),
    ("score-atoms", "atoms.xyz --of atoms.xyz --scorer edm", "--scorer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tiny_run(tmp_path_factory.mktemp("options"), "train.max_steps=1")
    said = command_of(MODULES["statistics"].main, "--config", place / "tiny.yaml", "--extractor", "digits", "--out",
                      place / "r.npz")  # fmt: skip
    assert said.returncode == 0, said.stderr
    (place / "atoms.yaml").write_text("model: {modality: atoms}\ndata: {source: qm9}")
    (place / "atoms.xyz").write_text("3\n\nO 0 0 0\nH 0.76 0.59 0\nH -0.76 0.59 0\n")
    return place


@pytest.mark.parametrize(("name", "words", "named"), IDLE, ids=lambda value: value[:70])
def test_an_option_that_would_do_nothing_is_refused(place, monkeypatch, name, words, named):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    said = command_of(MODULES[name].main, *words.split())
    assert said.returncode == 2, said
    assert named in said.stderr.splitlines()[-1]
    assert sum(line.startswith("error: ") for line in said.stderr.splitlines()) == 1
    assert sorted(place.iterdir()) == before


class Taken(Exception):
    pass


def options(name: str) -> dict[str, set[str]]:
    """The options of a command and its sub-commands, by the name under which the command reads them."""
    found: dict[str, set[str]] = {}

    def parse(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parsers = [parser]
        for one in parsers:
            for action in one._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                elif action.dest != "help":
                    found.setdefault(action.dest, set()).update(action.option_strings)
        raise Taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
        with pytest.raises(Taken):
            MODULES[name].main(["--checkpoint", "x"])
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_option_is_read(name):
    """An option that a command takes is an attribute that its code looks at, beside the line that declares it."""
    for dest in options(name):
        files = [Path(inspect.getfile(MODULES[name]))]
        files = list(files[0].parent.glob("*.py")) if files[0].name == "__init__.py" else files
        files += [Path(inspect.getfile(importlib.import_module(ELSEWHERE[dest])))] if dest in ELSEWHERE else []
        found = set().union(*(looked_at(file.read_text()) for file in files))
        assert dest in found, f"{name} takes {dest} and does not look at it"


def looked_at(text: str) -> set[str]:
    """Attributes of what a parser returns, and words by which code may ask for one; those that declare do not count."""
    tree = ast.parse(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    declaring = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) in ("add", "add_argument")]
    declared = {id(n) for call in declaring for n in ast.walk(call)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(
            r"arguments|args|a|(\w+\.)*arguments|\w*[pP]arser.parse_args\(.*\)", ast.unparse(node.value)
        ):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in declared:
            found.add(node.value.lstrip("-").replace("-", "_"))
    return found


def test_rules_name_keys():
    """A rule that names no key would never speak; one that is idle always would always."""
    keys = flat(config.Config())
    for beginnings, is_idle, beside in idle.RULES:
        assert all(any(key.startswith(beginning) for key in keys) for beginning in beginnings), beginnings
        assert beside.format(config.Config())
        adversarial = {"weight": 1.0, "penalty": "r1"}
        others = [yaml_text.from_dict({
            "data": {"source": source}, "model": {"modality": "atoms"}, "init_from": "x",
            "train": {"wandb": True, "strategy": "fsdp2"},
            "objective": {"noising": "add", "adversarial": adversarial},
        }) for source in ("digits", "parquet")]  # fmt: skip
        assert not all(is_idle(one) for one in (config.Config(), *others)), beginnings


def flat(section: object, path: str = "") -> list[str]:
    import dataclasses

    found = []
    for f in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, f.name)
        found += flat(value, f"{path}{f.name}.") if dataclasses.is_dataclass(value) else [path + f.name]
    return found


def test_what_a_file_holds_is_left_alone(tmp_path):
    """It may be meant for several commands; and a key that is given its default asks for nothing."""
    (tmp_path / "a.yaml").write_text("data: {source: digits, path: images, flip: false}")
    assert yaml_text.load(tmp_path / "a.yaml").data.path == "images"
    assert yaml_text.load(tmp_path / "a.yaml", ["data.path="]).data.path == ""
    with pytest.raises(UserError, match=r"^override data\.path: it does nothing beside data\.source=digits"):
        yaml_text.load(tmp_path / "a.yaml", ["data.path=other"])
