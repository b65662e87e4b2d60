"""The precision recipes: products against float64, which layers, what is cast how often, checkpoints, errors.

tests/test_efficiency.py holds the losses of each recipe to those of float32.
"""

from __future__ import annotations

import dataclasses
import inspect
import resource

import pytest
import torch
import torch.nn.functional as F
from stepping import backward
from support import TINY, command
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.base.errors import UserError
from unite_fast.config import ENCODER_SIZES, EfficiencyConfig, ModelConfig, ObjectiveConfig
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.data import Batch, batch_of_images
from unite_fast.efficiency import execution, precision
from unite_fast.layers import Linear
from unite_fast.model.encoder import SwiGLU
from unite_fast.model.unite import UNITE, build
from unite_fast.objective import Draws, Objective
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.state import TrainState
from unite_fast.training.step import TrainStep
from unite_kernels import copied_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OLD_CPU = DEVICE.type == "cpu" and tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13)
ROWWISE = pytest.param(True, marks=pytest.mark.skipif(OLD_CPU, reason="a scale per row on CPUs needs torch 2.13"))
FP8 = ["fp8", pytest.param("fp8_rowwise", marks=ROWWISE.marks)]


# --- which layers ----------------------------------------------------------------------------------------------------


def prepared(name: str, encoder: str = "base", **changes) -> precision.Recipe:
    with torch.device("meta"):
        model = UNITE(dataclasses.replace(ModelConfig(), encoder=ENCODER_SIZES[encoder]))
    return execution.prepare(model, EfficiencyConfig(precision=name, **changes), torch.device("meta"))


def test_all_large_layers_of_base_and_xl_are_in_float8():
    assert len(prepared("fp8").scaled) == 12 * 4 + 12 * 4
    assert str(prepared("fp8")) == "fp8 (96 layers in float8)"
    assert len(prepared("fp8", "xl").scaled) == 28 * 4 + 12 * 4


def test_layers_whose_sizes_float8_does_not_allow_are_named():
    narrow = dataclasses.replace(ENCODER_SIZES["base"], width=744, heads=6)  # 46.5 * 16
    with torch.device("meta"):
        model = UNITE(dataclasses.replace(ModelConfig(), encoder=narrow))
    recipe = execution.prepare(model, EfficiencyConfig(precision="fp8"), torch.device("meta"))
    assert len(recipe.scaled) == 12 * 4  # the decoder's
    left = "qkv 744 -> 2232", "proj 744 -> 744", "w12 744 -> 3968", "w3 1984 -> 744"
    assert all(layer in str(recipe) for layer in left)
    assert "in bfloat16, sizes no multiples of 16: encoder.blocks.*.attn.qkv 744 -> 2232, " in str(recipe)


def test_the_published_large_models_mlp_is_padded():
    """Its SwiGLU is 2,730 wide, whose rows are not aligned to 16 bytes."""
    for name in ("bf16", "fp8"):
        with torch.device("meta"):
            model = UNITE(dataclasses.replace(ModelConfig(), encoder=ENCODER_SIZES["large"]))
        recipe = execution.prepare(model, EfficiencyConfig(precision=name), torch.device("meta"))
        mlp = model.encoder.blocks[0].mlp
        assert (mlp.w12.products.outputs, mlp.w3.products.outputs) == (2 * 2736, 1024)
        assert not recipe.left
    assert len(recipe.scaled) == 24 * 4 + 12 * 4


@pytest.mark.parametrize("shards", [False, True])
def test_what_is_slower_in_float8_stays_out_unless_it_is_padded_with_a_neighbour(monkeypatch, shards):
    """Whole weights have padded copies in bfloat16, too; of gathered ones there are none."""
    monkeypatch.setattr(precision, "slower", lambda shape, device: True)
    mlp, recipe = SwiGLU(32, 24).train(), precision.Recipe("fp8")
    for name, layer in mlp.named_modules():
        if hasattr(layer, "products"):
            layer.products = precision._products(recipe, name, layer, shards)
    assert len(recipe.gathered) == 2 * shards
    assert len(recipe.halves) == 4 * (not shards)
    for products, layer in zip(recipe.gathered, (mlp.w12, mlp.w3), strict=False):
        products.write_gathered(layer.weight.to(torch.bfloat16))
    recipe.refresh()
    with precision.autocast("fp8", recipe.device):
        assert mlp(torch.randn(2, 3, 32), "eager").product.shape == (2, 3, 32)


