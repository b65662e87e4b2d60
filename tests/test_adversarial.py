"""The decoder's fine-tuning against a discriminator: losses and gradients, and the step of both networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from stepping import load_tiny, trainer
from torch import Tensor

from unite_fast.checkpoint import resume, saving
from unite_fast.config import AdversarialConfig
from unite_fast.data import Batch
from unite_fast.efficiency import compiling
from unite_fast.objective import adversarial, augment
from unite_fast.objective.adversarial import Adversarial
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import local, part_of, whole
from unite_fast.plan import cost
from unite_fast.run.stats import DuelAlarm
from unite_fast.training.state import tensors_of
from unite_fast.training.step import TrainStep
from unite_kernels import copied_linear

FROZEN = ("encoder", "encoder_layer_norm", "latent_tokens", "patch_embed")
STAGE = (
    "objective.flow_steps=0",
    "objective.adversarial.weight=0.5",
    "objective.adversarial.channels=8",
    f"optim.frozen=[{', '.join(FROZEN)}]",
)
ALONE = Ranks(0, 1, torch.device("cpu"))


def stage(*overrides: str, ranks: Ranks | None = None) -> tuple[TrainStep, Batch]:
    """A step of both networks and this rank's share of a batch of 16; no weight of the encoder is zero any more."""
    step, batch = trainer(*STAGE, "optim.warmup_epochs=0", *overrides, ranks=ranks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in step.state.model.parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            local(parameter).add_(part_of(noise, parameter))
        if (trunk := step.state.parts["discriminator"].module.trunk) is not None:
            for name, parameter in trunk.encoder.named_parameters():
                local(parameter).copy_(local(step.state.model.encoder.get_parameter(name)))
    return step, batch()


def duel(step: TrainStep) -> Adversarial:
    assert step.objective.adversarial is not None
    return step.objective.adversarial


# --- one step against plain autograd ---------------------------------------------------------------------------------


def plain_losses(step: TrainStep, batch: Batch, ratio: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the reconstruction's loss, the generator's, both together as the decoder's, the discriminator's)."""
    model, opponent, o = step.state.model, step.state.parts["discriminator"].module, step.config.objective
    c, images = o.adversarial, batch.content["images"]
    draws = step.objective.draws(model, step.config.seed, batch.samples)
    registers = draws.tokenizer()
    z = model.tokenize(images, *registers)
    fake = model.decode(draws.decoder_input(z, o))
    reconstruction = o.pixel_weight * (fake - images).square().mean()
    held = fake + ((fake.clamp(0, 1) * 255).round() / 255 - fake).detach()
    numbers = augment.draw(step.config.seed, batch.samples)

    def scores(x: Tensor) -> Tensor:
        labels = torch.full((len(x),), model.null_class)
        source = opponent.trunk or model
        context = source.embedder({"images": x})
        found = source.encoder.features(*registers, labels, source.latent_tokens, context, opponent.after)
        return torch.cat([head(f) for head, f in zip(opponent.heads, found, strict=True)], dim=1)

    seen = augment.augment(images, numbers, c.augment)
    real, against = scores(seen), scores(augment.augment(held.detach(), numbers, c.augment))
    pull = scores(augment.augment(held, numbers, c.augment))
    if c.loss == "hinge":
        generator, judge = -pull.mean(), ((1 - real).clamp_min(0).mean() + (1 + against).clamp_min(0).mean()) / 2
    else:
        generator, judge = F.softplus(-pull).mean(), (F.softplus(-real) + F.softplus(against)).mean() / 2
    if c.penalty == "lecam":
        a_real, a_fake = opponent.anchors
        judge = judge + c.penalty_weight * (
            (real - a_fake).clamp_min(0).square().mean() + (a_real - against).clamp_min(0).square().mean()
        )
    elif c.penalty == "r1":
        moved = scores(seen + 0.01 * augment.direction(step.config.seed, batch.samples, tuple(images.shape[1:])))
        slope = (moved.mean(1) - real.mean(1)) / 0.01
        judge = judge + c.penalty_weight * slope.square().mean() / 2
    return reconstruction, generator, reconstruction + c.weight * ratio * generator, judge


@pytest.mark.parametrize(
    ("kind", "trunk", "penalty"),
    [("hinge", "frozen", "none"), ("non_saturating", "trained", "lecam"), ("hinge", "trained", "r1")],
)
def test_gradients_of_both_networks(kind, trunk, penalty):
    options = {"loss": kind, "trunk": trunk, "penalty": penalty, "penalty_weight": "0.3" if penalty != "none" else "1"}
    step, batch = stage(*(f"objective.adversarial.{key}={value}" for key, value in options.items()))
    model, opponent = step.state.model, step.state.parts["discriminator"].module
    opponent.ratio.fill_(0.7)
    opponent.anchors.copy_(torch.tensor([0.1, -0.1]))
    opponent.anchored.fill_(1.0)
    step.objective.begin(1)
    draws = step.objective.draws(model, step.config.seed, batch.samples)
    found = step.objective.backward(model, batch, draws)
    ours = {name: p.grad.clone() for name, p in step.state.parameters.items() if p.grad is not None}
    for p in step.state.parameters.values():
        p.grad = None
    reconstruction, generator, decoders, judges = plain_losses(step, batch, 0.7)
    assert found["l2"] * step.config.objective.pixel_weight == pytest.approx(reconstruction.item(), rel=1e-6)
    assert found["generator"] == pytest.approx(generator.item(), rel=1e-5, abs=1e-6)
    assert found["total"] == pytest.approx(decoders.item(), rel=1e-6)
    parts = {name: part.optimizer.parameters for name, part in step.state.parts.items()}
    for part, loss in (("", decoders), ("discriminator", judges)):
        names = [n for n, p in parts[part].items() if p.requires_grad]
        given = torch.autograd.grad(loss, [parts[part][n] for n in names], retain_graph=True, allow_unused=True)
        whole = torch.cat([g.flatten() for g in given if g is not None]).norm()
        for name, expected in zip(names, given, strict=True):
            if expected is not None:
                actual = ours[f"{part}.{name}" if part else name]
                assert (actual - expected).norm() <= 1e-6 * whole, (part, name)
    assert len(ours) == sum(
        g is not None
        for part, loss in (("", decoders), ("discriminator", judges))
        for g in torch.autograd.grad(loss, list(parts[part].values()), retain_graph=True, allow_unused=True)
    )


def test_the_adaptive_weight_is_that_of_the_whole_batch():
    """|dL/dW| / (|dG/dW| + 1e-6) at the decoder's last layer, though the batch is cut in two; in force a step later."""
    step, batch = stage("objective.adversarial.spectral_norm=false")  # whose iteration begins a step
    reconstruction, generator, _, _ = plain_losses(step, batch, 0.0)
    last = step.state.model.decoder.decoder_pred.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, generator)]
    first, second = step(batch), None
    ratio = float(norms[0] / (norms[1] + 1e-6))
    assert 0.01 < ratio < 1e4
    held = step.state.parts["discriminator"].module.ratio
    assert float(held) == pytest.approx(ratio, rel=1e-5)
    second = step(batch)
    assert (float(first["adaptive_weight"]), float(second["adaptive_weight"])) == (0, pytest.approx(0.5 * ratio))
    assert float(adversarial.adaptive_ratio(torch.ones(4), torch.zeros(4), 10.0)) == 10
    fixed, batch = stage("objective.adversarial.adaptive=false")
    assert float(fixed(batch)["adaptive_weight"]) == 0.5
    assert float(fixed.state.parts["discriminator"].module.ratio) == 0


