"""Models from published checkpoints: a file is read, its configuration told from shapes, its weights loaded."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.base import files
from unite_fast.base.errors import UserError, first_line
from unite_fast.config import DECODER_SIZES, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.config.checks import validate_model
from unite_fast.config.yaml_text import from_dict, to_dict
from unite_fast.model.unite import UNITE
from unite_fast.parallel.tensors import local, part_of

DERIVED = re.compile(
    r"^lpips_loss\.|(^|\.)feat_rope\w*\.freqs_(cos|sin)$|^(encoder|denoiser)\.pos_embed$|^decoder\.decoder_pos_embed$"
)
OPTIONAL = re.compile(r"\.special_time_emb$|^patch_embed\.position_embeddings$")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of which torch can compute
MOST_TABLES = 1 << 30  # bytes of what a model has beside its weights; 75 MB at 2048 x 2048 pixels
UNTOLD = "unite_fast_model"  # our entry in an official file: what shapes do not tell
UNTOLD_KEYS = ("encoder.in_context_start", "encoder.rope", "decoder.heads", "time_shift", "patch_positions")
ALIASES = {"hidden_size": "width", "num_heads": "heads"}


def read_official(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dict. Raises UserError when the file is missing, damaged, unsafe or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    zipped = _is_zip(path)
    try:
        if zipped and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("its records are compressed, and torch would read them as they are")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        text = str(error)
        name = re.search(r"GLOBAL ([\w.]+)", text)
        if name or "Unsupported global" in text or "Unsupported class" in text or (zipped and "weights_only" in text):
            what = name.group(1) if name else "code"
            raise UserError(
                f"{path} wants to execute {what} while loading; refused, nothing was run. If you trust its author "
                f"as you trust a program: python -m unite_fast.export {path} --trust-pickle --out FOLDER"
            ) from None
        raise UserError(
            f"{path} is damaged or not a checkpoint ({text.splitlines()[0][:120]}); fetch it again"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a UNITE checkpoint: it has no 'model' state dict")
    for part in ("model", *(str(name) for name in content if str(name).startswith("ema"))):
        values = content.get(part)
        for key, value in values.items() if isinstance(values, dict) else ():
            if not isinstance(key, str) or not _is_dense(value):
                raise UserError(
                    f"{path}: '{part}' holds {key!r}, which is not a dense tensor of floating-point numbers"
                )
    return content


def _is_dense(value: Any) -> bool:
    """Whether a value holds each of its floating-point numbers: one that repeats a few may be of any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.dtype in FLOATS and value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _is_zip(path: Path) -> bool:
    """Whether a file is in torch's present format rather than its first one. Raises UserError where it is neither."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is Git LFS's pointer to a file, not the file; get it with git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path} is a web page, not a checkpoint; fetch the file itself")
    return start.startswith(b"PK")


def best_scale(content: dict[str, Any]) -> float:
    """The guidance scale that the official search found, as the file records it; 0 where it names none."""
    scale = content.get("current_best_cfg_scale")
    return float(scale) if isinstance(scale, (int, float)) and 0 < scale < math.inf else 0.0


def weights_of(content: dict[str, Any], name: str, where: str) -> dict[str, Tensor]:
    """The state dict called ``name`` of ``read_official``'s dict. Raises UserError that lists those there are."""
    known = [k for k, v in content.items() if isinstance(v, dict) and v and (k == "model" or str(k).startswith("ema"))]
    if name not in known:
        raise UserError(f"{where} has no weights called '{name}'; it has {', '.join(known)}")
    return content[name]


