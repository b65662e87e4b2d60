"""Fused operations for transformers trained by flow matching: Triton and C++ kernels with eager references.

Each file is one operation: formula, eager reference, kernels, registered op, and last its public function.
Nothing here knows the model that calls it, and importing does no work.
"""
