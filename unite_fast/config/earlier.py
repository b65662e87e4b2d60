"""Keys of earlier versions: what a configuration says now, and what one that was saved with them means."""

from __future__ import annotations

from typing import Any

from unite_fast.base import launcher
from unite_fast.base.errors import UserError

ENDS = "optim.flat_epochs, decay_epochs (0: the end of training) and final_lr"
GONE = {
    "optim.schedule": f"the schedule is what {ENDS} say; cosine: both 0; constant: flat_epochs=1e9",
    "optim.mid_lr": "write optim.final_lr, the rate from decay_epochs on",
    "optim.second_flat_epochs": f"there is one decay: {ENDS}",
    "optim.second_decay_epochs": f"there is one decay: {ENDS}",
    "optim.epoch_unit": "epochs are true ones; multiply those of the official code by its accumulation: 20 by 2 is 40",
    "evaluation.validation_epoch": "evaluation.heldout_epoch measures the flow's losses as well",
    "evaluation.validation_count": "write evaluation.heldout_count",
}
SILENT = {"warmup_epochs": 20.0, "decay_epochs": 50.0, "final_lr": 1e-5}  # what a file meant that did not say it


def translated(values: Any, where: str) -> Any:
    """A saved configuration in today's keys, with equal learning rates. Raises UserError for a second decay.

    Where epochs were counted in micro-batches, they last as long as they would have on as many ranks as there are now.
    """
    values = _one_score_of_held_out_samples(values)
    old = values.get("optim") if isinstance(values, dict) else None
    if not isinstance(old, dict) or "schedule" not in old:
        return values
    try:
        return values | {"optim": _schedule(old, values["train"], where)}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: the learning-rate schedule that was saved is malformed ({error!r})") from None


def _one_score_of_held_out_samples(values: Any) -> Any:
    scores = values.get("evaluation") if isinstance(values, dict) else None
    if not isinstance(scores, dict) or "validation_epoch" not in scores:
        return values
    kept = dict(scores)
    epochs = kept.pop("validation_epoch")
    kept["heldout_epoch"] = kept.get("heldout_epoch") or epochs
    if "validation_count" in kept:
        kept["heldout_count"] = kept.pop("validation_count")
    return values | {"evaluation": kept}


def _schedule(old: dict[str, Any], train: dict[str, Any], where: str) -> dict[str, Any]:
    optim, length = {key: value for key, value in old.items() if f"optim.{key}" not in GONE}, 1.0
    if old["epoch_unit"] == "micro_batches":
        per_rank = train["global_batch"] / launcher.world_size()
        length = per_rank / min(train["micro_batch"], per_rank)
        optim |= {key: old[key] * length for key in ("warmup_epochs", "flat_epochs", "decay_epochs")}
    if old["schedule"] == "constant":
        return optim | {"flat_epochs": 1e9}
    if old["schedule"] == "cosine":
        return optim | {"flat_epochs": 0.0}
    end = max(optim["warmup_epochs"], optim["flat_epochs"], optim["decay_epochs"])
    if max(end, old["second_flat_epochs"] * length) < train["epochs"]:
        raise UserError(f"{where}: its learning rate decays again after optim.second_flat_epochs, which none does now")
    return optim | {"decay_epochs": end, "final_lr": old["mid_lr"]}


def written(values: Any) -> Any:
    """A user's file in today's keys, where what it says of the schedule has one meaning: cosine or constant."""
    optim = values.get("optim") if isinstance(values, dict) else None
    if not isinstance(optim, dict):
        return values
    flat = {"cosine": 0.0, "constant": 1e9}.get(str(optim.get("schedule")))
    if flat is None:
        return values
    kept = {key: value for key, value in optim.items() if key != "schedule"}
    return values | {"optim": SILENT | kept | {"flat_epochs": flat}}
