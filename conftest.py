"""Runs Triton kernels in Triton's interpreter where there is no GPU.

Here, above tests/conftest.py, because a kernel is interpreted or compiled from its definition on: the variable must be
set before the first import of the package.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
