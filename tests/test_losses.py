"""Reconstruction losses: values by hand, LPIPS against the lpips package, trunks and their checks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib

import lpips
import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from unite_fast.base.errors import UserError
from unite_fast.config import ObjectiveConfig
from unite_fast.efficiency import precision
from unite_fast.modality.lpips import Perceptual, load_perceptual, pixel_loss
from unite_fast.plan import cost
from unite_kernels.backend import as_on_a_gpu


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    """A VGG16 of random weights in torchvision's format."""
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 64, 64, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)


@pytest.fixture(scope="module")
def perceptual(trunk) -> Perceptual:
    return Perceptual(trunk)


def test_pixel_losses():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert pixel_loss(a, b, "l1") == 0.5
    assert pixel_loss(a, b, "l2") == 0.25


def test_equals_the_lpips_package(trunk, perceptual, pair, monkeypatch):
    oracle = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for name, value in oracle.net.state_dict().items():
        value.copy_(trunk[f"features.{name.split('.', 1)[1]}"])
    images, reconstruction = pair
    ours = perceptual(images, reconstruction)
    torch.testing.assert_close(ours, oracle(images, reconstruction).mean())
    monkeypatch.setattr(perceptual, "input_range", "-1_1")
    scaled = perceptual(images, reconstruction)
    torch.testing.assert_close(scaled, oracle(images * 2 - 1, reconstruction * 2 - 1).mean())


def test_dropout_follows_its_switch_not_the_training_mode(perceptual, pair, monkeypatch):
    perceptual.train()
    assert perceptual(*pair) == perceptual(*pair)
    monkeypatch.setattr(perceptual, "dropout", True)
    perceptual.eval()
    assert perceptual(*pair) != perceptual(*pair)
    with perceptual.without_dropout():
        assert perceptual(*pair) == perceptual(*pair)
    assert perceptual(*pair) != perceptual(*pair)
    monkeypatch.undo()
    perceptual.eval()


def test_differentiable_in_the_reconstruction_alone(perceptual, pair):
    reconstruction = pair[1].clone().requires_grad_()
    perceptual(pair[0], reconstruction).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_a_gpus_trunk_and_head_compute_the_same(perceptual, pair):
    """In Triton's interpreter: the value, and the gradient by its distance from float32's, as near as torch's own."""
    fused = copy.deepcopy(perceptual)
    fused.backend = "triton"
    images, start = (x[:1, :, :16, :16] for x in pair)

    def value_and_gradient(module: Perceptual, recipe: str) -> list[torch.Tensor]:
        reconstruction = start.clone().requires_grad_()
        with precision.autocast(recipe, torch.device("cpu")):
            loss = module(images, reconstruction)
        return [loss.detach(), *torch.autograd.grad(loss, reconstruction)]

    truth = value_and_gradient(perceptual, "fp32")
    for recipe in ("fp32", "bf16"):
        found, own = (value_and_gradient(module, recipe) for module in (fused, perceptual))
        for true, ours, theirs in zip(truth, found, own, strict=True):
            assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-4 * true.norm(), recipe
    before = fused.features(images)[0]
    fused.net.net.slice1[0].weight.data.mul_(0.5)
    assert not torch.equal(fused.features(images)[0], before)  # its copies are of the weights as they are


def test_a_gpus_trunk_and_head_keep_the_maps_and_bits(perceptual):
    """In bfloat16: both images' five maps, and a bit of every other activation of the reconstruction. Torch's layers
    keep every activation and the places of the maxima, and torch's head its own in float32."""
    maps = sum(c * (64 >> i) ** 2 for i, c in enumerate((64, 128, 256, 512, 512)))
    others = sum(n * c * (64 >> i) ** 2 for i, (n, c) in enumerate(((1, 64), (1, 128), (2, 256), (2, 512), (2, 512))))
    kept = {}
    for backend in ("eager", "fused"):
        module = copy.deepcopy(perceptual)
        module.backend = backend
        saved = cost.Saved(list(module.parameters()))
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            as_on_a_gpu(),
            precision.autocast("bf16", torch.device("cpu")),
            saved_tensors_hooks(saved.pack, lambda t: t),
        ):
            loss = module(torch.empty(1, 3, 64, 64), torch.empty(1, 3, 64, 64, requires_grad=True))
        del loss
        kept[backend] = saved.bytes
    assert kept["fused"] == pytest.approx(2 * 2 * maps + others / 8, rel=0.01)
    assert kept["eager"] > 4 * kept["fused"]


def test_loads_a_named_and_checked_trunk(trunk, perceptual, pair, tmp_path):
    path = tmp_path / "vgg16.pth"
    torch.save(trunk, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = ObjectiveConfig(perceptual_trunk=str(path), perceptual_sha256=digest)
    loaded = load_perceptual(config, 3)
    assert loaded is not None
    assert loaded.trunk_sha256 == digest  # that of the file, whichever hash admitted it
    torch.testing.assert_close(loaded(*pair), perceptual(*pair))
    with pytest.raises(UserError, match="sha256"):
        load_perceptual(dataclasses.replace(config, perceptual_sha256=""), 3)  # not torchvision's published file
    with pytest.raises(UserError, match="3 colour channels"):
        load_perceptual(config, 1)
    with pytest.raises(UserError, match="no file"):
        load_perceptual(dataclasses.replace(config, perceptual_trunk="missing.pth"), 3)
    assert load_perceptual(dataclasses.replace(config, perceptual_weight=0), 1) is None


def test_refuses_another_network(trunk, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({k: v for k, v in trunk.items() if "28" not in k}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="not a VGG16"):
        load_perceptual(ObjectiveConfig(perceptual_trunk=str(path), perceptual_sha256=digest), 3)
