"""The keys of a run: their types and defaults (``keys``), what they must satisfy (``checks``), YAML (``yaml_text``).

UserError and its kin are found here, too: who reads a configuration meets them.
"""

from unite_fast.base.errors import CommonError, RunError, Stopped, UserError
from unite_fast.config.adversarial import AdversarialConfig
from unite_fast.config.atoms import AtomDataConfig, AtomLossConfig, AtomsConfig
from unite_fast.config.checks import batch_split
from unite_fast.config.keys import (
    DECODER_SIZES,
    ENCODER_SIZES,
    MADE_FROM,
    SIZES,
    SOURCES,
    CommConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EfficiencyConfig,
    EncoderConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)
from unite_fast.config.option import choices

__all__ = [
    "DECODER_SIZES",
    "ENCODER_SIZES",
    "MADE_FROM",
    "SIZES",
    "SOURCES",
    "AdversarialConfig",
    "AtomDataConfig",
    "AtomLossConfig",
    "AtomsConfig",
    "CommConfig",
    "CommonError",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EfficiencyConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunError",
    "SampleConfig",
    "Stopped",
    "TrainConfig",
    "UserError",
    "batch_split",
    "choices",
]
