"""Precision recipes: the one place that decides which dtype runs where.

    fp32            everything in float32
    bf16            products in bfloat16; weights, their gradients and updates, norms and losses in float32
    bf16_te         the same, the large layers through Transformer Engine
    fp8             bf16 with the large layers' outputs and input gradients in float8, by torch's scaled product, one
                    scale per tensor, taken from its values; weight gradients in bfloat16
    fp8_rowwise     fp8 with one scale per row
    fp8_te          the large layers in float8 through Transformer Engine, scales from the current values
    fp8_te_delayed  the same, scales from the last steps' largest values

The large layers are the encoder's qkv, proj, w12 and w3 and the decoder's qkv, attn_proj, ffn_up and ffn_down
(``layers.Linear(large=True)``). Embeddings, modulations and final layers stay in bfloat16, the time MLP in
float32. Parameters stay float32 under their stock names, so a checkpoint of any recipe goes on under any other.

A recipe rules the forward and backward passes of training, within ``Recipe.step()``, which copies the weights anew. A
model in evaluation mode computes as its caller says (float32, or ``autocast``), from its parameters.

Where ranks share the weights (``parallel.sharding``) autocast casts what has been gathered, in place of bfloat16
copies. Float8 copies are kept whole on every rank, made from what the first pass of a step has gathered.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unite_fast.base.errors import UserError, first_line
from unite_fast.layers import Products
from unite_kernels import copied_linear

E4M3 = torch.float8_e4m3fn
TE = ("bf16_te", "fp8_te", "fp8_te_delayed")
TE_FLOAT8 = ("fp8_te", "fp8_te_delayed")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
SCALED = ("fp8", "fp8_rowwise")
# Large layers that fp8 and fp8_rowwise leave in bfloat16 because float8 was slower: (outputs, inputs) as padded, by
# compute capability. `make gpu-report` writes the row of a device; what has not been measured is taken.
SLOWER_IN_FLOAT8: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
}  # fmt: skip


def setup(device: torch.device, training: bool = False) -> None:
    """Process-wide switches: float32 is float32 in convolutions, too; denormals are flushed on CPUs, where they cost a
    factor in AdamW and EMA, and freed memory stays with the process. training: cuDNN times its convolutions at their
    first use and keeps the fastest, which may be another in the next process."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = training and device.type == "cuda"
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the kernel at once, which clears each page anew for the next operation's result.

    A C library that has no such switch is left as it is.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc allows
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def autocast(recipe: str, device: torch.device) -> AbstractContextManager[object]:
    """For passes outside training: "fp32", or "bf16" for matrix products in bfloat16, residual and losses in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe != "fp32")


def uncached(recipe: str, device: torch.device) -> AbstractContextManager[object]:
    """As ``autocast``, within it as well, but every use casts anew: a CUDA graph has no earlier cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe != "fp32", cache_enabled=False)


class Half:
    """Products in bfloat16, from copies of the parameters, padded where the layer allows it."""

    def __init__(self, layer: Any) -> None:
        shape = copied_linear.padded_shape(layer.weight.shape, layer.groups, layer.wide_inputs)
        self.outputs, self.groups = shape[0], layer.groups
        self.weight = layer.weight.new_zeros(shape, dtype=torch.bfloat16, requires_grad=False)
        self.bias = layer.bias.new_zeros(shape[0], dtype=torch.bfloat16, requires_grad=False)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
        bias_copy = None if bias is None else self.bias[start:stop]
        return copied_linear.half_linear(x, weight, bias, self.weight, bias_copy, (start, stop), self.groups)


class Scaled:
    """Output and input gradient in float8, from quantised copies of the weight, padded where the layer allows it.

    gathered: the weight is whole in a pass alone, which writes the copies (``write_gathered``) if none has yet.
    """

    def __init__(self, layer: Any, per_row: bool, gathered: bool = False) -> None:
        outputs, inputs = copied_linear.padded_shape(layer.weight.shape, layer.groups, layer.wide_inputs)
        self.outputs, self.groups = outputs, layer.groups
        device = layer.weight.device

        def factors(rows: int) -> Tensor:
            return torch.empty((rows, 1) if per_row else (), device=device)

        self.copies = (
            torch.empty(outputs, inputs, dtype=E4M3, device=device),
            factors(outputs),
            torch.empty(inputs, outputs, dtype=E4M3, device=device),
            factors(inputs),
        )
        self.bias = None if gathered else layer.bias.new_zeros(outputs, dtype=torch.bfloat16, requires_grad=False)
        self.fresh = False

    def write_gathered(self, weight: Tensor) -> None:
        """The copies, from the weight (N, K) in bfloat16, once after each ``Recipe.refresh``."""
        if not self.fresh:
            copied_linear.write_scaled_(weight.detach(), *self.copies, self.groups)
            self.fresh = True

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
        bias_copy = None if bias is None else self.bias
        # Not a slice: Inductor of torch 2.11 fails on it.
        if bias is not None and (bias_copy is None or (start, stop) != (0, self.outputs)):
            bias_copy = bias.detach().to(torch.bfloat16)
        return copied_linear.scaled_linear(x, weight, bias, self.copies, bias_copy, (start, stop), self.groups)


