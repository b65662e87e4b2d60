"""Sampling: guidance by its definition, solvers against a fine solution, per-image identity."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import TINY
from tape import Tape
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast import flow, sampling
from unite_fast.base.errors import UserError
from unite_fast.config import ModelConfig, SampleConfig
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.efficiency import compiling, graph
from unite_fast.flow import solvers
from unite_fast.flow.field import GuidedField, Replays
from unite_fast.model.flops import denoiser_flops
from unite_fast.model.unite import UNITE, build


def filled(config: ModelConfig, seed: int) -> UNITE:
    """A model whose zero-initialised layers are filled, so that every term of a formula shows."""
    unite = build(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in unite.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return unite.eval()


@pytest.fixture(scope="module")
def model() -> UNITE:
    return filled(from_dict(parse_yaml(TINY, "tiny")).model, seed=1)


@pytest.fixture(scope="module")
def weak(model) -> UNITE:
    """A smaller one of latents of the same shape."""
    small = dataclasses.replace(model.config.encoder, depth=2)
    return filled(dataclasses.replace(model.config, encoder=small), seed=3)


def noise(model: UNITE, n: int) -> torch.Tensor:
    return sampling.initial_noise(model, range(n), "cpu")


@torch.no_grad()
@pytest.mark.parametrize("order", sampling.ORDERS)
def test_guidance_orders(model, order):
    z, labels, t, w = noise(model, 3), torch.tensor([1, 2, 3]), torch.tensor(0.4), 2.5
    times = t.expand(3)
    conditional, null = model.denoise_raw(z, times, labels), model.denoise_raw(z, times, torch.full((3,), 10))
    norm = model.encoder_layer_norm
    expected = {
        "norm_first": norm(null) + w * (norm(conditional) - norm(null)),
        "cfg_first": norm(null + w * (conditional - null)),
        "both": norm(norm(null) + w * (norm(conditional) - norm(null))),
    }[order]
    actual = sampling.GuidedField(model, labels, w, (0.0, 1.0), order).predict(t, z)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    outside = sampling.GuidedField(model, labels, w, (0.5, 1.0), order).predict(t, z)
    at_one = sampling.GuidedField(model, labels, 1.0, (0.0, 1.0), order).predict(t, z)
    torch.testing.assert_close(outside, norm(conditional), rtol=1e-5, atol=1e-5)
    assert torch.equal(outside, at_one)


@torch.no_grad()
@pytest.mark.parametrize("order", ["norm_first", "both"])
def test_a_weaker_model_guides_by_its_definition(model, weak, order):
    """Both predict for the class, each with its own LayerNorm; inside the interval alone."""
    z, labels, t, w = noise(model, 3), torch.tensor([1, 2, 3]), torch.tensor(0.4), 2.5
    own, less = (m.encoder_layer_norm(m.denoise_raw(z, t.expand(3), labels)) for m in (model, weak))
    expected = less + w * (own - less)
    expected = model.encoder_layer_norm(expected) if order == "both" else expected
    field = GuidedField(model, labels, w, (0.0, 1.0), order, guide=weak)
    torch.testing.assert_close(field.predict(t, z), expected, rtol=1e-6, atol=1e-6)
    share = denoiser_flops(weak.config) / denoiser_flops(model.config)
    assert (field.evaluations, field.passes) == (1, pytest.approx(1 + share))
    assert 0.5 < share < 0.8  # two blocks of three
    assert torch.equal(GuidedField(model, labels, w, (0.5, 1.0), order, guide=weak).predict(t, z), own)


@pytest.mark.parametrize("solver", ["heun", "exp3"])
def test_a_model_does_not_guide_itself(model, weak, solver):
    """Bit for bit: by itself at any scale, and by any other at scale 1, the samples are the plain ones."""
    seeds, labels = [3, 4, 40], [0, 5, 9]
    plain = sampling.sample_tiles(model, seeds, labels, solver=solver, steps=3)
    by_itself = sampling.sample_tiles(model, seeds, labels, solver=solver, steps=3, cfg_scale=3.0, guide=model)
    at_one = sampling.sample_tiles(model, seeds, labels, solver=solver, steps=3, cfg_scale=1.0, guide=weak)
    other = sampling.sample_tiles(model, seeds, labels, solver=solver, steps=3, cfg_scale=3.0, guide=weak)
    assert torch.equal(by_itself, plain)
    assert torch.equal(at_one, plain)
    assert not torch.equal(other, plain)
    with pytest.raises(UserError, match=r"^cfg_first combines before the LayerNorm, of which two models have two"):
        sampling.sample(model, torch.tensor(labels), cfg_scale=3.0, cfg_order="cfg_first", guide=weak)


@pytest.mark.parametrize(
    ("t", "interval", "acts"),
    [(0.0, (0.0, 1.0), True), (0.0, (0.1, 1.0), False), (0.1, (0.1, 1.0), False), (0.5, (0.1, 0.6), True),
     (0.6, (0.1, 0.6), False), (1.0, (0.0, 1.0), False), (1.04, (0.0, 1.0), False)],
)  # fmt: skip
def test_guidance_interval(t, interval, acts):
    assert flow.inside(t, interval) is acts


ORDERS = {"euler": 1, "heun": 2, "ab2": 2, "dpmpp2m": 2, "exp3": 4}


@pytest.mark.parametrize("solver", solvers.FIXED)
def test_fixed_step_solvers_have_their_order(solver):
    """With x0 = z (1 + cos(3t) / r(t)), dz/dt = z cos(3t): the error falls with that power of the step, to t = 0.9."""

    def predict(t, z, guided):
        return z * (1 + math.cos(3 * t) / solvers.rate(t))

    def error(steps: int) -> float:
        times = [0.9 * t for t in solvers.phi_grid(steps + 1)]
        end = solvers.solve(solver, predict, torch.ones(1, dtype=torch.float64), times, None)
        return abs(float(end) - math.exp(math.sin(2.7) / 3))

    assert math.log2(error(160) / error(320)) == pytest.approx(ORDERS[solver], abs=0.2)


def test_exponential_weights_integrate_cubics():
    """On either side of t = 0.95 and across it, against the trapezoidal rule."""
    for t, s, nodes in ((0.3, 0.4, (0.3, 0.25, 0.15, 0.1)), (0.9, 1.0, (0.9, 0.85, 0.8)), (0.97, 0.99, (0.97, 0.96))):
        weights = solvers.exponential_weights(t, s, nodes)
        u = np.linspace(t, s, 200_001)
        kernel = np.array([solvers.rate(x) * math.exp(solvers.log_decay(x) - solvers.log_decay(s)) for x in u])
        for power in range(len(nodes)):
            ours = sum(w * float(solvers.phi(n)) ** power for w, n in zip(weights, nodes, strict=True))
            assert ours == pytest.approx(np.trapezoid(kernel * solvers.phi(u) ** power, u), rel=1e-7)


@pytest.mark.parametrize("solver", ["euler", "dpmpp2m", "exp3"])
def test_a_constant_prediction_is_followed_exactly(solver):
    """z(1) = x0 + sigma(1) (z - x0), sigma(1) = 0.05 / e; in one step for the exponential solvers."""
    times = [0.0, 1.0] if solver != "euler" else torch.linspace(0, 1, 5001, dtype=torch.float64).tolist()
    end = solvers.solve(solver, lambda t, z, guided: torch.full_like(z, 2.0), torch.zeros(1).double(), times, None)
    assert float(end) == pytest.approx(2 - 2 * 0.05 / math.e, abs=1e-9 if solver != "euler" else 1e-3)


@pytest.mark.parametrize("solver", solvers.MULTISTEP)
def test_multistep_solvers_see_the_jump_of_guidance(solver):
    """x0 is 1 without and 3 with guidance: a constant on either side of the interval's end, wherever the grid lies."""
    seen = []

    def predict(t, z, guided):
        seen.append((t, guided))
        return torch.full_like(z, 3.0 if guided else 1.0)

    times = torch.linspace(0, 1, 401, dtype=torch.float64).tolist()
    end = solvers.solve(solver, predict, torch.zeros(1).double(), times, (0.3001, 1.0))
    before = 1 - (1 - 0.3001)
    expected = 3 + (before - 3) * 0.05 / math.e / (1 - 0.3001)
    assert float(end) == pytest.approx(expected, abs=1e-9 if solver != "ab2" else 2e-3)
    assert (0.3001, True) in seen
    assert all(guided == (t >= 0.3001) for t, guided in seen)


