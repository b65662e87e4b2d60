"""Runs Triton kernels on the GPU, or in Triton's interpreter where there is none.

Here, above tests/conftest.py, because a kernel is interpreted or compiled from its definition on: the variable must be
set before the first import of the package.
"""

import os

import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products repeat their bits
else:
    os.environ["TRITON_INTERPRET"] = "1"