class TransformerEngine:
    """Output and input gradient by a Transformer Engine layer on our parameters' memory; weight gradient by us.

    Transformer Engine has a switch for the precision of the whole backward pass, none for weight gradients alone, so it
    sees constants and the weight gradient is added in bfloat16. What it keeps (``_extra_state``: the largest values of
    fp8_te_delayed) is not part of the model's state dict: such a run begins its history anew when it resumes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.ours, self.outputs = layer, layer.out_features
        # By first and last column, and whether the bias is added here. Made by the first pass that asks for them.
        self.theirs: dict[tuple[int, int, bool], nn.Module] = {}
        self.quantised: set[tuple[int, int, bool]] = set()  # in this step; the other passes use what was kept

    def _make(self, start: int, stop: int, with_bias: bool) -> nn.Module:
        import transformer_engine.pytorch as te

        theirs = te.Linear(
            self.ours.in_features, stop - start, bias=with_bias, params_dtype=torch.float32, device="cuda"
        )
        theirs.weight = nn.Parameter(self.ours.weight.detach()[start:stop], requires_grad=False)
        if with_bias:
            theirs.bias = nn.Parameter(self.ours.bias.detach()[start:stop], requires_grad=False)
        return theirs

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
        key = start, stop, bias is not None
        if key not in self.theirs:
            self.theirs[key] = self._make(*key)
        x = x.to(torch.bfloat16)
        y = self.theirs[key](x, is_first_microbatch=key not in self.quantised)
        self.quantised.add(key)
        return copied_linear.with_weight_gradient(y, x, weight, bias, start)


class Recipe:
    """A resolved recipe on a model. ``step()`` is the context of a training step's forward and backward passes."""

    def __init__(self, name: str = "fp32", device: torch.device | None = None) -> None:
        self.name, self.device = name, device or torch.device("cpu")
        self.halves: list[tuple[Tensor, Tensor]] = []  # (copy, parameter)
        self.scaled: list[tuple[Scaled, Tensor]] = []
        self.gathered: list[Scaled] = []
        self.engines: list[TransformerEngine] = []
        self.left: list[str] = []  # large layers that an FP8 recipe leaves in bfloat16 because of their sizes
        self.slower: list[str] = []  # and because they are faster there
        self.beside = ""  # what else is said of it
        # Whether autocast keeps what it has cast. Beside shards it must not: the gradient of a cast that an earlier
        # pass has made comes after the network's others, when these have been sent.
        self.keeps_casts = True

    def follow(self, copy: Tensor, parameter: Tensor, groups: int) -> None:
        """``refresh`` will write the parameter into its copy."""
        parameter = parameter.detach()
        if copy.shape != parameter.shape:
            copy = copied_linear.own_part(copy, parameter.shape, groups)
            parameter = parameter.unflatten(0, copy.shape[:2])
        self.halves.append((copy, parameter))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies every weight anew, once per optimizer step."""
        if self.halves:
            torch._foreach_copy_([copy for copy, _ in self.halves], [parameter for _, parameter in self.halves])
        for products, weight in self.scaled:
            copied_linear.write_scaled_(weight, *products.copies, products.groups)
        for products in self.gathered:
            products.fresh = False
        for engine in self.engines:
            engine.quantised.clear()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Refreshes the copies, then the context. autocast covers what has no copies: convolution and norms."""
        self.refresh()
        with ExitStack() as stack:
            stack.enter_context((autocast if self.keeps_casts else uncached)(self.name, self.device))
            if self.name in TE:
                stack.enter_context(_te_autocast(self.name))
            yield

    def __str__(self) -> str:
        text = self.name + self.beside
        if (scaled := len(self.scaled) + len(self.gathered)) or self.name in TE_FLOAT8:
            text += f" ({scaled or len(self.engines)} layers in float8"
            text += f"; in bfloat16, where float8 is slower: {', '.join(self.slower)}" if self.slower else ""
            text += f"; in bfloat16, sizes no multiples of 16: {', '.join(self.left)})" if self.left else ")"
        return text


