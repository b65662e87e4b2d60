"""The keys of a run: their types and defaults (``keys``), what they must satisfy (``checks``), YAML (``yaml_text``)."""

from unite_fast.config.keys import (
    DECODER_SIZES,
    ENCODER_SIZES,
    SIZES,
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
    batch_split,
)

__all__ = [
    "DECODER_SIZES",
    "ENCODER_SIZES",
    "SIZES",
    "CommConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EfficiencyConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "SampleConfig",
    "TrainConfig",
    "batch_split",
]
