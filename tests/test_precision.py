"""The precision recipes: products against float64, which layers, what is cast how often, checkpoints, errors.

tests/test_efficiency.py holds the losses of each recipe to those of float32.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from support import TINY, command
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast import objective, run
from unite_fast.checkpoint import TrainState
from unite_fast.config import ENCODER_SIZES, EfficiencyConfig, ModelConfig, ObjectiveConfig, UserError
from unite_fast.config_io import from_dict, parse_yaml
from unite_fast.data import Batch
from unite_fast.model.layers import Linear
from unite_fast.model.unite import UNITE, build
from unite_fast.runtime import precision
from unite_fast.runtime.distributed import Ranks
from unite_fast.step import TrainStep
from unite_kernels import copied_linear
from unite_kernels.copied_linear import half_linear, quantise, scaled_linear, with_weight_gradient, write_scaled_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OLD_CPU = DEVICE.type == "cpu" and tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13)
ROWWISE = pytest.param(True, marks=pytest.mark.skipif(OLD_CPU, reason="a scale per row on CPUs needs torch 2.13"))
FP8 = ["fp8", pytest.param("fp8_rowwise", marks=ROWWISE.marks)]


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e8])
def test_quantised_values_come_back(dtype, per_row, magnitude):
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(0)) * magnitude
    x[4] *= 1e-3
    values, factors = quantise(x, dtype, per_row)
    assert values.dtype == dtype
    assert factors.shape == ((9, 1) if per_row else ())
    step = 2.0 ** -(4 if dtype == E4M3 else 3)  # half the distance of neighbours, relative
    floor = torch.finfo(dtype).smallest_normal * factors  # below it the distance is absolute
    assert ((values.float() * factors - x).abs() <= step * x.abs() + floor).all()
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()
    torch.testing.assert_close(factors * torch.finfo(dtype).max, largest, rtol=1e-6, atol=0)


def test_quantising_nothing_and_what_is_not_finite():
    values, factors = quantise(torch.zeros(4, 4), E4M3)
    assert (values.float() * factors == 0).all()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(4, 4)
        x[1, 2] = bad
        values, factors = quantise(x, E4M3)
        assert (values.float() * factors).isnan().all()
        values, factors = quantise(x, E5M2, per_row=True)
        assert (values.float() * factors).isnan().any(1).tolist() == [False, True, False, False]


def layer(k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k + n)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return weight.to(DEVICE).requires_grad_(), torch.randn(n, generator=generator).to(DEVICE).requires_grad_()


def copies_of(weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    made = (
        torch.empty(n, k, dtype=E4M3, device=DEVICE),
        torch.full((n, 1) if per_row else (), torch.nan, device=DEVICE),
        torch.empty(k, n, dtype=E4M3, device=DEVICE),
        torch.full((k, 1) if per_row else (), torch.nan, device=DEVICE),
    )
    write_scaled_(weight.detach(), *made)
    return made


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative distances."""
    return [float((a.double() - b).norm().detach() / b.norm().detach()) for a, b in zip(found, exact, strict=True)]


