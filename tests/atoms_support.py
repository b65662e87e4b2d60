"""Small molecules and crystals, and a model of them that trains in seconds."""

from __future__ import annotations

import numpy as np
import yaml

from unite_fast.config import Config
from unite_fast.config.yaml_text import from_dict
from unite_fast.data.atoms import Structure, Structures, join, pack

SLOTS = 7
TINY = f"""
name: tiny
model:
  modality: atoms
  num_classes: 2
  num_latents: {SLOTS}
  latent_dim: 4
  time_shift: 1.0
  encoder: {{depth: 3, width: 32, heads: 2, in_context_start: 1, in_context_len: 2}}
  decoder: {{depth: 1, width: 32, heads: 2, mlp_hidden: 64, in_features: 32}}
objective: {{perceptual_weight: 0, flow_weight: 0.03, flow_steps: 2}}
optim: {{lr: 0.002, warmup_epochs: 0.1, flat_epochs: 1.0e+9}}
sample: {{solver: heun, steps: 2, last: prediction}}
evaluation: {{precision: fp32}}
train: {{global_batch: 8, micro_batch: 4, epochs: 4, log_every: 1, image_every: 0, checkpoint_every: 1000}}
efficiency: {{precision: fp32}}
"""


def structures(count: int = 24) -> Structures:
    """Molecules of up to 7 atoms, then crystals, as two data sets."""
    random = np.random.default_rng(0)
    listed = []
    for k in range(count):
        n = 2 + k % 6
        places = np.stack([np.arange(n), np.arange(n) % 2, np.zeros(n)], 1) * 1.2 + random.normal(0, 0.1, (n, 3))
        cell = np.diag(random.uniform(3, 6, 3)) + random.normal(0, 0.1, (3, 3)) if k >= count // 2 else None
        if cell is not None:
            places = (np.arange(n) / n)[:, None] + random.normal(0, 0.01, (n, 3))
        listed.append(Structure(random.choice([1, 6, 7, 8, 9], n), places, cell, f"number {k}"))
    return join([pack(listed[: count // 2]), pack(listed[count // 2 :])])


def config(**model: object) -> Config:
    values = yaml.safe_load(TINY)
    values["model"] |= model
    return from_dict(values)
