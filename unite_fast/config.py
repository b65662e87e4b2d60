"""The configuration of a run as frozen dataclasses. ``config_io`` reads it from YAML and overrides.

A field's default in this file is the only default. Unless its comment says otherwise, it is the value of the published
configuration of UNITE-B. (Each epoch of its schedule was two true ones in the published run: configs/imagenet_b.yaml.)
To add an option, add a field; YAML keys, ``section.key=value`` overrides, types, ``--help`` and error messages follow
from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake that the user can mend. Programs print its one line and exit with code 2."""


class CommonError(UserError):
    """A user's mistake that every rank sees alike, so that rank 0 alone prints it."""


class RunError(Exception):
    """What ends a run although the command was right. Programs print its one line and exit with code 1."""


class Stopped(Exception):
    """A stop was asked for while a long loop ran; raised on all ranks after the same round."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@dataclass(frozen=True)
class EncoderConfig:
    """The Generative Encoder. YAML may name a size instead: small, base, medium, large, xl."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0  # SwiGLU hidden width is int(2/3 * mlp_ratio * width)
    in_context_start: int = 4  # the block before which the class tokens are prepended
    in_context_len: int = 32
    rope: bool = True  # rotary positions; false leaves positions to the learned tables


@dataclass(frozen=True)
class DecoderConfig:
    """The ViT decoder. YAML may name a size instead: small, base, large."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_hidden: int = 3072
    in_features: int = 768  # width between the latent-to-decoder Linear and the decoder's own embedding


ENCODER_SIZES = {
    "small": EncoderConfig(12, 384, 6),
    "base": EncoderConfig(12, 768, 12),
    "medium": EncoderConfig(12, 1024, 16),
    "large": EncoderConfig(24, 1024, 16),
    "xl": EncoderConfig(28, 1152, 16),
}
DECODER_SIZES = {
    "small": DecoderConfig(12, 384, 6, 1536),
    "base": DecoderConfig(12, 768, 12, 3072),
    "large": DecoderConfig(24, 1024, 16, 4096),
}
SIZES: dict[type, dict[str, Any]] = {EncoderConfig: ENCODER_SIZES, DecoderConfig: DECODER_SIZES}


@dataclass(frozen=True)
class ModelConfig:
    image_size: int = 256
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    latent_dim: int = 32
    num_latents: int = 256  # latent register tokens
    time_shift: float | Literal["total", "channels", "tokens"] = 0.5  # a of SPEC 2; a name means sqrt(size / 4096)
    separate_denoiser: bool = False  # ablation: the denoiser gets its own weights
    patch_positions: Literal["zeros", "learned"] = "zeros"  # published: a frozen table of zeros
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    pixel_loss: Literal["l1", "l2"] = "l1"  # mean over images in [0, 1]
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual_trunk: str = ""  # torchvision's VGG16 weights (.pth or .safetensors); required when the weight is > 0
    perceptual_sha256: str = ""  # expected hash of that file; empty means torchvision's published vgg16-397923af.pth
    perceptual_range: Literal["0_1", "-1_1"] = "0_1"  # the official code feeds LPIPS images in [0, 1]
    perceptual_dropout: bool = False  # the official code leaves the heads' dropout active
    tokenizer_t_max: float = 0.01
    noising: Literal["interpolate", "add"] = "interpolate"  # t z + (1-t) eps, or the paper's z + sigma eps
    noising_probability: float = 0.5
    noising_t: tuple[float, float] = (0.7, 1.0)
    noising_sigma: float = 0.7  # for "add"
    flow_steps: int = 3  # flow steps per reconstruction; published B and L checkpoints: 14
    flow_weight: float = 1.0
    flow_loss: Literal["velocity", "x0"] = "velocity"
    flow_reduction: Literal["sum", "mean"] = "sum"  # over flow steps
    flow_time: Literal["logit_normal", "uniform"] = "logit_normal"
    flow_time_mean: float = 0.0
    flow_time_std: float = 1.0
    label_dropout: float = 0.1
    stop_gradient: bool = True  # detach the latents before the flow


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4
    lr_reference_batch: int = 384  # lr is scaled by max(1, global_batch / this); 0 switches the scaling off
    muon: bool = True  # false: AdamW for every tensor
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    newton_schulz_steps: int = 5
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 on GPUs and CPUs with AMX
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip: float = 3.0
    ema_decay: float = 0.9978
    # Further averages kept at once: decays, or std0.05 (power function of that relative width, arXiv 2312.02696).
    # Published: none. Each costs 12 bytes of traffic per weight and step, 0.2 % of a step of UNITE-B, and 4 bytes per
    # weight of memory. One that is added when a run resumes starts from the weights of then.
    ema_extra: tuple[float | str, ...] = ()
    schedule: Literal["two_stage", "cosine", "constant"] = "two_stage"
    warmup_epochs: float = 20.0
    flat_epochs: float = 30.0  # two_stage: constant until here
    decay_epochs: float = 50.0  # two_stage: first cosine ends here; cosine: 0 means the end of training
    mid_lr: float = 5e-5
    second_flat_epochs: float = 3000.0
    second_decay_epochs: float = 380.0  # clamped to come after second_flat_epochs, as published
    final_lr: float = 1e-5
    # micro_batches: as the official code counts, whose 20 epochs last 20 x accumulation true ones (published run: 40)
    epoch_unit: Literal["images", "micro_batches"] = "images"


@dataclass(frozen=True)
class DataConfig:
    source: Literal["digits", "folder", "tar", "packed", "dali", "synthetic"] = "folder"
    path: str = ""  # folder: one sub-folder per class; tar: a folder of .tar; packed: what unite_fast.data.pack wrote
    heldout_path: str = ""  # held-out images of the same kind and classes; needed for evaluation only
    crop: Literal["adm", "fast", "resize_random", "random_resized"] = "adm"  # fast: adm within 3 gray levels
    flip: bool = True
    workers: int = 8  # decoding processes per rank; threads for packed and dali
    timeout: float = 120.0  # seconds to wait for a batch before the run stops with an error
    on_error: Literal["fail", "skip"] = "fail"  # an unreadable image; skip: the next image replaces it, up to 0.1 %


@dataclass(frozen=True)
class SampleConfig:
    solver: Literal["dopri5", "heun", "euler", "ab2", "dpmpp2m", "exp3"] = "heun"
    steps: int = 50
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_order: Literal["norm_first", "cfg_first", "both"] = "norm_first"


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores while training, which never change the run. Epochs are of images; an interval of 0 switches off."""

    fid_epoch: float = 0.0  # between searches for the guidance scale, from the best one so far; published: 40
    sweep_epoch: float = 0.0  # between searches that also try other intervals and cfg_first; published: 120
    rfid_epoch: float = 0.0  # between reconstructions of the held-out images; published: 40
    count: int = 50_000  # generated images per score, a multiple of the classes
    weights: str = "ema"  # ema, model, or another average that the run keeps
    precision: Literal["fp32", "bf16"] = "bf16"  # of the network; the ODE state is fp32
    reference: str = ""  # statistics of the real images, .npz; python -m unite_fast.evaluation.statistics makes it
    extractor: Literal["inception", "digits"] = "inception"  # what looks at the images
    inception: str = ""  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth
    inception_sha256: str = "6726825d"  # first digits of that file's sha256; its published ones


