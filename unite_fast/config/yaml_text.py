"""Configurations in and out: strict YAML, dotted overrides, and the text of ``--help``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from unite_fast.base import files
from unite_fast.base.errors import CommonError, UserError, first_line
from unite_fast.config import SIZES, Config, idle
from unite_fast.config.checks import validate
from unite_fast.config.earlier import GONE, written

BASE = "base"  # in a file: another one, by its path from this one, whose keys it begins with
MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 50
LONE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # halves of letters; the others are bytes of a path, not UTF-8


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are decimal, and that refuses duplicate keys, references and extreme nesting.

    YAML 1.1 would read 1:30 as 90, 010 as 8 and 1e-4 as text. References can make a file of a few lines endless.
    """

    depth = 0

    def compose_node(self, parent, index):  # type: ignore[override]
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise UserError(f"nesting deeper than {MAX_YAML_DEPTH} levels")
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise UserError(f"line {line}: references (*name) are not read; write the value out")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be a plain name")
            if key == "<<":
                raise UserError(f"line {line}: '<<' is not read; write its keys out")
            if key in seen:
                raise UserError(f"line {line}: key '{key}' stands twice (first in line {seen[key]}); remove one")
            seen[key] = line
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(((0|[1-9][\d_]*)(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?|\.inf)$|^\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in found if tag not in _NUMBERS]
    for start, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    if len(text.encode()) > MAX_YAML_BYTES:
        raise UserError(f"{where}: larger than {MAX_YAML_BYTES} bytes; this is not a configuration")
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{where}: line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, OverflowError) as error:  # of tags
        raise UserError(f"{where}: not valid YAML: {first_line(error)}") from None


# What others call our keys.
ELSEWHERE = {
    "batch_size": "train.global_batch", "gradient_accumulation_steps": "train.micro_batch",
    "learning_rate": "optim.lr", "warmup_steps": "optim.warmup_epochs", "grad_clip": "optim.clip",
    "max_epochs": "train.epochs", "num_epochs": "train.epochs", "save_every": "train.checkpoint_every",
    "resolution": "model.image_size", "img_size": "model.image_size", "num_workers": "data.workers",
    "root": "data.path", "data_dir": "data.path", "output_dir": "run_dir", "outdir": "run_dir",
    "guidance_scale": "sample.cfg_scale", "num_steps": "sample.steps", "mixed_precision": "efficiency.precision",
}  # fmt: skip


def _unknown(key: str, known: list[str], path: str, where: str) -> UserError:
    if gone := GONE.get(path + key):
        return UserError(f"{where}: {path}{key} is no key any more: {gone}")
    if other := ELSEWHERE.get(key):
        return UserError(f"{where}: unknown key '{path}{key}'; did you mean '{other}'?")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{path}{close[0]}'?" if close else "known: " + ", ".join(known)
    return UserError(f"{where}: unknown key '{path}{key}'; {hint}")


def _convert(value: Any, kind: Any, key: str, where: str) -> Any:
    """``value`` as the annotated type ``kind``, or a UserError that names the key."""
    wrong = UserError(f"{where}: {key} must be {_describe(kind)}, got {value!r}")
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind) and not isinstance(value, bool):
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in get_args(kind)], n=1)
        raise UserError(f"{wrong}; did you mean '{close[0]}'?") if close else wrong
    if origin in (typing.Union, types.UnionType):
        for option in get_args(kind):
            try:
                return _convert(value, option, key, where)
            except UserError:
                continue
        raise wrong
    if origin is tuple:
        items = get_args(kind)
        if isinstance(value, (list, tuple)) and items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise wrong
        return tuple(_convert(v, k, key, where) for v, k in zip(value, items, strict=True))
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return value
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind is str:
        if isinstance(value, str) and "\0" not in value and not LONE.search(value):
            return value
        if value is None:
            return ""
        if not isinstance(value, (dict, list, tuple, str)):
            raise UserError(f"{wrong}; put it in quotes")
    raise wrong


