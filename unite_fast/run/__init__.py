"""A run's folder and what is done before, around and after its training loop.

runs/<name>/   config.resolved.yaml  provenance.json  status.json  run.lock  metrics.csv  metrics.jsonl
               samples/step_*.png    checkpoints/step-*/   logs/rank_*.log    began_from.txt
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast import __version__, checkpoint, data, interop, sampling
from unite_fast.base import faults
from unite_fast.base.errors import RunError, UserError
from unite_fast.checkpoint import saving
from unite_fast.config import Config
from unite_fast.config.yaml_text import to_dict, to_yaml
from unite_fast.efficiency import compiling, graph, precision
from unite_fast.modality import pictures
from unite_fast.model import attention
from unite_fast.model.decoder import DecoderLayer
from unite_fast.model.encoder import Block
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import FORWARDS, UNITE, build
from unite_fast.optim.optimizer import Optimizer
from unite_fast.parallel import overlap, sharding
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import copies_group, local
from unite_fast.plan import memory
from unite_fast.run.session import Diverged, folder
from unite_fast.training.guards import SkipCounter, first_difference, first_nonfinite
from unite_fast.training.state import TrainState, tensors_of
from unite_fast.training.step import sampling_model
from unite_kernels import backend

GRID_COLUMNS = 8
BEGAN_FROM = "began_from.txt"  # in the run folder: the checkpoint from which resume=PATH began this run


def provenance(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What is needed to repeat the run: code, versions, device. No paths, no environment."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parents[1]
        try:
            result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        except OSError:  # no git in this image
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.machine()
    return {
        "unite_fast": __version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device,
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_description(config: Config, ranks: Ranks, source: data.Source) -> None:
    """Writes into the run folder what the run is. Raises UserError when the disk refuses."""
    path = folder(config)
    try:
        (path / "config.resolved.yaml").write_text(to_yaml(config))
        described = provenance(config, ranks) | {"pipeline": source.pipeline_id(ranks.device.type)}
        (path / "provenance.json").write_text(json.dumps(described, indent=1))
    except OSError as error:
        raise UserError(f"run folder {path}: {error.strerror}; choose another with run_dir=PATH") from None


def check_paths(config: Config) -> None:
    """What can be wrong with the checkpoints that the command names, before any rank waits for another."""
    path = folder(config)
    if _is_named(config) and not _began_there(config):
        checkpoint.locate(config.resume, quiet=True)
    if config.resume == "must" and not any((path / "checkpoints").glob("step-*")):
        raise UserError(f"resume=must, but {path} has no usable checkpoint")
    if config.init_from:
        checkpoint.locate(config.init_from, quiet=True)


def check_kernels(config: Config, device: torch.device) -> None:
    """Whether ``efficiency.kernels`` can train on ``device``, before the first step asks for it. Raises UserError."""
    kernels = config.efficiency.kernels
    if why := backend.obstacle(kernels, device, update=True):
        raise UserError(f"efficiency.kernels={kernels}: {why}; or set efficiency.kernels=eager")


def fresh_state(config: Config, ranks: Ranks, model: UNITE | None = None) -> TrainState:
    """A new model (the same on every rank) with its optimizer, on the device; weights from ``init_from`` if given.

    model: taken instead of a new one; on the meta device the state takes no memory.
    """
    model = model or build(config.model, config.seed, ranks.device)
    if config.init_from:
        weights, saved = checkpoint.load_weights(config.init_from, "ema")
        if saved is not None:
            checkpoint.check_same_model(to_dict(saved), config, config.init_from)
        interop.load_weights(model, weights, config.init_from)
    recompute = memory.recompute(config, ranks).blocks
    model.use_kernels(config.efficiency.kernels)
    for encoder in model.encoders():
        encoder.recompute = recompute
    model.decoder.recompute = recompute
    if config.efficiency.compile != "none":
        model.decoder.run_layer = compiling.region(DecoderLayer.forward)
    if config.efficiency.compile == "all":
        block = compiling.region(Block.forward)
        for encoder in model.encoders():
            encoder.run_block = block
    sharded = config.train.strategy != "ddp" and ranks.world_size > 1
    recipe = precision.apply(model, config.efficiency, ranks.device, sharded)
    half = config.efficiency.precision != "fp32"
    attention.use(model, attention.resolve(config.efficiency.attention, config.model, ranks.device, half))
    sharding.apply(model, model.shard_units(), FORWARDS, config, ranks)
    group = dist.group.WORLD if config.efficiency.shard_muon and ranks.world_size > 1 else None
    return TrainState(model, Optimizer(model, config.optim, config.efficiency.kernels, group), recipe=recipe)


class Choice(NamedTuple):
    """The checkpoint from which a run begins or goes on, and why."""

    path: Path | None
    why: str
    lines: list[str]  # one for each newer checkpoint that is damaged, and for each setting that changed
    rejected: list[Path]  # those
    begins: bool = True  # false: goes on from the run's own checkpoints

    def said(self, step: int) -> str:
        """What is printed, once the checkpoint's step is known."""
        chosen = f"resuming from {self.path} at step {step}: {self.why}" if self.path else f"starting fresh: {self.why}"
        return "\n".join([*self.lines, chosen])