def clean_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stock names without derived tables; works on any state dict of the official code."""
    cleaned = {}
    for key, value in state.items():
        key = re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", key)
        if not DERIVED.search(key):
            cleaned[key] = value
    return cleaned


def infer_config(
    state: dict[str, Tensor], overrides: dict[str, Any] | None = None, where: str = "checkpoint"
) -> ModelConfig:
    """The ModelConfig whose parameters have the shapes of ``state`` (cleaned keys).

    What shapes do not tell keeps the published value unless overridden: the block at which class tokens enter, rotary
    positions, the time shift, and the decoder's heads, one per 64 of the published widths. Raises UserError for a
    decoder of another width whose heads nobody told.
    """
    depth = {
        part: 1 + max((int(m.group(1)) for k in state if (m := re.match(rf"{part}\.(\d+)\.", k))), default=-1)
        for part in (r"encoder\.blocks", r"decoder\.decoder_layers")
    }
    try:
        hidden, width = state["encoder.blocks.0.mlp.w3.weight"].shape[::-1]
        patches, head = (
            state["patch_embed.position_embeddings"].shape[1] - 1,
            len(state["encoder.blocks.0.attn.q_norm.weight"]),
        )
        _, channels, patch, _ = state["patch_embed.patch_embeddings.projection.weight"].shape
        decoder_width, in_features = state["decoder.decoder_embed.weight"].shape
        encoder = EncoderConfig(
            depth=depth[r"encoder\.blocks"],
            width=width,
            heads=width // head,
            mlp_ratio=next(r for r in (4.0, (hidden + 0.5) * 1.5 / width) if int(2 / 3 * r * width) == hidden),
            in_context_len=state["encoder.in_context_posemb"].shape[1],
        )
        decoder = DecoderConfig(
            depth=depth[r"decoder\.decoder_layers"],
            width=decoder_width,
            heads=max(1, decoder_width // 64),
            mlp_hidden=state["decoder.decoder_layers.0.ffn_up.weight"].shape[0],
            in_features=in_features,
        )
        config = ModelConfig(
            image_size=round(patches**0.5) * patch,
            patch_size=patch,
            channels=channels,
            num_classes=state["encoder.y_embedder.embedding_table.weight"].shape[0] - 2,
            latent_dim=len(state["encoder_layer_norm.weight"]),
            num_latents=state["latent_tokens"].shape[1],
            separate_denoiser=any(k.startswith("denoiser.") for k in state),
            encoder=encoder,
            decoder=decoder,
        )
    except (KeyError, StopIteration, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where} is not a UNITE model: {error} is missing or has an unknown shape") from None
    for key, value in (overrides or {}).items():
        config = _override(config, key, value)
    given = dict(overrides or {})
    within = given.pop("decoder", None)
    named = [*given, *(f"decoder.{key}" for key in within)] if isinstance(within, dict) else [*given]
    told = any(re.fullmatch(r"decoder[._](num_)?heads", key) for key in named)
    if not told and decoder_width not in {size.width for size in DECODER_SIZES.values()}:
        raise UserError(
            f"{where}: the decoder's heads cannot be told from its width {decoder_width}; pass decoder_heads=..., or "
            f'write {{"decoder": {{"heads": N}}}} into {Path(where).with_suffix(".json")}'
        )
    config = from_dict({"model": to_dict(config)}, where).model  # a file's values may be of any type
    if config.encoder.in_context_start >= config.encoder.depth:
        raise UserError(f"{where}: set in_context_start=... below the encoder's depth {config.encoder.depth}")
    if config.decoder.heads < 1 or config.decoder.width % config.decoder.heads:
        raise UserError(
            f"{where}: the decoder's heads cannot be told from its width {decoder_width}; pass decoder_heads=..."
        )
    return config


def _override(config: ModelConfig, key: str, value: Any) -> ModelConfig:
    """One override: a field of ModelConfig, {"encoder": {...}}, "decoder.heads", decoder_heads, or an encoder field."""
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    for part in ("encoder", "decoder"):
        if key == part and isinstance(value, dict):
            for name, item in value.items():
                config = _override(config, f"{part}.{name}", item)
            return config
        if key.startswith((part + ".", part + "_")):
            section, name = getattr(config, part), key[len(part) + 1 :]
            name = ALIASES.get(name, name)
            if name in {f.name for f in dataclasses.fields(section)}:
                return dataclasses.replace(config, **{part: dataclasses.replace(section, **{name: value})})
            if name == "qk_norm" and value is True:
                return config
            raise UserError(f"unknown model option '{key}'")
    if key in own:
        return dataclasses.replace(config, **{key: value})
    if ALIASES.get(key, key) in {f.name for f in dataclasses.fields(EncoderConfig)}:
        return _override(config, f"encoder.{key}", value)
    raise UserError(f"unknown model option '{key}'")


def load_weights(model: UNITE, state: dict[str, Tensor], where: str) -> None:
    """Loads a state dict of either format into ``model``. Raises UserError that lists what does not fit."""
    state = clean_keys(state)
    check_weights(model, state, where)
    copy_weights(model, state)


def copy_weights(model: UNITE, state: dict[str, Tensor]) -> None:
    """Cleaned and checked ``state`` into ``model``."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            local(own[name]).copy_(part_of(value, own[name]))


