"""Training state on disk: tensors in safetensors, counters in JSON, a sha256 manifest. ``saving`` writes it.

    checkpoints/step-0000200/   training.safetensors   model.* ema.* momentum.* exp_avg.* exp_avg_sq.*
                                                       ema_0.9999.* ... (optim.ema_extra)
                                state.json             counters, running means, the resolved configuration
                                manifest.json          size and sha256 of both

A folder named ``*.incomplete`` is an unfinished save or removal and is never read. Parameter names are the stock ones,
and nothing depends on the number of ranks. No file here can execute code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unite_fast import interop
from unite_fast.config import Config, UserError
from unite_fast.config_io import from_dict, to_dict
from unite_fast.model.unite import UNITE
from unite_fast.optim import ema
from unite_fast.optim.optimizer import Optimizer
from unite_fast.optim.parts import local, part_of, whole

log = logging.getLogger("unite_fast.checkpoint")
FORMAT = 1
NO_PICKLE = "this program executes nothing while it loads"
NAME = re.compile(r"step-(\d{7,})$")


@dataclass
class TrainState:
    """What a run carries from step to step. ``images_seen`` fixes the data order, every draw and the schedule."""

    model: UNITE
    optimizer: Optimizer
    step: int = 0
    images_seen: int = 0


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


STEPS = "optimizer_steps"  # among the tensors of a save; goes into state.json


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by its name there, and the optimizer's step count."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    for average, values in state.optimizer.averages.items():
        tensors |= {f"{average}.{k}": v for k, v in values.items()}
    tensors |= state.optimizer.state_dict()
    return tensors | {STEPS: state.optimizer.steps}


def whole_tensors_of(state: TrainState) -> dict[str, Tensor]:
    """The same, with sharded tensors gathered; all ranks must ask for them."""
    return {name: whole(tensor) for name, tensor in tensors_of(state).items()}


def counters_of(state: TrainState) -> dict[str, Any]:
    return {"format": FORMAT, "step": state.step, "images_seen": state.images_seen}


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other path."""
    found = NAME.search(path.name)
    return int(found.group(1)) if found else None


def newest_first(folder: Path) -> list[Path]:
    found = [(step, p) for p in folder.glob("step-*") if (step := step_of(p)) is not None and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def verify(path: Path, content: bool = True) -> str:
    """An empty string for a whole checkpoint, else what is wrong with it. Without ``content``, sizes alone count."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        if (path / ".metadata").exists():
            return f"it is a folder of torch.distributed.checkpoint, whose metadata is a pickle; {NO_PICKLE}"
        return "it has no readable manifest.json"
    for name, size, sha256 in files:
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}: it was cut short or changed"
        if content and _digest(file)["sha256"] != sha256:
            return f"{name} does not have the recorded sha256: its content changed"
    return "" if {"training.safetensors", "state.json"} <= set(manifest) else "its manifest is incomplete"


def newest(folder: Path) -> tuple[Path | None, list[str], list[Path]]:
    """(the newest checkpoint that verifies or None, one line for each newer one that does not, those themselves)."""
    lines: list[str] = []
    rejected: list[Path] = []
    for path in newest_first(folder):
        problem = verify(path)
        if not problem:
            return path, lines, rejected
        lines.append(f"skipping {path}: {problem}")
        rejected.append(path)
    return None, lines, rejected


def locate(path: str | Path) -> Path:
    """A checkpoint folder or official .pt from what a user names: either, or a run folder. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return path
    if (path / "manifest.json").is_file() or NAME.search(path.name):
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}")
        problem = verify(path)
        if problem:
            raise UserError(f"checkpoint {path} is damaged: {problem}; choose another one")
        return path
    for folder in (path / "checkpoints", path):
        found, rejected, _ = newest(folder) if folder.is_dir() else (None, [], [])
        if found:
            return found
        if rejected:
            raise UserError(f"no usable checkpoint in {folder}: {rejected[0]}")
    raise UserError(f"no checkpoint at {path}; give a run folder, a step-N folder, or an official .pt file")


