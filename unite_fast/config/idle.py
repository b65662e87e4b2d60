"""Keys that mean nothing beside the values of others: on a command line, where somebody asked for them, a mistake.

In a file they are left alone: it may be meant for several commands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from unite_fast.base.errors import UserError
from unite_fast.config import MADE_FROM, Config

Rule = tuple[tuple[str, ...], Callable[[Config], bool], str]

# (keys or beginnings of keys, whether they are idle, beside what); keys of one modality say so themselves, by ``of``
RULES: tuple[Rule, ...] = (
    (("data.path", "data.heldout_path"), lambda c: not c.data.reads_files, "data.source={0.data.source}"),
    (
        ("data.workers", "data.timeout", "data.on_error"),
        lambda c: not c.data.has_workers,
        "data.source={0.data.source}",
    ),
    (
        (
            "objective.perceptual_trunk",
            "objective.perceptual_sha256",
            "objective.perceptual_range",
            "objective.perceptual_dropout",
        ),
        lambda c: c.objective.perceptual_weight == 0,
        "objective.perceptual_weight=0",
    ),
    (
        ("objective.adversarial.",),
        lambda c: c.objective.adversarial.weight == 0,
        "objective.adversarial.weight=0",
    ),
    (
        ("objective.adversarial.adaptive_cap",),
        lambda c: not c.objective.adversarial.adaptive,
        "objective.adversarial.adaptive=false",
    ),
    (
        ("objective.adversarial.penalty_weight",),
        lambda c: c.objective.adversarial.penalty == "none",
        "objective.adversarial.penalty=none",
    ),
    (
        ("objective.adversarial.augment_probability",),
        lambda c: not c.objective.adversarial.augment,
        "objective.adversarial.augment=[]",
    ),
    (("train.reshard",), lambda c: c.train.strategy == "ddp", "train.strategy=ddp"),
    (("objective.noising_t",), lambda c: c.objective.noising == "add", "objective.noising=add"),
    (("objective.noising_sigma",), lambda c: c.objective.noising != "add", "objective.noising={0.objective.noising}"),
    (
        ("objective.flow_time_",),
        lambda c: c.objective.flow_time != "logit_normal",
        "objective.flow_time={0.objective.flow_time}",
    ),
    (
        (
            "objective.flow_weight",
            "objective.flow_loss",
            "objective.flow_reduction",
            "objective.flow_time",
            "efficiency.flow_mini_batch",
        ),
        lambda c: c.objective.flow_steps == 0,
        "objective.flow_steps=0",
    ),
    (("optim.muon_", "optim.newton_schulz_"), lambda c: not c.optim.muon, "optim.muon=false"),
    (("train.wandb_",), lambda c: not c.train.wandb, "train.wandb=false"),
    (("objective.label_dropout", "sample.cfg_"), lambda c: c.model.num_classes == 0, "model.num_classes=0"),
    (("data.image_column", "data.label_column"), lambda c: not c.data.has_columns, "data.source={0.data.source}"),
    (("data.alpha",), lambda c: not c.data.decodes, "data.source={0.data.source}"),
    (("init_strict",), lambda c: not c.init_from, "init_from=''"),
    (("init_from",), lambda c: c.resume not in ("auto", "never"), "resume={0.resume}"),
)


def value_of(config: Config, key: str) -> tuple[Any, str]:
    """Of a whole key such as ``train.epochs``; and what a model must be made from to read it, "" if that is all one."""
    found: Any = config
    of = ""
    for part in key.split("."):
        of = type(found).__dataclass_fields__[part].metadata.get("of") or of
        found = getattr(found, part)
    return found, of


def check(config: Config, asked: Sequence[str]) -> None:
    """Raises UserError for the first of the keys ``asked`` for that does nothing in ``config``.

    One that has its default there asks for nothing.
    """
    default = Config()
    for key in asked:
        value, of = value_of(config, key)
        if dataclasses.is_dataclass(value) or value == value_of(default, key)[0]:
            continue
        if of not in ("", MADE_FROM[config.model.modality]):
            raise UserError(
                f"override {key}: it does nothing beside model.modality={config.model.modality}; leave it out"
            )
        for beginnings, is_idle, beside in RULES:
            if key.startswith(beginnings) and is_idle(config):
                raise UserError(f"override {key}: it does nothing beside {beside.format(config)}; leave it out")