@dataclass(frozen=True)
class TrainConfig:
    global_batch: int = 1024  # images per optimizer step, over all ranks
    micro_batch: int = 64  # images per forward pass on one rank
    strategy: Literal["ddp", "fsdp2", "hsdp"] = "ddp"  # fsdp2: weights, gradients, states sharded over all ranks
    shard_size: int = 0  # hsdp: ranks that hold one copy of the model together; 0: those of one node
    epochs: float = 600.0
    max_steps: int = 0  # when > 0, ends training early
    log_every: int = 20  # optimizer steps
    image_every: int = 2000  # picture grids; 0 switches them off
    checkpoint_every: int = 2000
    keep_last: int = 3  # checkpoints; at least 2, so that a damaged newest one loses little
    keep_every: int = 0  # steps; checkpoints at multiples of this are never removed; 0 keeps none of them
    max_minutes: float = 0.0  # wall time after which the run saves and exits with code 0; 0: no limit
    max_skipped: int = 10  # steps in a row with a gradient that is not finite, then the run stops as diverged
    replica_check_every: int = 0  # steps; compares a checksum of all tensors over ranks; 0 switches it off
    on_oom: Literal["fail", "halve"] = "fail"  # halve: smaller micro-batches, the same global batch
    on_eval_error: Literal["continue", "fail"] = "continue"  # pictures or evaluation that raise
    collapse_std: float = 0.1  # warn when the latents' standard deviation over samples falls below
    tensorboard: bool = False
    wandb: bool = False  # Weights & Biases beside the files of the run folder
    wandb_project: str = "unite-fast"
    wandb_name: str = ""  # empty: the run's name
    wandb_offline: bool = False  # writes into the run folder only; `wandb sync` sends it later


