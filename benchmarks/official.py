"""A clone of the official UNITE code as something that a benchmark can run: loaded as it is, never changed.

The clone's own modules are imported from its folder. What is replaced is what a benchmark must control: the download
of LPIPS weights (random ones, unless a VGG16 file is given), and, for the comparison of losses alone, its draws.
It runs with all that its main_train.py and its YAML switch on (cudnn.benchmark, TF32, the compiled decoder), and
without DDP, which one process does not need. FORMS:

    official    as published
    compiled    as an expert would run it: its encoder compiled as well, at fixed sizes, and LPIPS in channels_last
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from unite_fast.objective import Draws

CONFIG = Path("configs/imagenet.yaml")
FORMS = ("official", "compiled")
# Sizes of a rehearsal, in the places of Base: depth, width, heads; depth, width, heads, hidden width.
TOY = {"ENCODER_CONFIGS": {"Base": (2, 64, 2)}, "DECODER_CONFIGS": {"Base": (1, 64, 1, 128)}}


class Official:
    """The official model, optimizers and step at Base/Base with ``flow_steps`` flow steps.

    folder: the clone. trunk: torchvision VGG16 state dict or None for random weights. Raises SystemExit with what is
    missing.
    """

    def __init__(
        self, folder: Path, device: torch.device, flow_steps: int, trunk: dict[str, Tensor] | None = None,
        toy: bool = False,
    ) -> None:  # fmt: skip
        folder = folder.resolve()
        if not (folder / "models" / "unite.py").is_file():
            raise SystemExit(f"--official-dir {folder}: no models/unite.py there; give a clone of the official code")
        self.device, self.backend = device, "eager" if toy else "inductor"  # a rehearsal traces and compiles nothing
        self.config: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text())
        self.settings = settings = self.config["gen_tok"] | {"flow_steps_per_recon": flow_steps}
        sys.path.insert(0, str(folder))
        try:
            lpips = importlib.import_module("modules.autoencoding_utils.lpips")
            unite = importlib.import_module("models.unite")
            self.optim = importlib.import_module("utils.optim")
            self.ema_of = importlib.import_module("utils.ema").update_ema
        except ImportError as error:
            raise SystemExit(f"the official code needs {error.name}: install its requirements.txt") from None
        finally:
            sys.path.remove(str(folder))
        if toy:
            settings["in_content_start"] = 1
            for name, sizes in TOY.items():
                getattr(unite, name).update(sizes)
        self.decoder_heads: int = unite.DECODER_CONFIGS["Base"][2]
        with _random_lpips(lpips), torch.device(device):  # on a GPU drawn there, which saves seconds
            self.model: Any = unite.UNITE(settings)
        if trunk is not None:
            self._load_trunk(trunk)
        self.model.to(device)

    def _load_trunk(self, trunk: dict[str, Tensor]) -> None:
        net = self.model.lpips_loss.net  # its slices number their layers anew; the order is torchvision's
        values = [value for name, value in trunk.items() if name.startswith("features.")]
        net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))

    def prepare(self) -> None:
        """Training mode, optimizers and EMA, as main_train.py makes them. The LPIPS heads' dropout stays off."""
        self.model.train()
        self.model.lpips_loss.eval()
        with contextlib.redirect_stdout(io.StringIO()):
            training = self.config["training"]
            self.adamw, _ = self.optim.build_optimizer(self.model.get_learnable_params(non_muon=True), training)
            self.muon, _ = self.optim.build_optimizer_muon(self.model.get_learnable_params(muon=True), training)
        self.ema = deepcopy(self.model).eval().requires_grad_(False)
        self.lpips = {"official": self.model.lpips_loss}
        self.encoder_call: Any = None  # the compiled encoder

    def compile(self, expert: bool = True) -> None:
        """Both FORMS, or the first alone. Nothing is compiled before it is called.

        The decoder as the YAML has it, in the mode that main_train.py takes for its accumulation steps.
        """
        training = self.config["training"]
        if training.get("torch_compile_decoder"):
            accumulates = int(training.get("grad_accum_steps", 1)) > 1
            mode = "default" if accumulates else "reduce-overhead"
            self.model.decoder.compile(mode=mode, backend=self.backend)
        if expert:  # dynamic: else its second size would make it a form for any size
            self.model.encoder.compile(dynamic=False, backend=self.backend)
            copy = deepcopy(self.lpips["official"]).to(memory_format=torch.channels_last)
            self.lpips["compiled"] = copy
            self.encoder_call = self.model.encoder._compiled_call_impl

    def use(self, form: str) -> None:
        """Makes the model one of FORMS, of what was compiled."""
        self.model.lpips_loss = self.lpips[form]
        self.model.encoder._compiled_call_impl = self.encoder_call if form == "compiled" else None

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        total, parts = self.model(images, labels=labels)
        return {"total": total, "l1": parts["rec_loss"], "lpips": parts["lpips_loss"], "flow": parts["flow/flow_loss"]}

    def passes(self, images: Tensor, labels: Tensor, recipe: str, form: str) -> None:
        """Forward and backward of one micro-batch, its gradients added to those that are there, as engines/train.py."""
        self.use(form)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe != "fp32")
        with switches():
            with half:
                total = self.losses(images, labels)["total"]
            total.backward()

    def update(self, clip: float = 3.0, decay: float = 0.9978) -> None:
        """What engines/train.py does after the last backward pass, without clearing the gradients."""
        with switches():
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.adamw.step()
            self.muon.step()
            self.ema_of(self.ema, self.model, decay)

    def sample(self, labels: Tensor, noise: Tensor, steps: int, scale: float, interval: tuple[float, float]) -> Tensor:
        """Images by Heun's method with ``steps`` intervals, which the official sampler takes from torchdiffeq."""
        sampler = self.model.flow_sampler
        make = type(sampler).sample_ode

        def heun(**arguments: Any) -> Any:
            return make(sampler, **(arguments | {"sampling_method": "heun2", "num_steps": steps + 1}))

        sampler.sample_ode = heun
        self.use("official")
        self.model.eval()
        try:
            return self.model.diffusion_generate(
                noise.device, len(labels), scale, interval, y_given=labels, noise=noise
            )
        finally:
            del sampler.sample_ode
            self.model.train()
            self.model.lpips_loss.eval()


