"""Published checkpoints in and out: the official .pt format.

Files are read with ``weights_only=True``: nothing in them is executed. Prefixes that wrappers leave in key names
(``module.``, ``_orig_mod.``) are removed wherever they stand; tables that are derived from sizes are ignored.
"""

from unite_fast.interop.training import load_training, save_reference
from unite_fast.interop.weights import (
    OPTIONAL,
    best_scale,
    build_filled,
    check_model,
    clean_keys,
    infer_config,
    known_of,
    load_reference,
    load_weights,
    read_official,
    weights_of,
)

__all__ = [
    "OPTIONAL", "best_scale", "build_filled", "check_model", "clean_keys", "infer_config", "known_of",
    "load_reference", "load_training", "load_weights", "read_official", "save_reference", "weights_of",
]  # fmt: skip