@pytest.mark.parametrize(("hidden", "theirs"), [(24, 0), (40, 0), (32, 2), (12, 0)])
def test_both_layers_of_a_swiglu_compute_in_one_place(hidden, theirs):
    """Transformer Engine takes w12 of 2 * 24 rows and not w3 of 24 columns: w3's copy is padded, so must w12's be."""
    mlp, recipe = SwiGLU(16, hidden).train(), precision.Recipe("fp8_te")
    for name, layer in mlp.named_modules():
        if hasattr(layer, "products"):
            layer.products = precision._products(recipe, name, layer)
    assert len(recipe.engines) == theirs
    if not theirs:
        recipe.refresh()
        with precision.autocast(recipe.name, recipe.device):
            assert mlp(torch.randn(2, 3, 16), "eager").product.shape == (2, 3, 16)


def test_only_large_layers_are_in_float8():
    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    execution.prepare(model, EfficiencyConfig(precision="fp8"), torch.device("cpu"))
    scaled = {n for n, m in model.named_modules() if isinstance(getattr(m, "products", None), precision.Scaled)}
    layers = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
    blocks = {f"encoder.blocks.{i}.{n}" for i in range(3) for n in layers}  # the SwiGLU, 85 wide, is padded
    decoder = {f"decoder.decoder_layers.0.{n}" for n in ("qkv", "attn_proj", "ffn_up", "ffn_down")}
    assert scaled == blocks | decoder
    others = {n for n, m in model.named_modules() if isinstance(getattr(m, "products", None), precision.Half)}
    assert {"encoder.up_sample", "encoder.final_layer.linear", "encoder.blocks.0.adaLN_modulation.1"} <= others
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears - scaled - others == {"encoder.t_embedder.mlp.0", "encoder.t_embedder.mlp.2"}  # in float32


def test_residual():
    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    recipe = execution.prepare(model, EfficiencyConfig(precision="bf16", residual="bf16"), torch.device("cpu"))
    assert str(recipe) == "bf16 with a bf16 residual"
    seen = []
    for block in (model.encoder.blocks[-1], model.decoder.decoder_layers[-1]):
        block.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].dtype))
    for training in (True, False):
        model.train(training)
        with recipe.step():
            model.decode(model.tokenize(torch.rand(1, 1, 8, 8)))
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


