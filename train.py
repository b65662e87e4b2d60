"""Trains UNITE: python train.py --config configs/digits.yaml, or the same under torchrun or srun."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from typing import NamedTuple

import torch

from unite_fast import checkpoint, config, data
from unite_fast.base import command, faults, launcher
from unite_fast.base.errors import RunError
from unite_fast.config import yaml_text
from unite_fast.efficiency import compatibility, compiling, precision
from unite_fast.model.flops import peak_flops
from unite_fast.objective import Objective
from unite_fast.parallel import distributed
from unite_fast.parallel.tensors import local
from unite_fast.plan import cost
from unite_fast.run import agreement, assemble, dry_run, grids, health, monitor, options, profile, start, stats, summary
from unite_fast.run.session import Session
from unite_fast.training.means import Means
from unite_fast.training.state import TrainState
from unite_fast.training.step import TrainStep


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys and their defaults:\n" + yaml_text.help_text(),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; every key is optional, base: a file before it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, FLOPs, memory, projected speed and data rate, and stop"
    )
    parser.add_argument("--mfu", type=float, metavar="X", help="with --dry-run: the utilisation to project, as 0.4")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: plan for N processes of one node")
    parser.add_argument(
        "--fast-dev-run", type=int, metavar="N", default=0, help="N steps, pictures, checkpoint and resume"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    settings = yaml_text.load(arguments.config, arguments.overrides)
    options.check(arguments)
    if n := arguments.fast_dev_run:
        train = dataclasses.replace(settings.train, max_steps=n, log_every=1, image_every=n, checkpoint_every=n)
        settings = dataclasses.replace(
            settings,
            train=train,
            resume="never",
            run_dir=f"{settings.folder}-dev",
            sample=dataclasses.replace(settings.sample, solver="heun", steps=2),
        )
    e = settings.efficiency if arguments.print_config else options.settled(settings.efficiency, settings.device)
    return arguments, dataclasses.replace(settings, efficiency=e)


class Inputs(NamedTuple):
    """What a run reads from outside, opened before the ranks meet, so that a rank that misses a path says so."""

    source: data.Source
    objective: Objective
    scoring: monitor.Opened
    flops: dict[str, float]  # of a sample, by part
    started: float

    @classmethod
    def open(cls, settings: config.Config) -> Inputs:
        """Raises UserError."""
        started, world_size = time.monotonic(), launcher.world_size()
        config.batch_split(settings.train, world_size)
        compatibility.check(settings.efficiency, settings.train, world_size)
        fine_tunes = settings.objective.adversarial.weight > 0
        start.check_paths(settings.folder, settings.resume, settings.init_from, settings.data, fine_tunes)
        stats.check_services(settings.train)
        source = data.open_source(settings.data, settings.model)
        objective = Objective.open(settings.model, settings.objective, settings.efficiency)
        flops = cost.step_flops(settings.model, settings.objective, settings.optim.frozen, source.lengths)
        return cls(source, objective, monitor.open_files(settings), flops, started)


def train(settings: config.Config, ranks: distributed.Ranks, inputs: Inputs) -> TrainState:
    """One run from its configuration to its last checkpoint."""
    t, o, source = settings.train, settings.objective, inputs.source
    split = config.batch_split(t, ranks.world_size)
    compatibility.check_device(settings.efficiency, t, o, ranks.device)
    resumes = ranks.decide(lambda: start.goes_on(settings.resume, settings.folder))
    begun = dataclasses.replace(settings, init_from="") if resumes else settings
    state = assemble.fresh_state(begun, ranks, class_names=source.class_names)
    state.model.modality.prepare(state.model, source)
    about = summary.describe(o, settings.optim, t, state, ranks, split, len(source), inputs.flops, source.lengths)
    if (lines := [*ranks.decide(source.remarks), about]) and ranks.is_main:
        print(*lines, sep="\n")
    images = agreement.check(yaml_text.to_dict(settings), source, ranks)
    with Session(settings, ranks, inputs.started, images) as session:  # locks: an earlier start may still save
        start.hash_together(settings.folder, settings.resume, ranks)
        choice = ranks.decide(lambda: start.choose(settings, images))
        sums = checkpoint.resume(choice.path, state, t.global_batch) if choice.path else {}
        health.recall_unreadable(state, source, ranks, choice.path, images)
        if ranks.is_main:
            start.tidy(settings.folder, settings.resume, choice, state.step)
            summary.write_description(session.path, yaml_text.to_dict(settings), ranks, source, state)
            print(choice.said(state.step))
        loop(settings, ranks, state, inputs, session, sums)
    return state


def open_step(state: TrainState, settings: config.Config, ranks: distributed.Ranks, inputs: Inputs) -> TrainStep:
    """The training step, with its losses on the device."""
    losses = inputs.objective.losses
    losses.to(ranks.device)
    if state.execution.compiles:
        losses.compile_parts(compiling.region)
    split = config.batch_split(settings.train, ranks.world_size)
    return TrainStep(state, settings, ranks, split, len(inputs.source), inputs.objective)


def open_batches(
    d: config.DataConfig, seed: int, batch: int, ranks: distributed.Ranks, source: data.Source, images_seen: int
) -> data.Waits:
    """This rank's share of every batch from here on."""
    rank, world = ranks.rank, ranks.world_size
    stream = data.stream(source, seed, images_seen, batch, rank, world, ranks.device, d.workers, d.timeout)
    return data.Waits(stream)