@contextlib.contextmanager
def switches() -> Iterator[None]:
    """cudnn.benchmark and TF32, which main_train.py switches on for its process; ours has the first."""
    backends = torch.backends
    saved = backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    backends.cudnn.benchmark = backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = saved


@contextlib.contextmanager
def _random_lpips(module: types.ModuleType) -> Iterator[None]:
    """The official LPIPS constructor without its two downloads; the linear heads keep random weights."""
    import torchvision

    vgg16 = torchvision.models.vgg16
    saved = module.models, module._ensure_torchvision_weights_cached, module.LPIPS._load_pretrained_weights
    module.models = types.SimpleNamespace(
        vgg16=lambda weights=None, progress=True: vgg16(weights=None), VGG16_Weights=torchvision.models.VGG16_Weights
    )
    module._ensure_torchvision_weights_cached = lambda url: None
    module.LPIPS._load_pretrained_weights = lambda self, name="": None
    try:
        yield
    finally:
        module.models, module._ensure_torchvision_weights_cached, module.LPIPS._load_pretrained_weights = saved


@contextlib.contextmanager
def replayed(official: Official, draws: Draws) -> Iterator[None]:
    """Gives the official forward pass our draws, in the order in which it asks for them."""
    # rand: tokenizer's times over their maximum, the noising mask, the noising times over their range, the label drop.
    model: Any = official.model
    low = model.noising_t_start
    uniforms = [
        draws.tokenize_t / model.modulation_recon_timestep_max,
        torch.where(draws.noising_mask, 0.0, 1.0),
        (draws.noising_t - low) / (1.0 - low),
        *(torch.where(drop.flatten(), 0.0, 1.0) for drop in draws.flow_class_dropped[:, None].flatten(0, 1).split(
            model.flow_mini_batch)),
    ]  # fmt: skip
    steps = len(draws.flow_t)
    chunks = [chunk.flatten(0, 1) for chunk in draws.flow_noise.split(model.flow_mini_batch)]
    # randn_like: the noising noise, one discarded draw per flow step, then the noise of each chunk.
    normals = [draws.noising_noise, *([draws.noising_noise] * steps), *chunks]
    # The official code shifts logit-normal times itself, so it is given ours before the shift.
    a = model.timestep_shift_alpha
    times = [t / (a + (1 - a) * t) if a > 0 else t for t in draws.flow_t]
    times.insert(0, times[0] if times else draws.noising_t)  # of the noising, discarded

    def take(queue: list[Tensor]) -> Any:
        return lambda *arguments, **options: queue.pop(0)

    saved = torch.randn, torch.rand, torch.randn_like, model.transport.sample_logit_normal
    registers = [draws.tokenize_noise]
    torch.randn, torch.rand, torch.randn_like = take(registers), take(uniforms), take(normals)
    model.transport.sample_logit_normal = take(times)
    try:
        yield
    finally:
        torch.randn, torch.rand, torch.randn_like, model.transport.sample_logit_normal = saved
    left = len(registers) + len(uniforms) + len(normals) + len(times)
    if left:
        raise SystemExit(f"the official code asked for {left} draws fewer than expected: is this another version?")


def wake(model: nn.Module, seed: int = 0) -> Any:
    """Random values where the initialisation has zeros (gates, output layers), so that every path carries numbers.

    Drawn on the parameters' device. Returns the model.
    """
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * 0.02)
    return model