@pytest.mark.parametrize("solver", solvers.MULTISTEP)
@pytest.mark.parametrize(
    ("steps", "interval"), [(8, (0.1, 0.15)), (8, (0.01, 0.02)), (8, (0.97, 0.99)), (3, (0.4, 0.5)), (50, (0.3, 0.301))]
)
def test_both_ends_of_a_narrow_interval_are_met(solver, steps, interval):
    """Each on a grid point of its own, whichever one is nearest to both."""
    seen = []

    def predict(t, z, guided):
        seen.append((t, guided))
        return z

    times = solvers.phi_grid(steps + 1) if solver == "exp3" else torch.linspace(0, 1, steps + 1).double().tolist()
    solvers.solve(solver, predict, torch.ones(1).double(), times, interval)
    grid = [t for t, _ in seen]
    assert len(grid) == steps
    assert grid == sorted(set(grid))
    assert {t for t, guided in seen if guided} == {t for t in grid if interval[0] <= t < interval[1]}
    assert set(interval) <= set(grid)


@pytest.mark.parametrize(("steps", "interval"), [(1, (0.2, 1.0)), (2, (0.2, 0.4))])
def test_too_few_steps_for_the_interval(model, steps, interval):
    words = rf"needs at least {steps + 1} steps, got {steps}; raise the steps or widen the interval"
    with pytest.raises(UserError, match=words):
        sampling.check(SampleConfig("exp3", steps, 2.0, interval))
    with pytest.raises(UserError, match=words):
        solvers.solve("ab2", lambda t, z, guided: z, torch.ones(1), [i / steps for i in range(steps + 1)], interval)
    with pytest.raises(UserError, match=words):
        sampling.sample(model, torch.tensor([0]), solver="exp3", steps=steps, cfg_scale=2.0, cfg_interval=interval)
    sampling.check(SampleConfig("exp3", steps, 1.0, interval))  # unguided
    sampling.check(SampleConfig("heun", steps, 2.0, interval))


