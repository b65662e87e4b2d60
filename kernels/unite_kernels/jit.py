"""The door to Triton: importable without it, so that eager and C++ paths work where Triton is not installed.

Without the package ``jit`` leaves a kernel undecorated; ``backend.resolve`` refuses "triton" before any launch.
"""

from __future__ import annotations

from .backend import HAS_TRITON, INTERPRETING

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit

    if INTERPRETING:  # 3.9's refuses a mask that a comparison of two scalars is part of, which it keeps as an integer
        from numpy import asarray
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def _with_bools(access, position):
            def masked(self, *given):
                mask = TensorHandle(asarray(given[position].data, dtype=bool), tl.int1)
                return access(self, *given[:position], mask, *given[position + 1 :])

            return masked

        InterpreterBuilder.create_masked_load = _with_bools(InterpreterBuilder.create_masked_load, 1)
        InterpreterBuilder.create_masked_store = _with_bools(InterpreterBuilder.create_masked_store, 2)
else:
    triton = tl = None

    def jit(kernel=None, **options):
        return (lambda undecorated: undecorated) if kernel is None else kernel


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


__all__ = ["jit", "next_power_of_2", "tl", "triton"]