@dataclass(frozen=True)
class EfficiencyConfig:
    """Options that change speed and memory, not results (each rung is held to the eager losses by a test)."""

    # bf16: products in bfloat16, weights and residual float32; fp8: the large products; _te: by Transformer Engine.
    # runtime/precision.py explains the recipes, model/attention.py the backends.
    precision: Literal["fp32", "bf16", "bf16_te", "fp8", "fp8_rowwise", "fp8_te", "fp8_te_delayed"] = "bf16"
    residual: Literal["fp32", "bf16"] = "fp32"  # dtype of the residual stream of the encoder and the decoder
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "fa2", "fa3", "fa4"] = "auto"
    kernels: Literal["eager", "fused"] = "eager"
    flow_mini_batch: int = 1  # flow steps that pass the network as one batch
    shard_muon: bool = True  # several processes: each orthogonalises its share of the matrices
    overlap_gradients: bool = True  # ddp: average gradients during the last backward; not with on_oom=halve, cuda_graph
    compile: Literal["none", "decoder", "all"] = "none"  # all: the encoder's blocks and LPIPS too
    cuda_graph: Literal["none", "flow", "step"] = "none"  # flow: of a mini-batch of flow steps; step: of the whole step
    recompute: Literal["none", "blocks", "auto"] = "none"  # activations in backward; auto: where they do not fit


@dataclass(frozen=True)
class CommConfig:
    train_timeout: float = 600.0  # seconds a rank waits for the others before it gives up


@dataclass(frozen=True)
class Config:
    name: str = "unite"
    seed: int = 0
    run_dir: str = ""  # empty: runs/<name>
    resume: str = "auto"  # auto, never, must, or a checkpoint's path: begins there; later starts go on from their own
    init_from: str = ""  # weights only, from a checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    comm: CommConfig = field(default_factory=CommConfig)


MAY_BE_ZERO = (
    "in_context_start", "in_context_len", "image_every", "max_steps", "collapse_std", "keep_every", "max_minutes",
    "replica_check_every", "shard_size",
)  # fmt: skip


# Sections whose numbers are not negative, but for these; those of NONZERO are above 0, those of FRACTIONS below 1.
SIGNED = ("flow_time_mean", "cfg_interval", "betas")
NONZERO = ("lr", "clip", "eps", "flow_time_std", "newton_schulz_steps", "steps", "timeout", "flow_mini_batch", "count")
FRACTIONS = ("muon_momentum",)