class Theirs(torch.nn.Module):
    """A product in bfloat16 with the call of Transformer Engine's layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.bfloat16(), None if bias is None else bias.bfloat16()

    def forward(self, x: Tensor, is_first_microbatch: bool) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def make_theirs(products: precision.TransformerEngine, start: int, stop: int, with_bias: bool) -> Theirs:
    weight, bias = (p.detach()[start:stop] for p in (products.ours.weight, products.ours.bias))
    return Theirs(weight, bias if with_bias else None)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "engine"])
@pytest.mark.parametrize("wanted", [(0, 96), (0, 32), (32, 96), (16, 48)])
def test_some_columns_of_a_layer(kind, wanted, monkeypatch):
    """As the attention asks for them: the bias is added and has no gradient. The rest of dW is zero."""
    layer, x = Linear(32, 96, large=True), torch.randn(3, 5, 32)
    torch.nn.init.normal_(layer.bias)
    whole = F.linear(x, layer.weight, layer.bias)[..., slice(*wanted)]
    if kind == "engine":
        monkeypatch.setattr(precision.TransformerEngine, "_make", make_theirs)
        layer.products = precision.TransformerEngine(layer)
    elif kind == "bf16":
        execution.prepare(layer, EfficiencyConfig(precision="bf16"), torch.device("cpu"))
    found = layer.columns(x, *wanted)
    assert found.is_contiguous()
    dy = torch.randn(found.shape)
    gradients = [
        torch.autograd.grad(y, (layer.weight, layer.bias), dy.to(y.dtype), allow_unused=True) for y in (found, whole)
    ]
    assert gradients[0][1] is None
    for a, b in ((found, whole.detach()), (gradients[0][0], gradients[1][0])):
        torch.testing.assert_close(
            a.float(), b, rtol=0, atol=(1e-6 if kind == "fp32" else 1e-2) * float(1 + b.abs().max())
        )


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_layers_share_compiled_code(name):
    """Blocks compiled one by one give two graphs, the last block's modulation being strided otherwise; none later."""
    config = from_dict(parse_yaml(TINY, "tiny")).model
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, depth=5, in_context_len=0))
    model = build(config)
    recipe = execution.prepare(model, EfficiencyConfig(precision=name), torch.device("cpu"))
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.encoder.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        with recipe.step():
            model.tokenize(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert counter.frame_count == 2


# --- what is cast, and how often -------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts conversions of dtype, by the converted shape; ``watched`` are the addresses of some tensors."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self.watched, self.of_watched, self.shapes = watched, 0, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype != arguments[0].dtype:
            self.of_watched += arguments[0].data_ptr() in self.watched
            self.shapes.append(tuple(result.shape))
        return result


def step_of(**efficiency) -> tuple[TrainStep, TrainState, Batch]:
    config = from_dict(parse_yaml(TINY, "tiny"))
    config = dataclasses.replace(config, efficiency=EfficiencyConfig(**efficiency), device="cpu")
    ranks = Ranks(0, 1, torch.device("cpu"))
    state = assemble.fresh_state(config, ranks)
    step = TrainStep(
        state, config, ranks, (8, 2), 1000, Objective.open(config.model, config.objective, config.efficiency)
    )
    batch = batch_of_images(torch.rand(16, 1, 8, 8), torch.arange(16) % 10, torch.arange(16))
    return step, state, batch


@pytest.mark.parametrize("name", ["bf16", *FP8])
def test_weights_are_cast_once_per_step(name, monkeypatch):
    """However many micro-batches and flow steps: copies are written once, and autocast casts the convolution once.

    Also: the float32 layers of the time embedding stay float32 in the backward pass.
    """
    step, state, batch = step_of(precision=name)
    assert step.config.objective.flow_steps > 1
    written = []
    original = copied_linear.write_scaled_
    monkeypatch.setattr(copied_linear, "write_scaled_", lambda *a: written.append(1) or original(*a))
    parameters = {p.data_ptr() for p in state.model.parameters() if p.ndim > 1}
    embeddings = {state.model.encoder.y_embedder.embedding_table.weight.data_ptr()}
    with Casts(parameters - embeddings) as casts:
        step(batch)
    assert casts.of_watched == 1
    assert len(written) == len(state.recipe.scaled)


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_no_cast_in_the_encoders_blocks(residual):
    """Between the layers of a block nothing changes its dtype: deeper models convert no more activations."""
    counts = []
    for depth in (3, 6):
        config = from_dict(parse_yaml(TINY, "tiny"))
        encoder = dataclasses.replace(config.model.encoder, depth=depth)
        model = build(dataclasses.replace(config.model, encoder=encoder))
        model.encoder.backend = "fused"
        recipe = execution.prepare(model, EfficiencyConfig(precision="bf16", residual=residual), torch.device("cpu"))
        with recipe.step(), Casts(set()) as casts:
            model.tokenize(torch.rand(2, 1, 8, 8))
        counts.append(sum(len(shape) == 3 for shape in casts.shapes))
    assert counts[0] == counts[1] <= 4


class Passes(TorchDispatchMode):
    """Counts sums over the rows of a matrix that has more than ``rows``, and copies: tokens side by side, and a matrix
    that a product is added to."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.sums, self.copies = rows, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.sum.dim_IntList:
            self.sums += arguments[0].ndim == 2 and len(arguments[0]) > self.rows
        self.copies += function is torch.ops.aten.cat.default and arguments[0][0].ndim > 2
        self.copies += function is torch.ops.aten.addmm.default and len(arguments[0]) > self.rows
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_gradients_of_biases_and_of_packed_parts_take_no_pass_of_their_own(name):
    """The kernels that hold the gradients of the large layers' outputs sum them, and write them where the product of
    the next layer reads them: nothing more of it in six blocks than in three."""
    counts = []
    for depth in (3, 6):
        config = from_dict(parse_yaml(TINY, "tiny")).model
        model = build(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, depth=depth)))
        model.encoder.backend = "fused"
        recipe = execution.prepare(model, EfficiencyConfig(precision=name), torch.device("cpu"))
        images = torch.rand(2, 1, 8, 8)
        with recipe.step():
            latents = model.tokenize(images)
        with Passes(len(images)) as passes:
            latents.square().sum().backward()
        counts.append((passes.sums, passes.copies))
        biases = [p for n, p in model.named_parameters() if n.startswith("encoder.blocks") and n.endswith(".bias")]
        assert all(p.grad is not None for p in biases)
    assert counts[1] == counts[0]


# --- losses ----------------------------------------------------------------------------------------------------------

# Largest relative error of a loss, and smallest cosine of a tensor's gradient with that of float32. Seen: 0.0016 and
# 0.9997, 0.013 and 0.997, 0.002 and 0.995, 0.012 and 0.993.
PARITY = {
    ("bf16", "fp32"): (0.01, 0.998),
    ("bf16", "bf16"): (0.03, 0.99),
    ("fp8", "fp32"): (0.03, 0.98),
    ("fp8_rowwise", "fp32"): (0.03, 0.98),
}


def healthy(name: str, residual: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a model whose latents are not near zero and whose large layers all suit float8."""
    small = from_dict(parse_yaml(TINY, "tiny")).model
    encoder = dataclasses.replace(small.encoder, width=64, mlp_ratio=4.5)
    decoder = dataclasses.replace(small.decoder, width=64, in_features=64, mlp_hidden=128)
    model = build(dataclasses.replace(small, encoder=encoder, decoder=decoder))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    recipe = execution.prepare(model, EfficiencyConfig(precision=name, residual=residual), torch.device("cpu"))
    assert not recipe.left
    o = ObjectiveConfig(perceptual_weight=0)
    images, labels = torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8)
    with recipe.step():
        losses = backward(model, images, labels, Draws.make(model, o, 0, torch.arange(8)), o)
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "residual"), [pytest.param(*k, marks=ROWWISE.marks if "rowwise" in k[0] else ()) for k in PARITY]
)
def test_losses_and_gradients_stay_close_to_float32(name, residual):
    exact, exact_gradients = healthy("fp32", "fp32")
    losses, gradients = healthy(name, residual)
    loss_error, cosine = PARITY[name, residual]
    for key in ("l1", "flow", "total"):
        assert float(losses[key]) == pytest.approx(float(exact[key]), rel=loss_error), key
    assert gradients.keys() == exact_gradients.keys()
    for key, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), exact_gradients[key].flatten(), 0) > cosine, key
        assert float(gradient.norm()) == pytest.approx(float(exact_gradients[key].norm()), rel=0.15), key


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_padding_changes_nothing(kernels, monkeypatch):
    """The tiny SwiGLU is 85 wide, so that padding reaches both halves of its input and the columns of its output."""
    results = []
    for multiple in (16, 1):
        monkeypatch.setattr(copied_linear, "MULTIPLE", multiple)
        model = build(from_dict(parse_yaml(TINY, "tiny")).model)
        model.use_kernels(kernels)
        recipe = execution.prepare(model, EfficiencyConfig(precision="bf16"), torch.device("cpu"))
        assert model.encoder.blocks[0].mlp.w12.products.outputs == {16: 192, 1: 170}[multiple]
        o = ObjectiveConfig(perceptual_weight=0)
        images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        for p in model.parameters():
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
        with recipe.step():
            losses = backward(model, images, torch.arange(4), Draws.make(model, o, 0, torch.arange(4)), o)
        results.append(losses | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-2, atol=1e-2 * float(value.abs().max()), msg=name)


