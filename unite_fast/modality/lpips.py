"""Reconstruction losses: pixels, and LPIPS with the lpips package's heads on a VGG16 trunk the user provides."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.config import ObjectiveConfig
from unite_kernels import backend as kernels
from unite_kernels.conv_relu import Frozen, conv_relu_stages, frozen
from unite_kernels.lpips_head import lpips_head

# The sha256 of torchvision's vgg16-397923af.pth, whose name has its first digits.
TRUNK_FILE = "vgg16-397923af.pth"
TORCHVISION_VGG16 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
# The heads that come with the lpips package (v0.1, vgg.pth), which are those of the official code.
LPIPS_HEADS = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
MEND = (
    "get torchvision's vgg16-397923af.pth (python -m unite_fast fetch vgg16) and set "
    "objective.perceptual_trunk=PATH, or objective.perceptual_weight=0"
)


# VGG16's convolutions: (channels in, channels out, pooling steps before).
VGG16 = (
    (3, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2),
    (256, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4),
)  # fmt: skip


def perceptual_flops(image_size: int) -> float:
    """Of LPIPS' trunk per image: two forwards, and the gradient of one input."""
    return 3.0 * sum(2 * 9 * cin * cout * (image_size >> pools) ** 2 for cin, cout, pools in VGG16)


def pixel_loss(images: Tensor, reconstruction: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") difference of (B, Q, S, S) images, a float32 scalar."""
    difference = reconstruction.float() - images.float()
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


class Undrawn(TorchFunctionMode):
    """Weights that are loaded afterwards, or never read, are not drawn first: VGG16's 138 million take seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


class Perceptual(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018): VGG16, v0.1 linear heads; a frozen module returning the batch mean."""

    def __init__(
        self, trunk: dict[str, Tensor] | None, input_range: str = "0_1", dropout: bool = False, backend: str = "eager"
    ) -> None:
        """trunk: torchvision VGG16 state dict; None leaves random weights (for benchmarks and tests only).

        backend: as ``efficiency.kernels``. With Triton's the trunk runs as ``conv_relu_stages``, which keeps and moves
        least; otherwise it is the package's, as it is or compiled (``compile_trunk``). Either runs in channels_last.
        """
        super().__init__()
        check_heads()
        import lpips  # here: it imports torchvision, which takes seconds

        with warnings.catch_warnings(), Undrawn() if trunk is not None else nullcontext():
            warnings.simplefilter("ignore")  # torchvision's deprecated "pretrained" argument
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        if trunk is not None:
            own = self.net.net.state_dict()
            wanted = {name: f"features.{re.sub(r'^slice[0-9]+.', '', name)}" for name in own}
            missing = [source for source in wanted.values() if source not in trunk]
            if missing:
                raise UserError(f"the perceptual trunk is not a VGG16: it lacks {missing[0]}; {MEND}")
            self.net.net.load_state_dict({name: trunk[source] for name, source in wanted.items()})
        self.net.requires_grad_(False).to(memory_format=torch.channels_last)
        self.input_range, self.dropout, self.backend = input_range, dropout, backend
        self.trunk_sha256 = ""  # of the file that it was loaded from
        self.compiled: Callable[[nn.Module, Tensor], Any] | None = None  # the package's trunk
        self.constants: tuple[Any, list[list[Frozen]]] = (None, [])  # what they were made from, and they
        self.train(False)

    def train(self, mode: bool = True) -> Perceptual:
        """The heads' dropout follows the configuration, not the training mode of whoever holds this module."""
        super().train(False)
        for head in self.net.lins:
            head.train(self.dropout)
        return self

    @contextmanager
    def without_dropout(self) -> Iterator[Perceptual]:
        """For scores: dropout in the heads is a quirk of the training loss."""
        dropout, self.dropout = self.dropout, False
        self.train()
        try:
            yield self
        finally:
            self.dropout = dropout
            self.train()

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Two (B, 3, S, S) image batches in [0, 1] -> scalar; differentiable in ``reconstruction``."""
        if self.input_range == "-1_1":
            images, reconstruction = images * 2 - 1, reconstruction * 2 - 1
        if self.dropout:  # a quirk kept for comparison; it has no kernel
            return self.net(images, reconstruction).mean()
        with torch.no_grad():  # the real branch needs no graph
            real = self.features(images)
        weights = [p.flatten() for name, p in self.net.named_parameters() if name.startswith("lin")]
        return lpips_head(real, self.features(reconstruction), weights, backend=self.backend).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps of (B, 3, S, S) images, before normalisation."""
        scaled: Tensor = self.net.scaling_layer(images).contiguous(memory_format=torch.channels_last)
        if not self.fused:
            return list((self.compiled or nn.Module.__call__)(self.net.net, scaled))
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else scaled.dtype
        return conv_relu_stages(scaled.to(dtype), self.stages(dtype), self.backend)

    @property
    def fused(self) -> bool:
        """Whether the trunk runs as ``conv_relu_stages``: with Triton's kernels, unless it has been compiled."""
        return self.compiled is None and kernels.resolve(self.backend, next(self.net.parameters())) == "triton"

    def stages(self, dtype: torch.dtype) -> list[list[Frozen]]:
        """The trunk's convolutions by feature map in ``dtype``, made once for the weights as they are."""
        slices: list[list[Any]] = [
            [m for m in part.children() if isinstance(m, nn.Conv2d)] for part in self.net.net.children()
        ]
        key = dtype, [(m.weight.device, m.weight._version, m.bias._version) for part in slices for m in part]
        if self.constants[0] != key:
            self.constants = key, [[frozen(m.weight, m.bias, dtype) for m in part] for part in slices]
        return self.constants[1]

    def compile_trunk(self, region: Callable[..., Any]) -> None:
        """The package's trunk runs, compiled. region: makes a compiled function (``efficiency.compiling``)."""
        self.compiled = region(type(self.net.net).forward, inference=True)


def check_heads() -> None:
    """Raises UserError unless the weights within the lpips package are the known ones."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise UserError("LPIPS needs the package lpips; pip install lpips")
    file = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    digest = file_sha256(file) if file.is_file() else "no such file"
    if digest != LPIPS_HEADS:
        raise UserError(f"the heads of the lpips package are not the published ones ({digest}); reinstall lpips")


def load_perceptual(config: ObjectiveConfig, channels: int, backend: str = "eager") -> Perceptual | None:
    """The LPIPS module that ``config`` asks for, or None at weight 0. Raises UserError on a missing or altered file."""
    if config.perceptual_weight <= 0:
        return None
    if channels != 3:
        raise UserError(f"LPIPS needs 3 colour channels, the model has {channels}; set objective.perceptual_weight=0")
    if not config.perceptual_trunk:
        raise UserError(
            f"objective.perceptual_weight is {config.perceptual_weight} but no VGG16 weights are named; {MEND}"
        )
    path = Path(config.perceptual_trunk)
    if not path.is_file():
        raise UserError(f"objective.perceptual_trunk: no file {path}; {MEND}")
    digest = file_sha256(path)
    if not digest.startswith(config.perceptual_sha256 or TORCHVISION_VGG16):
        raise UserError(
            f"objective.perceptual_trunk {path} has sha256 {digest}, expected "
            f"{config.perceptual_sha256 or TORCHVISION_VGG16}; {MEND}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            trunk = load_file(path)
        else:
            trunk = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"objective.perceptual_trunk {path}: {str(error).splitlines()[0]}; {MEND}") from None
    perceptual = Perceptual(trunk, config.perceptual_range, config.perceptual_dropout, backend)
    perceptual.trunk_sha256 = digest
    return perceptual
