"""Whether Triton works here: y = 2 x, compiled for this GPU and run, or for sm_90 where there is none."""

from __future__ import annotations

import torch

from .backend import HAS_TRITON
from .jit import jit, tl, triton

BLOCK = 64


@jit
def _double_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, 2.0 * tl.load(p_x + o))


def triton_works() -> str:
    """What was shown. Raises whatever Triton raises: its package, its compiler, ptxas or the driver may be broken."""
    if not HAS_TRITON:
        raise ImportError("not installed")
    if torch.cuda.is_available():
        x = torch.arange(BLOCK, dtype=torch.float32, device="cuda")
        y = torch.empty_like(x)
        _double_kernel[(1,)](x, y, BLOCK)  # type: ignore[index]
        if not torch.equal(y, 2 * x):
            raise RuntimeError("a kernel gave wrong numbers")
        return "a kernel compiles and runs"
    from triton.backends.compiler import GPUTarget

    if not isinstance(_double_kernel, triton.JITFunction):
        return "interpreted (TRITON_INTERPRET=1)"
    source = triton.compiler.ASTSource(
        fn=_double_kernel, signature={"p_x": "*fp32", "p_y": "*fp32", "BLOCK": "constexpr"}, constexprs={(2,): BLOCK}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return f"a kernel compiles for sm_90 ({len(compiled.asm['cubin'])} bytes of machine code); no GPU to run it"