def validate(config: Config) -> None:
    """Checks that span several fields. Raises UserError."""
    m, o, t, s = config.model, config.objective, config.train, config.sample

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for section in (m, m.encoder, m.decoder, t):
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            may_be_zero = f.name in MAY_BE_ZERO
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                require(value > 0 or (may_be_zero and value == 0), f"{f.name} must be positive, got {value}")
    for name in ("objective", "optim", "data", "sample", "evaluation", "efficiency"):
        for f in dataclasses.fields(getattr(config, name)):
            value, key = getattr(getattr(config, name), f.name), f"{name}.{f.name}"
            if isinstance(value, (int, float)) and not isinstance(value, bool) and f.name not in SIGNED:
                least = "more than 0" if f.name in NONZERO else "at least 0"
                require(value > 0 or (value == 0 and f.name not in NONZERO), f"{key} must be {least}, got {value}")
                require(value < 1 or f.name not in FRACTIONS, f"{key} must be below 1, got {value}")
    require(
        all(0 <= b < 1 for b in config.optim.betas), f"optim.betas {list(config.optim.betas)} must be within 0 and 1"
    )
    require(config.seed >= 0, f"seed must be at least 0, got {config.seed}")
    require(m.encoder.width % 2 == 0, f"model.encoder.width {m.encoder.width} must be even (sin-cos positions)")
    require(int(2 / 3 * m.encoder.mlp_ratio * m.encoder.width) >= 1, "model.encoder.mlp_ratio is too small")
    require(m.image_size <= 1 << 16, f"model.image_size {m.image_size} is too large")
    require(s.solver != "dopri5" or s.steps >= 2, "sample.steps must be at least 2 for dopri5")
    require(
        m.image_size % m.patch_size == 0,
        f"model.image_size {m.image_size} is not a multiple of model.patch_size {m.patch_size}",
    )
    for name, part in (("encoder", m.encoder), ("decoder", m.decoder)):
        require(
            part.width % part.heads == 0,
            f"model.{name}.width {part.width} does not divide by model.{name}.heads {part.heads}",
        )
    require(not m.encoder.rope or (m.encoder.width // m.encoder.heads) % 2 == 0, "rotary positions need even head size")
    require(m.decoder.width % 4 == 0, f"model.decoder.width {m.decoder.width} must be a multiple of 4 (2-D sin-cos)")
    require(
        m.encoder.in_context_start < m.encoder.depth,
        f"model.encoder.in_context_start {m.encoder.in_context_start} must be below its depth {m.encoder.depth}",
    )
    require(0 <= s.cfg_interval[0] < s.cfg_interval[1] <= 1, f"sample.cfg_interval {list(s.cfg_interval)} must satisfy "
            "0 <= low < high <= 1")  # fmt: skip
    require(s.steps >= 1, f"sample.steps must be at least 1, got {s.steps}")
    require(0 <= o.noising_t[0] <= o.noising_t[1] <= 1, f"objective.noising_t {list(o.noising_t)} must satisfy "
            "0 <= low <= high <= 1")  # fmt: skip
    for name in ("noising_probability", "label_dropout", "tokenizer_t_max"):
        require(0 <= getattr(o, name) <= 1, f"objective.{name} must be within 0 and 1, got {getattr(o, name)}")
    require(t.keep_last >= 2, f"train.keep_last must be at least 2, got {t.keep_last}: the newest may be damaged")
    require(config.comm.train_timeout > 0, f"comm.train_timeout must be positive, got {config.comm.train_timeout}")
    e = config.efficiency
    require(e.residual == "fp32" or e.precision != "fp32", "efficiency.residual=bf16 needs a precision other than fp32")
    if e.precision.startswith("fp8_te"):
        require(t.micro_batch % 8 == 0, f"efficiency.precision={e.precision} needs train.micro_batch to be a multiple "
                f"of 8, got {t.micro_batch}")  # fmt: skip
    if "_te" in e.precision:
        for key, value in {"recompute": e.recompute, "compile": e.compile}.items():
            require(value == "none", f"efficiency.{key}={value} does not work with efficiency.precision={e.precision}: "
                    "Transformer Engine's layers keep state between passes; use fp8 or bf16, or none")  # fmt: skip
    require(e.flow_mini_batch >= 1, "efficiency.flow_mini_batch must be at least 1")
    require(o.flow_steps >= 0, f"objective.flow_steps must not be negative, got {o.flow_steps}")
    require(0 < config.optim.ema_decay < 1, f"optim.ema_decay must be between 0 and 1, got {config.optim.ema_decay}")
    for entry in config.optim.ema_extra:
        if isinstance(entry, str):
            width = entry.removeprefix("std")
            good = entry.startswith("std") and width.replace(".", "", 1).isdecimal() and 0 < float(width) < 0.288
        else:
            good = 0 < entry < 1
        require(good, f"optim.ema_extra: {entry!r} is neither a decay between 0 and 1 nor std0.01 to std0.28")
    require(len(set(config.optim.ema_extra)) == len(config.optim.ema_extra), "optim.ema_extra: an entry stands twice")
    require(config.optim.lr > 0 and config.optim.clip > 0, "optim.lr and optim.clip must be positive")


def batch_split(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation steps) on each of ``world_size`` ranks. Raises UserError with batches that divide."""
    per_rank, rest = divmod(train.global_batch, world_size)
    if rest or per_rank == 0:
        low = max(1, per_rank) * world_size
        raise UserError(
            f"train.global_batch {train.global_batch} does not divide over {world_size} ranks; "
            f"nearest that do: {low} or {low + world_size}"
        )
    micro = min(train.micro_batch, per_rank)
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - micro))[:2]
        raise UserError(
            f"train.micro_batch {micro} does not divide the {per_rank} images of each rank "
            f"(global_batch {train.global_batch} / {world_size} ranks); nearest that do: "
            + " or ".join(str(d) for d in sorted(near))
        )
    return micro, per_rank // micro