def _is_named(config: Config) -> bool:
    return config.resume not in ("auto", "must", "never")


def _began_there(config: Config) -> bool:
    """Whether the run in this folder began from the checkpoint that ``resume=PATH`` names."""
    try:
        return (folder(config) / BEGAN_FROM).read_text().strip() == str(Path(config.resume).absolute())
    except OSError:
        return False


def choose(config: Config) -> Choice:
    """Applies ``resume=auto|never|must|PATH``. Raises UserError."""
    path = folder(config)
    if config.resume == "never":
        if any((path / "checkpoints").glob("step-*")):
            raise UserError(f"resume=never, but {path} already holds checkpoints; choose another name or run_dir")
        return Choice(None, "resume=never", [], [])
    found, lines, rejected = checkpoint.newest(path / "checkpoints")
    why = "the newest that verifies"
    if _is_named(config):
        if found is None or not _began_there(config):
            return _choose_named(config, Choice(found, "", lines, rejected))
        why += f" of the run that began from {config.resume}"
    if found is None:
        if config.resume == "must":
            detail = f" ({lines[0]})" if lines else ""
            raise UserError(f"resume=must, but {path} has no usable checkpoint{detail}")
        return Choice(None, f"no usable checkpoint in {path}", lines, rejected)
    return Choice(found, why, lines + checkpoint.changes(found, config), rejected, begins=False)


def _choose_named(config: Config, own: Choice) -> Choice:
    """The PATH of ``resume=PATH``: for a run that has no checkpoint, or one of its own, to go back. Raises UserError.

    own: the newest checkpoint of the run.
    """
    named = checkpoint.locate(config.resume)
    if own.path is not None and named.resolve().parent != own.path.resolve().parent:
        raise UserError(
            f"resume={config.resume}, but {folder(config)} holds checkpoints of a run that did not begin from there; "
            "choose another name or run_dir, or go on with resume=auto"
        )
    return Choice(named, "it was named", own.lines + checkpoint.changes(named, config), own.rejected)


def tidy(config: Config, choice: Choice, step: int) -> None:
    """Removes unfinished saves; renames damaged checkpoints to step-N.damaged and those newer than ``step``, from which
    the run goes on, to step-N.abandoned; notes from where a run begins. For the holder of the lock."""
    checkpoints = folder(config) / "checkpoints"
    saving.clean(checkpoints)
    newer = [p for p in checkpoint.newest_first(checkpoints) if (checkpoint.step_of(p) or 0) > step]
    for path in newer:
        _put_aside(path, "damaged" if path in choice.rejected else "abandoned")
    # Last: if this process ends before it, the same start does all of it again.
    if choice.begins:
        note = folder(config) / BEGAN_FROM
        try:
            note.unlink(missing_ok=True)
            if choice.path is not None:
                note.write_text(f"{Path(config.resume).absolute()}\n")
        except OSError as error:
            raise UserError(f"{note}: {error.strerror}; choose another folder with run_dir=PATH") from None


def _put_aside(path: Path, why: str) -> None:
    """Renames a checkpoint to step-N.WHY, or step-N.WHY-2 and so on where earlier starts have left some."""
    aside = path.with_name(f"{path.name}.{why}")
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.{why}-{number}")
    path.rename(aside)


def clear_dev_folder(path: Path) -> None:
    """Removes what an earlier --fast-dev-run left; anything else in its place is a UserError."""
    if path.exists() and any(path.iterdir()) and not (path / "config.resolved.yaml").is_file():
        raise UserError(f"--fast-dev-run writes to {path}, which holds something else; choose another run_dir")
    shutil.rmtree(path, ignore_errors=True)


def last_step(config: Config, state: TrainState, images_per_epoch: int) -> int:
    """The number of the run's last step: whole batches until ``epochs`` of images are seen, or ``max_steps``."""
    t = config.train
    total = state.step + max(0, int(t.epochs * images_per_epoch) - state.images_seen) // t.global_batch
    return min(total, t.max_steps or total)


