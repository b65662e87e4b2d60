"""Files of scores: how they are told from others, from those of other commits, and from those they repeat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.base import files, outputs
from unite_fast.base.errors import UserError

WHILE_TRAINING = Path("scores", "training")  # in a run's folder

is_result = outputs.holds_json("result", "rows")


def is_result_of(command: str) -> Callable[[Path], bool]:
    """A function that tells whether a file is a result of this command, of those that score: no other replaces it."""

    def told(path: Path) -> bool:
        return is_result(path) and command == _command_of(json.loads(files.read_text(path)))

    return told


def _command_of(content: dict[str, Any]) -> str:
    """The command that wrote a result; told from what it holds where it does not say, as earlier ones."""
    if isinstance(said := content.get("command"), str):
        return said
    if "rows" in content:
        return "search" if "best" in content else "table"
    protocol = content.get("protocol")
    if not isinstance(protocol, dict) or "kind" in content:  # a score while training
        return ""
    for command, part in (("small", "classifier"), ("atoms", "heldout"), ("fid", "reference")):
        if part in protocol:
            return command
    return ("rfid" if protocol.get("extractor") else "heldout") if "data" in protocol else ""


def while_training(run: Path) -> list[dict[str, Any]]:
    """The scores that a run took while it trained, in the order of steps; files that hold none are left out."""
    found = [files.read_json(path) for path in sorted((run / WHILE_TRAINING).glob("step_*.json"))]
    return [content for content in found if isinstance(content.get("result"), dict)]


def timeless(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol, as JSON has it, without when and where it was followed."""
    return json.loads(json.dumps({k: v for k, v in protocol.items() if k != "environment"}))


def beside_other_commits(path: Path, environment: dict[str, Any]) -> Path:
    """``path``, or its name with the commit where a score of another commit has it: both are kept."""
    try:
        found = json.loads(files.read_text(path))
        protocol = found.get("protocol") or found.get("best") or found["rows"][0]["protocol"]
        before = protocol["environment"]["commit"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return path
    commit = str(environment.get("commit", before))
    return path if before == commit else path.with_name(f"{path.stem}_at_{commit[:8] or 'unknown'}.json")


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values: what tells weights apart that are in no file."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _is_training(content: dict[str, Any]) -> bool:
    """Whether a score is one of a run's own searches, of weights that were in no file then."""
    return content.get("kind") in ("search", "sweep")


def read_result(path: str) -> dict[str, Any]:
    """What --protocol names: a score of ``evaluate fid``, or the best of a search while training. Raises UserError."""
    try:
        content = json.loads(files.read_text(Path(path)))
        if _is_training(content):
            content["protocol"] |= {"settings": content["best_overall"], "kid_subset": None}
        protocol = content["protocol"]
        read = [protocol[part]["sha256"] for part in ("checkpoint", "extractor", "reference")]
        read += [protocol["checkpoint"]["weights"], protocol["extractor"]["layers"], protocol["kid_subset"]]
        if isinstance(protocol["settings"], dict):
            return content
    except OSError as error:
        raise UserError(f"--protocol {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"--protocol {path}: not a result of python -m unite_fast.evaluate fid, nor a search while training"
    )


def compare(protocol: dict[str, Any], earlier: dict[str, Any], trained: Callable[[], Mapping[str, Tensor]]) -> None:
    """Raises UserError naming the first file, set of weights or layers that is not the protocol's.

    trained: the weights now, those that a run trains, by which a score while training knows its own.
    """
    if _is_training(earlier):
        protocol = protocol | {"checkpoint": protocol["checkpoint"] | {"sha256": weights_sha256(trained())}}
    for part, name in (("checkpoint", "--checkpoint"), ("extractor", "the extractor"), ("reference", "--reference")):
        now, before = protocol[part]["sha256"], earlier["protocol"][part]["sha256"]
        if now != before:
            at = f" (step {earlier.get('step')} of training)" if part == "checkpoint" and _is_training(earlier) else ""
            raise UserError(f"{name} has sha256 {now[:12]}..., the protocol was made with {before[:12]}...{at}")
    for part, key in (("checkpoint", "weights"), ("checkpoint", "autoguidance"), ("extractor", "layers")):
        now, before = protocol[part].get(key, "none"), earlier["protocol"][part].get(key, "none")
        if now != before:
            now, before = (v if isinstance(v, str) else ",".join(v) for v in (now, before))
            raise UserError(f"--{key} is {now}, the protocol was made with {before}")
