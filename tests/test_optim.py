"""Schedule, groups and update against torch.optim and hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch
from support import ROOT
from torch import nn

from unite_fast.config import OptimConfig, UserError, earlier, yaml_text
from unite_fast.layers import adamw_parameter, use_adamw
from unite_fast.optim import ema
from unite_fast.optim.groups import split_parameters
from unite_fast.optim.optimizer import Optimizer
from unite_fast.optim.schedule import learning_rate, lr_scale


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(12, 20)
        self.tall = nn.Linear(7, 30, bias=False)
        self.last = use_adamw(nn.Linear(20, 3))
        self.table = adamw_parameter(torch.randn(4, 5))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def with_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_equals_torch_optim(dtype, backend):
    """Four steps of clip + torch.optim.AdamW + torch.optim.Muon + a looped EMA."""
    torch.manual_seed(0)
    model = Small()
    twin = Small()
    twin.load_state_dict(model.state_dict())
    config = OptimConfig(newton_schulz_dtype=dtype, weight_decay=0.01, muon_weight_decay=0.02, ema_decay=0.9)
    ours = Optimizer(model, config, backend)
    muon, adamw = split_parameters(twin)
    assert set(muon) == {"one.weight", "two.weight", "tall.weight"}
    theirs = (
        torch.optim.AdamW(adamw.values(), lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.01),
        torch.optim.Muon(muon.values(), lr=1e-2, weight_decay=0.02, eps=1e-6, adjust_lr_fn="match_rms_adamw"),
    )
    ema = {n: p.detach().clone() for n, p in twin.named_parameters() if p.requires_grad}
    for step in range(4):
        with_gradients(model, step)
        with_gradients(twin, step)
        norm = ours.step(1e-2)
        expected = nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.grad is not None], config.clip)
        torch.testing.assert_close(norm, expected)
        for optimizer in theirs:
            optimizer.step()
        for n, p in twin.named_parameters():
            if n in ema:
                ema[n].mul_(0.9).add_(p.detach(), alpha=0.1)
    after = dict(model.named_parameters())
    for n, p in twin.named_parameters():
        # torch.optim.Muon iterates in bfloat16; in fp32 ours is the exact iteration
        tolerance = 1e-6 if n not in muon or dtype == "bf16" else 2e-2
        torch.testing.assert_close(after[n], p, rtol=tolerance, atol=tolerance, msg=n)
        if n in ema:
            torch.testing.assert_close(ours.ema[n], ema[n], rtol=tolerance, atol=tolerance, msg=n)
    assert int(ours.steps) == 4


def test_parameters_without_gradient_keep_their_value():
    model = Small()
    before = model.one.weight.detach().clone()
    with_gradients(model, 0)
    model.one.weight.grad = None
    Optimizer(model, OptimConfig()).step(0.1)
    assert torch.equal(model.one.weight, before)


def test_adamw_only():
    muon, adamw = split_parameters(Small(), muon=False)
    assert not muon
    assert len(adamw) == 8


def test_state_names_what_is_wrong():
    optimizer = Optimizer(Small(), OptimConfig())
    state = optimizer.state_dict()
    state["momentum.tall.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"momentum.tall.weight is \(2, 2\), expected \(30, 7\)"):
        optimizer.load_state_dict(state, 1)
    del state["momentum.tall.weight"]
    with pytest.raises(ValueError, match=r"lacks momentum.tall.weight"):
        optimizer.load_state_dict(state, 1)


PUBLISHED = {
    13: "0x1.6b819fef65c5ap-14",
    45: "0x1.179ec9cbd821ep-12",
    77: "0x1.c41184760de8ap-13",
    450: "0x1.179ec9cbd821ep-13",
}
PAPER = {
    10: "0x1.a36e2eb1c432dp-15",
    50: "0x1.90ab1a613ac5cp-14",
    130: "0x1.a79fec99f1ae3p-15",
    239: "0x1.0dca4b89dfd45p-20",
}
DIGITS = {
    0.5: "0x1.88f40d7a6ca7ap-9",
    3: "0x1.861bed3244e37p-8",
    18: "0x1.a11dfd150f6e2p-9",
    36: "0x1.a36e2eb1c432dp-14",
}


def rate(o: OptimConfig, epoch: float, batch: int = 384, total: float = 600) -> float:
    return learning_rate(o, round(epoch * 1000), 1000, batch, total)


def official(epoch: float, total: float = 600, accumulation: int = 2) -> float:
    """The official schedule of the published run, 8 GPUs x 64 x 2, whose second decay never starts: 3000 -> 380."""
    epoch /= accumulation
    if epoch < 20:
        return 1e-4 * epoch / 20
    progress = min(1.0, max(0.0, (epoch - 30) / (50 - 30)))
    return 5e-5 + (1e-4 - 5e-5) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    "path", [ROOT / "configs" / f"imagenet_{size}.yaml" for size in ("b", "l", "xl")], ids=lambda path: path.stem
)
def test_the_published_recipes_have_the_published_learning_rates(path):
    """To the bit; what 041eeaa computed for some epochs is written out."""
    published = yaml_text.load(path).optim
    for epoch in range(601):
        assert rate(published, epoch, 1024) == 1024 / 384 * official(epoch), epoch
    assert {epoch: rate(published, epoch, 1024).hex() for epoch in PUBLISHED} == PUBLISHED
    paper = ("warmup_epochs=20", "flat_epochs=0", "decay_epochs=0", "final_lr=1e-6")
    o = yaml_text.load(path, [f"optim.{word}" for word in paper]).optim
    assert {epoch: rate(o, epoch, total=240).hex() for epoch in PAPER} == PAPER


def test_the_digits_have_the_learning_rates_that_they_had():
    o = yaml_text.load(ROOT / "configs" / "digits.yaml").optim
    assert {epoch: learning_rate(o, round(epoch * 1497), 1497, 32, 36).hex() for epoch in DIGITS} == DIGITS


def test_scaling_by_batch():
    o = OptimConfig()
    assert lr_scale(o, 1024) == pytest.approx(1024 / 384)
    assert lr_scale(o, 64) == 1
    assert rate(o, 50, batch=1024) == pytest.approx(1e-4 * 1024 / 384)
    assert rate(OptimConfig(lr_reference_batch=0), 50, batch=1024) == pytest.approx(1e-4)


OLD_KEYS = {"schedule": "two_stage", "warmup_epochs": 20.0, "flat_epochs": 30.0, "decay_epochs": 50.0, "mid_lr": 5e-5}
OLD_KEYS |= {"second_flat_epochs": 3000.0, "second_decay_epochs": 380.0, "final_lr": 1e-5, "epoch_unit": "images"}
OLD_TRAIN = {"epochs": 600.0, "global_batch": 1024, "micro_batch": 512}


def translated(**changes) -> OptimConfig:
    saved = {"optim": OLD_KEYS | changes, "train": OLD_TRAIN}
    return yaml_text.from_dict(earlier.translated(saved, "saved")).optim


def test_a_saved_schedule_is_translated():
    assert translated(epoch_unit="micro_batches") == OptimConfig()
    assert translated(warmup_epochs=60.0).decay_epochs == 60
    assert rate(translated(warmup_epochs=60.0), 61) == 5e-5
    constant, cosine = translated(schedule="constant"), translated(schedule="cosine", decay_epochs=0.0)
    assert [rate(constant, epoch) for epoch in (10, 20, 599)] == [5e-5, 1e-4, 1e-4]
    assert [rate(cosine, epoch, total=240) for epoch in (20, 240)] == [1e-4, 1e-5]
    assert rate(cosine, 130, total=240) == 1e-5 + (1e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 0.5))
    today = {"optim": {"lr": 1.0}}
    assert earlier.translated(today, "saved") is today
    with pytest.raises(UserError, match="saved: its learning rate decays again"):
        translated(second_flat_epochs=100.0)
    with pytest.raises(UserError, match="saved: the learning-rate schedule that was saved is malformed"):
        translated(warmup_epochs="long")


@pytest.mark.parametrize("key", sorted(earlier.GONE))
def test_a_key_that_is_gone_names_what_took_its_place(key):
    section, name = key.split(".")
    words = "(flat_epochs|final_lr|multiply)" if section == "optim" else r"evaluation\.heldout_(epoch|count)"
    with pytest.raises(UserError, match=rf"config: {key} is no key any more: .*{words}"):
        yaml_text.from_dict({section: {name: OLD_KEYS.get(name, 2)}})


def test_saved_scores_of_held_out_samples_are_translated():
    saved = {"evaluation": {"heldout_epoch": 0.0, "validation_epoch": 2.0, "validation_count": 7}}
    found = yaml_text.from_dict(earlier.translated(saved, "saved")).evaluation
    assert (found.heldout_epoch, found.heldout_count) == (2, 7)
    both = earlier.translated({"evaluation": {"heldout_epoch": 3.0, "validation_epoch": 2.0}}, "saved")
    assert yaml_text.from_dict(both).evaluation.heldout_epoch == 3


# --- several moving averages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_main_average_that_warms_up(backend):
    """Against its formula in float64; a skipped step does not count; after 10 / (1 - d) updates it is the fixed one."""
    torch.manual_seed(0)
    model = Small()
    optimizer = Optimizer(model, OptimConfig(ema_decay=0.75, ema_warmup=True), backend)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    truth, decays = {n: p.detach().double() for n, p in trained.items()}, []
    for step in range(40):
        with_gradients(model, step)
        if step == 2:
            model.one.bias.grad.fill_(math.inf)
        optimizer.step(1e-2)
        if step != 2:
            t = len(decays) + 1
            decays.append(min(0.75, (1 + t) / (10 + t)))
            truth = {n: e + (1 - decays[-1]) * (trained[n].detach().double() - e) for n, e in truth.items()}
        for name, expected in truth.items():
            torch.testing.assert_close(optimizer.ema[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert decays[0] == 2 / 11
    assert next(step for step, d in enumerate(decays, 1) if d == 0.75) == 26
    assert optimizer.ema is optimizer.averages["ema"]


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_averages_of_every_kind(backend):
    """Against their formulas in float64; a step that is skipped changes none and does not count as an update."""
    torch.manual_seed(0)
    model = Small()
    entries = (0.5, 0.99, "std0.1", "std0.25")
    optimizer = Optimizer(model, OptimConfig(ema_decay=0.9, ema_extra=entries), backend)
    assert list(optimizer.averages) == ["ema", "ema_0.5", "ema_0.99", "ema_std0.1", "ema_std0.25"]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    truth = {name: {n: p.detach().double() for n, p in trained.items()} for name in optimizer.averages}
    updates = 0
    for step in range(6):
        with_gradients(model, step)
        if step == 2:
            model.one.bias.grad.fill_(math.inf)
        optimizer.step(1e-2)
        if step == 2:
            continue
        updates += 1
        decays = {"ema": 0.9, "ema_0.5": 0.5, "ema_0.99": 0.99}
        for std in (0.1, 0.25):
            decays[f"ema_std{std}"] = (1 - 1 / updates) ** (ema.power_exponent(std) + 1)
        for name, decay in decays.items():
            for n, p in trained.items():
                truth[name][n].lerp_(p.detach().double(), 1 - decay)
    for name, values in optimizer.averages.items():
        for n, value in values.items():
            torch.testing.assert_close(value.double(), truth[name][n], rtol=1e-5, atol=1e-6, msg=f"{name} {n}")
    assert not torch.equal(optimizer.averages["ema_std0.1"]["table"], optimizer.averages["ema_std0.25"]["table"])


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.28])
def test_power_average_has_the_width_it_is_named_after(std):
    """Its standard deviation over the training so far, relative to that, after 4,000 updates; weights sum to 1."""
    updates = 4000
    weights = torch.zeros(updates, dtype=torch.float64)
    for t in range(1, updates + 1):
        decay = float(ema.decay(f"std{std}", torch.tensor(float(t))))
        weights *= decay
        weights[t - 1] = 1 - decay
    times = torch.arange(1, updates + 1, dtype=torch.float64) / updates
    mean = (weights * times).sum()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    assert float((weights * (times - mean) ** 2).sum().sqrt()) == pytest.approx(std, rel=5e-3)


@pytest.mark.parametrize(("tiles", "short_side", "dtype"), [
    (True, 256, torch.bfloat16), (True, 255, torch.float32), (False, 768, torch.float32),
])  # fmt: skip
def test_newton_schulz_takes_the_fast_dtype_of_the_cpu(monkeypatch, tiles, short_side, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    model = nn.Sequential(nn.Linear(short_side, 2 * short_side, device="meta"), nn.Linear(16, 16, device="meta"))
    optimizer = Optimizer(model, OptimConfig())
    assert optimizer.newton_schulz_dtype(torch.device("cpu")) == dtype
    assert optimizer.newton_schulz_dtype(torch.device("cuda")) == torch.bfloat16
