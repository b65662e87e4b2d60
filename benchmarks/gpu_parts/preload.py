"""What the server of gpu_check.py's processes imports once, so that every part begins with it. Touches no device."""

from __future__ import annotations

import gc

import compare_official  # noqa: F401  torch, the model, the training step
import lpips  # noqa: F401
import torch._dynamo  # noqa: F401  which the first step of anything imports
import torchvision  # noqa: F401

gc.freeze()  # a part that looked through all of it for garbage would copy it
