"""Training state on disk: tensors in safetensors, counters in JSON, a sha256 manifest. ``saving`` writes it, ``find``
says where one is and whether it is whole, and what is here reads it.

    checkpoints/step-0000200/   training-00001-of-00002.safetensors ...   one file per rank that wrote; of one rank:
                                training.safetensors   model.* ema.* momentum.* exp_avg.* exp_avg_sq.*
                                                       ema_0.9999.* ... (optim.ema_extra)
                                state.json             counters, running means, the resolved configuration
                                manifest.json          size and sha256 of all of them

A folder named ``*.incomplete`` is an unfinished save or removal and is never read. Parameter names are the stock ones,
and any number of ranks, sharded or not, loads what any other number has saved. No file here can execute code when it
is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from unite_fast import interop
from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import posthoc, shards
from unite_fast.checkpoint.compare import changed_settings, check_parts, check_same_model
from unite_fast.checkpoint.facts import class_names, facts, saved_images
from unite_fast.checkpoint.find import (
    EXPORTED,
    TENSORS,
    hash_part,
    identity,
    locate,
    newest,
    newest_first,
    reads,
    run_of,
    step_of,
    take_hashes,
    verify,
)
from unite_fast.checkpoint.shards import Stored
from unite_fast.config import Config, ModelConfig
from unite_fast.config.checks import validate
from unite_fast.config.earlier import translated
from unite_fast.config.yaml_text import from_dict, to_dict
from unite_fast.model.unite import UNITE
from unite_fast.optim import ema
from unite_fast.optim.optimizer import PARTS
from unite_fast.parallel.tensors import local
from unite_fast.training.guards import first_nonfinite
from unite_fast.training.state import STEPS, TrainState, prefix, tensors_of

__all__ = [
    "EXPORTED", "changes", "check_same_model", "class_names", "counters_of", "described", "facts", "found_scale",
    "hash_part", "identity", "load_model", "load_weights", "locate", "newest", "newest_first", "official_config",
    "read", "reads", "recorded_step", "resume", "run_of", "saved_config", "saved_images", "step_in", "step_of",
    "stored", "take_hashes", "verify",
]  # fmt: skip

FORMAT = 2


def counters_of(state: TrainState) -> dict[str, Any]:
    return {
        "format": FORMAT, "step": state.step, "images_seen": state.images_seen, "best_cfg_scale": state.best_cfg_scale,
        "origin": state.origin,
        "unreadable": state.unreadable,
    }  # fmt: skip


def described(located: Path, weights: str, name: str, sha256: str) -> dict[str, Any]:
    """What a run says of the ``weights`` of a checkpoint that it began with: no path. name: their run's, if known;
    sha256: the checkpoint's ``identity``."""
    return {"name": name, "step": recorded_step(located), "weights": weights, "sha256": sha256}


def recorded_step(located: Path) -> int | None:
    """The step at which weights were saved, where they say so. That of an official .pt counts micro-batches."""
    if located.is_dir():
        return step_of(located)
    if located.suffix == ".safetensors":
        step = facts(located).get("step", "")
        return int(step) if step.isdecimal() else None
    return step_in(interop.read_official(located))


def found_scale(located: Path) -> float:
    """The best guidance scale that scores while training had found by then; 0 where there were none."""
    scale = _read_counters(located).get("best_cfg_scale", 0.0) if located.is_dir() else 0.0
    return float(scale) if isinstance(scale, (int, float)) and 0 <= scale < math.inf else 0.0


def step_in(content: dict[str, Any]) -> int | None:
    """That of an official .pt."""
    step = content.get("step")
    return step if isinstance(step, int) else None


