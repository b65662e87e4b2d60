"""The kernels of one optimizer step, counted from the model's sizes: FLOPs, least bytes, and what kind each is.

Shape letters: B images of a micro-batch, T tokens, D width, F hidden width, r bytes of a residual element (4).
Bytes are the least that a kernel must move, and kernels those that a step has: between two matrix products of the
encoder one elementwise kernel; copies of what lies elsewhere than its reader wants it (``copies``); of matrix products,
their operands and results in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from unite_fast.config import Config, ModelConfig
from unite_fast.modality.lpips import VGG16
from unite_fast.model.unite import UNITE
from unite_fast.optim.groups import split_parameters

RESIDUAL, BRANCH = 4, 2  # bytes of an element
NS_STEPS = 5


@dataclass(frozen=True)
class Work:
    """``count`` equal kernels."""

    part: str  # tokenize, flow, decode, perceptual, update
    kind: str  # gemm, attention, elementwise, reduction, conv
    backward: bool
    flops: float  # of one
    bytes: float  # of one
    shape: tuple[int, ...] = ()  # gemm: rows, columns, depth; attention: B, heads, T, head size
    count: float = 1
    form: str = ""  # of a gemm: "forward", or the gradient of the "weight" or the "input", which differ in layout


def gemm(part: str, rows: int, columns: int, depth: int, count: float = 1, input_gradient: bool = True) -> list[Work]:
    """A Linear(depth, columns) over ``rows`` rows: forward, gradient of the weight, gradient of the input."""
    flops = 2.0 * rows * columns * depth
    bytes_ = float(BRANCH * (rows * depth + depth * columns + rows * columns))
    shapes = {"forward": (rows, columns, depth), "weight": (depth, columns, rows)}
    shapes |= {"input": (rows, depth, columns)} if input_gradient else {}
    return [Work(part, "gemm", f != "forward", flops, bytes_, shape, count, f) for f, shape in shapes.items()]


def elementwise(part: str, forward: float, backward: float, count: float = 1) -> list[Work]:
    sizes = ((False, forward), (True, backward))
    return [Work(part, "elementwise", back, 0, size, (), count) for back, size in sizes]


def bias_gradient(part: str, rows: int, columns: int, count: float) -> Work:
    """A pass over the gradient of a linear layer's output, where the operation that made it does not sum it as well."""
    return Work(part, "reduction", True, 0, float(BRANCH * rows * columns), (), count)


def copies(part: str, moved: float, count: float) -> Work:
    """Backward: bytes read and written to bring gradients together."""
    return Work(part, "copy", True, 0, moved, (), count)