# --- training, checkpoints, errors -----------------------------------------------------------------------------------


def test_a_step_needs_the_recipe_that_the_model_was_prepared_for():
    step, state, batch = step_of(precision="fp8")
    state.parts[""].recipe = precision.Recipe("bf16")
    with pytest.raises(ValueError, match="prepared for bf16, not fp8"):
        step(batch)


def test_evaluation_uses_the_parameters_not_the_copies():
    step, state, batch = step_of(precision="fp8")
    step(batch)  # the copies are of the weights before this step
    plain = build(step.config.model)
    plain.load_state_dict(state.model.state_dict())
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected, found = (m.eval().decode(m.tokenize(images)) for m in (plain, state.model))
    assert torch.equal(found, expected)
    state.model.train()
    with state.recipe.step(), torch.no_grad():
        assert not torch.allclose(state.model.decode(state.model.tokenize(images)).float(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["bf16", *FP8])
def test_names_of_parameters_stay(name):
    config = from_dict(parse_yaml(TINY, "tiny")).model
    model = build(config)
    stock = {k: v.shape for k, v in model.state_dict().items()}
    execution.prepare(model, EfficiencyConfig(precision=name), torch.device("cpu"))
    assert {k: v.shape for k, v in model.state_dict().items()} == stock
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("before", "after"), [("fp8", "fp32"), ("fp32", "fp8"), ("bf16", "fp8")])
def test_a_run_goes_on_under_another_recipe(tiny, tmp_path, before, after):
    arguments = ("--config", tiny, f"run_dir={tmp_path / 'run'}")
    first = command("train.py", *arguments, "train.max_steps=3", f"efficiency.precision={before}")
    assert first.returncode == 0, first.stderr
    second = command("train.py", *arguments, "train.max_steps=6", f"efficiency.precision={after}")
    assert second.returncode == 0, second.stderr
    assert "at step 3" in second.stdout
    assert f"efficiency.precision {before} -> {after}" in second.stdout


