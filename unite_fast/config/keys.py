"""The configuration of a run as frozen dataclasses. ``yaml_text`` reads it from YAML and overrides.

A field's default in this file is the only default, its text is its line of ``--help``, and ``checks`` checks its
bounds. Unless the text says otherwise, the default is the value of the published run of UNITE-B. To add an option, add
a field; YAML keys, ``section.key=value`` overrides, types, ``--help`` and error messages follow from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from unite_fast.config.adversarial import AdversarialConfig
from unite_fast.config.atoms import AtomDataConfig, AtomLossConfig, AtomsConfig
from unite_fast.config.option import option

# What models are of; what each is made from, which decides the keys and the sources that go with it.
MADE_FROM = {"images": "images", "atoms": "structures"}
ImageSource = Literal["digits", "idx", "folder", "tar", "parquet", "packed", "dali", "synthetic"]
StructureSource = Literal["qm9", "mp20", "crystals", "structures", "joint"]
SOURCES: dict[str, tuple[str, ...]] = {"images": get_args(ImageSource), "structures": get_args(StructureSource)}
OF_IMAGES, OF_STRUCTURES = {"of": "images"}, {"of": "structures"}  # of a section
WITHOUT_FILES = ("digits", "synthetic")  # sources that read none of the user's
WITHOUT_WORKERS = (*WITHOUT_FILES, "idx")  # those whose samples are in memory at once


@dataclass(frozen=True)
class EncoderConfig:
    """The Generative Encoder. YAML may name a size instead: small, base, medium, large, xl."""

    depth: int = option(12, "transformer blocks", above=0, most=1024)
    width: int = option(768, "width of the residual stream", above=0)
    heads: int = option(12, "attention heads", above=0)
    mlp_ratio: float = option(4.0, "the SwiGLU's hidden width is int(2/3 * mlp_ratio * width)", above=0)
    in_context_start: int = option(4, "the block before which the class tokens are prepended")
    in_context_len: int = option(32, "class tokens; 0 leaves the class to the modulation")
    rope: bool = option(True, "rotary positions; false leaves positions to the learned tables")


@dataclass(frozen=True)
class DecoderConfig:
    """The ViT decoder. YAML may name a size instead: small, base, large."""

    depth: int = option(12, "transformer layers", above=0, most=1024)
    width: int = option(768, "width of the residual stream", above=0)
    heads: int = option(12, "attention heads", above=0)
    mlp_hidden: int = option(3072, "hidden width of the MLPs", above=0)
    in_features: int = option(
        768, "width between the latent-to-decoder Linear and the decoder's own embedding", above=0
    )


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
    modality: Literal["images", "atoms"] = option(
        "images", "what the model is of; the next three keys and patch_positions are those of images"
    )
    image_size: int = option(256, "pixels, height and width", above=0, most=1 << 16, of="images")
    patch_size: int = option(16, "pixels of a patch, height and width", above=0, of="images")
    channels: int = option(3, "colour channels of the images", above=0, of="images")
    num_classes: int = option(1000, "classes that labels can name; 0: images without labels")
    latent_dim: int = option(32, "width of a latent", above=0)
    num_latents: int = option(256, "latent register tokens; of atoms the most that a sample has", above=0)
    time_shift: float | Literal["total", "channels", "tokens"] = option(
        0.5, "a of t' = a t / (1 + (a - 1) t); a name takes sqrt(size / 4096) of that size of the latents", above=0
    )
    separate_denoiser: bool = option(False, "ablation: the denoiser gets its own weights")
    patch_positions: Literal["zeros", "learned"] = option(
        "zeros", "positions of the patch tokens; published: frozen zeros", of="images"
    )
    atoms: AtomsConfig = field(default_factory=AtomsConfig, metadata=OF_STRUCTURES)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    atoms: AtomLossConfig = field(default_factory=AtomLossConfig, metadata=OF_STRUCTURES)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig, metadata=OF_IMAGES)
    pixel_loss: Literal["l1", "l2"] = option("l1", "loss on pixels: mean over images in [0, 1]", of="images")
    pixel_weight: float = option(1.0, "weight of the pixel loss", of="images")
    perceptual_weight: float = option(1.0, "weight of LPIPS; 0 leaves it out", of="images")
    perceptual_trunk: str = option(
        "", "file of torchvision's VGG16 weights, .pth or .safetensors; required for LPIPS", path=True, of="images"
    )
    perceptual_sha256: str = option(
        "", "expected hash of that file; empty: of torchvision's vgg16-397923af.pth", of="images"
    )
    perceptual_range: Literal["0_1", "-1_1"] = option(
        "0_1", "range of the images that LPIPS sees; official: 0_1", of="images"
    )
    perceptual_dropout: bool = option(
        False, "dropout in the heads of LPIPS; the official code leaves it active", of="images"
    )
    feature_weight: float = option(
        0.0, "weight of the distance in features of EfficientNet-lite0, which a package ships; no LPIPS", of="images"
    )
    tokenizer_t_max: float = option(0.01, "the times of tokenization are uniform between 0 and this", most=1)
    noising: Literal["interpolate", "add"] = option(
        "interpolate", "noise on the decoder's input: t z + (1 - t) eps, or the paper's z + sigma eps"
    )
    noising_probability: float = option(0.5, "probability that a sample's latents are noised for the decoder", most=1)
    noising_t: tuple[float, float] = option((0.7, 1.0), "noising=interpolate: t is uniform between these", most=1)
    noising_sigma: float = option(0.7, "noising=add: the noise's standard deviation")
    flow_steps: int = option(3, "flow steps per reconstruction; published B and L checkpoints: 14")
    flow_weight: float = option(1.0, "weight of the flow loss")
    flow_loss: Literal["velocity", "x0"] = option(
        "velocity", "loss on velocities, or on the predicted latents as in the paper"
    )
    flow_reduction: Literal["sum", "mean"] = option("sum", "over the flow steps of a reconstruction")
    flow_time: Literal["logit_normal", "uniform"] = option(
        "logit_normal", "law of the flow's times; uniform: the paper's"
    )
    flow_time_mean: float = option(0.0, "flow_time=logit_normal: mean of the normal", least=-math.inf)
    flow_time_std: float = option(1.0, "flow_time=logit_normal: standard deviation of the normal", above=0)
    label_dropout: float = option(0.1, "probability of the null class, per sample and flow step", most=1)
    stop_gradient: bool = option(True, "detach the latents before the flow")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = option(1e-4, "learning rate after the warm-up, before the scaling below", above=0)
    lr_reference_batch: int = option(384, "rates are scaled by max(1, train.global_batch / this); 0: no scaling")
    muon: bool = option(True, "false: AdamW for every tensor")
    frozen: tuple[str, ...] = option((), "parameters that are not trained, by the beginnings of their names: [encoder]")
    muon_momentum: float = option(0.95, "Nesterov momentum of Muon", below=1)
    muon_weight_decay: float = option(0.0, "decoupled weight decay of Muon's matrices")
    newton_schulz_steps: int = option(5, "iterations of Muon's orthogonalisation", above=0)
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 on GPUs and on CPUs with AMX")
    betas: tuple[float, float] = option((0.9, 0.999), "decays of AdamW's two moments", below=1)
    eps: float = option(1e-6, "added to AdamW's denominator", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW's tensors")
    clip: float = option(3.0, "the whole gradient is scaled down to this norm", above=0)
    ema_decay: float = option(0.9978, "decay of the averaged weights (EMA) per step", above=0, below=1)
    ema_warmup: bool = option(False, "a decay that begins low, so that early averages are no noise; published: false")
    # Each costs 12 bytes of traffic per weight and step, 0.2 % of a step of UNITE-B, and 4 bytes per weight of memory.
    # One that is added when a run resumes starts from the weights of then.
    ema_extra: tuple[float | str, ...] = option(
        (),
        "further averages: decays, or std0.05 (power function of that relative width, arXiv 2312.02696)",
        above=0,
        below=1,
    )
    # Published: 40, 60 and 100 true epochs. The paper: 20, 0, 0 and 1e-6, over 240 epochs.
    warmup_epochs: float = option(40.0, "linear warm-up from 0 until here, in true epochs")
    flat_epochs: float = option(60.0, "constant until here; at or before the end of the warm-up: no flat part")
    decay_epochs: float = option(100.0, "cosine from lr to final_lr until here, constant after it; 0: until the end")
    final_lr: float = option(5e-5, "rate after the decay")


@dataclass(frozen=True)
class DataConfig:
    source: Literal[ImageSource, StructureSource] = option("folder", "where images, molecules or crystals come from")
    path: str = option(
        "",
        "folder: one sub-folder per class; tar, parquet: of such files, or t-{000..146}.tar; packed: what data.pack "
        "wrote; idx: MNIST's four files",
        path=True,
    )
    heldout_path: str = option(
        "", "held-out images of the same kind and classes; needed for evaluation only", path=True
    )
    crop: Literal["adm", "fast", "resize_random", "random_resized"] = option(
        "adm", "adm: centre crop; fast: the same within 3 gray levels; the others are random", of="images"
    )
    flip: bool = option(True, "mirror half of the images", of="images")
    workers: int = option(8, "decoding processes per rank; threads for packed and dali")
    timeout: float = option(120.0, "seconds to wait for a batch before the run stops with an error", above=0)
    on_change: Literal["fail", "accept"] = option(
        "fail", "what other labels or class names than those of the checkpoint do to a run that resumes"
    )
    image_column: str = option("", "parquet: the column of images; empty: the only one", of="images")
    label_column: str = option("", "parquet: the column of classes; empty: the only one that can be", of="images")
    alpha: Literal["white", "black", "refuse"] = option(
        "white",
        "what transparent parts of an image are laid on; refuse: such an image is an unreadable one",
        of="images",
    )
    on_error: Literal["fail", "skip"] = option(
        "fail",
        "what an unreadable image does; skip: the next image replaces it, up to 0.1 % of them over ranks and starts",
    )
    atoms: AtomDataConfig = field(default_factory=AtomDataConfig, metadata=OF_STRUCTURES)

    @property
    def reads_files(self) -> bool:
        """Whether the source reads ``path`` or ``heldout_path``."""
        return self.source not in WITHOUT_FILES

    @property
    def has_columns(self) -> bool:
        """Whether the source may be tables."""
        return self.source in ("parquet", "dali")

    @property
    def decodes(self) -> bool:
        """Whether images are decoded from files that may be transparent."""
        return self.source in ("folder", "tar", "parquet", "dali")

    @property
    def has_workers(self) -> bool:
        """Whether processes or threads read files, so that some can be slow or unreadable."""
        return self.source not in WITHOUT_WORKERS


@dataclass(frozen=True)
class SampleConfig:
    solver: Literal["dopri5", "heun", "euler", "ab2", "dpmpp2m", "exp3"] = option(
        "heun", "solver of the probability-flow ODE"
    )
    steps: int = option(50, "steps of a fixed-step solver; dopri5: points of its grid", above=0)
    cfg_scale: float = option(1.0, "classifier-free guidance; 1 is none")
    cfg_interval: tuple[float, float] = option((0.0, 1.0), "times at which guidance acts: low < t < high", most=1)
    cfg_order: Literal["norm_first", "cfg_first", "both"] = option(
        "norm_first", "whether the LayerNorm comes before the guidance, after it, or both"
    )
    # The velocity's floor leaves about 2 % of the noise in the last state, which pixels do not show and bonds do.
    last: Literal["state", "prediction"] = option(
        "state", "what is decoded: the solver's last state, or the latents that the network predicts from it"
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores while training, which never change the run."""

    fid_epoch: float = option(
        0.0, "epochs between searches for the guidance scale, from the best one so far; 0: none; published: 40"
    )
    sweep_epoch: float = option(
        0.0, "epochs between searches that also try other intervals and cfg_first; 0: none; published: 120"
    )
    rfid_epoch: float = option(0.0, "epochs between reconstructions of the held-out images; 0: none; published: 40")
    heldout_epoch: float = option(
        0.0,
        "epochs between scores of held-out samples without other networks: the flow's losses at fixed times; of images "
        "PSNR, L1 and LPIPS (where it is trained with), too; 0: none",
    )
    heldout_count: int = option(1000, "held-out samples that the flow's losses are of, at most", above=0)
    atoms_epoch: float = option(
        0.0, "epochs between scores of samples and reconstructions of molecules and crystals; 0: none"
    )
    scorer: Literal["rdkit", "rdkit_tight"] = option(
        "rdkit", "rule by which bonds of molecules are perceived", of="structures"
    )
    count: int = option(50_000, "generated samples per score; of images a multiple of the classes", above=0)
    weights: str = option("ema", "weights that are scored: ema, model, or another average that the run keeps")
    precision: Literal["fp32", "bf16"] = option(
        "bf16", "of the network while scoring; the ODE state is fp32; published: fp32"
    )
    reference: str = option(
        "",
        "statistics of the real images; python -m unite_fast.evaluation.statistics makes them",
        path=True,
        of="images",
    )
    extractor: Literal["inception", "digits"] = option("inception", "network whose features are compared", of="images")
    inception: str = option(
        "", "file of torch-fidelity's weights-inception-2015-12-05-6726825d.pth", path=True, of="images"
    )
    inception_sha256: str = option("6726825d", "first digits of that file's hash; its published ones", of="images")


