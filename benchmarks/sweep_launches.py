"""Launches of the longest kernels, each beside the table's: which rows, columns, warps and stages this GPU likes.

    python benchmarks/sweep_launches.py --compile      compiles all candidates for sm_90, without a GPU, into the cache
    python benchmarks/sweep_launches.py                times them on this GPU: rows in results/<device>/launches.jsonl

A candidate is a row of a table in kernels/unite_kernels/launch_tables/. One that spills or does not fit is left out.
What is timed is the whole pass, in backward with the sums over programs, at the rows of UNITE-B's tokenization and
flow passes, once it computes what the table's launch computes. gpu_report.py writes the fastest into the device's
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and "--compile" in sys.argv:
    os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "ops"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from machine_code import programs_at_once  # noqa: E402

from unite_kernels import launches  # noqa: E402
from unite_kernels.launches import Launch  # noqa: E402

WIDTH, HIDDEN = 768, 2048  # of UNITE-B's encoder
GRIDS: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("adaln_mid", "backward"): {"rows": (1, 2), "warps": (2, 4, 8), "stages": (0, 2, 3)},
    ("adaln_tail", "backward"): {"rows": (1, 2), "warps": (2, 4, 8), "stages": (0, 2, 3)},
    ("qk_norm_rope", "backward"): {"rows": (4, 8), "columns": (2, 4), "warps": (4, 8), "stages": (0, 2, 3)},
    ("qk_norm_rope", "forward"): {"rows": (8,), "columns": (2, 4), "warps": (4, 8), "stages": (0, 2, 3)},
    ("swiglu", "backward"): {"rows": (2, 4), "columns": (256, 512), "warps": (4, 8), "stages": (0, 2, 3)},
}
SHAPES = ("base", "flow")  # of bench_kernels.py


def width_of(op: str) -> int:
    return HIDDEN if op == "swiglu" else WIDTH


def candidates(op: str, direction: str, toy: bool = False) -> list[Launch]:
    """The table's launch first, then every point of the grid laid over it."""
    now, grid = launches.launch_of(op, direction, width_of(op), torch.device("cpu")), GRIDS[op, direction]
    names = [name for name in grid if name == "warps" or getattr(now, name)]  # what this kernel reads
    names += [name for name in grid if name == "stages" and name not in names]
    points = itertools.product(*(grid[name] for name in names))
    found = [now, *(replace(now, **dict(zip(names, point, strict=True))) for point in points)]
    return list(dict.fromkeys(found))[: 2 if toy else None]


@contextmanager
def chosen(op: str, direction: str, launch: Launch) -> Iterator[None]:
    """This pass of ``op`` is launched so, whatever the table says."""
    table = launches.launch_of

    def launch_of(name: str, way: str, width: int, device: torch.device) -> Launch:
        return launch if (name, way) == (op, direction) else table(name, way, width, device)

    launches.launch_of = launch_of
    try:
        yield
    finally:
        launches.launch_of = table


def compiled(op: str, direction: str, launch: Launch) -> tuple[str, str, Launch, dict[str, int] | None]:
    """Compiles one candidate; what its kernel uses, or None where it does not compile."""
    import cases
    import check_kernels

    torch.set_num_threads(1)
    try:
        with chosen(op, direction, launch):
            kernels = check_kernels.compiled_kernels(lambda: cases.launch_model_shape(op, WIDTH))
    except Exception as error:
        print(f"{op} {direction} {asdict(launch)}: {type(error).__name__}", file=sys.stderr)
        return op, direction, launch, None
    kernel = next(k for k in kernels if direction in k.metadata.name)
    ((_, used),) = check_kernels.read_cubin(kernel.asm["cubin"]).items()
    return (
        op,
        direction,
        launch,
        {"registers": used["registers"], "spills": used["spills"], "shared": kernel.metadata.shared},
    )


def compile_all(path: Path, processes: int, toy: bool) -> int:
    """Writes what every candidate uses, with the programs that follow; the number that compile without spills."""
    few = 1 if toy else None
    work = [(*swept, launch) for swept in list(GRIDS)[:few] for launch in candidates(*swept, toy)[:few]]
    if processes == 1:
        results = [compiled(*item) for item in work]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(compiled, *zip(*work, strict=True)))
    rows = []
    for op, direction, launch, used in results:
        if used is not None and not used["spills"]:
            fitted = programs_at_once(used["registers"], launch.warps, used["shared"])
            rows.append({"op": op, "direction": direction, "launch": asdict(replace(launch, programs=fitted)), **used})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    print(f"{len(rows)} of {len(results)} candidates compile without spills")
    return len(rows)


def sweep(device: torch.device, path: Path, toy: bool = False, rounds: int = 7) -> Iterator[dict]:
    """One row per candidate and shape; those that ``compile_all`` left out are not tried."""
    import bench_kernels
    from harness import interleaved, quantiles

    fit = [(row["op"], row["direction"], Launch(**row["launch"])) for row in json.loads(path.read_text())]
    for op, direction in GRIDS:
        known = candidates(op, direction, toy)
        tried = known[:2] if toy else [known[0], *(launch for *swept, launch in fit if swept == [op, direction])]
        for shape in SHAPES:
            sizes = bench_kernels.Sizes(1, 4, 48, 3, 128) if toy else bench_kernels.SIZES["cuda"][shape]
            passes = bench_kernels.passes_of(op, sizes, device, "triton")
            run = passes.backward if direction == "backward" else passes.outputs_again
            truth = [x.clone() for x in run()]
            calls, right = {}, {}
            for launch in dict.fromkeys(tried):

                def call(launch: Launch = launch) -> tuple[torch.Tensor, ...]:
                    with chosen(op, direction, launch):  # noqa: B023
                        return run()  # noqa: B023

                try:
                    right[launch] = all(near(a, b) for a, b in zip(call(), truth, strict=True))
                except Exception as error:
                    yield row_of(
                        op, direction, shape, launch, ok=False, why=f"{type(error).__name__}: {str(error)[:160]}"
                    )
                    continue
                if not right[launch]:
                    yield row_of(
                        op, direction, shape, launch, ok=False, why="its results are not those of the table's launch"
                    )
                    continue
                calls[launch] = call
            times = interleaved(calls, device, 1 if toy else rounds, 1.0 if toy else 2.0, warmup=0 if toy else 2)
            for launch, values in times.items():
                yield row_of(op, direction, shape, launch, ok=True, ms=quantiles(values), n=len(values))
            if toy:
                break


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a.double() - b.double()).abs().max() <= 1e-2 * b.double().abs().max())


def row_of(op: str, direction: str, shape: str, launch: Launch, **facts: object) -> dict:
    found = {"op": op, "direction": direction, "width": width_of(op), "shape": shape, "launch": asdict(launch)}
    return found | facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="without a GPU: fill the cache, count registers")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--file", type=Path, default=ROOT / "gpu-run" / "launches.json", help="of what compiles")
    parser.add_argument("--toy", action="store_true", help="one candidate, for a rehearsal")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.compile:
        return 0 if compile_all(arguments.file, arguments.processes, arguments.toy) else 1
    from harness import record

    device = torch.device("cuda")
    if not arguments.file.is_file():
        parser.error(f"{arguments.file} is not there: run with --compile first")
    for row in sweep(device, arguments.file):
        print(json.dumps(row), flush=True)
        if not arguments.no_record:
            record("launches", device, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
