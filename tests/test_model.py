"""The model beyond the golden values: sizes, shapes, masks, ablations, precision, draws."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stepping import backward
from support import TINY

from unite_fast.config import DECODER_SIZES, ENCODER_SIZES, EncoderConfig, ModelConfig, ObjectiveConfig
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.efficiency import precision
from unite_fast.layers.attention import Keys
from unite_fast.model.encoder import GenerativeEncoder, Layout, Modulation
from unite_fast.model.flops import training_flops
from unite_fast.model.unite import UNITE, build
from unite_fast.objective import Draws


def tiny(**changes) -> ModelConfig:
    return dataclasses.replace(from_dict(parse_yaml(TINY, "tiny")).model, **changes)


def filled(config: ModelConfig, seed: int = 0) -> UNITE:
    """A model whose zero-initialised layers are filled."""
    model = build(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("encoder", ENCODER_SIZES)
@pytest.mark.parametrize("decoder", DECODER_SIZES)
def test_every_size_can_be_built(encoder, decoder):
    config = ModelConfig(encoder=ENCODER_SIZES[encoder], decoder=DECODER_SIZES[decoder])
    with torch.device("meta"):
        model = UNITE(config)
    assert len(model.encoder.blocks) == config.encoder.depth
    assert model.trainable_parameters() > 50e6


@pytest.mark.parametrize(
    ("size", "patch", "channels", "dim", "latents"), [(8, 2, 1, 4, 8), (12, 4, 3, 6, 9), (16, 4, 2, 5, 20)]
)
def test_any_geometry(size, patch, channels, dim, latents):
    model = build(tiny(image_size=size, patch_size=patch, channels=channels, latent_dim=dim, num_latents=latents))
    images, labels = torch.rand(2, channels, size, size), torch.tensor([0, 9])
    draws = Draws.make(model, ObjectiveConfig(), 0, torch.arange(2))
    losses = backward(model, images, labels, draws, ObjectiveConfig(perceptual_weight=0))
    assert losses["latents"].shape == (2, latents, dim)
    assert model.decode(losses["latents"]).shape == images.shape
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == ["encoder.t_embedder.special_time_emb"]


def test_latents_are_normalised():
    z = build(tiny()).tokenize(torch.rand(3, 1, 8, 8))
    assert z.mean(-1).abs().max() < 1e-5
    z = filled(tiny()).tokenize(torch.rand(3, 1, 8, 8))
    assert z.std() > 0.1


def test_tokenize_without_draws_is_deterministic():
    model, images = filled(tiny()), torch.rand(2, 1, 8, 8)
    assert torch.equal(model.tokenize(images), model.tokenize(images))


@torch.no_grad()
def test_masked_context_tokens_do_not_matter():
    """A key mask makes a batch of sets of different sizes equal to each set on its own."""
    config = dataclasses.replace(ENCODER_SIZES["small"], depth=3, width=32, heads=2, in_context_start=1)
    encoder = GenerativeEncoder(config, 4, 10, max_tokens=64)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(1, 6, 4), torch.tensor([0.3]), torch.tensor([2])
    positions, context = torch.randn(1, 6, 32), torch.randn(1, 10, 32)
    alone = encoder(x, t, y, positions, context[:, :7])
    mask = torch.arange(16)[None] < 13  # 6 registers and 7 real context tokens
    padded = encoder(x, t, y, positions, context, mask)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    assert (encoder(x, t, y, positions, context) - alone).abs().max() > 5e-5  # ten times what the mask may leave


def test_the_last_block_is_pruned_exactly():
    """Kept rows equal those of a block that computes all, also with an odd number of heads; so do the gradients."""
    for heads, backend in ((4, "eager"), (4, "fused"), (3, "eager")):
        config = EncoderConfig(1, 24 if heads == 3 else 32, heads, in_context_start=0, in_context_len=2)
        encoder = GenerativeEncoder(config, 4, 10, max_tokens=16)
        for p in encoder.parameters():
            torch.nn.init.normal_(p, std=0.2)
        d = config.width
        x, y = torch.randn(2, 2, 12, d).unbind(0)
        chunks = torch.randn(2, 6 * d).chunk(6, dim=-1)
        following = Modulation(encoder.blocks[0].norm1.weight, *torch.randn(2, 2, d).unbind(0))
        layout = Layout(
            encoder.rotary_cos, encoder.rotary_sin, True, 2, Keys(torch.arange(12)[None] < torch.tensor([[12], [9]]))
        )
        results = []
        for kept in (0, 5):
            inputs = [t.clone().requires_grad_() for t in (x, y)]
            encoder.zero_grad()
            out = encoder.blocks[0](*inputs, chunks, following, layout, backend, kept)
            out = [o if kept else o[:, 2:7] for o in out]
            (out[0].square().sum() + out[1].sum()).backward()
            grads = [p.grad for p in encoder.blocks[0].parameters() if p.grad is not None]
            results.append([*out, *(t.grad for t in inputs), *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_block_checkpointing_changes_nothing():
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    gradients = []
    for recompute in (False, True):
        model = filled(tiny())
        model.encoder.recompute = model.decoder.recompute = recompute
        draws = Draws.make(model, ObjectiveConfig(), 0, torch.arange(2))
        backward(model, images, labels, draws, ObjectiveConfig(perceptual_weight=0))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def losses_of(model: UNITE, **changes) -> dict[str, torch.Tensor]:
    o = dataclasses.replace(ObjectiveConfig(perceptual_weight=0), **changes)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = Draws.make(model, o, 7, torch.arange(4))
    model.zero_grad()
    return backward(model, images, torch.arange(4), draws, o)


def test_ablation_switches():
    model = filled(tiny())
    base = losses_of(model)
    assert losses_of(model, flow_reduction="mean")["flow"] == pytest.approx(float(base["flow"]) / 3, rel=1e-5)
    for change in ({"flow_loss": "x0"}, {"flow_time": "uniform"}, {"label_dropout": 1.0}):
        other = losses_of(model, **change)
        assert other["l1"] == base["l1"], change
        assert other["flow"] != base["flow"], change
    for change in ({"noising": "add"}, {"noising_t": (0.1, 0.2)}, {"noising_probability": 0.0}, {"pixel_loss": "l2"}):
        other = losses_of(model, **change)
        assert other[change.get("pixel_loss", "l1")] != base["l1"], change
        assert other["flow"] == base["flow"], change


def test_stop_gradient_switch():
    """Without it the flow loss reaches what only the tokenizer uses: the patch embedding."""
    model = filled(tiny())

    def patch_gradient(**changes) -> torch.Tensor:
        losses_of(model, pixel_weight=0.0, **changes)
        gradient = model.patch_embed.patch_embeddings.projection.weight.grad
        return torch.zeros(1) if gradient is None else gradient.abs().max()

    assert patch_gradient() == 0
    assert patch_gradient(stop_gradient=False) > 0


def test_separate_denoiser_computes_the_same_and_learns_apart():
    shared, apart = filled(tiny(), 3), build(tiny(separate_denoiser=True), 3)
    apart.load_state_dict(shared.state_dict(), strict=False)
    apart.denoiser.load_state_dict(shared.encoder.state_dict())
    apart.latent_tokens_denoiser.data.copy_(shared.latent_tokens)
    one, two = losses_of(shared), losses_of(apart)
    assert two["total"] == pytest.approx(float(one["total"]), rel=1e-5)
    assert apart.denoiser.up_sample.weight.grad is not None
    assert not torch.equal(apart.denoiser.up_sample.weight.grad, apart.encoder.up_sample.weight.grad)


SHIFTS = {0.5: 0.5, "total": (32 / 4096) ** 0.5, "channels": 2**-5, "tokens": (8 / 4096) ** 0.5}


@pytest.mark.parametrize(("mode", "value"), SHIFTS.items())
def test_time_shift(mode, value):
    assert UNITE(tiny(time_shift=mode)).time_shift == pytest.approx(value)


def test_draws_do_not_depend_on_the_batch():
    model, o = build(tiny()), ObjectiveConfig()
    whole = Draws.make(model, o, 5, torch.arange(100, 108))
    part = Draws.make(model, o, 5, torch.arange(104, 106))
    for field in dataclasses.fields(Draws):
        a, b = getattr(whole, field.name), getattr(part, field.name)
        a = a[:, 4:6] if field.name.startswith("flow") else a[4:6]
        assert torch.equal(a, b), field.name
    other = Draws.make(model, o, 6, torch.arange(100, 108))
    assert not torch.equal(other.flow_noise, whole.flow_noise)


def test_laws_of_the_draws():
    model, o = build(tiny()), ObjectiveConfig()
    d = Draws.make(model, o, 0, torch.arange(4000))
    assert 0 <= d.tokenize_t.min() <= d.tokenize_t.max() < 0.01
    assert 0.7 <= d.noising_t.min() <= d.noising_t.max() < 1
    assert float(d.noising_mask.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(d.flow_class_dropped.float().mean()) == pytest.approx(0.1, abs=0.01)
    unshifted = d.flow_t / (0.5 + 0.5 * d.flow_t)
    assert float(torch.logit(unshifted.double()).mean()) == pytest.approx(0, abs=0.03)
    assert float(torch.logit(unshifted.double()).std()) == pytest.approx(1, abs=0.03)
    assert float(d.flow_noise.std()) == pytest.approx(1, abs=0.01)
    assert torch.corrcoef(torch.stack([d.flow_noise[0].flatten(), d.flow_noise[1].flatten()]))[0, 1].abs() < 0.01


def test_bf16_losses_stay_close():
    model = filled(tiny())
    exact = losses_of(model)
    with precision.autocast("bf16", torch.device("cpu")):
        rounded = losses_of(model)
    for name in ("l1", "flow", "total"):
        assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=2e-2), name


def test_flops_agree_with_torch_and_the_published_count():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(image_size=64, encoder=dataclasses.replace(ENCODER_SIZES["small"], depth=5), num_latents=16,
                         decoder=dataclasses.replace(DECODER_SIZES["small"], depth=2))  # fmt: skip
    model, o = build(config), ObjectiveConfig(perceptual_weight=0)
    draws = Draws.make(model, o, 0, torch.arange(1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backward(model, torch.rand(1, 3, 64, 64), torch.tensor([0]), draws, o)
    counted = counter.get_total_flops()
    assert training_flops(config, 3, False, pruned=True)["total"] == pytest.approx(counted, rel=1e-3)
    assert training_flops(config, 3, False)["total"] > 1.02 * counted  # by definition, without the pruning
    published = {3: 1015.2e9, 14: 2667.5e9}
    for steps, total in published.items():
        assert training_flops(ModelConfig(), steps, True)["total"] == pytest.approx(total, rel=0.01)