def test_the_difference_is_the_slope():
    """r1's squared difference is that of the directional derivative, of which autograd has the exact value."""
    step, batch = stage("objective.adversarial.penalty=r1", "objective.adversarial.augment=[]")
    model, opponent = step.state.model, duel(step).discriminator
    draws = step.objective.draws(model, step.config.seed, batch.samples)
    images = batch.content["images"]
    penalty = duel(step).judged(model, duel(step).shown(images, images, draws)).penalty
    moved = images.clone().requires_grad_()
    scores = opponent.logits(opponent.features(model, moved, *draws.tokenizer())).mean(1)
    (slope,) = torch.autograd.grad(scores.sum(), moved)
    direction = augment.direction(step.config.seed, batch.samples, tuple(images.shape[1:]))
    exact = (slope * direction).flatten(1).sum(1).square().mean() / 2
    assert float(penalty) == pytest.approx(float(exact), rel=0.05)


# --- the images that it sees ---


def test_rounding_passes_the_gradient():
    x = torch.tensor([-0.2, 0.1, 0.5, 1.3], requires_grad=True)
    held = adversarial.rounded(x)
    assert torch.equal((held * 255).round(), held * 255)
    assert (held.min(), held.max()) == (0, 1)
    (gradient,) = torch.autograd.grad((held * torch.arange(4.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(4.0))


def test_changes_of_images():
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    middle = torch.full((3, augment.NUMBERS), 0.5)
    assert torch.allclose(augment.augment(x, middle, ("colour", "translation")), x, atol=1e-6)  # these change nothing
    numbers = middle.clone()
    numbers[:, 4], numbers[:, 5] = 0.99, 0.0  # two rows down, two columns to the left
    moved = augment.translation(x, numbers)
    assert torch.equal(moved[:, :, 2:, :-2], x[:, :, :-2, 2:])
    assert not moved[:, :, :2].any()
    assert not moved[:, :, :, -2:].any()
    holes = augment.cutout(torch.ones(3, 1, 16, 16), middle)
    assert int((holes == 0).sum()) == 3 * 64
    drawn = augment.draw(0, torch.arange(400))
    bright = augment.colour(torch.zeros(400, 3, 2, 2), drawn)
    assert bright.abs().max() <= 0.25
    assert bright.min() < -0.2
    some = augment.augment(torch.ones(400, 1, 16, 16), drawn, ("cutout",), 0.3)
    assert float((some == 0).flatten(1).any(1).float().mean()) == pytest.approx(0.3, abs=0.08)
    assert torch.equal(augment.draw(0, torch.arange(100, 103)), drawn[100:103])


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_generative_encoder_stays_and_costs_no_gradients(precision, monkeypatch):
    shapes, original = [], copied_linear._layer_weight_gradient
    monkeypatch.setattr(
        copied_linear, "_layer_weight_gradient", lambda *a: (shapes.append(tuple(a[4])), original(*a))[1]
    )
    step, batch = stage(f"efficiency.precision={precision}", "efficiency.kernels=fused")
    before = {n: p.detach().clone() for n, p in step.state.model.named_parameters()}
    heads = {n: p.detach().clone() for n, p in step.state.parts["discriminator"].module.named_parameters()}
    rows = [step(batch) for _ in range(3)]
    assert all(row["skipped"] == 0 and row["d_accuracy"] > 0 for row in rows)
    for name, parameter in step.state.model.named_parameters():
        frozen = name.split(".")[0] in FROZEN
        assert torch.equal(parameter, before[name]) or not frozen, name
        assert (name in step.state.optimizer.parameters) != frozen, name
        assert parameter.grad is None
    moved = [n for n, p in step.state.optimizer.parameters.items() if not torch.equal(p, before[n])]
    assert len(moved) == len(step.state.optimizer.parameters)
    assert not any(n.startswith("encoder") for n in step.state.optimizer.state_dict())
    still = [n for n, p in duel(step).discriminator.named_parameters() if torch.equal(p, heads[n])]
    assert all(n.endswith("leave.bias") for n in still)  # where hinge's two sides cancel
    encoders = {tuple(p.shape) for n, p in before.items() if n.startswith("encoder.") and p.ndim == 2}
    decoders = {tuple(p.shape) for n, p in before.items() if "decoder." in n and p.ndim == 2}
    assert not set(shapes) & (encoders - decoders)
    assert bool(shapes) == (precision == "bf16")


def test_features_compute_what_they_need():
    """Of the blocks that run and of the one that follows them; not sharded, when all are gathered together."""
    step, batch = stage("model.encoder.depth=5")
    model, ran = step.state.model, []
    for number, block in enumerate(model.encoder.blocks):
        block.adaLN_modulation[1].register_forward_hook(lambda *_, number=number: ran.append(number))
    model.encoder.final_layer.adaLN_modulation[1].register_forward_hook(lambda *_: ran.append("last"))
    draws = step.objective.draws(model, 0, batch.samples)
    two, three = model.features(batch.content, *draws.tokenizer(), (2, 3))
    assert ran == [0, 1, 2, 3]
    assert torch.equal(model.features(batch.content, *draws.tokenizer(), (2, 5))[0], two)
    assert ran[4:] == [0, 1, 2, 3, 4, "last"]
    assert not torch.equal(two, three)


def run_steps(ranks: Ranks, count: int, *overrides: str) -> dict[str, Tensor]:
    """The state after ``count`` steps in which the discriminator begins with the second, the decoder with the third."""
    starts = ("objective.adversarial.discriminator_start=1", "objective.adversarial.generator_start=2")
    step, batch = stage(*starts, "objective.adversarial.penalty=lecam", *overrides, ranks=ranks)
    rows = [step(batch) for _ in range(count)]
    told = {
        f"told.{n}": torch.stack([row[n] for row in rows]) for n in ("total", "d_accuracy", "d_real", "adaptive_weight")
    }
    averaged = list(told.values())
    ranks.average_(averaged)
    return {n: whole(t.detach()).clone() for n, t in tensors_of(step.state).items()} | told


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return run_steps(ALONE, 4)


def test_the_starts(alone):
    assert alone["told.adaptive_weight"].tolist()[:3] == [0, 0, 0]
    assert alone["told.adaptive_weight"][3] > 0  # in force in the step after it was measured
    assert alone["told.d_accuracy"][0] == 0
    assert bool((alone["told.d_accuracy"][1:] > 0).all())
    assert (int(alone["optimizer_steps"]), int(alone["discriminator.optimizer_steps"])) == (4, 3)


def test_two_ranks_are_one(alone):
    """Also where gradients of one network come later than those of the other, and leave during the backward."""
    first, second = on_ranks(2, run_steps, 4)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=2e-3, atol=2e-5, msg=name)


SHARDED = ("train.strategy=fsdp2", "train.micro_batch=4")  # two micro-batches on each of two ranks


def interrupted(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    """Four steps with sharded networks, and two and two with a checkpoint between them."""
    starts = ("objective.adversarial.discriminator_start=1", "objective.adversarial.generator_start=2", *SHARDED)
    step, batch = stage(*starts, ranks=ranks)
    again, _ = stage(*starts, ranks=ranks)
    for number in range(4):
        step(batch)
        if number == 1:
            writer = saving.Writer(Path(folder), step.config, ranks)
            writer.save(step.state, {})
            writer.wait()
    ranks.barrier()
    resume(Path(folder) / "step-0000002", again.state, step.config.train.global_batch)
    for _ in range(2):
        again(batch)
    return [{n: whole(t.detach()).clone() for n, t in tensors_of(s.state).items()} for s in (step, again)]


def sharded_stage(ranks: Ranks, folder: str) -> list[dict[str, Tensor]]:
    return [run_steps(ranks, 4, *SHARDED, "objective.adversarial.trunk=trained"), *interrupted(ranks, folder)]


def test_sharded_networks_are_those_of_one_process(alone_on_a_copy, tmp_path):
    """With a trunk that learns; with a frozen one resumed bit for bit."""
    (found, straight, resumed), (other, *_) = on_ranks(2, sharded_stage, str(tmp_path))
    for name, tensor in alone_on_a_copy.items():
        assert torch.equal(found[name], other[name]), name
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


def test_copies_of_shards_are_one_process(alone):
    """hsdp, two copies of two shards, the model's own encoder frozen; a micro-batch on each rank."""
    hsdp = ("train.strategy=hsdp", "train.shard_size=2", "train.micro_batch=4")
    first, *others = on_ranks(4, run_steps, 4, *hsdp)
    for name, tensor in alone.items():
        assert all(torch.equal(first[name], other[name]) for other in others), name
        torch.testing.assert_close(first[name], tensor, rtol=2e-3, atol=2e-5, msg=name)


def test_the_cut_of_a_batch_does_not_matter(alone):
    whole = run_steps(ALONE, 4, "train.micro_batch=16")
    for name, tensor in alone.items():
        torch.testing.assert_close(whole[name], tensor, rtol=2e-3, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def alone_on_a_copy() -> dict[str, Tensor]:
    return run_steps(ALONE, 4, "objective.adversarial.trunk=trained")


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
@pytest.mark.parametrize(
    "how",
    [
        ("efficiency.recompute=blocks", "efficiency.kernels=fused"),
        ("efficiency.compile=all",),
        ("efficiency.precision=bf16", "efficiency.recompute=blocks", "efficiency.kernels=fused"),
    ],
    ids=["fused", "compiled", "bf16"],
)
def test_however_it_is_computed(alone, alone_on_a_copy, how, trunk, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    if trunk == "frozen" and "compile" in how[0]:
        how = ("efficiency.compile=decoder",)
    found = run_steps(ALONE, 4, f"objective.adversarial.trunk={trunk}", *how)
    tolerance = 0.05 if "bf16" in how[0] else 2e-3
    for name in ("told.total", "told.d_real", "told.adaptive_weight", "discriminator.model.ratio"):
        expected = (alone if trunk == "frozen" else alone_on_a_copy)[name]
        close = {"rtol": tolerance, "atol": tolerance * 0.1, "msg": name}
        torch.testing.assert_close(found[name], expected, **close)


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_what_it_costs_is_counted_without_running(trunk):
    """Memory as autograd keeps it in the passes themselves; a copy of the encoder costs its own gradients as well."""
    step, batch = stage(f"objective.adversarial.trunk={trunk}")
    m, o, e, model = step.config.model, step.config.objective, step.config.efficiency, step.state.model
    counted = cost.activation_bytes(m, o, e, 16, FROZEN)
    assert counted.keys() == {"reconstruction", "generator", "discriminator"}
    draws = step.objective.draws(model, 0, batch.samples)
    for judging in (False, True):
        saved = cost.Saved([*model.parameters(), *duel(step).discriminator.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            _, prediction = step.objective.decoded(model, batch, draws)
            shown = duel(step).shown(batch.content["images"], adversarial.opened(prediction), draws)
            kept = (duel(step).judged if judging else duel(step).generator)(model, shown)
        assert saved.bytes == pytest.approx(counted["discriminator" if judging else "generator"], rel=0.05)
        del kept
    parts = cost.persistent_parts(m, o, step.config.optim, e, step.config.train, 1)
    assert parts["parameters"] == 4 * sum(p.numel() for p in step.state.parameters.values())
    assert parts["frozen"] == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adversary = dataclasses.replace(o.adversarial, trunk="frozen")
    alone = cost.counted_flops(m, dataclasses.replace(o, adversarial=adversary), FROZEN)
    assert (cost.counted_flops(m, o, FROZEN) > 1.2 * alone) == (trunk == "trained")


def test_a_gradient_that_is_not_finite_stops_its_own_network_alone():
    step, batch = stage()
    step(batch)
    weight = next(iter(duel(step).discriminator.parameters()))
    held, decoder = weight.detach().clone(), step.state.model.decoder.decoder_pred.weight
    broken, before = weight.register_hook(lambda gradient: gradient * torch.nan), decoder.detach().clone()
    assert float(step(batch)["skipped"]) == 1
    assert torch.equal(weight, held)
    assert not torch.equal(decoder, before)
    broken.remove()
    ratio = float(duel(step).discriminator.ratio)
    bad = {name: torch.full((2, 2), torch.nan) for name in adversarial.LAST_LAYER}
    duel(step).settle(bad, ALONE)
    assert float(duel(step).discriminator.ratio) == ratio


def test_alarms():
    def said(*values: float) -> list[str]:
        alarm = DuelAlarm(patience=3)
        rows = [{"d_accuracy": value, "discriminator": 0.5} for value in values]
        return [words for row in rows if (words := alarm.check(row))]

    assert not said(1.0, 1.0, 0.9, 1.0, 1.0)
    assert ["wins outright" in words for words in said(1.0, 1.0, 1.0, 1.0)] == [True]
    assert ["loses outright" in words for words in said(0.5, 0.5, 0.5)] == [True]
    assert not said(float("nan"), 1.0, 1.0)
    assert not DuelAlarm(1).check({"total": 1.0})
    assert not DuelAlarm(1).check({"d_accuracy": 0.0, "discriminator": 0.0})  # before it learns


def test_without_it_nothing_changes():
    """No discriminator, no further numbers, no other parts."""
    step, batch = trainer()
    assert step.state.parts.keys() == {""}
    assert step.objective.measures == ()
    assert dataclasses.asdict(load_tiny().objective.adversarial) == dataclasses.asdict(AdversarialConfig())
    assert not any(name.startswith("d_") for name in step(batch()))
