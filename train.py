"""Trains UNITE: python train.py --config configs/digits.yaml, or the same under torchrun or srun."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch

from unite_fast import checkpoint, command, config, config_io, data, run
from unite_fast.checkpoint import TrainState
from unite_fast.losses import load_perceptual
from unite_fast.runtime import distributed, precision, stats
from unite_fast.runtime.flops import peak_flops, training_flops
from unite_fast.step import METRICS, TrainStep


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys and their defaults:\n" + config_io.help_text().replace("%", "%%"),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; every key is optional")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, FLOPs, memory and batch split, and stop")
    parser.add_argument(
        "--fast-dev-run", type=int, metavar="N", default=0, help="N steps, pictures, checkpoint and resume"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    settings = config_io.load(arguments.config, arguments.overrides)
    if arguments.fast_dev_run:
        n = arguments.fast_dev_run
        train = dataclasses.replace(settings.train, max_steps=n, log_every=1, image_every=n, checkpoint_every=n)
        settings = dataclasses.replace(
            settings,
            train=train,
            resume="never",
            run_dir=f"{run.folder(settings)}-dev",
            sample=dataclasses.replace(settings.sample, solver="heun", steps=2),
        )
    return arguments, settings


def train(settings: config.Config, ranks: distributed.Ranks, dry_run: bool = False) -> TrainState:
    """One run from its configuration to its last checkpoint."""
    t, device = settings.train, ranks.device
    split = config.batch_split(t, ranks.world_size)
    source = data.open_source(settings.data, settings.model)
    perceptual = load_perceptual(settings.objective, settings.model.channels, settings.efficiency.kernels)
    state = run.fresh_state(settings, ranks)
    if ranks.is_main:
        print(run.describe(settings, state, ranks, split, len(source)))
    if dry_run:
        return state

    path = run.folder(settings)
    sums, lines = run.resume(settings, state, path)
    run.prepare(settings, ranks)
    if ranks.is_main:
        print("\n".join(lines))
    total = int(t.epochs * len(source)) // t.global_batch
    total = min(total, t.max_steps or total)
    step = TrainStep(settings, ranks, split, len(source), perceptual.to(device) if perceptual else None)
    means = stats.Means(METRICS, ranks)
    means.restore(sums)
    log = stats.Log(path, state.step, t.tensorboard) if ranks.is_main else None
    alarm = stats.CollapseAlarm(t.collapse_std)
    flops = training_flops(settings.model, settings.objective.flow_steps, perceptual is not None)["total"]
    meter = stats.Meter(total * t.global_batch, state.images_seen, flops, peak_flops(device), ranks.world_size)
    shown = run.examples(settings, device) if ranks.is_main else None
    batches = data.stream(
        source, settings.seed, state.images_seen, t.global_batch, ranks.rank, ranks.world_size, device,
        settings.data.workers, settings.data.timeout,
    )  # fmt: skip

    run.status(path, ranks, "running", state.step)
    state.model.train()
    while state.step < total:
        means.add(step(state, next(batches)))
        last = state.step == total
        if state.step % t.log_every == 0 or last:
            row = (
                {"step": state.step, "images_seen": state.images_seen} | means.drain() | meter.rates(state.images_seen)
            )
            if log is not None:
                log.write(row)
                print(stats.progress_line(row, total), flush=True)
                if warning := alarm.check(row):
                    print(warning, file=sys.stderr)
        if shown is not None and t.image_every and (state.step % t.image_every == 0 or last):
            run.save_pictures(path, state, settings, *shown)
        if state.step % t.checkpoint_every == 0 or last:
            kept = means.sums()
            if ranks.is_main:
                checkpoint.save(path / "checkpoints", state, settings, kept, t.keep_last)
            ranks.barrier()
    run.status(path, ranks, "finished", state.step)
    return state


def check_round_trip(settings: config.Config, state: TrainState, ranks: distributed.Ranks) -> None:
    """--fast-dev-run: what was saved loads again, equal."""
    again = run.fresh_state(settings, ranks)
    run.resume(dataclasses.replace(settings, resume="must"), again, run.folder(settings))
    before, after = state.model.state_dict(), again.model.state_dict()
    if again.step != state.step or any(not torch.equal(before[k], after[k]) for k in before):
        raise RuntimeError("the checkpoint does not give back the model that was saved")
    if ranks.is_main:
        print(f"fast dev run: {state.step} steps, pictures and a checkpoint round trip in {Path(run.folder(settings))}")


def main(argv: list[str]) -> int:
    arguments, settings = parse(argv)
    if arguments.print_config:
        print(config_io.to_yaml(settings), end="")
        return 0
    ranks = distributed.start(settings.device)
    try:
        precision.setup(ranks.device)
        if arguments.fast_dev_run and ranks.is_main:
            shutil.rmtree(run.folder(settings), ignore_errors=True)
        state = train(settings, ranks, arguments.dry_run)
        if arguments.fast_dev_run:
            check_round_trip(settings, state, ranks)
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
