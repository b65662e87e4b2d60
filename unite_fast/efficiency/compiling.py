"""Regional compilation: the function that all layers of a kind share is compiled, so 28 layers compile once.

A compiled region is a function of (module, tensors, sizes); its parameters are inputs, so modules of equal structure
run the same code. There is one compilation for each combination of sizes, all of them in the first step: two sequence
lengths (tokenization, flow), each before, among and behind the class tokens, and the pruned last block make six of an
encoder's block and one of a decoder's layer. A graph break or one combination too many is an error, not a slow run.

torch keeps what it compiled in its FX graph cache on disk (``cache()``; TORCHINDUCTOR_CACHE_DIR moves it), keyed by
code, sizes, versions and device, so the next start of the same run loads it in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
BACKEND = "inductor"
MOST_VARIANTS = 64  # of one region; torch's default of 8 is close to what a run with uneven flow mini-batches needs


def region(function: F, inference: bool = False) -> F:
    """``function`` compiled as one graph at fixed sizes while gradients are recorded; as it is otherwise.

    Sampling and evaluation come in other sizes, once in a while: compiling them would cost more than it saves.
    inference: compiled there as well, for a function that training itself calls without gradients.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if inference or torch.is_grad_enabled() else function)(*arguments)

    return call  # type: ignore[return-value]


def graphs() -> int:
    """Graphs compiled by this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def cache() -> str:
    """The folder of torch's caches of compiled code."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def report(seconds: float) -> str:
    """What is printed after the first step, which took ``seconds`` on the host: it waits there for the compiler."""
    return f"compiled       {graphs()} graphs; the first step took {seconds:.1f} s; cached in {cache()}"
