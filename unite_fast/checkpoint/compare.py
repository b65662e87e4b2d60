"""A run beside a checkpoint: the configuration that it was saved with, the parts of its training state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unite_fast.base.errors import UserError
from unite_fast.config import ModelConfig
from unite_fast.config.yaml_text import to_dict
from unite_fast.training.state import STEPS, prefix

# Keys, or their beginnings, whose change does not change what the steps of a run compute.
QUIET = (
    "name", "run_dir", "resume", "init_", "device", "sample.", "evaluation.", "comm.", "data.workers",
    "data.timeout", "data.heldout_path", "data.on_change", "objective.perceptual_trunk", "train.max_",
    "train.log_every", "train.image_every", "train.checkpoint_every", "train.keep_", "train.replica_check_every",
    "train.on_", "train.collapse_std", "train.tensorboard", "train.wandb",
    "train.profile",
)  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything that differs; keys that only one side has are left out."""
    found = []
    for key in old.keys() & new.keys():
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            found += differences(old[key], new[key], f"{path}{key}.")
        elif old[key] != new[key]:
            found.append((path + key, old[key], new[key]))
    return sorted(found)


def check_same_model(saved: dict[str, Any], model: ModelConfig, where: str) -> None:
    """Raises UserError when the saved configuration describes another model, which equal shapes would not show."""
    changed = differences({"model": saved.get("model", {})}, {"model": to_dict(model)})
    if changed:
        listed = "; ".join(f"{key} is {old} there and {new} here" for key, old, new in changed[:3])
        raise UserError(f"{where} holds another model: {listed}")


def check_parts(path: Path, parts: Iterable[str], counters: Iterable[str]) -> None:
    """Raises UserError unless a checkpoint has the same parts beside the model. counters: the names of its counts."""
    there = {name.removesuffix(STEPS) for name in counters if name.endswith(f".{STEPS}")}
    ours = {prefix(part) for part in parts if part}
    for part in sorted(ours - there):
        raise UserError(
            f"checkpoint {path} holds no {part[:-1]}, so a run with one cannot go on from it; begin another run with "
            f"its weights: init_from={path}"
        )
    for part in sorted(there - ours):
        raise UserError(
            f"checkpoint {path} holds a {part[:-1]} as well, which this run has not; begin it with the other weights: "
            f"init_from={path}"
        )


def changed_settings(saved: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """A line for each key that changes what the steps compute. saved: the configuration of the checkpoint ``where``."""
    return [
        f"changed since {where}: {key} {old} -> {new}"
        for key, old, new in differences(saved, now)
        if not key.startswith(QUIET)
    ]