@torch.no_grad()
def test_solvers_agree(model):
    """The floor of 1 - t puts a kink near the end, so Heun's gain on the model's field is smaller than its order."""
    labels, z = torch.tensor([0, 5]), noise(model, 2)

    def latents(solver: str, steps: int) -> torch.Tensor:
        return sampling.sample(model, labels, noise=z, solver=solver, steps=steps, return_latents=True)[1]

    fine = latents("heun", 800)
    error = {s: float((latents(s, 50) - fine).norm() / fine.norm()) for s in sampling.SOLVERS}
    assert max(error["ab2"], error["dpmpp2m"]) < 2e-2
    assert error["exp3"] < error["heun"]
    assert error["dopri5"] < 5e-3
    assert error["heun"] < 1e-2
    assert error["heun"] < error["euler"] / 2


@torch.no_grad()
def test_heun_by_hand(model):
    labels, z = torch.tensor([4]), noise(model, 1)
    grid = flow.shift_time(torch.linspace(0, 1, 3), model.time_shift)
    state = z
    for t, u in ((grid[0], grid[1]), (grid[1], grid[2])):
        v = flow.velocity(model.denoise(state, t.expand(1), labels), state, t)
        ahead = state + (u - t) * v
        w = flow.velocity(model.denoise(ahead, u.expand(1), labels), ahead, u)
        state = state + (u - t) * (v + w) / 2
    actual = sampling.sample(model, labels, SampleConfig("heun", 2), noise=z, return_latents=True)[1]
    torch.testing.assert_close(actual, state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("solver", solvers.FIXED)
def test_number_of_evaluations_without_reading_the_device(model, solver):
    """Counted in the network itself; a solution reads no value back, so that it can be compiled or captured."""
    calls = []
    hook = model.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
            return func(*args, **(kwargs or {}))

    z, counts = noise(model, 2), {}
    try:
        with NoReading():
            sampling.sample(
                model, torch.tensor([0, 1]), SampleConfig(solver, 10, 2.0, (0.4, 1.0)), noise=z, counts=counts
            )
    finally:
        hook.remove()
    assert counts["evaluations"] == len(calls) == (20 if solver == "heun" else 10)
    assert counts["passes"] == sum(calls) // 2
    assert len(calls) < counts["passes"] < 2 * len(calls)  # guidance acts for a part of the time
    assert set(calls) == {2, 4}  # and then both halves pass together


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_an_image_does_not_depend_on_its_batch(model, solver):
    options = {"solver": solver, "steps": 5, "cfg_scale": 2.0}
    labels = torch.tensor([3, 1, 4, 1, 5])
    together = sampling.sample(model, labels, seeds=[10, 11, 12, 13, 14], **options)
    for i in range(5):
        alone = sampling.sample(model, labels[i : i + 1], seeds=[10 + i], **options)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_sampling_does_not_touch_the_training_state(model):
    model.train()
    before = torch.get_rng_state()
    sampling.sample(model, torch.tensor([0]), solver="euler", steps=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"solver": "rk4"}, "rk4"), ({"cfg_order": "last"}, "last"), ({"cfg_interval": (1.0, 0.0)}, "low < high"),
     ({"noise": torch.zeros(1, 2, 3)}, "shape"), ({"cfg_scale": float("nan")}, "finite"),
     ({"steps": 0, "solver": "heun"}, "few")],
)  # fmt: skip
def test_bad_options(model, options, says):
    with pytest.raises(UserError, match=says):
        sampling.sample(model, torch.tensor([0]), **options)


