"""Training state on disk: tensors in safetensors, counters in JSON, a sha256 manifest, committed by rename.

    checkpoints/step-0000200/   training.safetensors   model.* ema.* momentum.* exp_avg.* exp_avg_sq.*
                                state.json             counters, running means, the resolved configuration
                                manifest.json          size and sha256 of both

A folder named ``*.incomplete`` is an unfinished save and is never read. Parameter names are the stock ones, and
nothing depends on the number of ranks. No file here can execute code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unite_fast import interop
from unite_fast.config import Config, UserError
from unite_fast.config_io import from_dict, to_dict
from unite_fast.model.unite import UNITE
from unite_fast.optim.optimizer import Optimizer

FORMAT = 1
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


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save(folder: Path, state: TrainState, config: Config, means: dict[str, float], keep_last: int) -> Path:
    """Writes folder/step-N, then removes all but the newest ``keep_last``. Returns the new checkpoint's path.

    ``means`` are the running sums of the log line in progress. Raises OSError when the disk refuses; older
    checkpoints are then untouched.
    """
    final = folder / f"step-{state.step:07d}"
    temporary = folder / f"{final.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.optimizer.ema.items()} | state.optimizer.state_dict()
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "training.safetensors")
    _sync(temporary / "training.safetensors")
    counters = {
        "format": FORMAT,
        "step": state.step,
        "images_seen": state.images_seen,
        "optimizer_steps": int(state.optimizer.steps),
    }
    _write(temporary / "state.json", json.dumps(counters | {"means": means, "config": to_dict(config)}, indent=1))
    manifest = {name: _digest(temporary / name) for name in ("training.safetensors", "state.json")}
    _write(temporary / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(folder)
    for old in _newest_first(folder)[max(1, keep_last) :]:
        shutil.rmtree(old)
    return final


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := NAME.search(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def verify(path: Path) -> str:
    """An empty string for a whole checkpoint, else what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return "it has no readable manifest.json"
    for name, expected in manifest.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}: it was cut short or changed"
        if _digest(file)["sha256"] != expected["sha256"]:
            return f"{name} does not have the recorded sha256: its content changed"
    return "" if {"training.safetensors", "state.json"} <= set(manifest) else "its manifest is incomplete"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that verifies or None, one line for each newer one that does not)."""
    rejected = []
    for path in _newest_first(folder):
        problem = verify(path)
        if not problem:
            return path, rejected
        rejected.append(f"skipping {path}: {problem}")
    return None, rejected


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
        found, rejected = newest(folder) if folder.is_dir() else (None, [])
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
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {state.get('format')}, this program reads {FORMAT}")
    return tensors, state


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
    rest = {k: v for k, v in tensors.items() if not k.startswith(("model.", "ema."))}
    interop.check_weights(state.model, weights, str(path))
    try:
        state.optimizer.load_state_dict(rest, counters["optimizer_steps"])
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    interop.load_weights(state.model, weights, str(path))
    ema = _part(tensors, "ema")
    with torch.no_grad():
        for name, value in state.optimizer.ema.items():
            value.copy_(ema[name])
    state.step, state.images_seen = counters["step"], counters["images_seen"]
    return counters["means"]


def load_weights(path: str | Path, weights: str = "ema") -> tuple[dict[str, Tensor], Config | None]:
    """(state dict of the "ema" or raw "model" weights, the run's Config or None for an official .pt)."""
    path = locate(path)
    if path.is_file():
        content = interop.read_official(path)
        if not isinstance(content.get(weights), dict):
            raise UserError(f"{path} has no '{weights}' weights")
        return interop.clean_keys(content[weights]), None
    tensors, state = _read(path)
    found = _part(tensors, "model")
    return (found | _part(tensors, "ema") if weights == "ema" else found), from_dict(state["config"], str(path))


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
