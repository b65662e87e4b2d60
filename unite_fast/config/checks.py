"""What a configuration must satisfy beyond its types: the bounds of its numbers, and what spans several fields."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator
from typing import Any

from unite_fast.base.errors import UserError
from unite_fast.config.keys import MADE_FROM, Config, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def _numbers(section: Any, path: str = "") -> Iterator[tuple[str, float, dict[str, float]]]:
    """(whole key, value, bounds) of every number in a section and those within it; of a list's numbers one by one."""
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), path + f.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{key}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield key, number, f.metadata["bounds"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_bounds(section: Any, path: str = "") -> None:
    for key, number, bounds in _numbers(section, path):
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
        _require(
            all(HOLDS[word](number, bound) for word, bound in bounds.items()), f"{key} must be {words}, got {number}"
        )


def validate_model(model: ModelConfig) -> None:
    """As ``validate``, of the model section alone."""
    _check_bounds(model, "model.")
    _check_model(model)


def validate(config: Config) -> None:
    """Checks the bounds of every number, and what spans several fields. Raises UserError that names whole keys."""
    _check_bounds(config)
    plain = config.name.strip() not in ("", ".", "..") and not set(config.name) & set("/\\\n\0")
    _require(plain, f"name {config.name!r} is not the name of a folder; give one without /, or the whole run_dir")
    o, s = config.objective, config.sample
    _check_model(config.model)
    _check_averages(config.optim)
    if o.adversarial.weight:
        _check_adversarial(o, config.model)
    _require(
        config.model.num_classes > 0 or s.cfg_scale == 1,
        "sample.cfg_scale guides towards a class, which model.num_classes=0 has not; set it to 1",
    )
    window = config.train.profile
    _require(re.fullmatch(r"|\d+-\d+", window) is not None, f"train.profile {window!r}: write two steps, as 10-12")
    low, high = o.noising_t
    _require(low <= high, f"objective.noising_t {[low, high]} must satisfy low <= high")
    low, high = s.cfg_interval
    _require(low < high, f"sample.cfg_interval {[low, high]} must satisfy low < high")
    _require(s.solver != "dopri5" or s.steps >= 2, "sample.steps must be at least 2 for sample.solver=dopri5")


def _check_model(m: ModelConfig) -> None:
    e, d = m.encoder, m.decoder
    _require(
        m.num_classes > 0 or MADE_FROM[m.modality] == "images",
        f"model.num_classes must be above 0 for {m.modality}, got 0",
    )
    _require(
        m.image_size % m.patch_size == 0,
        f"model.image_size {m.image_size} is not a multiple of model.patch_size {m.patch_size}",
    )
    for key, part in (("model.encoder", e), ("model.decoder", d)):
        _require(part.width % part.heads == 0, f"{key}.width {part.width} does not divide by {key}.heads {part.heads}")
    _require(e.width % 2 == 0, f"model.encoder.width {e.width} must be even (sin-cos positions)")
    _require(d.width % 4 == 0, f"model.decoder.width {d.width} must be a multiple of 4 (2-D sin-cos)")
    size = e.width // e.heads
    _require(not e.rope or size % 2 == 0, f"model.encoder.rope needs an even width of heads, this is {size}")
    _require(int(2 / 3 * e.mlp_ratio * e.width) >= 1, f"model.encoder.mlp_ratio {e.mlp_ratio} is too small")
    _require(
        e.in_context_start < e.depth,
        f"model.encoder.in_context_start {e.in_context_start} must be below its depth {e.depth}",
    )


def _check_adversarial(o: ObjectiveConfig, m: ModelConfig) -> None:
    """What fine-tuning with a discriminator needs of the other keys."""
    a, depth, key = o.adversarial, m.encoder.depth, "objective.adversarial"
    _require(
        MADE_FROM[m.modality] == "images",
        f"{key}.weight: the discriminator is of images, and model.modality is {m.modality}; set it to 0",
    )
    _require(
        o.flow_steps == 0,
        f"{key}.weight: the Generative Encoder is frozen then, so objective.flow_steps={o.flow_steps} would cost time "
        "and teach nothing; set objective.flow_steps=0",
    )
    _require(
        not a.adaptive or o.pixel_weight > 0 or o.perceptual_weight > 0,
        f"{key}.adaptive measures by the reconstruction's gradient, and objective.pixel_weight and perceptual_weight "
        f"are 0; give one of them, or set {key}.adaptive=false",
    )
    _require(
        a.generator_start >= a.discriminator_start,
        f"{key}.generator_start {a.generator_start} is before discriminator_start {a.discriminator_start}: the decoder "
        "would learn from heads that know nothing; raise it",
    )
    _require(depth > 1, f"{key}.weight: the discriminator needs an encoder of 2 or more blocks, this has {depth}")
    for block in a.blocks:
        _require(
            block < depth,
            f"{key}.blocks: {block} is not below the encoder's depth {depth}, whose last block drops the patch tokens",
        )
    _require(len(set(a.blocks)) == len(a.blocks), f"{key}.blocks: {list(a.blocks)} names a block twice")
    for kind in a.augment:
        known = ("colour", "translation", "cutout")
        _require(kind in known, f"{key}.augment: {kind!r} is not one of {', '.join(known)}")


def is_width(text: str) -> bool:
    """Whether it says the width of a power-function average, as std0.05: below that of the uniform one, 12^-1/2."""
    return bool(re.fullmatch(r"std0?\.\d+", text)) and 0 < float(text[3:]) < 0.288


def _check_averages(o: OptimConfig) -> None:
    for entry in o.ema_extra:
        if isinstance(entry, str):
            good = is_width(entry)
            _require(good, f"optim.ema_extra: {entry!r} is neither a decay between 0 and 1 nor std0.01 to std0.28")
    _require(len(set(o.ema_extra)) == len(o.ema_extra), "optim.ema_extra: an entry stands twice")


def batch_split(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation steps) on each of ``world_size`` ranks. Raises UserError with batches that divide."""
    per_rank, rest = divmod(train.global_batch, world_size)
    if rest or per_rank == 0:
        low = max(1, per_rank) * world_size
        raise UserError(
            f"train.global_batch {train.global_batch} does not divide over {world_size} ranks; "
            f"nearest that do: {low} or {low + world_size}"
        )
    micro = min(train.micro_batch, per_rank)
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - micro))[:2]
        raise UserError(
            f"train.micro_batch {micro} does not divide the {per_rank} images of each rank "
            f"(global_batch {train.global_batch} / {world_size} ranks); nearest that do: "
            + " or ".join(str(d) for d in sorted(near))
        )
    return micro, per_rank // micro
