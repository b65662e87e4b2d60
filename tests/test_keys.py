"""Every key of a configuration is read by code that acts on it: none is accepted and forgotten."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterable, Iterator

from support import ROOT

from unite_fast.config import Config
from unite_fast.evaluation.scores import SCORES

# What knows keys without acting on them; of keys.py properties count.
KEEPERS = ("config/checks.py", "config/idle.py", "config/yaml_text.py", "checkpoint/compare.py")


def sections(kind: type, name: str = "") -> dict[type, set[str]]:
    """The classes of a configuration's sections, each with the names by which it is reached."""
    found = {kind: {name} if name else set()}
    for key, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            for inner, names in sections(hint, key).items():  # type: ignore[arg-type]
                found.setdefault(inner, set()).update(names)
    return found


SECTIONS = sections(Config)
BY_NAME = {kind.__name__: kind for kind in SECTIONS}


def last(node: ast.AST) -> str:
    """``efficiency`` of ``self.config.efficiency``, ``e`` of ``e``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def kinds_of(node: ast.AST, names: dict[str, set[type]]) -> set[type]:
    """Which sections an expression may be: by its type's name, or that of the key that it was taken from."""
    if isinstance(node, ast.Call) and last(node.func) in ("replace", "saved_config"):
        return kinds_of(node.args[0], names)
    if isinstance(node, ast.IfExp):
        return kinds_of(node.body, names) | kinds_of(node.orelse, names)
    if isinstance(node, ast.BoolOp):
        return set().union(*(kinds_of(value, names) for value in node.values))
    word = last(node)
    return names.get(word, set()) | {kind for kind, keys in SECTIONS.items() if word in keys}


def pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What a (tuple) assignment gives to what."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from pairs(one, other)
    else:
        yield target, value


def reads(text: str) -> set[tuple[type, str]]:
    """(section, key) of all that a module's code looks at.

    Names mean what their annotation or the value given to them says, wherever in the module they stand, so that some
    that nobody reads may pass, and none that somebody reads is named.
    """
    tree = ast.parse(text)
    names: dict[str, set[type]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last(node.target)
            words = {word for n in ast.walk(node.annotation) if (word := last(n)) in BY_NAME}
            names.setdefault(name, set()).update(BY_NAME[word] for word in words)
    for _ in range(2):  # names of names
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target, value in pairs(node.targets[0], node.value):
                    if last(target):
                        names.setdefault(last(target), set()).update(kinds_of(value, names))
    found = {
        (kind, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        for kind in kinds_of(node.value, names)
    }
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in BY_NAME:  # of a property of the section
            own = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and last(n.value) == "self"}
            found |= {(BY_NAME[node.name], key) for key in own}
        if isinstance(node, ast.Call) and last(node.func) == "getattr":  # by one of the module's words
            found |= {(kind, word) for kind in kinds_of(node.args[0], names) for word in words if isinstance(word, str)}
    return found


def unread(texts: Iterable[str]) -> list[str]:
    found = set().union(*map(reads, texts))
    keys = [(kind, f.name) for kind in SECTIONS for f in dataclasses.fields(kind)]
    return [f"{kind.__name__}.{key}" for kind, key in keys if (kind, key) not in found]


def test_every_key_is_read():
    paths = [*(ROOT / "unite_fast").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
    acting = [path.read_text() for path in paths if not str(path).endswith(KEEPERS)]
    acting += ["def due(e: EvaluationConfig, key): getattr(e, key) or " + repr([s.key for s in SCORES.values()])]
    assert unread(acting) == []


def test_a_key_that_nobody_reads_is_found():
    code = (
        "def f(t: TrainConfig, c):\n    e, x = c.efficiency, t.epochs\n    return x + e.precision + c.other.max_steps"
    )
    left = unread([code])
    assert not {"TrainConfig.epochs", "EfficiencyConfig.precision"} & set(left)
    assert {"TrainConfig.max_steps", "EfficiencyConfig.residual", "TrainConfig.precision"} - set(left) == {
        "TrainConfig.precision"
    }