def with_gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def setting(k: int, n: int, rows: tuple[int, ...], split: int | None):
    """x, weight, bias, and the float64 output and gradients for dy."""
    weight, bias = layer(k, n)
    x = torch.randn(*rows, k, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    dy = torch.randn(*rows, n, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 1e-6
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    return x, weight, bias, dy, with_gradients(F.linear(*exact), dy.double(), *exact)


def bounds(n: int, split: int | None) -> tuple[int, ...]:
    return (0, n) if split is None else (0, split, n)


@pytest.mark.parametrize("split", [None, 32])
@pytest.mark.parametrize(("k", "n", "rows"), [(32, 96, (3, 5)), (48, 64, (17,)), (64, 80, (2, 3, 7))])
def test_half_linear(k, n, rows, split):
    """At most the error of autocast's linear layer, and a weight gradient in float32."""
    x, weight, bias, dy, exact = setting(k, n, rows, split)
    copy, bias_copy = weight.detach().bfloat16(), bias.detach().bfloat16()
    y = torch.cat(half_linear(x, weight, bias, copy, bias_copy, bounds(n, split)), -1)
    ours = with_gradients(y, dy, x, weight, bias)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs = with_gradients(F.linear(x, weight, bias), dy, x, weight, bias)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for a, b in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert a <= 1.2 * b
    (y,) = half_linear(x, weight, None, copy, None, (0, n))
    torch.testing.assert_close(y, F.linear(x.bfloat16(), copy))


@pytest.mark.parametrize("per_row", [False, ROWWISE])
@pytest.mark.parametrize("split", [None, 32])
@pytest.mark.parametrize(("k", "n", "rows"), [(32, 96, (3, 5)), (48, 64, (17,)), (128, 256, (2, 3, 7))])
def test_scaled_linear(k, n, rows, split, per_row):
    x, weight, bias, dy, exact = setting(k, n, rows, split)
    copies, bias_copy = copies_of(weight, per_row), bias.detach().bfloat16()
    parts = scaled_linear(x, weight, bias, copies, bias_copy, bounds(n, split))
    assert all(part.is_contiguous() for part in parts)
    ours = with_gradients(torch.cat(parts, -1), dy, x, weight, bias)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    y, dx, dweight, dbias = errors(ours, exact)
    assert y < 0.05  # two operands of 4 bits
    assert 0.005 < dx < (0.05 if per_row else 0.08)  # in float8: 3 bits of dy with one scale
    assert dweight < 0.006  # in bfloat16
    assert dbias < 0.006
    (y,) = scaled_linear(x, weight, None, copies, None, (0, n))
    assert errors([y], [F.linear(x, weight).double()])[0] < 0.05


@pytest.mark.parametrize("kind", ["plain", "half", "tensor", pytest.param("row", marks=ROWWISE.marks)])
def test_some_of_the_columns(kind):
    """As the last block asks for them: queries of a few rows, then keys and values of all. The rest of dW is zero."""
    x, weight, bias, dy, _ = setting(32, 96, (3, 5), None)
    ours = Linear(32, 96, large=True).to(DEVICE)
    with torch.no_grad():
        ours.weight.copy_(weight)
        ours.bias.copy_(bias)
    if kind != "plain":
        name = {"half": "bf16", "tensor": "fp8", "row": "fp8_rowwise"}[kind]
        precision.apply(ours, EfficiencyConfig(precision=name), DEVICE).refresh()
    for wanted in ((0, 32), (32, 64, 96), (16, 48)):
        where = slice(wanted[0], wanted[-1])
        parts = ours.parts(x, *wanted)
        assert [part.shape[-1] for part in parts] == [b - a for a, b in itertools.pairwise(wanted)]
        assert all(part.is_contiguous() for part in parts)
        found = with_gradients(torch.cat(parts, -1), dy[..., where], x, ours.weight, ours.bias)
        exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        expected = with_gradients(F.linear(*exact)[..., where], dy[..., where].double(), *exact)
        assert max(errors(found, expected)) < {"plain": 1e-5, "half": 0.01}.get(kind, 0.08)
        others = torch.ones(96, dtype=torch.bool, device=DEVICE)
        others[where] = False
        assert (found[2][others] == 0).all()
        assert (found[3][others] == 0).all()


def test_scaled_gradients_below_the_range_of_half_precision():
    """A gradient of 1e-12, as a mean over many pixels gives, is not lost: its scale comes from its own values."""
    x, weight, bias, dy, exact = setting(64, 64, (5,), None)
    (y,) = scaled_linear(x, weight, bias, copies_of(weight, False), bias.detach().bfloat16(), (0, 64))
    _, dx, dweight, _ = with_gradients(y, dy * 1e-12, x, weight, bias)
    scaled = [exact[1] * 1e-12, exact[2] * 1e-12]
    assert max(errors([dx, dweight], scaled)) < 0.08


@pytest.mark.parametrize("kind", ["half", "tensor", pytest.param("row", marks=ROWWISE.marks)])
def test_compiled_in_one_graph(kind):
    x, weight, bias, dy, _ = setting(32, 96, (3, 5), 32)
    bias_copy = bias.detach().bfloat16()
    copies = copies_of(weight, kind == "row")

    def call(x: Tensor) -> Tensor:
        if kind == "half":
            return torch.cat(half_linear(x, weight, bias, weight.detach().bfloat16(), bias_copy, (0, 32, 96)), -1)
        return torch.cat(scaled_linear(x, weight, bias, copies, bias_copy, (0, 32, 96)), -1)

    eager = with_gradients(call(x), dy, x, weight, bias)
    torch._dynamo.reset()
    compiled = with_gradients(torch.compile(call, backend="aot_eager", fullgraph=True)(x), dy, x, weight, bias)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_layers_share_compiled_code(name):
    """Blocks compiled one by one give two graphs, the last block's modulation being strided otherwise; none later."""
    config = from_dict(parse_yaml(TINY, "tiny")).model
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, depth=5, in_context_len=0))
    model = build(config)
    recipe = precision.apply(model, EfficiencyConfig(precision=name), torch.device("cpu"))
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.encoder.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        with recipe.step():
            model.tokenize(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert counter.frame_count == 2


def test_weight_gradient_beside_another_product():
    """What Transformer Engine's layers get: their own output and input gradient, our weight gradient."""
    x, weight, bias, dy, exact = setting(32, 48, (3, 5), None)
    half = x.bfloat16()
    y = F.linear(half, weight.detach().bfloat16(), bias.detach().bfloat16())
    ours = with_gradients(with_weight_gradient(y, half, weight, bias), dy, x, weight, bias)
    assert max(errors(ours, exact)) < 0.01


# --- which layers ----------------------------------------------------------------------------------------------------


def prepared(name: str, encoder: str = "base", **changes) -> precision.Recipe:
    with torch.device("meta"):
        model = UNITE(dataclasses.replace(ModelConfig(), encoder=ENCODER_SIZES[encoder]))
    return precision.apply(model, EfficiencyConfig(precision=name, **changes), torch.device("meta"))


def test_all_large_layers_of_base_and_xl_are_in_float8():
    assert len(prepared("fp8").scaled) == 12 * 4 + 12 * 4
    assert str(prepared("fp8")) == "fp8 (96 layers in float8)"
    assert len(prepared("fp8", "xl").scaled) == 28 * 4 + 12 * 4


def test_layers_whose_sizes_float8_does_not_allow_are_named():
    recipe = prepared("fp8", "large")  # its SwiGLU is 2,730 wide
    assert len(recipe.scaled) == 24 * 2 + 12 * 4
    assert str(recipe) == (
        "fp8 (96 layers in float8; in bfloat16, sizes no multiples of 16: "
        "encoder.blocks.*.mlp.w12 1024 -> 5460, encoder.blocks.*.mlp.w3 2730 -> 1024)"
    )


def test_only_large_layers_are_in_float8():
    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    precision.apply(model, EfficiencyConfig(precision="fp8"), torch.device("cpu"))
    scaled = {n for n, m in model.named_modules() if isinstance(getattr(m, "products", None), precision.Scaled)}
    blocks = {f"encoder.blocks.{i}.attn.{n}" for i in range(3) for n in ("qkv", "proj")}
    decoder = {f"decoder.decoder_layers.0.{n}" for n in ("qkv", "attn_proj", "ffn_up", "ffn_down")}
    assert scaled == blocks | decoder  # the tiny SwiGLU is 85 wide
    others = {n for n, m in model.named_modules() if isinstance(getattr(m, "products", None), precision.Half)}
    assert {"encoder.up_sample", "encoder.final_layer.linear", "encoder.blocks.0.adaLN_modulation.1"} <= others
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears - scaled - others == {"encoder.t_embedder.mlp.0", "encoder.t_embedder.mlp.2"}  # in float32


def test_residual():
    model = build(from_dict(parse_yaml(TINY, "tiny")).model)
    recipe = precision.apply(model, EfficiencyConfig(precision="bf16", residual="bf16"), torch.device("cpu"))
    assert str(recipe) == "bf16 with a bf16 residual"
    seen = []
    for block in (model.encoder.blocks[-1], model.decoder.decoder_layers[-1]):
        block.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].dtype))
    for training in (True, False):
        model.train(training)
        with recipe.step():
            model.decode(model.tokenize(torch.rand(1, 1, 8, 8)))
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


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
    state = run.fresh_state(config, ranks)
    step = TrainStep(config, ranks, (8, 2), 1000)
    batch = Batch(torch.rand(16, 1, 8, 8), torch.arange(16) % 10, torch.arange(16))
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
        step(state, batch)
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
        recipe = precision.apply(model, EfficiencyConfig(precision="bf16", residual=residual), torch.device("cpu"))
        with recipe.step(), Casts(set()) as casts:
            model.tokenize(torch.rand(2, 1, 8, 8))
        counts.append(sum(len(shape) == 3 for shape in casts.shapes))
    assert counts[0] == counts[1] <= 4


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
    recipe = precision.apply(model, EfficiencyConfig(precision=name, residual=residual), torch.device("cpu"))
    assert not recipe.left
    o = ObjectiveConfig(perceptual_weight=0)
    images, labels = torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8)
    with recipe.step():
        draws = objective.Draws.make(model, o, 0, torch.arange(8))
        losses = objective.backward(model, images, labels, draws, o)
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


# --- training, checkpoints, errors -----------------------------------------------------------------------------------


def test_a_step_needs_the_recipe_that_the_model_was_prepared_for():
    step, state, batch = step_of(precision="fp8")
    state.recipe = precision.Recipe("bf16")
    with pytest.raises(ValueError, match="prepared for bf16, not fp8"):
        step(state, batch)


def test_evaluation_uses_the_parameters_not_the_copies():
    step, state, batch = step_of(precision="fp8")
    step(state, batch)  # the copies are of the weights before this step
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
    precision.apply(model, EfficiencyConfig(precision=name), torch.device("cpu"))
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
    assert "precision fp8 with a bf16 residual (10 layers in float8; in bfloat16" in result.stdout


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
        recipe = precision.apply(model, EfficiencyConfig(precision=recipe_name), DEVICE)
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
