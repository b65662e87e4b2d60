"""What starting, saving and resuming cost each rank, by the number of ranks; on this CPU, over gloo.

    python benchmarks/bench_checkpoint.py           2, 4 and 8 ranks, ddp and fsdp2

start: a rank's model, optimizer and averages, sharded. save: its copy and its file, until rank 0 has renamed all.
load: the index of all files, and what a rank reads of them. verify: the hashes of all files, each rank its share of
them, before rank 0 chooses what to resume from. CPU seconds of a rank, the largest of all ranks, the median of REPEATS;
bytes of the largest and smallest rank.
Rows go to benchmarks/results/<device>/checkpoint.jsonl, of which scripts/scaling.py makes a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import ROOT, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from unite_fast import checkpoint
from unite_fast.checkpoint import dcp, find, saving
from unite_fast.config import Config, yaml_text
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble, start

REPEATS = 3
WORLDS = (2, 4, 8)
STRATEGIES = ("ddp", "fsdp2")
SIZES = (
    "model.encoder.width=384", "model.decoder.width=384", "model.decoder.in_features=384", "efficiency.kernels=fused",
)  # fmt: skip


def config(strategy: str) -> Config:
    return yaml_text.load(ROOT / "configs" / "digits.yaml", [*SIZES, f"train.strategy={strategy}"])


def timed(function: Callable[[], Any], ranks: Ranks) -> tuple[float, Any]:
    """CPU seconds of this rank, all its threads, from when all ranks are there; what ``function`` returned."""
    ranks.barrier()
    begin = time.process_time()
    found = function()
    return time.process_time() - begin, found


def saved(state: Any, settings: Config, ranks: Ranks, folder: Path) -> None:
    writer = saving.Writer(folder, settings, ranks)
    writer.save(state, {})
    writer.wait()


def resumed(path: Path, state: Any, settings: Config) -> int:
    """Bytes that this rank read."""
    read, copy = [], dcp._copy

    def counted(file: Any, item: Any, planner: Any) -> None:
        copy(file, item, planner)
        target = planner.resolve_tensor(item)
        read.append(target.numel() * target.element_size())

    with mock.patch.object(dcp, "_copy", counted):
        checkpoint.resume(path, state, settings.train.global_batch)
    return sum(read)


def verified(folder: Path, ranks: Ranks) -> int:
    """Bytes that this rank hashed."""
    sizes, hash_of = [], find.file_sha256

    def counted(file: Path) -> str:
        sizes.append(file.stat().st_size)
        return hash_of(file)

    with mock.patch.object(find, "file_sha256", counted):
        start.hash_together(folder, "auto", ranks)
        if ranks.is_main:
            assert checkpoint.newest(folder / "checkpoints")[0]
    return sum(sizes)


def on_a_rank(strategy: str, folder: str) -> dict[str, list[float]]:
    """Of each repeat: seconds of start, save, load and verify, and the bytes read."""
    torch.set_num_threads(1)
    ranks, settings = distributed.start("cpu"), config(strategy)
    found: dict[str, list[float]] = {name: [] for name in ("start", "save", "load", "verify", "read", "hashed")}
    for number in range(REPEATS):
        place = Path(folder) / str(number)
        seconds, state = timed(lambda: assemble.fresh_state(settings, ranks), ranks)
        found["start"].append(seconds)
        saves = place / "checkpoints"
        found["save"].append(timed(lambda s=state, p=saves: saved(s, settings, ranks, p), ranks)[0])
        path = saves / "step-0000000"
        seconds, read = timed(lambda s=state, p=path: resumed(p, s, settings), ranks)
        found["load"].append(seconds)
        found["read"].append(read)
        seconds, hashed = timed(lambda p=place: verified(p, ranks), ranks)
        found["verify"].append(seconds)
        found["hashed"].append(hashed)
    distributed.stop()
    return found


def row(strategy: str, world: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        launch = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=world, run_id="checkpoint", rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", max_restarts=0, start_method="fork",
        )  # fmt: skip
        ranks = elastic_launch(launch, on_a_rank)(strategy, folder)
        written = [
            path.stat().st_size for path in Path(folder, "0", "checkpoints", "step-0000000").glob("*.safetensors")
        ]
    seconds = {
        name: statistics.median(max(found[name][n] for found in ranks.values()) for n in range(REPEATS))
        for name in ("start", "save", "load", "verify")
    }
    read = [found["read"][0] for found in ranks.values()]
    return {
        "strategy": strategy, "ranks": world, "repeats": REPEATS, "seconds": seconds,
        "files": len(written), "written": [min(written), max(written)], "read": [min(read), max(read)],
        "hashed": max(found["hashed"][0] for found in ranks.values()), "whole": sum(written),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = [row(strategy, world) for strategy in STRATEGIES for world in WORLDS]
    print(record("checkpoint", torch.device("cpu"), rows))


if __name__ == "__main__":
    main()
