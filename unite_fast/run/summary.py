"""What a run is, in words: the lines that it prints at its start, and the files of its folder that say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from unite_fast import data
from unite_fast.base import command, files, launcher, provenance
from unite_fast.config import ObjectiveConfig, OptimConfig, TrainConfig, yaml_text
from unite_fast.model.discriminator import Discriminator
from unite_fast.parallel.distributed import Ranks
from unite_fast.plan import cost
from unite_fast.run.start import last_step
from unite_fast.training.state import TrainState


def ending(state: str, reason: str, step: int, total: int, folder: Path, saved: int | None, seconds: float) -> str:
    """How a run ended, where it is saved, how to go on: its last lines. state, reason: as in status.json."""
    minutes, rest = divmod(int(seconds), 60)
    where = f"saved in {folder / 'checkpoints' / f'step-{saved:07d}'}" if saved else f"{folder} has no checkpoint yet"
    if state == "finished":
        first = f"finished: {step:,} of {total:,} steps, {minutes}:{rest:02d} minutes in this start; {where}"
        return "\n".join(
            (
                first,
                f"to see it: {command.called('report')} {folder}",
                f"to sample: {command.called('sample')} --checkpoint {folder} --out samples.png",
                "to go on: raise train.epochs (and train.max_steps, if it is set), then start the same command",
            )
        )
    why = {"time_limit": "train.max_minutes is over", "preempted": reason}.get(state, reason or state)
    return f"stopped at step {step:,} of {total:,}: {why}; {where}\nto go on: start the same command again"


def failed(step: int, folder: Path, saved: int | None) -> str:
    """Where a run that an error ends after ``step`` is saved; the error's own line says why."""
    if not saved:
        return f"ended after step {step:,} by an error; nothing is saved yet, the same command begins again"
    return f"ended after step {step:,} by an error; saved until step {saved:,}, from where the same command goes on"


def write_description(path: Path, keys: dict[str, Any], ranks: Ranks, source: data.Source, state: TrainState) -> None:
    """Writes into the run folder what the run is since this start, and adds it as a line to starts.jsonl.

    keys: the configuration. Raises UserError when the disk refuses.
    """
    described = provenance.of(ranks.device, ranks.world_size) | {"pipeline": source.pipeline_id(ranks.device.type)}
    described |= {"parameters": state.model.trainable_parameters(), "images": len(source)}
    described |= {"fine_tuned_from": state.origin} if state.origin else {}
    with files.refusals(f"run folder {path}", "; choose another with run_dir=PATH"):
        starts = path / "starts.jsonl"
        start = {"step": state.step} | described | {"config": keys}
        before = files.read(starts) if starts.is_file() else b""  # whatever it holds
        files.write(starts, before + b"\n" * (before[-1:] not in (b"", b"\n")) + json.dumps(start).encode() + b"\n")
        files.write(path / "config.resolved.yaml", yaml_text.dump(keys))
        files.write_json(path / "provenance.json", described | {"class_names": source.class_names})


def _discriminator(state: TrainState) -> list[str]:
    """A line on what is trained beside the model, where there is such a part."""
    if "discriminator" not in state.parts:
        return []
    module = cast(Discriminator, state.parts["discriminator"].module)
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    trunk = "the model's own encoder, frozen" if module.trunk is None else "a copy of the encoder that learns as well"
    after = ", ".join(str(block) for block in module.after)
    return [f"discriminator  {learned:,} trainable, AdamW; heads after blocks {after} of {trunk}"]


def describe(
    o: ObjectiveConfig,
    optim: OptimConfig,
    t: TrainConfig,
    state: TrainState,
    ranks: Ranks,
    split: tuple[int, int],
    images: int,
    flops: dict[str, float],
    lengths: Tensor | None = None,
) -> str:
    """Sizes, FLOPs, batch split, memory and length of a run: its first lines, and those of ``--dry-run``.

    images, lengths: of the training set, as of ``Source``. flops: of ``plan.cost.step_flops``.
    """
    model, how = state.model, state.execution
    thing = model.modality.thing
    count = model.trainable_parameters()
    parts = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        model.modality.embedding: model.embedder,
    }
    sizes = ", ".join(f"{n} {sum(p.numel() for p in m.parameters() if p.requires_grad):,}" for n, m in parts.items())
    executed = cost.step_flops(model.config, o, optim.frozen, lengths, pruned=True)["total"]
    mean = "" if lengths is None else f", mean of {lengths.double().mean():.1f} atoms"
    by_part = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in flops.items())
    moments = len(state.optimizer.muon)
    orthogonal = str(state.optimizer.newton_schulz_dtype(ranks.device)).removeprefix("torch.")
    stay = cost.persistent_parts(model.config, o, optim, how.efficiency, t, ranks.world_size)
    kept = ", ".join(f"{name} {cost.amount(size)}" for name, size in stay.items())
    total = last_step(t, state, images)
    computed = how.lines(state.recipe)
    return "\n".join(
        (
            f"parameters     {count:,} trainable ({sizes}, ...)",
            *_discriminator(state),
            f"optimizers     Muon {moments} tensors (Newton-Schulz in {orthogonal}), "
            f"AdamW {len(state.optimizer.adamw)} tensors",
            f"{'FLOPs/' + thing:<14} {by_part} GFLOP "
            f"(forward and backward, N = {o.flow_steps}{mean}; MFU counts these)",
            f"executed       {executed / 1e9:.4g} GFLOP/{thing}: the encoder's last block computes the registers alone",
            f"batch          {t.global_batch} = {ranks.world_size} ranks x {split[1]} accumulation x {split[0]}",
            f"memory         {cost.amount(sum(stay.values()))} per rank that stay: {kept}",
            f"recompute      {computed['recompute']}",
            f"length         {images:,} {thing}s/epoch, {t.epochs:g} epochs, {total:,} steps",
            f"device         {computed['device']}",
            f"strategy       {computed['strategy']}",
            *launcher.lost_for_good(),
        )
    )