def check_weights(model: UNITE, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError that lists what of ``state`` (cleaned keys) does not fit ``model``, or is not finite."""
    own = model.state_dict()
    wrong = [
        f"{k} is {tuple(v.shape)}, the model has {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    wrong += [f"{k} is missing" for k in own if k not in state and not OPTIONAL.search(k)]
    wrong += [f"{k} is unknown to the model" for k in state if k not in own]
    wrong = wrong or [f"{k} is not finite" for k, v in state.items() if not torch.isfinite(v).all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where} holds another model: {'; '.join(wrong[:3])}{more}")


def check_model(config: ModelConfig, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError unless ``state`` (cleaned keys) fills a model of this configuration; makes no such model.

    What makes it of ``state`` may then be allocated: beside it the model has tables of positions alone.
    """
    try:
        validate_model(config)
        with torch.device("meta"):
            model = UNITE(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (RuntimeError, OverflowError) as error:  # of sizes that no tensor can have
        raise UserError(f"{where} is not a UNITE model: {first_line(error)}") from None
    check_weights(model, state, where)
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    if (size := sum(t.numel() * t.element_size() for name, t in everything if name not in state)) > MOST_TABLES:
        raise UserError(f"{where} asks for {size} bytes of positions, which no UNITE model needs")


def build_filled(config: ModelConfig, state: dict[str, Tensor], where: str) -> UNITE:
    """A model in evaluation mode with the weights of ``state``, which ``check_model`` sees first. Raises UserError."""
    state = clean_keys(state)
    check_model(config, state, where)
    model = UNITE(config)
    copy_weights(model, state)
    return model.eval()


def load_reference(path: str | Path, weights: str = "ema", **overrides: Any) -> UNITE:
    """A model in evaluation mode from an official checkpoint; sizes are inferred from shapes.

    weights: "ema", "model" or another average in the file. overrides: ModelConfig fields that shapes do not tell, as
    ``in_context_start=2``, ``decoder_heads=3`` or ``decoder={"heads": 3}``; a JSON file of the same stem beside the
    checkpoint is read for "encoder" and "decoder" sections first, and what ``save_reference`` wrote before that. Raises
    UserError.
    """
    content = read_official(path)
    state = clean_keys(weights_of(content, weights, str(path)))
    return build_filled(infer_config(state, known_of(content, Path(path)) | overrides, str(path)), state, str(path))


def known_of(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint says of its model beside shapes: ``save_reference``'s own entry, then the JSON beside it."""
    own = content.get(UNTOLD)
    said = {key: own[key] for key in UNTOLD_KEYS if key in own} if isinstance(own, dict) else {}
    return said | sidecar(path)


def sidecar(path: Path) -> dict[str, Any]:
    """The "encoder" and "decoder" sections of the JSON file of the same stem beside a checkpoint. Raises UserError."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        content = json.loads(files.read(beside))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{beside} is not a JSON object; mend or remove it")
    return {k: content[k] for k in ("encoder", "decoder") if isinstance(content.get(k), dict)}
