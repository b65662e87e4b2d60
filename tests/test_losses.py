"""Reconstruction losses: values by hand, LPIPS against the lpips package, trunks and their checks."""

from __future__ import annotations

import dataclasses
import hashlib

import lpips
import pytest
import torch
import torchvision

from unite_fast.base.errors import UserError
from unite_fast.config import ObjectiveConfig
from unite_fast.modality.lpips import Perceptual, load_perceptual, pixel_loss


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
    monkeypatch.undo()
    perceptual.eval()


def test_differentiable_in_the_reconstruction_alone(perceptual, pair):
    reconstruction = pair[1].clone().requires_grad_()
    perceptual(pair[0], reconstruction).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_loads_a_named_and_checked_trunk(trunk, perceptual, pair, tmp_path):
    path = tmp_path / "vgg16.pth"
    torch.save(trunk, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = ObjectiveConfig(perceptual_trunk=str(path), perceptual_sha256=digest)
    loaded = load_perceptual(config, 3)
    assert loaded is not None
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