def make(
    model: nn.Module, name: str, device: torch.device, shards: bool = False
) -> tuple[Recipe, dict[nn.Module, Products]]:
    """The recipe called ``name`` for ``model``, which is on ``device``, and how its linear layers compute by it.

    For ``execution.prepare``, once for a model: parameters may be written to afterwards, but not replaced.
    shards: the parameters will be replaced by shards. Raises UserError.
    """
    check(name, device)
    recipe, products = Recipe(name, device), {}
    if name == "fp32":
        return recipe, products
    for path, layer in model.named_modules():
        if hasattr(layer, "products") and (found := _products(recipe, path, layer, shards)) is not None:
            products[layer] = found
    if name in SCALED + TE_FLOAT8 and not (recipe.scaled or recipe.gathered or recipe.engines):
        raise UserError(f"efficiency.precision={name}: no layer of this model has sizes that are multiples of 16")
    recipe.refresh()
    return recipe, products


def fits_float8(layer: Any) -> bool:
    """Whether a layer of this kind and these sizes has float8 products."""
    padded = copied_linear.padded_shape(layer.weight.shape, layer.groups, layer.wide_inputs)
    return layer.large and _fits(padded)


def _fits(shape: Iterable[int]) -> bool:
    return all(size % copied_linear.MULTIPLE == 0 for size in shape)


def _products(recipe: Recipe, path: str, layer: Any, shards: bool = False) -> Products | None:
    """None: autocast casts the layer's parameters."""
    shape = layer.weight.shape
    padded = copied_linear.padded_shape(shape, layer.groups, layer.wide_inputs)
    # Transformer Engine pads nothing: what is padded here, and the layer behind it, are both ours.
    if layer.large and (recipe.name == "bf16_te" or (recipe.name in TE_FLOAT8 and _fits(shape) and padded == shape)):
        recipe.engines.append(engine := TransformerEngine(layer))
        return engine
    # Autocast pads nothing either, and a padded layer has a neighbour that is padded with it.
    left = slower(padded, recipe.device) and not (shards and padded != shape)
    if recipe.name in SCALED and fits_float8(layer) and not left:
        products = Scaled(layer, recipe.name == "fp8_rowwise", gathered=shards)
        if shards:
            recipe.gathered.append(products)
        else:
            recipe.scaled.append((products, layer.weight))
    else:
        pattern = f"{re.sub(r'[.][0-9]+[.]', '.*.', path)} {layer.in_features} -> {layer.out_features}"
        reasons = recipe.slower if slower(padded, recipe.device) else recipe.left
        if layer.large and recipe.name != "bf16" and pattern not in reasons:
            reasons.append(pattern)
        if shards:
            return None
        products = Half(layer)
        recipe.follow(products.weight, layer.weight, layer.groups)
    if products.bias is not None:
        recipe.follow(products.bias, layer.bias, layer.groups)
    return products


def slower(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a layer's products are known to be slower in float8 on ``device``."""
    return device.type == "cuda" and shape in SLOWER_IN_FLOAT8.get(torch.cuda.get_device_capability(device), ())


def check(name: str, device: torch.device) -> None:
    """Whether a recipe can run on ``device``. Raises UserError with the reason and what to do."""
    asked = f"efficiency.precision={name}"
    if name in SCALED and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device)
        raise UserError(f"{asked} needs a GPU with float8 products (sm_89 or later), this is {found}; use bf16")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if name == "fp8_rowwise" and device.type == "cpu" and release < (2, 13):
        raise UserError(f"{asked} on a CPU needs torch 2.13 or later, this is {torch.__version__}; use fp8")
    if name in TE:
        if device.type != "cuda":
            raise UserError(f"{asked}: Transformer Engine needs a CUDA device; use {name.split('_')[0]} on a CPU")
        try:
            import transformer_engine.pytorch as te
        except (ImportError, OSError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{asked} needs Transformer Engine ({reason}); pip install 'transformer-engine[pytorch]', or use bf16 "
                "or fp8"
            ) from None
        if name in TE_FLOAT8:
            available, reason = te.is_fp8_available(return_reason=True)
            if not available:
                raise UserError(f"{asked}: {reason}; use bf16")


def _te_autocast(name: str) -> AbstractContextManager[object]:
    """Transformer Engine's context. Scales are not shared between ranks, which each see other images."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    if name == "bf16_te":
        return te.autocast(enabled=False)
    if name == "fp8_te":
        return te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling())
    # A layer runs several times in one context, which a reduction of the largest values at its end would not allow.
    return te.autocast(enabled=True, recipe=recipe.DelayedScaling(amax_history_len=16, reduce_amax=False))