@dataclass(frozen=True)
class TrainConfig:
    global_batch: int = option(1024, "images per optimizer step, over all ranks", above=0)
    micro_batch: int = option(64, "images per forward pass on one rank", above=0)
    strategy: Literal["ddp", "fsdp2", "hsdp"] = option(
        "ddp", "fsdp2: weights, gradients, states sharded over all ranks; hsdp: over shard_size of them"
    )
    shard_size: int = option(0, "hsdp: ranks that hold one copy of the model together; 0: those of one node")
    reshard: Literal["step", "pass"] = option(
        "step",
        "fsdp2, hsdp: whole weights and gradients live for a step, or for one pass: less memory, more traffic",
    )
    epochs: float = option(600.0, "true epochs: how often each image is seen", above=0)
    max_steps: int = option(0, "when above 0, ends training early")
    log_every: int = option(20, "optimizer steps between log lines", above=0)
    image_every: int = option(2000, "steps between picture grids; 0 switches them off")
    checkpoint_every: int = option(2000, "steps between checkpoints", above=0)
    keep_last: int = option(3, "newest checkpoints that stay; 2, so that a damaged one loses little", least=2)
    keep_every: int = option(0, "checkpoints at multiples of this step are never removed; 0: none of them")
    max_minutes: float = option(0.0, "wall time after which the run saves and exits with code 0; 0: no limit")
    max_skipped: int = option(10, "steps in a row without a finite gradient that stop the run as diverged", above=0)
    replica_check_every: int = option(
        0, "steps between comparisons of all tensors over ranks by checksums; 0 switches them off"
    )
    on_oom: Literal["fail", "halve"] = option(
        "fail", "out of memory; halve: goes on with smaller micro-batches, the same global batch"
    )
    on_eval_error: Literal["continue", "fail"] = option(
        "continue", "what an error in pictures or scores does to the run"
    )
    collapse_std: float = option(0.1, "warn when the latents' standard deviation over samples falls below")
    profile: str = option("", "steps to trace with torch's profiler, as 10-12: trace, table by part, memory")
    tensorboard: bool = option(False, "TensorBoard, beside the files of the run folder")
    wandb: bool = option(False, "Weights & Biases, beside the files of the run folder")
    wandb_project: str = option("unite-fast", "the run's project there")
    wandb_name: str = option("", "the run's name there; empty: name")
    wandb_offline: bool = option(False, "wandb writes into the run folder only; `wandb sync` sends it later")


