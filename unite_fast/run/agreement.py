"""What a run is made of: configuration, code, images. Compared over ranks, and with what a checkpoint keeps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

import unite_kernels
from unite_fast.base.errors import CommonError, UserError
from unite_fast.config import DataConfig
from unite_fast.data import Source
from unite_fast.data.source import BYTES
from unite_fast.parallel.distributed import Ranks

CODE = ("*.py", "*.json", "*.sources")  # of the kernels, the last: hashes of what the libraries were built from


def _sha256(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for pattern in CODE for file in folder.rglob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def fingerprint(keys: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal on all ranks: configuration keys, code, torch, and the images of ``Source.identity``."""
    code = {
        "the code of unite_fast": _sha256(Path(__file__).parents[1]),
        "the code of unite_kernels": _sha256(Path(unite_kernels.__file__).parent),
        "torch": torch.__version__,
    }
    return _flat(keys) | code | {f"data.path: {name}": value for name, value in images.items()}


def check(keys: dict[str, Any], source: Source, ranks: Ranks) -> dict[str, Any]:
    """The identity of the run's images. Raises UserError on all ranks when they have other configurations (``keys``),
    code or images, with what differs."""

    def mine() -> tuple[dict[str, Any], dict[str, Any]]:
        images = source.identity(ranks.device.type)
        return images, fingerprint(keys, images)

    found = ranks.each(mine)
    images, everyone = found[ranks.rank][0], [keys for _, keys in found]
    for rank, other in enumerate(everyone):
        differing = [key for key in everyone[0] if other.get(key) != everyone[0][key]]
        if differing:
            shown = "; ".join(
                f"{k} is {_short(everyone[0][k], other.get(k))} on rank 0, "
                f"{_short(other.get(k), everyone[0][k])} on rank {rank}"
                for k in differing[:3]
            )
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CommonError(
                f"the ranks differ: {shown}{more}; start all of them with the same command, code and images"
            )
    return images


def _short(value: Any, other: Any) -> str:
    """``value``; of a list the first entry that ``other`` does not have at that place."""
    if isinstance(value, list) and isinstance(other, list):
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"{value[at]!r} at {at}" if at < len(value) else f"{len(value)} entries"
    return repr(value)


def changed_images(saved: dict[str, Any], images: dict[str, Any], reading: DataConfig, where: str) -> list[str]:
    """A line for each way in which the images are not those of the checkpoint ``where``, which kept ``saved``.

    Raises UserError when labels have another meaning than there, unless data.on_change=accept.
    """
    if not saved or saved == images:
        return []
    # Of their bytes earlier checkpoints say nothing.
    differs = [name for name, value in images.items() if saved.get(name) != value and (name in saved or name != BYTES)]
    lines = [
        f"changed since {where}: {name} {_short(saved.get(name), images[name])} -> "
        f"{_short(images[name], saved.get(name))}"
        for name in differs
    ]
    relabelled = "labels" in differs and saved.get("images") == images["images"]
    if (relabelled or "class names" in differs) and reading.on_change == "fail":
        what = "class names" if "class names" in differs else "labels"
        raise UserError(
            f"data.path {reading.path}: its {what} are not those of {where} "
            f"({_short(saved.get(what), images[what])} there, {_short(images[what], saved.get(what))} here); "
            "give the images of the run so far, or go on with these by data.on_change=accept"
        )
    return lines
