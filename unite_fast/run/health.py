"""Whether a run is still well: skipped steps, tensors that are not finite, ranks that no longer hold the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unite_fast import checkpoint, data
from unite_fast.base import files
from unite_fast.base.errors import CommonError, RunError, UserError
from unite_fast.config import TrainConfig
from unite_fast.data.loader import check_skipped
from unite_fast.data.source import BYTES
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import copies_group, local
from unite_fast.run.session import Diverged
from unite_fast.training.guards import SkipCounter, first_difference, first_nonfinite
from unite_fast.training.state import TrainState, tensors_of


def bad_batches(path: Path, source: data.Source, positions: list[int], seed: int, n: int) -> None:
    """Writes bad_batches.json: which samples were in the skipped steps, of ``n``, that began at ``positions``."""
    order = source.order(seed, n)
    rows = [
        {"step": p // n + 1, "first_position": p, "images": n, "samples": order.indices(p, p + n).tolist()}
        for p in positions
    ]
    files.write_json(path / "bad_batches.json", rows)


def check_skips(t: TrainConfig, seed: int, path: Path, skips: SkipCounter, source: data.Source, ranks: Ranks) -> None:
    """With the log line, on all ranks: raises Diverged after train.max_skipped skipped steps in a row."""
    longest, positions = skips.drain()
    if longest >= t.max_skipped:
        if ranks.is_main:
            bad_batches(path, source, positions, seed, t.global_batch)
        raise Diverged(
            f"the gradient was not finite in {longest} steps in a row (train.max_skipped={t.max_skipped}); the batches "
            "are in bad_batches.json, the last checkpoint is from before; lower optim.lr or look at those images"
        )


def check_unreadable(state: TrainState, source: data.Source, ranks: Ranks) -> None:
    """With the log line and before a save, on all ranks: the images that data.on_error=skip has replaced are the run's,
    each once, whichever rank found it and in whichever start. Raises CommonError for more than it allows."""
    if source.on_error != "skip":
        return
    for found in ranks.gather(source.skipped):
        state.unreadable |= found
    source.skipped |= state.unreadable
    try:
        check_skipped(source)
    except UserError as error:
        raise CommonError(str(error)) from None


def recall_unreadable(
    state: TrainState, source: data.Source, ranks: Ranks, path: Path | None, images: Mapping[str, Any]
) -> None:
    """At the start, on all ranks: what earlier starts replaced counts on, unless it can be read by now.

    path: of the checkpoint from which the run goes on; images: ``Source.identity``.
    """
    saved = {} if path is None else checkpoint.saved_images(path)
    same_images = path is not None and all(saved.get(name) == images[name] for name in images if name != BYTES)

    def still() -> dict[int, str]:
        found = {}
        for index in state.unreadable if same_images else ():  # else their numbers are those of other images
            try:
                source.read(index, None, 0)
            except data.BadImage as error:
                found[index] = str(error)
        return found

    state.unreadable = ranks.decide(still)
    source.skipped |= state.unreadable


def _on_any_rank(name: str, state: TrainState, ranks: Ranks) -> str:
    """``name``, or that of the first rank that has one where each looked at its own shards."""
    return next(filter(None, ranks.gather(name)), "") if state.optimizer.sharded else name


def check_finite(state: TrainState, ranks: Ranks) -> None:
    """Before a save, on all ranks: raises Diverged naming the first tensor of any of them that is not finite."""
    mine = first_nonfinite({name: local(tensor) for name, tensor in tensors_of(state).items()})
    if name := next(filter(None, ranks.gather(mine)), ""):
        raise Diverged(f"{name} is not finite at step {state.step}; nothing was saved, the last checkpoint stays")


def check_replicas(state: TrainState, ranks: Ranks) -> None:
    """On all ranks: raises RunError naming the first tensor that is not the same everywhere."""
    tensors = {name: local(tensor) for name, tensor in tensors_of(state).items()}
    name = first_difference(tensors, ranks, copies_group(next(iter(state.optimizer.parameters.values()))))
    if name := _on_any_rank(name, state, ranks):
        raise RunError(
            f"the ranks no longer hold the same model at step {state.step}: {name} differs; one of the devices "
            "computes wrongly, or a collective failed; resume from the last checkpoint, without that node"
        )