def _read_counters(path: Path) -> dict[str, Any]:
    """state.json, of a format that is known. Raises UserError."""
    try:
        state = json.loads(files.read_text(path / "state.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path} cannot be read: state.json: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        state = state if isinstance(state, dict) else {}
        raise UserError(f"checkpoint {path} has format {state.get('format')}, this program reads {FORMAT}")
    return state


def stored(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, by its name in ``tensors_of``. Raises UserError."""
    try:
        names = sorted(name for name in json.loads(files.read_text(path / "manifest.json")) if TENSORS.match(name))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: manifest.json: {error}") from None
    return shards.index([path / name for name in names])


def read(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Those tensors of a checkpoint folder, or all, whole on the CPU. Raises UserError."""
    return shards.read(stored(path), names)


def _saved_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(files.read_text(path / "state.json"))["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {path} has no readable configuration in state.json ({error!r})") from None
    return translated(config, str(path)) if isinstance(config, dict) else {}


def saved_config(path: Path) -> Config:
    """The configuration of the run that wrote a checkpoint folder. Raises UserError."""
    return from_dict(_saved_config(path), str(path))


def official_config(content: dict[str, Any], model: ModelConfig) -> Config:
    """What an official .pt, which knows no run of ours, is sampled and scored with unless options say otherwise.

    Guidance: the scale that the official search found, which the file records, on the interval of that search.
    """
    values = {"model": to_dict(model), "evaluation": {"precision": "fp32"}, "efficiency": {"kernels": "fused"}}
    if scale := interop.best_scale(content):
        values["sample"] = {"cfg_scale": scale, "cfg_interval": [0.1, 1.0]}
    return from_dict(values)


def changes(path: Path, model: ModelConfig, keys: dict[str, Any]) -> list[str]:
    """A line for each of its keys that a run changes by resuming from ``path``. Raises UserError for another model."""
    if path.is_file():  # an official .pt says nothing of its run
        return []
    saved = _saved_config(path)
    check_same_model(saved, model, str(path))
    return changed_settings(saved, keys, path.name)


def _expected(
    found: dict[str, Stored], state: TrainState
) -> tuple[dict[str, Stored], dict[str, Tensor], dict[str, list[str]]]:
    """What is read of ``found``, what it fills, and the averages of each part that begin anew.

    Left out is what may differ: averages that only one side keeps, and of parameters that are frozen by now what an
    optimizer kept.
    """
    wanted, fresh = tensors_of(state), {}
    for name, part in state.parts.items():
        at, optimizer = prefix(name), part.optimizer
        del wanted[at + STEPS]
        averages = [a for a in optimizer.averages if a != "ema"]
        fresh[name] = [a for a in averages if not any(n.startswith(f"{at}{a}.") for n in found)]
        absent = tuple(f"{at}{a}." for a in fresh[name])
        wanted = {n: t for n, t in wanted.items() if not n.startswith(absent)}
        frozen = {n for n, _ in part.module.named_parameters()} - optimizer.parameters.keys()
        kept = {f"{at}{of}.{n}" for of in (*PARTS, *optimizer.averages) for n in frozen}
        known = tuple(f"{at}{a}." for a in averages)
        kept |= {n for n in found if n.startswith(f"{at}ema_") and not n.startswith(known)}
        found = {n: entry for n, entry in found.items() if n not in kept}
    return found, wanted, fresh


def _misfits(found: dict[str, Stored], wanted: dict[str, Tensor]) -> list[str]:
    """What of a checkpoint does not fit the state that it is to fill."""
    wrong = []
    for name, tensor in wanted.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name].shape != tuple(tensor.shape):
            wrong.append(f"{name} is {found[name].shape}, expected {tuple(tensor.shape)}")
        elif found[name].dtype != tensor.dtype:
            wrong.append(f"{name} is {found[name].dtype}, expected {tensor.dtype}".replace("torch.", ""))
    return wrong + [f"{name} is unknown to the model" for name in found if name not in wanted]


def _counters(state: dict[str, Any], path: Path, names: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """The counts of these names in state.json, and the running sums. Raises UserError."""
    counts: dict[str, int] = {}
    for name in names:
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
            raise UserError(f"checkpoint {path}: {name} in state.json is missing or malformed")
        counts[name] = value
    means = state.get("means")
    numbers = means.values() if isinstance(means, dict) else [None]
    if not all(isinstance(v, (int, float)) for v in numbers):
        raise UserError(f"checkpoint {path}: means in state.json is missing or malformed")
    return counts, _sums(state["means"], state.get("config"))


def _unreadable(state: dict[str, Any], path: Path) -> dict[int, str]:
    """The images that had been replaced by then. Raises UserError."""
    try:
        return {int(index): str(reason) for index, reason in state.get("unreadable", {}).items()}
    except (AttributeError, ValueError):
        raise UserError(f"checkpoint {path}: unreadable in state.json is malformed") from None


def _sums(means: dict[str, float], config: Any) -> dict[str, float]:
    """Running sums under the names of today's terms: the pixel loss was called "l1" once, whatever its kind."""
    objective = config.get("objective") if isinstance(config, dict) else None
    kind = objective.get("pixel_loss", "l1") if isinstance(objective, dict) else "l1"
    return means if kind in means else {kind if name == "l1" else name: value for name, value in means.items()}


def resume(path: Path, state: TrainState, global_batch: int) -> dict[str, float]:
    """Fills ``state`` from a checkpoint folder or an official .pt; returns the running sums of its log line.

    Every rank calls it and reads what it holds. Raises UserError when the checkpoint belongs to another model or is
    not what this program writes; ``state`` is then unchanged, unless a number in it is not finite.
    """
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights without a training state; start from them with init_from={path}")
    if path.is_file():
        check_parts(path, state.parts, [])
        content = interop.read_official(path)
        interop.load_training(content, state.model, state.optimizer, str(path))
        # The official counter counts micro-batches; the optimizer's counts updates.
        state.step = int(state.optimizer.steps)
        state.images_seen = state.step * global_batch
        state.best_cfg_scale = interop.best_scale(content)
        return {}
    counters = _read_counters(path)
    check_parts(path, state.parts, counters)
    counts, means = _counters(counters, path, ("step", "images_seen", *(prefix(part) + STEPS for part in state.parts)))
    best = counters.get("best_cfg_scale", 0.0)
    if not isinstance(best, (int, float)) or not 0 <= best < math.inf:
        raise UserError(f"checkpoint {path}: best_cfg_scale in state.json is malformed")
    unreadable = _unreadable(counters, path)
    found, wanted, fresh = _expected(stored(path), state)
    if wrong := _misfits(found, wanted):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"checkpoint {path} holds another model: {'; '.join(wrong[:3])}{more}")
    from unite_fast.checkpoint import dcp

    try:
        dcp.load(wanted, found)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if bad := first_nonfinite({name: local(tensor) for name, tensor in wanted.items()}):
        raise UserError(f"checkpoint {path}: {bad} is not finite; move the folder away to resume from the one before")
    for name, part in state.parts.items():
        part.optimizer.restart(fresh[name])
        part.optimizer.steps.fill_(counts[prefix(name) + STEPS])
    state.step, state.images_seen, state.best_cfg_scale = counts["step"], counts["images_seen"], best
    state.origin = counters["origin"] if isinstance(counters.get("origin"), dict) else {}  # older ones have none
    state.unreadable = unreadable
    return means


def _exported(path: Path, weights: str) -> tuple[dict[str, Tensor], Config]:
    """What ``load_weights`` returns, of a file that ``export`` wrote. Raises UserError."""
    found = shards.index([path])
    metadata = facts(path)
    try:
        values, held = json.loads(metadata["config"]), metadata["weights"]
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path} does not say what it holds; python -m unite_fast.export makes files that do") from None
    if weights != held:
        raise UserError(f"{path} holds the weights '{held}' alone, not '{weights}'")
    config = from_dict(translated(values, str(path)), str(path))
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = shards.read(found)
    if bad := first_nonfinite(tensors):
        raise UserError(f"{path}: {bad} is not finite; export an older checkpoint")
    return tensors, config


def _kept_until(path: Path) -> list[posthoc.Kept]:
    """The averages of a run's whole checkpoints up to the one at ``path``, the earliest first. Raises UserError."""
    last, found = step_of(path), []
    for folder in reversed(newest_first(path.parent)):
        step = step_of(folder)
        if step is None or last is None or step > last or verify(folder, content=False):
            continue
        o, counts = saved_config(folder).optim, _counters(_read_counters(folder), folder, (STEPS,))[0]
        averages = dict(zip(ema.names(o), (o.ema_decay, *o.ema_extra), strict=True))
        if o.ema_warmup:  # its decays are not those of a profile that ``ema`` knows
            del averages["ema"]
        found.append(posthoc.Kept(folder.name, counts[STEPS], averages, stored(folder)))
    return found


def load_weights(
    path: str | Path, weights: str = "ema", located: bool = False
) -> tuple[dict[str, Tensor], Config | None]:
    """(state dict of the weights, the run's Config or None for an official .pt).

    weights: "ema", one of ``optim.ema_extra`` ("ema_0.9999", "ema_std0.05"), one that follows from them
    ("posthoc_std0.07"), or "model", the raw ones; an exported file has one of them. located: ``path`` is what
    ``locate`` gave. Raises UserError.
    """
    path = Path(path) if located else locate(path)
    if path.suffix == ".safetensors":
        return _exported(path, weights)
    if path.is_file():
        return interop.clean_keys(interop.weights_of(interop.read_official(path), weights, str(path))), None
    _read_counters(path)
    config, found = saved_config(path), stored(path)
    if posthoc.entry_of(weights) is not None:
        averages = posthoc.combined(_kept_until(path), weights)
        others = {k: k.removeprefix("model.") for k in found if k.startswith("model.")}
        others = {k: name for k, name in others.items() if name not in averages}
        return {others[k]: tensor for k, tensor in shards.read(found, others).items()} | averages, config
    known = [*ema.names(config.optim), "model"]
    if weights not in known:
        raise UserError(f"{path} has no '{weights}' weights; it has {', '.join(known)}, or posthoc_std0.07 for example")
    names = {k.removeprefix("model."): k for k in found if k.startswith("model.")}
    names |= {k.removeprefix(f"{weights}."): k for k in found if k.startswith(f"{weights}.")}
    tensors = shards.read(found, names.values())
    if bad := first_nonfinite(tensors):
        raise UserError(f"checkpoint {path}: {bad} is not finite; take an older one")
    return {name: tensors[key] for name, key in names.items()}, config


def load_model(path: str | Path, weights: str = "ema") -> tuple[UNITE, Config]:
    """A model in evaluation mode and its run's Config, from whatever ``locate`` finds."""
    located = locate(path)
    if located.is_file() and located.suffix != ".safetensors":
        model = interop.load_reference(located, weights)
        return model, official_config(interop.read_official(located), model.config)
    state, config = load_weights(located, weights)
    assert config is not None
    return interop.build_filled(config.model, state, str(located)), config