def test_the_recipe_is_printed(tiny):
    result = command("train.py", "--config", tiny, "--dry-run", "efficiency.precision=fp8", "efficiency.residual=bf16")
    assert result.returncode == 0, result.stderr
    assert "precision fp8 with a bf16 residual (16 layers in float8)" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["efficiency.precision=fp8_te"], "Transformer Engine needs a CUDA device; use fp8"),
        (["efficiency.precision=bf16_te"], "Transformer Engine needs a CUDA device; use bf16"),
        (["efficiency.precision=fp8_te", "train.micro_batch=4"], "train.micro_batch to be a multiple of 8, got 4"),
        (["efficiency.precision=fp8_te_delayed", "efficiency.recompute=blocks"], "recompute=blocks does not work"),
        (["efficiency.precision=fp32", "efficiency.residual=bf16"], "residual=bf16 needs a precision other than fp32"),
        (["efficiency.precision=fp8", "model.encoder.width=40", "model.decoder.width=40"], "no layer of this model"),
    ],
)
def test_what_cannot_run_says_why(tiny, overrides, message):
    result = command("train.py", "--config", tiny, "--dry-run", "device=cpu", *overrides)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_rowwise_on_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(UserError, match=r"needs torch 2.13 or later, this is 2.11.0\+cu130; use fp8"):
        precision.check("fp8_rowwise", torch.device("cpu"))
    precision.check("fp8", torch.device("cpu"))


# --- Transformer Engine ----------------------------------------------------------------------------------------------


def test_transformer_engine_has_what_is_called():
    te = pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    from transformer_engine.common import recipe

    wanted = {"in_features", "out_features", "bias", "params_dtype", "device"}
    assert wanted <= set(inspect.signature(te.Linear.__init__).parameters)
    assert "is_first_microbatch" in inspect.signature(te.Linear.forward).parameters
    assert {"enabled", "recipe"} <= set(inspect.signature(te.autocast).parameters)
    recipe.Float8CurrentScaling()
    recipe.DelayedScaling(amax_history_len=16, reduce_amax=False)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", precision.TE)
def test_transformer_engine_layers(name):
    """Gradients through Transformer Engine are near those in bfloat16; it adds nothing to the model's state."""
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    config = from_dict(parse_yaml(TINY, "tiny")).model
    results = []
    for recipe_name in ("bf16", name):
        model = build(config, device=DEVICE)
        stock = set(model.state_dict())
        recipe = execution.prepare(model, EfficiencyConfig(precision=recipe_name), DEVICE)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(DEVICE) * 0.05)
        images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        for _ in range(2):  # delayed scaling begins with a scale of 1
            model.zero_grad()
            with recipe.step():
                model.decode(model.tokenize(images)).float().square().mean().backward()
        assert set(model.state_dict()) == stock
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    close = [float((results[1][n] - g).norm() / g.norm().clamp_min(1e-12)) for n, g in results[0].items()]
    assert sorted(close)[len(close) // 2] < (0.02 if name == "bf16_te" else 0.15)


def test_freed_memory_stays_with_the_process():
    """As the activations of a step: 160 MiB at once, then nothing. Pages that were given back would be cleared anew."""

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.ones(1 << 20) for _ in range(40)]
        del activations
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    precision.setup(torch.device("cpu"))
    assert min(step() for _ in range(4)) < 4096  # of 40,960 pages of 4 KiB
