"""What the server of gpu_check.py's processes imports once, so that every part begins with it. Touches no device."""

from __future__ import annotations

import compare_official  # noqa: F401  torch, the model, the training step
import torchvision  # noqa: F401