def _describe(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + "|".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return f"[{', '.join('...' if a is Ellipsis else _describe(a) for a in args)}]"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _merge(base: Any, values: Any, path: str, where: str) -> Any:
    """``base`` (a config dataclass) with ``values`` (a mapping, or a size's name) laid over it."""
    sizes = SIZES.get(type(base))
    if sizes is not None and isinstance(values, str):
        if values not in sizes:
            raise _unknown(values, list(sizes), path, where)
        return sizes[values]
    if not isinstance(values, dict):
        raise UserError(f"{where}: {path.rstrip('.') or 'the file'} must be a section of keys, got {values!r}")
    hints = typing.get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key == "size" and sizes is not None:
            continue
        if key not in hints:
            raise _unknown(str(key), list(hints), path, where)
        if dataclasses.is_dataclass(hints[key]):
            changes[key] = _merge(getattr(base, key), value, f"{path}{key}.", where)
        else:
            changes[key] = _convert(value, hints[key], path + key, where)
    if sizes is not None and "size" in values:
        base = _merge(base, str(values["size"]), path, where)
    return dataclasses.replace(base, **changes)


def from_dict(values: dict[str, Any], where: str = "config", base: Config | None = None) -> Config:
    """A checked Config from nested dictionaries. Raises UserError."""
    return _merge(base or Config(), values, "", where)


def located(name: str | Path) -> Path:
    """A configuration's file: ``name`` itself, or one that the package brings: ``digits``, ``configs/digits.yaml``."""
    path, package = Path(name), Path(__file__).resolve().parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"  # of a checkout
    brought = folder / f"{str(name).removeprefix('configs/').removesuffix('.yaml')}.yaml"
    return brought if not path.exists() and not path.is_absolute() and brought.is_file() else path


def load(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads ``path`` (YAML), applies ``section.key=value`` overrides in order, and validates. Raises CommonError."""
    try:
        return _load(path, overrides)
    except UserError as error:
        raise CommonError(str(error)) from None


def read(path: str | Path, option: str = "--config") -> Any:
    """What a YAML file holds. option: what names it. Raises UserError."""
    try:
        text = files.read_text(Path(path))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{option} {path}: not a text file") from None
    return parse_yaml(text, str(path))


def _from_file(path: Path, option: str = "--config", above: tuple[str, ...] = ()) -> Config:
    """The configuration of a file, laid over that of the file its ``base`` names, if it names one.

    above: the files that led here, so that none leads back to itself.
    """
    here = os.path.realpath(path)  # of links in a circle ``Path.resolve`` raises more than OSError
    if here in above:
        raise UserError(
            f"{option} {path}: this file is its own base; take a base out of one of the files in the circle"
        )
    values = read(path, option)
    if not isinstance(values, dict) or BASE not in values:
        return from_dict({} if values is None else written(values), str(path))
    name = values.pop(BASE)
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: {BASE} must be the path of a YAML file, got {name!r}")
    name = files.expanded(name, f"{path}: {BASE}")
    base = _from_file(path.parent / name, f"{path}: {BASE}", (*above, here))
    return from_dict(written(values), str(path), base)


def _load(path: str | Path | None, overrides: typing.Sequence[str]) -> Config:
    config = Config() if path is None else _from_file(located(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}': write it as section.key=value")
        nested: Any = text if _is_text(key, text) else parse_yaml(text, f"override {override}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = from_dict(nested, f"override {override}", config)
    config = _expand(config)
    validate(config)
    idle.check(config, [override.partition("=")[0] for override in overrides])
    return config


def _is_text(key: str, text: str) -> bool:
    """Whether an override's value is taken as it stands: where a key's values are text, unless it is in quotes."""
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return (kind is str and not quoted) or (get_origin(kind) is Literal and text in get_args(kind))


def _expand(section: Any, path: str = "") -> Any:
    """``section`` with ~ and $NAME replaced in the keys that are paths. Raises UserError."""
    changes = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _expand(value, f"{path}{f.name}.")
        elif f.metadata.get("path"):
            changes[f.name] = files.expanded(value, path + f.name)
    return dataclasses.replace(section, **changes)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    return dump(to_dict(config))


def dump(values: dict[str, Any]) -> str:
    """As YAML, in the order that they have."""
    return yaml.safe_dump(values, sort_keys=False)


def help_text() -> str:
    """Every key with its default, meaning and type, a line each, grouped by section, for ``--help``."""
    lines: list[str] = []

    def section(kind: type, path: str) -> None:
        hints = typing.get_type_hints(kind)
        default = kind()
        nested = []
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[f.name]):
                nested.append(f.name)
            else:
                shown = f"{path}{f.name}={to_yaml_value(getattr(default, f.name))}"
                lines.append(f"  {shown:<40} {f.metadata['meaning']} [{_describe(hints[f.name])}]")
        for name in nested:
            sizes = SIZES.get(hints[name])
            lines.append(f"\n{path}{name}" + (f"  (or a size: {', '.join(sizes)})" if sizes else ""))
            section(hints[name], f"{path}{name}.")

    section(Config, "")
    return "\n".join(lines)


def to_yaml_value(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return text.replace("\n...", "").strip()
