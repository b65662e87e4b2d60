"""The door to Triton: importable without it, so that eager and C++ paths work where Triton is not installed.

Without the package ``jit`` leaves a kernel undecorated; ``backend.resolve`` refuses "triton" before any launch.
"""

from __future__ import annotations

from .backend import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton = tl = None

    def jit(kernel=None, **options):
        return (lambda undecorated: undecorated) if kernel is None else kernel


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


__all__ = ["jit", "next_power_of_2", "tl", "triton"]