def open_meter(flops: float, batch: int, ranks: distributed.Ranks, state: TrainState, total: int) -> stats.Meter:
    """Counts speed and time to go from here to step ``total``. flops: per sample; batch: samples per step."""
    goal = state.images_seen + (total - state.step) * batch
    return stats.Meter(goal, state.images_seen, flops, peak_flops(ranks.device), ranks.world_size)


def loop(
    settings: config.Config,
    ranks: distributed.Ranks,
    state: TrainState,
    inputs: Inputs,
    session: Session,
    sums: dict[str, float],
) -> None:
    t, device, source, path = settings.train, ranks.device, inputs.source, session.path
    total = start.last_step(settings.train, state, len(source))
    step = open_step(state, settings, ranks, inputs)
    batches = open_batches(settings.data, settings.seed, t.global_batch, ranks, source, state.images_seen)
    means = Means(step.metrics, ranks)
    means.restore(sums)
    log = None
    if ranks.is_main:
        log = stats.Log(path, state.step, stats.open_services(path, t, yaml_text.to_dict(settings)))
    alarms = stats.CollapseAlarm(t.collapse_std), stats.DuelAlarm()
    meter = open_meter(inputs.flops["total"], t.global_batch, ranks, state, total)
    everyone = state.optimizer.sharded  # weights are gathered by all ranks, for rank 0 to draw
    shown = (
        grids.examples(settings.data, settings.model, device) if (everyone or ranks.is_main) and t.image_every else None
    )
    how, scores = (settings.sample, settings.objective.tokenizer_t_max), None
    if inputs.scoring:
        scores = monitor.Monitor(settings, session, inputs.scoring, state, len(source), total, step.objective.losses)
    pictures = functools.partial(grids.save_pictures, path, state, *how, ranks, log)
    traced = profile.Profile(t.profile if ranks.is_main else "", path, device)
    session.begin(state.step)
    if shown is not None and state.step == 0 and state.origin:  # what fine-tuning begins from
        session.guarded("pictures", functools.partial(pictures, shown))
    state.model.train()
    first, scale = state.step + 1, state.best_cfg_scale
    ending = scores(state) if scores else ""  # what a stop left unfinished
    if state.step >= total and state.best_cfg_scale != scale:
        session.save(state, means.sums())  # no step follows with which it would be
    while state.step < total and not ending:
        faults.strike("load", state.step + 1)
        began = time.perf_counter()
        means.add(traced(step, next(batches)))
        if state.execution.compiles and state.step == first and ranks.is_main:
            print(compiling.report(time.perf_counter() - began), flush=True)
        ending = session.boundary(state.step)
        done = state.step == total
        if state.step % t.log_every == 0 or done:
            row = {"step": state.step, "images_seen": state.images_seen} | means.drain()
            row |= meter.rates(state.images_seen)
            row |= {"data_wait": batches.share(), "checkpoint_stall": session.writer.stall()}
            row |= stats.peak_memory(device)
            if log is not None:
                stats.tell(row, total, step.objective.terms, log, alarms, state.model.modality.thing)
            health.check_unreadable(state, source, ranks)
            health.check_skips(t, settings.seed, path, step.skips, source, ranks)
        if t.replica_check_every and state.step % t.replica_check_every == 0:
            health.check_replicas(state, ranks)
        if shown is not None and not ending and (state.step % t.image_every == 0 or done):
            session.guarded("pictures", functools.partial(pictures, shown))
        if scores is not None and not ending:
            with meter.paused():
                ending = scores(state)
        if state.step % t.checkpoint_every == 0 or done or ending:
            health.check_finite(state, ranks)
            health.check_unreadable(state, source, ranks)
            session.save(state, means.sums())
    session.finish_saving(total)
    if log is not None:
        log.close()


def check_round_trip(settings: config.Config, state: TrainState, ranks: distributed.Ranks) -> None:
    """--fast-dev-run: what was saved loads again, equal."""
    path, lines, _ = ranks.decide(lambda: checkpoint.newest(settings.folder / "checkpoints"))
    if path is None:
        raise RunError("; ".join([f"--fast-dev-run left no usable checkpoint in {settings.folder}", *lines]))
    again = assemble.fresh_state(dataclasses.replace(settings, init_from=""), ranks)
    checkpoint.resume(path, again, settings.train.global_batch)
    before, after = state.model.state_dict(), again.model.state_dict()
    if again.step != state.step or any(not torch.equal(local(before[k]), local(after[k])) for k in before):
        raise RuntimeError("the checkpoint does not give back the model that was saved")
    if ranks.is_main:
        print(f"fast dev run: {state.step} steps, pictures and a checkpoint round trip in {settings.folder}")


def main(argv: list[str]) -> int:
    arguments, settings = parse(argv)
    if arguments.print_config:
        compatibility.check(settings.efficiency, settings.train, launcher.world_size())
        print(yaml_text.to_yaml(settings), end="")
        return 0
    if arguments.dry_run:
        if launcher.rank() == 0:
            print(dry_run.dry_run(settings, arguments.mfu, arguments.ranks or 0))
        return 0
    inputs = Inputs.open(settings)
    ranks = distributed.start(settings.device, settings.comm.train_timeout)
    try:
        precision.setup(ranks.device, training=True)
        faults.arm(ranks.rank)
        if arguments.fast_dev_run:
            ranks.decide(lambda: start.clear_dev_folder(settings.folder))
        state = train(settings, ranks, inputs)
        if arguments.fast_dev_run:
            check_round_trip(settings, state, ranks)
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
