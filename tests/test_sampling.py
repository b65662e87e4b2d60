"""Sampling: guidance by its definition, solvers against a fine solution, per-image identity, files."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY, command

from unite_fast import flow, sampling
from unite_fast.config import UserError
from unite_fast.config_io import from_dict, parse_yaml
from unite_fast.generate import parse_labels, parse_seeds
from unite_fast.model.unite import UNITE, build


@pytest.fixture(scope="module")
def model() -> UNITE:
    """A tiny model whose zero-initialised layers are filled, so that every term of a formula shows."""
    config = from_dict(parse_yaml(TINY, "tiny")).model
    unite = build(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in unite.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return unite.eval()


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


@pytest.mark.parametrize(
    ("t", "interval", "acts"),
    [(0.0, (0.0, 1.0), True), (0.0, (0.1, 1.0), False), (0.1, (0.1, 1.0), False), (0.5, (0.1, 0.6), True),
     (0.6, (0.1, 0.6), False), (1.0, (0.0, 1.0), False), (1.04, (0.0, 1.0), False)],
)  # fmt: skip
def test_guidance_interval(t, interval, acts):
    assert flow.inside(t, interval) is acts


def test_fixed_step_solvers_have_their_order():
    """On dz/dt = z cos t, whose solution is exp(sin t): halving the step divides the error by 2 and by 4."""

    def field(t, z):
        return z * torch.cos(t)

    def error(solve, steps: int) -> float:
        end = solve(field, torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        return abs(float(end) - float(torch.tensor(1.0, dtype=torch.float64).sin().exp()))

    assert error(sampling._euler, 50) / error(sampling._euler, 100) == pytest.approx(2, abs=0.1)
    assert error(sampling._heun, 50) / error(sampling._heun, 100) == pytest.approx(4, abs=0.2)


@torch.no_grad()
def test_solvers_agree(model):
    """The floor of 1 - t puts a kink near the end, so Heun's gain on the model's field is smaller than its order."""
    labels, z = torch.tensor([0, 5]), noise(model, 2)

    def latents(solver: str, steps: int) -> torch.Tensor:
        return sampling.sample(model, labels, z, solver, steps, return_latents=True)[1]

    fine = latents("heun", 800)
    error = {s: float((latents(s, 50) - fine).norm() / fine.norm()) for s in sampling.SOLVERS}
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
    actual = sampling.sample(model, labels, z, "heun", 2, return_latents=True)[1]
    torch.testing.assert_close(actual, state, rtol=1e-5, atol=1e-5)


def test_number_of_evaluations(model, monkeypatch):
    counted = []
    call = sampling.GuidedField.__call__
    monkeypatch.setattr(sampling.GuidedField, "__call__", lambda self, t, z: (counted.append(1), call(self, t, z))[1])
    for solver, expected in (("heun", 20), ("euler", 10)):
        counted.clear()
        sampling.sample(model, torch.tensor([0]), solver=solver, steps=10)
        assert len(counted) == expected


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
     ({"noise": torch.zeros(1, 2, 3)}, "shape"), ({"steps": 0, "solver": "heun"}, "few")],
)  # fmt: skip
def test_bad_options(model, options, says):
    with pytest.raises(UserError, match=says):
        sampling.sample(model, torch.tensor([0]), **options)


def test_seeds_and_labels():
    assert parse_seeds("0-3,8") == [0, 1, 2, 3, 8]
    assert parse_labels("equal", [0, 11, 5], 10) == [0, 1, 5]
    assert parse_labels("3,7", [0, 1, 2], 10) == [3, 7, 3]
    random = parse_labels("random", list(range(2000)), 10)
    assert parse_labels("random", [1999], 10) == random[-1:]
    assert np.bincount(random, minlength=10).min() > 140


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert (
        command(
            "train.py", "--config", folder / "tiny.yaml", f"run_dir={folder / 'run'}", "train.max_steps=2"
        ).returncode
        == 0
    )
    return folder / "run"


def make(trained, out, *options: object) -> str:
    result = command("sample.py", "--checkpoint", trained, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def pixels(folder) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def test_batch_size_does_not_change_files(trained, tmp_path):
    for batch in (1, 3, 64):
        make(trained, tmp_path / str(batch), "--seeds", "0-6", "--batch", batch)
    expected = pixels(tmp_path / "64")
    assert len(expected) == 7
    for batch in ("1", "3"):
        actual = pixels(tmp_path / batch)
        assert list(actual) == list(expected)
        assert max(np.abs(actual[n] - expected[n]).max() for n in expected) <= 1  # a rounding edge of uint8


def test_rerun_makes_only_the_missing(trained, tmp_path):
    out = tmp_path / "out"
    make(trained, out, "--seeds", "0-4")
    (out / "0000002_class2.png").unlink()
    kept = (out / "0000001_class1.png").stat().st_mtime_ns
    assert "made 1 of 5" in make(trained, out, "--seeds", "0-4")
    assert (out / "0000001_class1.png").stat().st_mtime_ns == kept
    refused = command("sample.py", "--checkpoint", trained, "--out", out, "--seeds", "0-4", "--cfg", "3")
    assert refused.returncode == 2
    assert "other options" in refused.stderr


def test_archives(trained, tmp_path):
    make(trained, tmp_path / "f", "--seeds", "5-9")
    make(trained, tmp_path / "s.npz", "--seeds", "5-9")
    make(trained, tmp_path / "s.tar", "--seeds", "5-9")
    make(trained, tmp_path / "s.png", "--seeds", "5-9")
    expected = pixels(tmp_path / "f")
    with np.load(tmp_path / "s.npz") as content:
        assert content["images"].shape == (5, 8, 8, 1)
        assert content["labels"].tolist() == [5, 6, 7, 8, 9]
        assert all((a[..., 0] == b).all() for a, b in zip(content["images"], expected.values(), strict=True))
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == list(expected)
        for name in tar.getnames():
            file = tar.extractfile(name)
            assert file is not None
            assert (np.asarray(Image.open(io.BytesIO(file.read()))) == expected[name]).all()
    assert Image.open(tmp_path / "s.png").size[0] > 5 * 32
    assert not list(tmp_path.glob("*.parts"))


def test_reconstruct_a_folder(trained, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.new("RGB", (30, 20), (200, 200, 200)).save(tmp_path / "in" / "a.jpg")
    Image.new("L", (9, 9), 90).save(tmp_path / "in" / "sub" / "b.png")
    said = make(trained, tmp_path / "out", "--reconstruct", tmp_path / "in")
    assert "2 images, mean PSNR" in said
    assert (tmp_path / "out" / "a.png").is_file()
    assert (tmp_path / "out" / "sub" / "b.png").is_file()
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    result = command("sample.py", "--checkpoint", trained, "--out", tmp_path / "o2", "--reconstruct", tmp_path / "in")
    assert result.returncode == 2
    assert "bad.png" in result.stderr
