"""Training states from published checkpoints, and files in their format."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.base import files
from unite_fast.base.errors import UserError, first_line
from unite_fast.interop.weights import OPTIONAL, UNTOLD, UNTOLD_KEYS, check_weights, clean_keys, copy_weights
from unite_fast.layers import sincos_2d
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import split_parameters
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel.tensors import local, part_of


def load_training(content: dict[str, Any], model: UNITE, optimizer: Optimizer, where: str) -> None:
    """Model, EMA and both optimizers of an official checkpoint into ours. Raises UserError before anything changes."""
    weights = clean_keys(content["model"])
    ema = weights
    if "ema" in content:  # a file that never had one starts its average from its weights
        if not isinstance(content["ema"], dict):
            raise UserError(f"{where}: 'ema' is not a state dict; init_from={where} starts from its weights alone")
        ema = clean_keys(content["ema"])
        check_weights(model, ema, f"{where}, 'ema',")
    check_weights(model, weights, where)
    tensors, steps = _moments(content, optimizer, where)
    try:
        optimizer.load_state_dict(tensors, steps)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    copy_weights(model, weights)
    with torch.no_grad():
        for name, value in optimizer.ema.items():
            local(value).copy_(part_of(ema.get(name, optimizer.parameters[name]), value))
    optimizer.restart(name for name in optimizer.averages if name != "ema")


def _moments(content: dict[str, Any], optimizer: Optimizer, where: str) -> tuple[dict[str, Tensor], int]:
    """Our optimizer's tensors from both of an official checkpoint, and the updates done. Raises UserError."""
    tensors: dict[str, Tensor] = {}
    steps = 0
    sources = (
        ("optimizer", optimizer.adamw, {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}),
        ("optimizer_muon", optimizer.muon, {"momentum": "momentum_buffer"}),
    )
    for key, params, parts in sources:
        saved = content.get(key)
        if not isinstance(saved, dict) or "state" not in saved:
            raise UserError(f"{where} has no '{key}' state; use init_from={where} to start from its weights alone")
        try:
            indices = [i for group in saved["param_groups"] for i in group["params"]]
            if len(indices) != len(params):
                raise UserError(f"{where}: '{key}' holds {len(indices)} tensors, this model has {len(params)}")
            for index, (name, parameter) in zip(indices, params.items(), strict=True):
                state = saved["state"].get(index, {})
                if not state and saved["state"] and not OPTIONAL.search(name):  # those that never get a gradient
                    raise UserError(f"{where}: '{key}' has no state of {name}")
                steps = max(steps, int(state.get("step", 0)))
                for ours, official in parts.items():
                    moment = state.get(official, torch.zeros(parameter.shape))
                    if moment.shape != parameter.shape:
                        raise UserError(f"{where}: '{key}' holds a {official} of {name} that is {tuple(moment.shape)}")
                    if moment.is_meta or not torch.isfinite(moment).all():
                        raise UserError(f"{where}: '{key}' holds a {official} of {name} that is not finite")
                    tensors[f"{ours}.{name}"] = moment
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}: '{key}' is not a state of torch.optim ({first_line(error)})") from None
    return tensors, steps


def save_reference(
    path: str | Path,
    model: UNITE,
    optimizer: Optimizer | None = None,
    lr: float = 0.0,
    step: int = 0,
    epoch: int = 0,
    best_cfg_scale: float = 1.0,
    ema: dict[str, Tensor] | None = None,
) -> None:
    """Writes the official format (whole or not at all), and in it what shapes do not tell of the model, so that
    ``load_reference`` gives the same one. ``ema`` defaults to the optimizer's, else weights."""
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()} | derived_tables(model)
    averaged = ema or (optimizer.ema if optimizer else {})
    content: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "model": weights,
        "ema": weights | {k: v.detach().cpu() for k, v in averaged.items()},
        "current_best_cfg_scale": best_cfg_scale,
        "optimizer": {},
        "scheduler": {},
        "optimizer_muon": {},
        "scheduler_muon": {},
        UNTOLD: {key: attrgetter(key)(model.config) for key in UNTOLD_KEYS},
    }
    if optimizer is not None:
        content["optimizer"], content["optimizer_muon"] = _official_optimizers(model, optimizer, lr)
    with files.replacing(Path(path)) as file:
        torch.save(content, file)


def _official_optimizers(model: UNITE, optimizer: Optimizer, lr: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts that torch.optim.AdamW and torch.optim.Muon load."""
    c = optimizer.config
    muon, adamw = split_parameters(model, c.muon)
    groups = (
        torch.optim.AdamW([torch.empty(1)], lr=lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay),
        torch.optim.Muon([torch.empty(1, 1)], lr=lr, momentum=c.muon_momentum, weight_decay=c.muon_weight_decay,
                         eps=1e-6, adjust_lr_fn="match_rms_adamw"),
    )  # fmt: skip
    result = []
    for group, names in zip(groups, (adamw, muon), strict=True):
        content = group.state_dict()
        content["param_groups"][0]["params"] = list(range(len(names)))
        for i, name in enumerate(names):
            if name in optimizer.momentum:
                content["state"][i] = {"momentum_buffer": optimizer.momentum[name].cpu()}
            elif not name.endswith("special_time_emb"):  # never has a gradient, so it has no state
                content["state"][i] = {
                    "step": optimizer.steps.cpu(),
                    "exp_avg": optimizer.exp_avg[name].cpu(),
                    "exp_avg_sq": optimizer.exp_avg_sq[name].cpu(),
                }
        result.append(content)
    return result[0], result[1]


def derived_tables(model: UNITE) -> dict[str, Tensor]:
    """The tables that the official state dict holds although sizes determine them."""
    c, encoder = model.config, model.encoder
    tables = {"decoder.decoder_pos_embed": model.decoder.get_buffer("positions").cpu()}
    names = ["encoder", "denoiser"] if c.separate_denoiser else ["encoder"]
    side = round(c.num_latents**0.5)
    for name in names:
        tables[f"{name}.pos_embed"] = sincos_2d(side, c.encoder.width)[None]
        for table in ("cos", "sin"):
            angles = encoder.get_buffer(f"rotary_{table}").cpu().repeat_interleave(2, dim=1)
            prefix = torch.full((c.encoder.in_context_len, angles.shape[1]), 1.0 if table == "cos" else 0.0)
            tables[f"{name}.feat_rope.freqs_{table}"] = angles
            tables[f"{name}.feat_rope_incontext.freqs_{table}"] = torch.cat([prefix, angles])
    return tables
