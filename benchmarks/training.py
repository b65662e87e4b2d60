"""Our training step as something to be timed: made once on its device, its passes and its update apart.

A step of U images in micro-batches of B takes U / B times the passes (forward and backward of one micro-batch, its
gradients added to those that are there) and once the update (clip, Muon, AdamW, EMA). Timed apart they compose to any
U: at 128 images the update weighs eight times as much as at 1,024.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import ROOT, quantiles
from official import wake
from torch import Tensor, nn

from unite_fast.base.errors import RunError
from unite_fast.config import Config, ModelConfig, yaml_text
from unite_fast.data import Batch, batch_of_images
from unite_fast.efficiency import compatibility, compiling, graph
from unite_fast.modality.images import IMAGENET, ImageLosses
from unite_fast.modality.lpips import Perceptual
from unite_fast.model.unite import UNITE
from unite_fast.objective import Objective
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.step import TrainStep

GIB = 2**30
MODELS = {
    "b": "imagenet_b.yaml", "l": "imagenet_l.yaml", "xl": "imagenet_xl.yaml", "digits": "digits.yaml",
}  # fmt: skip
# Eager is eager: what the configurations switch on is taken off first.
PLAIN = {"kernels": "eager", "compile": "none", "cuda_graph": "none", "recompute": "none", "flow_mini_batch": "1"}
FIXED = ("data.source=synthetic", "data.flip=false", "optim.warmup_epochs=1", "optim.flat_epochs=1e9")
TINY = (
    "model.image_size=32", "model.patch_size=8", "model.num_latents=16", "model.latent_dim=8", "model.num_classes=10",
    "model.encoder={depth: 3, width: 64, heads: 4, in_context_start: 1, in_context_len: 4}",
    "model.decoder={depth: 2, width: 64, heads: 4, mlp_hidden: 128, in_features: 64}", "objective.perceptual_weight=0",
)  # fmt: skip


def configuration(model: str, flow_steps: int, batch: int, device: torch.device, overrides: tuple[str, ...]) -> Config:
    """Of ``model`` (a key of MODELS, or "tiny"), eager unless ``overrides`` say more.

    Raises UserError where an option is unknown or does not go with others.
    """
    tiny = model == "tiny"
    path = ROOT / "configs" / ("imagenet_b.yaml" if tiny else MODELS[model])
    plain = [f"efficiency.{key}={value}" for key, value in PLAIN.items()]
    sizes = (f"objective.flow_steps={flow_steps}", f"train.global_batch={batch}", f"train.micro_batch={batch}",
             f"efficiency.precision={'fp32' if device.type == 'cpu' else 'bf16'}")  # fmt: skip
    return yaml_text.load(path, [*(TINY if tiny else ()), *plain, *FIXED, *sizes, *overrides])


class Origin:
    """The weights that every variant begins with: one model and, where it is wanted, one VGG16, made on the device."""

    def __init__(
        self, model: ModelConfig, device: torch.device, perceptual: bool, weights: dict[str, Tensor] | None = None
    ) -> None:
        self.device = device
        torch.manual_seed(0)
        # Awake, for else the losses say nothing of the blocks.
        self.weights = wake(on(device, UNITE, model)).state_dict() if weights is None else weights
        self.perceptual = on(device, Perceptual, None) if perceptual else None

    def model(self, config: ModelConfig) -> UNITE:
        """A new model with these weights. (A copy would not know which of its parameters are AdamW's.)"""
        model = on(self.device, UNITE, config)
        model.load_state_dict(self.weights)
        return model

    def lpips(self, backend: str, compiled: bool | None) -> Perceptual | None:
        """compiled: None leaves the trunk to the backend; else it is the package's, compiled or as it is."""
        if self.perceptual is None:
            return None
        module = copy.deepcopy(self.perceptual)
        module.backend = backend
        if compiled:
            module.compile_trunk(compiling.region)
        elif compiled is not None:
            module.compiled = nn.Module.__call__
        return module


def on(device: torch.device, make: Callable[..., Any], *arguments: Any) -> Any:
    """A module made on the device: on a GPU a second, where drawing its weights on the CPU takes several."""
    with torch.device(device):
        return make(*arguments).to(device)


class OurStep:
    """A copy of ``origin`` with its optimizer, ready to step over one micro-batch.

    compile_lpips: None does as train.py; else LPIPS' trunk is the package's, compiled or not. Raises UserError where
    the configuration cannot run here.
    """

    def __init__(
        self, config: Config, origin: Origin, batch: Batch | None = None, compile_lpips: bool | None = None
    ) -> None:
        compatibility.check_device(config.efficiency, config.train, config.objective, origin.device)
        self.config, self.device = config, origin.device
        ranks = Ranks(0, 1, origin.device)
        self.state = assemble.fresh_state(config, ranks, origin.model(config.model))
        self.state.model.train()
        e = config.efficiency
        lpips = None
        if config.objective.perceptual_weight > 0:
            lpips = origin.lpips(e.kernels, compile_lpips)
            if lpips is not None:
                lpips.input_range = config.objective.perceptual_range
        losses = ImageLosses(config.objective, lpips)
        if compile_lpips is None and e.compile != "none":
            losses.compile_parts(compiling.region)
        objective = Objective(config.objective, losses, e.kernels, e.flow_mini_batch)
        self.step = TrainStep(self.state, config, ranks, (config.train.micro_batch, 1), IMAGENET, objective)
        self.batch = batch or images_like(config, origin.device)
        self.losses: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor | None] = {}

    def passes(self) -> dict[str, Tensor]:
        """Forward and backward of the batch; the losses. Gradients are added to those of earlier calls.

        With graphs they are zeroed first, which a step does once for all its micro-batches: counted against us.
        """
        try:
            self.losses = self.step.within_memory(self.batch, 1)
        except RunError as error:  # a run would be told to end; a benchmark takes a smaller batch
            raise (torch.OutOfMemoryError(str(error)) if "out of memory" in str(error) else error) from None
        self.gradients = {name: p.grad for name, p in self.state.optimizer.parameters.items()}
        return self.losses

    def fresh_passes(self) -> dict[str, Tensor]:
        """As ``passes``, from no gradients."""
        if self.step.graphs is None:
            for parameter in self.state.optimizer.parameters.values():
                parameter.grad = None
        return self.passes()

    def update(self) -> dict[str, Tensor]:
        """Clip, Muon, AdamW and EMA from the gradients of the last ``passes``, which stay."""
        for name, parameter in self.state.optimizer.parameters.items():
            parameter.grad = self.gradients[name]
        lr, position = self.step.scalars()
        update = self.step.update if self.step.graphs is None else self.step.graphs.update
        metrics = update(lr, position, self.losses)
        for name, parameter in self.state.optimizer.parameters.items():
            parameter.grad = self.gradients[name]
        return metrics

    def warm_up(self) -> float:
        """Compiles, chooses algorithms, captures; the first step's loss. Nothing of it is left to a timed call."""
        first = float(self.fresh_passes()["total"])
        self.update()
        for _ in range(graph.WARM_UP + 1 if self.step.graphs is not None else 2):
            self.passes()
            self.update()
        synchronize(self.device)
        return first

    def whole(self) -> dict[str, Tensor]:
        """One optimizer step over this micro-batch alone."""
        return self.step(self.batch)


def images_like(config: Config, device: torch.device) -> Batch:
    """One micro-batch of random uint8 images with labels."""
    n, m = config.train.micro_batch, config.model
    generator = torch.Generator(device).manual_seed(0)
    shape = (n, m.channels, m.image_size, m.image_size)
    images = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    samples = torch.arange(n, device=device)
    return batch_of_images(images, samples * 37 % m.num_classes, samples)


def composed(passes_ms: float, update_ms: float, batch: int, images: int) -> float:
    """Images/s of steps of ``images`` in micro-batches of ``batch``."""
    return images * 1e3 / (images / batch * passes_ms + update_ms)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives the memory of variants that are gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """A function that says how many GiB more than at the beginning were taken at most; None on a CPU."""
    if device.type != "cuda":
        yield lambda: None
        return
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: (torch.cuda.max_memory_allocated(device) - base) / GIB


def median(times: list[float]) -> float:
    return quantiles(times)["median"]
