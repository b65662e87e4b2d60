"""Is it right? Rows of benchmark "check" and "test"; what is red stays red in every figure, and stops no timing."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import cases
import torch
from checking import check_budget
from harness import ROOT
from test_fused_ops import in_double
from training import Origin, OurStep, configuration, release

from gpu_parts import Bench
from unite_fast.efficiency import precision

TOLERANCE = {"cuda": 2e-2, "cpu": 1e-4}  # of losses, relative: bfloat16, float32
# Of tests/ops: smoke.run does the first; the others have nothing to run on a GPU.
NOT_HERE = ("test_fused_ops", "test_attention_products", "test_bytes", "test_extension", "test_launches")
OPERATIONS = tuple(
    f"tests/ops/{path.name}" for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if path.stem not in NOT_HERE
)
# What only a GPU can show of a step, and the operations that smoke.run does not reach.
TESTS = (
    *("tests/test_efficiency.py::test_a_step_never_waits_for_the_gpu", "tests/test_graph.py::test_graphs_never_wait"),
    *("tests/test_graph.py::test_graphs_on_a_gpu", "tests/test_graph.py::test_launches_of_a_replayed_step"),
    *OPERATIONS,
)
TOY_TESTS = ("tests/ops/test_copied_linear.py::test_half_linear",)


def run(bench: Bench) -> None:
    """Each fused operation at a shape of the model, forward and backward, against float64; a step, fused and eager."""
    precision.setup(bench.device)
    backend = "cpp" if bench.toy else "triton"
    shape = (1, 9, 48) if bench.toy else (2, 544, 768)
    for name, case in cases.CASES.items():
        tensors = case.tensors(*shape, torch.float32, torch.float32 if bench.toy else torch.bfloat16)
        bench.check(f"{name} against float64", reason(check_budget, case.call, tensors, backend, in_double(name)))
    losses_agree(bench)


def reason(function: Callable[..., object], *arguments: object) -> str:
    """Why it fails, in a line; empty when it does not."""
    try:
        function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ""


def losses_agree(bench: Bench) -> None:
    device, found = bench.device, {}
    sizes = ("tiny", 3, 2) if bench.toy else ("b", 3, 8)
    plain = configuration(*sizes, device, ())
    origin = Origin(plain.model, device, plain.objective.perceptual_weight > 0)
    for kernels in ("eager", "fused"):
        step = OurStep(configuration(*sizes, device, (f"efficiency.kernels={kernels}",)), origin)
        found[kernels] = {name: float(v) for name, v in step.fresh_passes().items() if v.ndim == 0}
        found[kernels]["grad_norm"] = float(step.update()["grad_norm"])
        del step
        release(device)
    off = {n: abs(found["fused"][n] - v) / max(abs(v), 1e-12) for n, v in found["eager"].items()}
    worst = max(off, key=lambda n: off[n])
    why = "" if off[worst] <= TOLERANCE[device.type] else f"{worst} is off by {off[worst]:.2g}, relative"
    bench.check("a step's losses, fused against eager", why, losses=found)


class Rows:
    """A pytest plugin: a row for every test, when it ends."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            line = (str(report.longrepr).splitlines() or [""])[-1] if report.failed else ""
            facts = {"test": report.nodeid, "outcome": report.outcome, "ok": not report.failed, "why": line[:200]}
            self.bench.row("test", **facts, seconds=round(report.duration, 2))


def tests(bench: Bench) -> None:
    import pytest

    parallel = [] if bench.toy else ["-n", "6"]
    if not bench.toy:
        os.environ.pop("TRITON_INTERPRET", None)
    chosen = TOY_TESTS if bench.toy else TESTS
    status = pytest.main(["-q", "-p", "no:cacheprovider", *parallel, *chosen], plugins=[Rows(bench)])
    bench.check("pytest ran", "" if status in (0, 1) else f"pytest ended with status {int(status)}")
