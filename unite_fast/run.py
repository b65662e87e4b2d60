"""A run's folder and what is done before, around and after its training loop.

runs/<name>/   config.resolved.yaml  provenance.json  status.json  metrics.csv  metrics.jsonl
               samples/step_*.png    checkpoints/step-*/
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast import __version__, checkpoint, data, interop, pictures, sampling
from unite_fast.checkpoint import TrainState
from unite_fast.config import Config, UserError
from unite_fast.config_io import to_yaml
from unite_fast.model.unite import build
from unite_fast.optim.optimizer import Optimizer
from unite_fast.runtime.distributed import Ranks
from unite_fast.runtime.flops import training_flops
from unite_fast.step import sampling_model

GRID_COLUMNS = 8


def folder(config: Config) -> Path:
    return Path(config.run_dir or f"runs/{config.name}")


def provenance(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What is needed to repeat the run: code, versions, device. No paths, no environment."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
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


def prepare(config: Config, ranks: Ranks) -> Path:
    """Creates the run folder and writes what the run is. Raises UserError when it cannot be written."""
    path = folder(config)
    try:
        if ranks.is_main:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "config.resolved.yaml").write_text(to_yaml(config))
            (path / "provenance.json").write_text(json.dumps(provenance(config, ranks), indent=1))
    except OSError as error:
        raise UserError(f"run folder {path}: {error.strerror}; choose another with run_dir=PATH") from None
    ranks.barrier()
    return path


def status(path: Path, ranks: Ranks, state: str, step: int, reason: str = "") -> None:
    """Writes status.json, for schedulers and people."""
    if ranks.is_main:
        content = {"state": state, "reason": reason, "step": step, "time": time.time()}
        temporary = path / "status.json.tmp"
        temporary.write_text(json.dumps(content))
        temporary.replace(path / "status.json")


def fresh_state(config: Config, ranks: Ranks) -> TrainState:
    """A new model (the same on every rank) with its optimizer, on the device; weights from ``init_from`` if given."""
    model = build(config.model, config.seed, ranks.device)
    if config.init_from:
        weights, _ = checkpoint.load_weights(config.init_from, "ema")
        interop.load_weights(model, weights, config.init_from)
    for part in (model.encoder, getattr(model, "denoiser", None)):
        if part is not None:
            part.checkpoint_blocks = config.efficiency.checkpoint_blocks
            part.backend = config.efficiency.kernels
    if config.efficiency.compile_decoder:
        model.decoder.compile()
    return TrainState(model, Optimizer(model, config.optim, config.efficiency.kernels))


def resume(config: Config, state: TrainState, path: Path) -> tuple[dict[str, float], list[str]]:
    """Applies ``resume=auto|never|must|PATH``. Returns (running sums of the log line, what was chosen)."""
    if config.resume == "never":
        if any((path / "checkpoints").glob("step-*")):
            raise UserError(f"resume=never, but {path} already holds checkpoints; choose another name or run_dir")
        return {}, ["starting fresh: resume=never"]
    if config.resume not in ("auto", "must"):
        chosen = checkpoint.locate(config.resume)
        return checkpoint.resume(chosen, state, config), [f"resuming from {chosen} at step {state.step}: it was named"]
    found, lines = checkpoint.newest(path / "checkpoints")
    if found is None:
        if config.resume == "must":
            detail = f" ({lines[0]})" if lines else ""
            raise UserError(f"resume=must, but {path} has no usable checkpoint{detail}")
        return {}, [*lines, f"starting fresh: no usable checkpoint in {path}"]
    means = checkpoint.resume(found, state, config)
    return means, [*lines, f"resuming from {found} at step {state.step}: the newest that verifies"]


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
    path: Path, state: TrainState, config: Config, images: Tensor, labels: Tensor, steps: int = 0
) -> None:
    """samples/step_N.png, four rows: real | reconstruction | EMA samples | raw samples, with fixed noise and labels.

    images (B, Q, S, S) in [0, 1] and labels (B,) are shown; the samples have the same labels.
    """
    model, s = state.model, config.sample
    model.eval()
    seeds = range(len(labels))
    options: dict[str, Any] = {"solver": s.solver, "steps": steps or s.steps, "cfg_scale": s.cfg_scale, "seeds": seeds}
    options |= {"cfg_interval": s.cfg_interval, "cfg_order": s.cfg_order}
    raw = sampling.sample(model, labels, **options)
    restore = sampling_model(state)
    try:
        reconstruction = model.decode(model.tokenize(images))
        averaged = sampling.sample(model, labels, **options)
    finally:
        restore()
    model.train()
    pictures.save_grid(path / "samples" / f"step_{state.step:07d}.png", [images, reconstruction, averaged, raw])


def describe(config: Config, state: TrainState, ranks: Ranks, split: tuple[int, int], images: int) -> str:
    """What ``--dry-run`` prints: sizes, FLOPs, batch split, memory, length."""
    model, t, o, e = state.model, config.train, config.objective, config.efficiency
    count = model.trainable_parameters()
    parts = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        "patch embedding": model.patch_embed,
    }
    sizes = ", ".join(f"{n} {sum(p.numel() for p in m.parameters() if p.requires_grad):,}" for n, m in parts.items())
    flops = training_flops(config.model, o.flow_steps, o.perceptual_weight > 0)
    by_part = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in flops.items())
    moments = len(state.optimizer.muon)
    persistent = sum(x.numel() for x in state.optimizer.state_dict().values()) + 3 * count  # weights, gradients, EMA
    total = int(t.epochs * images) // t.global_batch
    return "\n".join(
        (
            f"parameters     {count:,} trainable ({sizes}, ...)",
            f"optimizers     Muon {moments} tensors, AdamW {len(state.optimizer.adamw)} tensors",
            f"FLOPs/image    {by_part} GFLOP (forward and backward, N = {o.flow_steps})",
            f"batch          {t.global_batch} = {ranks.world_size} ranks x {split[1]} accumulation x {split[0]}",
            f"memory         {persistent * 4 / 2**30:.2f} GiB per rank before activations",
            f"length         {images:,} images/epoch, {t.epochs:g} epochs, {min(total, t.max_steps or total):,} steps",
            f"device         {ranks.device}, precision {e.precision}, kernels {e.kernels}",
        )
    )