def examples(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images in [0, 1] and labels of the grids: one of each of the first classes, held out where there are any."""
    held_out = config.data.source == "digits" or config.data.heldout_path
    source = data.open_source(config.data, config.model, "heldout" if held_out else "train")
    labels = torch.arange(GRID_COLUMNS) % source.num_classes
    occurrence = torch.arange(GRID_COLUMNS) // source.num_classes
    indices = []
    for label, number in zip(labels.tolist(), occurrence.tolist(), strict=True):
        members = (source.labels == label).nonzero()[:, 0]
        indices.append(int(members[number % len(members)]))
    images = torch.stack([source.load(i) for i in indices])
    return data.to_float(images.to(device)), labels.to(device)


@torch.no_grad()
def save_pictures(
    path: Path, state: TrainState, config: Config, ranks: Ranks, images: Tensor, labels: Tensor, steps: int = 0
) -> None:
    """samples/step_N.png, four rows: real | reconstruction | EMA samples | raw samples, with fixed noise and labels.

    images (B, Q, S, S) in [0, 1] and labels (B,) are shown; the samples have the same labels. A sharded model needs
    all ranks; rank 0 writes.
    """
    model, s = state.model, config.sample
    model.eval()
    faults.strike("eval", state.step)
    seeds = range(len(labels))
    options: dict[str, Any] = {"solver": s.solver, "steps": steps or s.steps, "cfg_scale": s.cfg_scale, "seeds": seeds}
    options |= {"cfg_interval": s.cfg_interval, "cfg_order": s.cfg_order}
    try:
        raw = sampling.sample(model, labels, **options)
        restore = sampling_model(state)
        try:
            reconstruction = model.decode(model.tokenize(images))
            averaged = sampling.sample(model, labels, **options)
        finally:
            restore()
    finally:
        model.train()
    if ranks.is_main:
        pictures.save_grid(path / "samples" / f"step_{state.step:07d}.png", [images, reconstruction, averaged, raw])


def bad_batches(config: Config, source: data.Source, positions: list[int], path: Path) -> None:
    """Writes bad_batches.json: which samples were in the skipped steps that began at ``positions``."""
    order, n = data.Order(len(source), config.seed), config.train.global_batch
    rows = [
        {"step": p // n + 1, "first_position": p, "images": n, "samples": order.indices(p, p + n).tolist()}
        for p in positions
    ]
    (path / "bad_batches.json").write_text(json.dumps(rows))


def check_skips(config: Config, skips: SkipCounter, source: data.Source, ranks: Ranks) -> None:
    """With the log line, on all ranks: raises Diverged after train.max_skipped skipped steps in a row."""
    t = config.train
    longest, positions = skips.drain()
    if longest >= t.max_skipped:
        if ranks.is_main:
            bad_batches(config, source, positions, folder(config))
        raise Diverged(
            f"the gradient was not finite in {longest} steps in a row (train.max_skipped={t.max_skipped}); the batches "
            "are in bad_batches.json, the last checkpoint is from before; lower optim.lr or look at those images"
        )


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


def strategy_line(config: Config, ranks: Ranks) -> str:
    """How the ranks share the model and the work, as resolved."""
    t, e, world = config.train, config.efficiency, ranks.world_size
    if world == 1:
        return "one process"
    if t.strategy == "ddp":
        parts = f"divided over {world} ranks" if e.shard_muon else "whole on every rank"
        return f"ddp, gradients averaged {'during' if overlap.wanted(config) else 'after'} the backward, Muon {parts}"
    size = sharding.shard_size(config, world)
    return f"{t.strategy}, {world // size} x {size} shards, Muon divided over {size} ranks"


def describe(config: Config, state: TrainState, ranks: Ranks, split: tuple[int, int], images: int) -> str:
    """Sizes, FLOPs, batch split, memory and length of a run: its first lines, and those of ``--dry-run``."""
    model, t, o, e = state.model, config.train, config.objective, config.efficiency
    count = model.trainable_parameters()
    parts = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        "patch embedding": model.patch_embed,
    }
    sizes = ", ".join(f"{n} {sum(p.numel() for p in m.parameters() if p.requires_grad):,}" for n, m in parts.items())
    flops = training_flops(config.model, o.flow_steps, o.perceptual_weight > 0)
    executed = training_flops(config.model, o.flow_steps, o.perceptual_weight > 0, pruned=True)["total"]
    by_part = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in flops.items())
    moments = len(state.optimizer.muon)
    orthogonal = str(state.optimizer.newton_schulz_dtype(ranks.device)).removeprefix("torch.")
    stay = memory.persistent_parts(config, ranks.world_size)
    kept = ", ".join(f"{name} {memory.amount(size)}" for name, size in stay.items())
    recompute = memory.recompute(config, ranks)
    total = last_step(config, state, images)
    unfused = e.precision in precision.SCALED and e.compile != "all" and ranks.device.type == "cuda"
    compiled = f"{e.compile} (every cast to float8 is a pass of its own; all fuses them)" if unfused else e.compile
    return "\n".join(
        (
            f"parameters     {count:,} trainable ({sizes}, ...)",
            f"optimizers     Muon {moments} tensors (Newton-Schulz in {orthogonal}), "
            f"AdamW {len(state.optimizer.adamw)} tensors",
            f"FLOPs/image    {by_part} GFLOP (forward and backward, N = {o.flow_steps}; MFU counts these)",
            f"executed       {executed / 1e9:.4g} GFLOP/image: the encoder's last block computes the registers alone",
            f"batch          {t.global_batch} = {ranks.world_size} ranks x {split[1]} accumulation x {split[0]}",
            f"memory         {memory.amount(sum(stay.values()))} per rank that stay: {kept}",
            f"recompute      {'blocks' if recompute.blocks else 'none'} ({recompute.reason})",
            f"length         {images:,} images/epoch, {t.epochs:g} epochs, {total:,} steps",
            f"device         {ranks.device}, precision {state.recipe}, attention {attention.describe(model)}, "
            f"kernels {e.kernels}, compile {compiled}, CUDA graph {graph.describe(e.cuda_graph, ranks.world_size)}",
            f"strategy       {strategy_line(config, ranks)}",
        )
    )