def identity(located: Path) -> str:
    """A sha256 that changes whenever the weights do: of an official .pt, or of a checkpoint folder's manifest."""
    return str(_digest(located if located.is_file() else located / "manifest.json")["sha256"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "training.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        state = state if isinstance(state, dict) else {}
        raise UserError(f"checkpoint {path} has format {state.get('format')}, this program reads {FORMAT}")
    return tensors, state


def _saved_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "state.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} has no readable configuration in state.json ({error!r})") from None
    return config if isinstance(config, dict) else {}


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything that differs; keys that only one side has are left out."""
    found = []
    for key in old.keys() & new.keys():
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            found += _differences(old[key], new[key], f"{path}{key}.")
        elif old[key] != new[key]:
            found.append((path + key, old[key], new[key]))
    return sorted(found)


def check_same_model(saved: dict[str, Any], config: Config, where: str) -> None:
    """Raises UserError when the saved configuration describes another model, which equal shapes would not show."""
    changed = _differences({"model": saved.get("model", {})}, {"model": to_dict(config)["model"]})
    if changed:
        listed = "; ".join(f"{key} is {old} there and {new} here" for key, old, new in changed[:3])
        raise UserError(f"{where} holds another model: {listed}")


def changes(path: Path, config: Config) -> list[str]:
    """A line for each setting that a run changes by resuming from ``path``. Raises UserError for another model."""
    if path.is_file():  # an official .pt says nothing of its run
        return []
    saved = _saved_config(path)
    check_same_model(saved, config, str(path))
    sections = ("objective", "optim", "data", "efficiency")
    old, new = ({k: c.get(k, {}) for k in (*sections, "seed")} for c in (saved, to_dict(config)))
    watched = _differences(old, new)
    batch = [c.get("train", {}).get("global_batch") for c in (saved, to_dict(config))]
    if batch[0] != batch[1]:
        watched.append(("train.global_batch", *batch))
    quiet = ("data.workers", "data.timeout", "data.path", "objective.perceptual_trunk")
    return [f"changed since {path.name}: {key} {old} -> {new}" for key, old, new in watched if key not in quiet]


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def resume(path: Path, state: TrainState, config: Config) -> dict[str, float]:
    """Fills ``state`` from a checkpoint folder or an official .pt; returns the running sums of its log line.

    Raises UserError when it belongs to another model; ``state`` is then unchanged.
    """
    if path.is_file():
        content = interop.read_official(path)
        interop.load_training(content, state.model, state.optimizer, str(path))
        # The official counter counts micro-batches; the optimizer's counts updates.
        state.step = int(state.optimizer.steps)
        state.images_seen = state.step * config.train.global_batch
        return {}
    tensors, counters = _read(path)
    weights = _part(tensors, "model")
    rest = {k: v for k, v in tensors.items() if k.startswith(("momentum.", "exp_avg.", "exp_avg_sq."))}
    interop.check_weights(state.model, weights, str(path))
    averages = {n: _part(tensors, n) for n in state.optimizer.averages}
    fresh = [n for n, found in averages.items() if not found and n != "ema"]
    averages = {n: found for n, found in averages.items() if n not in fresh}
    wrong = [
        f"{n}.{name}"
        for n, found in averages.items()
        for name, value in state.optimizer.averages[n].items()
        if name not in found or found[name].shape != value.shape
    ]
    kinds = {"step": int, "images_seen": int, "optimizer_steps": int, "means": dict}
    wrong += [name for name, kind in kinds.items() if not isinstance(counters.get(name), kind)]
    if wrong:
        raise UserError(f"checkpoint {path}: {wrong[0]} is missing or malformed")
    try:
        state.optimizer.load_state_dict(rest, counters["optimizer_steps"])
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    interop.load_weights(state.model, weights, str(path))
    with torch.no_grad():
        for n, found in averages.items():
            for name, value in state.optimizer.averages[n].items():
                local(value).copy_(part_of(found[name], value))
    if fresh:
        log.warning("%s has no %s; starting from its weights", path, ", ".join(fresh))
        state.optimizer.restart(fresh)
    state.step, state.images_seen = counters["step"], counters["images_seen"]
    return counters["means"]


def load_weights(path: str | Path, weights: str = "ema") -> tuple[dict[str, Tensor], Config | None]:
    """(state dict of the weights, the run's Config or None for an official .pt).

    weights: "ema", one of ``optim.ema_extra`` ("ema_0.9999", "ema_std0.05"), or "model", the raw ones. Raises
    UserError.
    """
    path = locate(path)
    if path.is_file():
        content = interop.read_official(path)
        if not isinstance(content.get(weights), dict):
            raise UserError(f"{path} has no '{weights}' weights")
        return interop.clean_keys(content[weights]), None
    tensors, state = _read(path)
    config = from_dict(state["config"], str(path))
    known = [*ema.names(config.optim), "model"]
    if weights not in known:
        raise UserError(f"{path} has no '{weights}' weights; it has {', '.join(known)}")
    return _part(tensors, "model") | _part(tensors, weights), config


def load_model(path: str | Path, weights: str = "ema") -> tuple[UNITE, Config]:
    """A model in evaluation mode and its run's Config, from a run folder, a checkpoint folder, or an official .pt."""
    located = locate(path)
    if located.is_file():
        model = interop.load_reference(located, weights)
        return model, from_dict({"model": to_dict(model.config)})
    state, config = load_weights(located, weights)
    assert config is not None
    model = UNITE(config.model)
    interop.load_weights(model, state, str(located))
    return model.eval(), config
