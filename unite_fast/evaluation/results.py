"""Files of scores: how they are told from others, from those of other commits, and from those they repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unite_fast.base import outputs
from unite_fast.base.errors import UserError

is_result = outputs.holds_json("result", "rows")


def timeless(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol, as JSON has it, without when and where it was followed."""
    return json.loads(json.dumps({k: v for k, v in protocol.items() if k != "environment"}))


def beside_other_commits(path: Path, environment: dict[str, Any]) -> Path:
    """``path``, or its name with the commit where a score of another commit has it: both are kept."""
    try:
        found = json.loads(path.read_text())
        protocol = found.get("protocol") or found.get("best") or found["rows"][0]["protocol"]
        before = protocol["environment"]["commit"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return path
    commit = str(environment.get("commit", before))
    return path if before == commit else path.with_name(f"{path.stem}_at_{commit[:8] or 'unknown'}.json")


def read_result(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
        protocol = content["protocol"]
        read = [protocol[part]["sha256"] for part in ("checkpoint", "extractor", "reference")]
        read += [protocol["checkpoint"]["weights"], protocol["extractor"]["layers"], protocol["kid_subset"]]
        if isinstance(protocol["settings"], dict):
            return content
    except OSError as error:
        raise UserError(f"--protocol {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--protocol {path}: not a result of python -m unite_fast.evaluate fid")


def compare(protocol: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raises UserError naming the first file, set of weights or layers that is not the protocol's."""
    for part, name in (("checkpoint", "--checkpoint"), ("extractor", "the extractor"), ("reference", "--reference")):
        now, before = protocol[part]["sha256"], earlier["protocol"][part]["sha256"]
        if now != before:
            raise UserError(f"{name} has sha256 {now[:12]}..., the protocol was made with {before[:12]}...")
    for part, key in (("checkpoint", "weights"), ("extractor", "layers")):
        now, before = protocol[part][key], earlier["protocol"][part][key]
        if now != before:
            now, before = (v if isinstance(v, str) else ",".join(v) for v in (now, before))
            raise UserError(f"--{key} is {now}, the protocol was made with {before}")