@dataclass(frozen=True)
class EfficiencyConfig:
    """Options that change speed and memory, not results (each rung is held to the eager losses by a test)."""

    # efficiency/precision.py explains the recipes, layers/attention.py the backends.
    precision: Literal["fp32", "bf16", "bf16_te", "fp8", "fp8_rowwise", "fp8_te", "fp8_te_delayed"] = option(
        "bf16", "of the matrix products, the weights stay fp32; fp8: of the large ones; _te: by Transformer Engine"
    )
    residual: Literal["fp32", "bf16"] = option("fp32", "dtype of the residual stream of the encoder and the decoder")
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "fa2", "fa3", "fa4", "products"] = option(
        "auto",
        "attention backend; auto: cudnn or flash where a table names them, products on CPUs with AMX, else sdpa",
    )
    kernels: Literal["eager", "fused", "auto"] = option(
        "eager", "fused: Triton's on GPUs, C++ on CPUs and for the optimizer; auto: fused where that is installed"
    )
    flow_mini_batch: int = option(1, "flow steps that pass the network as one batch", above=0)
    shard_muon: bool = option(True, "several processes: each orthogonalises its share of the matrices")
    overlap_gradients: bool = option(
        True, "ddp: average gradients during the last backward; not with train.on_oom=halve or where it is captured"
    )
    compile: Literal["none", "decoder", "all"] = option(
        "none", "torch.compile, of LPIPS, too, where its kernels are torch's own; all: the encoder's blocks as well"
    )
    cuda_graph: Literal["none", "flow", "step", "accumulation"] = option(
        "none",
        "CUDA graph of a mini-batch of flow steps, or of the whole step; accumulation: of all micro-batches of a step "
        "but the last, during which gradients are averaged",
    )
    recompute: Literal["none", "blocks", "auto"] = option(
        "none", "compute activations again in backward; auto: where they do not fit"
    )


@dataclass(frozen=True)
class CommConfig:
    train_timeout: float = option(600.0, "seconds a rank waits for the others before it gives up", above=0)


@dataclass(frozen=True)
class Config:
    name: str = option("unite", "the run's name")
    seed: int = option(0, "of the first weights, the order of samples and every draw")
    run_dir: str = option("", "the run's folder; empty: runs/<name>", path=True)
    resume: str = option(
        "auto",
        "auto, never, must, or a checkpoint's path: the run begins there, later starts go on from its own",
        path=True,
    )
    init_from: str = option(
        "", "checkpoint, of this model or another, from which a new run takes its weights alone", path=True
    )
    init_strict: bool = option(
        False,
        "init_from: refuse weights that do not fit as a whole; false: take what fits, adapt classes and positions",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one")
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    comm: CommConfig = field(default_factory=CommConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir or f"runs/{self.name}")