def attention(part: str, images: int, heads: int, tokens: int, width: int, count: float) -> list[Work]:
    """Backward counts twice the forward's products, without the scores that are computed again."""
    shape, flops = (images, heads, tokens, width // heads), 4.0 * images * tokens**2 * width
    size = float(BRANCH * images * tokens * width)
    forward = Work(part, "attention", False, flops, 4 * size, shape, count)
    return [forward, Work(part, "attention", True, 2 * flops, 8 * size, shape, count)]


def encoder_pass(part: str, model: ModelConfig, images: int, tokens: int, passes: float) -> Iterator[Work]:
    e = model.encoder
    d, f = e.width, int(2 / 3 * e.mlp_ratio * e.width)
    for t, blocks in ((tokens, e.in_context_start), (tokens + e.in_context_len, e.depth - e.in_context_start)):
        rows, count = images * t, blocks * passes
        for columns, depth in ((3 * d, d), (d, d), (2 * f, d), (d, f)):  # q, k and v, projection, SwiGLU's two
            yield from gemm(part, rows, columns, depth, count)
        yield from gemm(part, images, 6 * d, d, count)
        yield from attention(part, images, e.heads, t, d, count)
        mid_or_tail = (2 * RESIDUAL + 2 * BRANCH) * d, (3 * RESIDUAL + 3 * BRANCH) * d
        yield from elementwise(part, rows * mid_or_tail[0], rows * mid_or_tail[1], 2 * count)
        yield from elementwise(
            part, 4 * BRANCH * rows * d, 8 * BRANCH * rows * d, count
        )  # norms and rotation of q, k; v's gradient
        yield from elementwise(part, 3 * BRANCH * rows * f, 5 * BRANCH * rows * f, count)  # SwiGLU
    yield from gemm(part, images * model.num_latents, d, model.latent_dim, passes, input_gradient=False)
    yield from gemm(part, images * model.num_latents, model.latent_dim, d, passes)
    yield from gemm(part, images, 2 * d, d, passes)
    yield from gemm(part, images, d, 512, passes, input_gradient=False)
    yield from gemm(part, images, d, d, passes)


def decoder_pass(model: ModelConfig, images: int) -> Iterator[Work]:
    d, patches = model.decoder, (model.image_size // model.patch_size) ** 2
    tokens = patches + 1 + (model.num_latents if model.num_latents != patches else 0)
    rows, w = images * tokens, d.width
    for columns, depth in ((3 * w, w), (w, w), (d.mlp_hidden, w), (w, d.mlp_hidden)):
        yield from gemm("decode", rows, columns, depth, d.depth)
        yield bias_gradient("decode", rows, columns, d.depth)
    yield from attention("decode", images, d.heads, tokens, w, d.depth)
    yield from elementwise("decode", rows * 12 * w, rows * 18 * w, 2 * d.depth)  # residual sum and LayerNorm
    yield copies("decode", 6 * BRANCH * rows * w, d.depth)  # gradients of q, k and v into one tensor
    yield from elementwise("decode", 4 * rows * d.mlp_hidden, 6 * rows * d.mlp_hidden, d.depth)  # GELU
    yield from gemm("decode", images * model.num_latents, d.in_features, model.latent_dim)
    yield from gemm("decode", images * model.num_latents, w, d.in_features)
    yield from gemm("decode", images * (patches + 1), model.patch_size**2 * model.channels, w)


def perceptual_pass(model: ModelConfig, images: int) -> Iterator[Work]:
    """VGG16 over both images, the gradient of one; beside each convolution the kernel that ends it (conv_relu.py)."""
    for k, (cin, cout, pools) in enumerate(VGG16):
        side = model.image_size >> pools
        flops, pixels = 2.0 * 9 * cin * cout * images * side**2, float(images * side**2)
        size = BRANCH * pixels * (cin + cout)
        yield Work("perceptual", "conv", False, flops, size, (images, cin, cout, side), 2)
        yield Work("perceptual", "conv", True, flops, size, (images, cin, cout, side))
        n = cout * pixels
        if k not in (1, 3, 6, 9, 12):  # bias and ReLU in place twice, and a bit each for the one that has a backward
            yield from elementwise("perceptual", (4 * BRANCH + 1 / 8) * n, (2 * BRANCH + 1 / 8) * n)
            continue
        # Maps that the head compares: it reads both forward, both and writes a gradient backward.
        yield from elementwise("perceptual", 2 * BRANCH * n, 3 * BRANCH * n)
        pooled = 0 if k == 12 else BRANCH / 4  # with the maxima, or their gradient
        yield from elementwise("perceptual", 2 * (2 * BRANCH + pooled) * n, (3 * BRANCH + pooled) * n)


def update(
    parameters: int, matrices: dict[tuple[int, int], int], passes: dict[str, float], once: float
) -> Iterator[Work]:
    """Casts of the weights, sums of gradients, Newton-Schulz, and the clip, Muon, AdamW and EMA of all parameters.

    matrices: Muon's shapes and how many there are of each. passes: "parameters" that are cast, and "summed" gradients
    (parameters times passes through them). once: of an update, what this micro-batch has to bear.
    """
    yield Work("update", "elementwise", False, 0, 6.0 * passes["parameters"], (), once)
    yield Work("update", "elementwise", False, 0, 10.0 * passes["summed"])
    yield Work("update", "elementwise", False, 0, 36.0 * parameters, (), once)
    for (rows, columns), count in matrices.items():
        n, k = sorted((rows, columns))
        for shape, each in (((n, n, k), 1), ((n, n, n), 1), ((n, k, n), 1)):
            flops, size = 2.0 * shape[0] * shape[1] * shape[2], BRANCH * (shape[0] * shape[2] + shape[1] * shape[2])
            yield Work("update", "gemm", False, flops, float(size + BRANCH * shape[0] * shape[1]), shape,
                       count * each * NS_STEPS * once)  # fmt: skip


def step(config: Config, images: int, ranks: int = 1) -> list[Work]:
    """Every kernel of one micro-batch of ``images``, with its share of the update after a global batch over ``ranks``.

    Newton-Schulz of all matrices, as if on one GPU.
    """
    model, o, e = config.model, config.objective, config.efficiency
    with torch.device("meta"):
        network = UNITE(model)
    muon, adamw = split_parameters(network, config.optim.muon)
    parameters = sum(p.numel() for p in (*muon.values(), *adamw.values()))
    shared = sum(p.numel() for p in network.encoder.parameters() if p.requires_grad)
    patches = (model.image_size // model.patch_size) ** 2
    work = [*encoder_pass("tokenize", model, images, model.num_latents + patches, 1)]
    work += gemm("tokenize", images * patches, model.encoder.width, model.patch_size**2 * model.channels, 1, False)
    together = min(e.flow_mini_batch, o.flow_steps)
    if o.flow_steps:
        work += encoder_pass("flow", model, images * together, model.num_latents, o.flow_steps / together)
    work += decoder_pass(model, images)
    work += perceptual_pass(model, images) if o.perceptual_weight > 0 else []
    shapes = Counter((p.shape[0], p[0].numel()) for p in muon.values())
    passes = {"parameters": parameters, "summed": parameters + shared * -(-o.flow_steps // e.flow_mini_batch)}
    once = images * ranks / config.train.global_batch
    return [*work, *update(parameters, dict(shapes), passes, once)]
