"""The security table, row by row, where the fault matrix has no row: loaders, pinned weights, image limits."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import ROOT
from photographs import crop, jpeg

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig, ObjectiveConfig
from unite_fast.data import encoded, open_source
from unite_fast.evaluation.features import inception
from unite_fast.modality import lpips

FILES = [*(ROOT / "unite_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
FORBIDDEN = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "torch.hub", "flash_attn.utils"}


def named(node: ast.expr) -> str:
    return f"{named(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_executes_what_it_loads(path):
    """weights_only and allow_pickle stand at every load, but for the one that --trust-pickle asks for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not names & FORBIDDEN, f"{path}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        name, options = named(node.func), {k.arg: k.value for k in node.keywords}
        where = f"{path}:{node.lineno}"
        assert name not in ("eval", "exec", "os.system", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load"), where
        if name in ("torch.load", "np.load"):
            key, safe = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}[name]
            value = options[key].value if isinstance(options.get(key), ast.Constant) else None  # type: ignore[union-attr]
            trusted = path.name == "export.py" and "load_trusted" in path.read_text()
            assert value is safe or (trusted and name == "torch.load"), where
        if name == "yaml.load":
            assert ast.unparse(options["Loader"]) == "_Loader", where
        assert "shell" not in options, where


def test_torch_is_new_enough():
    """2.10 mended the last known hole of weights_only."""
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.11,' in text


class Executes:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"features.0.weight": Executes()}, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_trunk_with_code_and_the_asked_hash(evil):
    asked = ObjectiveConfig(perceptual_trunk=str(evil), perceptual_sha256=digest(evil))
    with pytest.raises(UserError, match="perceptual_trunk"):
        lpips.load_perceptual(asked, 3)
    with pytest.raises(UserError, match="has sha256"):
        lpips.load_perceptual(replace(asked, perceptual_sha256=""), 3)
    assert not Path("executed").exists()


def test_inception_with_code_and_the_asked_hash(evil):
    with pytest.raises(UserError, match="Inception weights"):
        inception(str(evil), expected=digest(evil))
    with pytest.raises(UserError, match="expected 6726825d"):
        inception(str(evil))
    assert not Path("executed").exists()


def test_heads_of_the_lpips_package_are_pinned(tmp_path, monkeypatch):
    lpips.check_heads()
    package = tmp_path / "lpips"
    heads = package / "weights" / "v0.1" / "vgg.pth"
    heads.parent.mkdir(parents=True)
    found = importlib.util.find_spec("lpips")
    assert found is not None
    assert found.origin is not None
    shutil.copy(Path(found.origin).parent / "weights" / "v0.1" / "vgg.pth", heads)
    (package / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location("lpips", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    lpips.check_heads()
    heads.write_bytes(pickle.dumps(Executes()))
    with pytest.raises(UserError, match="not the published ones"):
        lpips.Perceptual(None)
    heads.unlink()
    with pytest.raises(UserError, match="no such file"):
        lpips.check_heads()


def folder_of(tmp_path: Path, content: bytes):
    path = tmp_path / "images" / "a" / "0.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    data = DataConfig(source="folder", path=str(tmp_path / "images"), workers=0)
    return open_source(data, ModelConfig(image_size=16, num_classes=1))


def test_encoded_size_is_limited(tmp_path, monkeypatch):
    content = jpeg(crop(1))
    source = folder_of(tmp_path, content)
    source.load(0)
    monkeypatch.setattr(encoded, "MAX_ENCODED_BYTES", len(content) - 1)
    with pytest.raises(UserError, match=f"{len(content)} bytes, more than the {len(content) - 1} allowed"):
        source.load(0)


def test_colour_profiles_are_not_looked_at(tmp_path):
    """A profile of a megabyte, and one of nonsense: the pixels are those of the file without it."""
    plain = folder_of(tmp_path / "plain", jpeg(crop(1))).load(0)
    for name, profile in {"large": bytes(1 << 20), "nonsense": b"\xff\xe1" * 4000}.items():
        buffer = io.BytesIO()
        crop(1).save(buffer, "JPEG", quality=92, icc_profile=profile)
        assert torch.equal(folder_of(tmp_path / name, buffer.getvalue()).load(0), plain)