def test_options_by_name_are_those_of_the_object(model):
    options = {"solver": "euler", "steps": 2, "cfg_scale": 2.0, "cfg_interval": (0.1, 1.0), "cfg_order": "both"}
    by_name = sampling.sample(model, torch.tensor([1]), **options)
    assert torch.equal(by_name, sampling.sample(model, torch.tensor([1]), SampleConfig(**options)))
    with pytest.raises(TypeError, match="solvr"):
        sampling.sample(model, torch.tensor([1]), solvr="euler")


def test_equal_bits_in_any_company(model):
    """Each seed alone, in pairs and among many: the very same floats, also of dopri5, whose steps depend on all."""
    seeds = [2, 3, 31, 32, 40, 77]
    for options in ({"solver": "heun", "steps": 3, "cfg_scale": 2.0}, {"solver": "dopri5"}):
        labels = [s % 10 for s in seeds]
        together = sampling.sample_tiles(model, seeds, labels, **options)
        pair = sampling.sample_tiles(model, seeds[3:1:-1], labels[3:1:-1], **options)
        assert torch.equal(pair, together[[3, 2]])
        for i in (0, 4):
            assert torch.equal(sampling.sample_tiles(model, [seeds[i]], [labels[i]], **options)[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.fixture
def replays(monkeypatch) -> Replays:
    """As on a GPU, from a tape in place of a graph."""
    monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)
    return Replays(torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("solver", sampling.SOLVERS)
def test_replayed_evaluations_are_the_same(model, replays, solver):
    """For tiles, labels and scales that follow each other; two recordings serve them all."""
    for seeds, scale in (([0, 1, 2], 2.0), ([33, 40], 2.0), ([5], 3.5)):
        options = {"solver": solver, "steps": 6, "cfg_scale": scale, "cfg_interval": (0.3, 1.0)}
        labels = [s % 7 for s in seeds]
        expected = sampling.sample_tiles(model, seeds, labels, **options)
        assert torch.equal(sampling.sample_tiles(model, seeds, labels, **options, replays=replays), expected)
    assert [name for name, *_ in replays.known] == ["plain", "norm_first"]
    assert all(captured.recording is not None for captured in replays.known.values())


@torch.no_grad()
def test_what_a_replay_depends_on(model, replays):
    labels, z = torch.tensor([1, 2]), noise(model, 2)
    field = GuidedField(model, labels, 2.0, (0.0, 1.0), "norm_first", replays)
    plain = GuidedField(model, labels, 2.0, (0.0, 1.0), "norm_first")
    found = [field.at(0.2, z, True) for _ in range(graph.WARM_UP + 2)]
    assert all(torch.equal(x0, plain.at(0.2, z, True)) for x0 in found)
    plain.scale = field.scale = 3.0
    plain.labels = field.labels = labels.flip(0)
    later = field.at(0.4, z + 1, True)
    assert torch.equal(later, plain.at(0.4, z + 1, True))
    assert torch.equal(found[-1], found[0])  # a result stays what it was
    with torch.autocast("cpu", torch.bfloat16):  # another graph, not that of float32
        half = field.at(0.4, z + 1, True)
        assert torch.equal(half, plain.at(0.4, z + 1, True))
    assert not torch.equal(half, later)
    assert len(replays.known) == 2
    with pytest.raises(RuntimeError, match=r"z was captured as .*float32.* and is now .*float64"):
        field.at(0.4, z.double(), True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        field.at(0.4, z, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@torch.no_grad()
def test_captured_evaluations_are_the_same(model):
    there = UNITE(model.config).cuda().eval()
    there.load_state_dict(model.state_dict())
    there.use_kernels("fused")
    for precision in (torch.float32, torch.bfloat16):
        replays = Replays(torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            for seeds, scale in ((range(40), 2.0), (range(70, 90), 3.5)):
                options = {"solver": "heun", "steps": 6, "cfg_scale": scale, "cfg_interval": (0.3, 1.0)}
                labels = [s % 7 for s in seeds]
                expected = sampling.sample_tiles(there, list(seeds), labels, **options)
                there.latent_tokens.mul_(1.0)  # changed in place: the graph must read the weights where they are
                actual = sampling.sample_tiles(there, list(seeds), labels, **options, replays=replays)
                assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("order", sampling.ORDERS)
def test_guidance_under_bf16_is_combined_in_fp32(model, order):
    z, labels = noise(model, 2), torch.tensor([3, 4])
    with torch.autocast("cpu", torch.bfloat16):
        actual = GuidedField(model, labels, 4.0, (0.0, 1.0), order).at(0.4, z, True)
        both = torch.cat([z, z]), torch.full((4,), 0.4), torch.cat([torch.full((2,), 10), labels])
        raw = model.denoise_raw(*both)
    assert raw.dtype == torch.bfloat16
    assert actual.dtype == torch.float32
    assert torch.equal(actual, flow.combine(*raw.float().chunk(2), 4.0, order, model.normalise))


@torch.no_grad()
def test_compiled_blocks_draw_the_same_images(model, monkeypatch):
    """As few graphs as promised, and none more for other seeds. Without the C++ compiler, which takes a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = UNITE(model.config).eval()
    compiled.load_state_dict(model.state_dict())
    sampling.compile_blocks(compiled)
    options = {"solver": "euler", "steps": 3, "cfg_scale": 2.0, "cfg_interval": (0.3, 1.0)}
    for seeds in ([0, 1, 2], [40]):
        labels = [s % 10 for s in seeds]
        expected = sampling.sample_tiles(model, seeds, labels, **options)
        actual = sampling.sample_tiles(compiled, seeds, labels, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert compiling.graphs() == 2 * 3 + 1


def test_a_model_in_training_stays_so_when_sampling_fails(model, monkeypatch):
    model = build(model.config).train()
    monkeypatch.setattr(UNITE, "decode", lambda self, z, sizes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampling.sample(model, torch.arange(2), solver="euler", steps=1)
    assert model.training
