"""FID, IS, KID, precision/recall: equal to torch-fidelity on the same images, on one process and on two; bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from support import command_of
from torch import Tensor
from torch.utils.data import Dataset

from unite_fast.base.errors import UserError
from unite_fast.config.yaml_text import from_dict
from unite_fast.evaluation import features, fid, statistics
from unite_fast.parallel.distributed import Ranks

COUNT, SUBSET = 50, 20
ONE = Ranks(0, 1, torch.device("cpu"))


def random_inception() -> dict[str, Tensor]:
    """A state dict of torch-fidelity's InceptionV3: He-initialised, so that layers neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    generator = torch.Generator().manual_seed(0)
    load = torch.load
    state: dict[str, Tensor] = {}

    def keep(module, content):  # the class insists on loading something: take its own shapes instead
        state.update(module.state_dict())

    torch.load, original = (lambda *_, **__: {}), FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = keep
    try:
        FeatureExtractorInceptionV3("random", ["64"], feature_extractor_weights_path="none")
    finally:
        torch.load, FeatureExtractorInceptionV3.load_state_dict = load, original
    for value in state.values():
        if value.ndim >= 2:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, str]:
    """(a weights file in torch-fidelity's format, its sha256)."""
    import hashlib

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_inception(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def pictures(seed: int, contrast: float) -> Tensor:
    """uint8 (COUNT, 3, 32, 32): smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(COUNT, 3, 6, 6, generator=generator) * contrast
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


class Images(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def oracle(weights) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=Images(pictures(1, 1.0)), input2=Images(pictures(2, 0.8)), cuda=False, cache=False, verbose=False,
        batch_size=10, feature_extractor_weights_path=str(weights[0]), fid=True, isc=True, kid=True,
        kid_subset_size=SUBSET,
        feature_layer_fid="64", feature_layer_isc="64", feature_layer_kid="64",
    )  # fmt: skip


def accumulate(weights: str, seed: int, contrast: float, ranks: Ranks) -> fid.Accumulator:
    """The images shared out over ``ranks``, in uneven batches."""
    extractor = features.inception(weights, "", ("64", "64"))
    images = pictures(seed, contrast)
    accumulator = fid.Accumulator(COUNT, (64, 64), keep=True)
    for index in torch.arange(COUNT)[ranks.rank :: ranks.world_size].split(7):
        accumulator.add(index, *extractor.compute(images[index]))
    accumulator.reduce(ranks)
    return accumulator


def as_oracle(made: fid.Accumulator, real: fid.Accumulator) -> dict[str, float]:
    found = fid.scores(made, real.statistics(), pairs=True, subset=SUBSET)
    names = {
        "fid": "frechet_inception_distance", "is": "inception_score_mean", "is_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std",
    }  # fmt: skip
    return {names.get(key, key): value for key, value in found.items()}


def scored(ranks: Ranks, weights: str) -> dict[str, float]:
    return as_oracle(*(accumulate(weights, *a, ranks) for a in ((1, 1.0), (2, 0.8))))


@pytest.mark.parametrize("world", [1, 2])
def test_equal_to_torch_fidelity(weights, oracle, world):
    found = scored(ONE, str(weights[0])) if world == 1 else on_ranks(2, scored, str(weights[0]))[0]
    assert oracle["frechet_inception_distance"] > 0.1  # else the comparison would say nothing
    assert set(oracle) < set(found)
    for name, expected in oracle.items():
        assert found[name] == pytest.approx(expected, abs=1e-3, rel=1e-3), name


def test_spatial_features_are_those_of_sfid(weights):
    """Mixed_6d's 1x1 branch, done here by hand from its input: 17 x 17 places of the first 7 channels."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    extractor = features.inception(str(weights[0]), "", ("spatial", "2048"))
    found, logits = extractor.compute(images)
    assert found.shape == (2, extractor.sizes[0]) == (2, 7 * 17 * 17)
    network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(weights[0]))
    seen: list[Tensor] = []
    network.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert torch.equal(network(images)[0], logits)
        branch = network.Mixed_6d.branch1x1
        x = torch.nn.functional.conv2d(seen[0], branch.conv.weight[:7])
        mean, var, bias, gain = (
            p[:7, None, None] for p in (branch.bn.running_mean, branch.bn.running_var, branch.bn.bias, branch.bn.weight)
        )
        x = ((x - mean) / (var + branch.bn.eps).sqrt() * gain + bias).relu()
    assert torch.allclose(x.flatten(1), found, rtol=1e-4, atol=1e-5)
    for layers in (("64", "spatial"), ("spatial", "64"), ("spatial", "spatial")):
        with pytest.raises(UserError, match="spatial"):
            features.inception(str(weights[0]), "", layers)


def test_precision_recall_by_hand():
    """Two clusters: the made images sit in one of them."""
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(0, 1, (40, 2)), rng.normal(50, 1, (40, 2))]).astype(np.float32)
    made = rng.normal(0, 0.5, (40, 2)).astype(np.float32)

    def statistics_of(x):
        return fid.Statistics(x.mean(0), np.cov(x.T), len(x), x)

    found = fid.pairwise(statistics_of(made), statistics_of(real), subset=20)
    assert found["precision"] > 0.9
    assert 0.1 < found["recall"] <= 0.5
    with pytest.raises(UserError, match="--kid-subset"):
        fid.pairwise(statistics_of(made), statistics_of(real), subset=41)
    with pytest.raises(UserError, match="--features"):
        fid.pairwise(statistics_of(made), fid.Statistics(real.mean(0), np.cov(real.T), 80))


def test_frechet_of_known_gaussians():
    a = fid.Statistics(np.zeros(2), np.diag([1.0, 4.0]), 10)
    b = fid.Statistics(np.array([3.0, 0.0]), np.diag([4.0, 9.0]), 10)
    assert fid.frechet(a, b) == pytest.approx(9 + (1 - 2) ** 2 + (2 - 3) ** 2)
    with pytest.raises(UserError, match="another network or layer"):
        fid.frechet(a, fid.Statistics(np.zeros(3), np.eye(3), 10))


def test_too_few_images_are_said_once(caplog):
    few, many = (fid.Statistics(np.zeros(3), np.eye(3), count) for count in (3, 4))
    for _ in range(2):
        fid.frechet(few, many)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["3 images are no more than the 3 features"]


def test_missing_images_and_nan_are_noticed():
    accumulator = fid.Accumulator(3, (2, 2))
    accumulator.add(torch.tensor([0, 2]), torch.rand(2, 2), torch.rand(2, 2))
    with pytest.raises(RuntimeError, match="2 images were added, expected 3"):
        accumulator.reduce(ONE)
    with pytest.raises(UserError, match="not finite"):
        accumulator.add(torch.tensor([1]), torch.tensor([[float("nan"), 0.0]]), torch.rand(1, 2))


def test_inception_files(weights, tmp_path):
    path, digest = weights
    assert features.inception(str(path), digest[:10], ("64", "64")).sha256 == digest
    with pytest.raises(UserError, match="do not compare"):
        features.inception(str(path))
    with pytest.raises(UserError, match="no such file"):
        features.inception(str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        features.inception(str(tmp_path / "text.pth"), "")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torch-fidelity's InceptionV3"):
        features.inception(str(tmp_path / "other.pth"), "")

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        features.inception(str(tmp_path / "evil.pth"), "")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def digits_statistics(tiny, tmp_path) -> Path:
    out = tmp_path / "digits.npz"
    options = ("--config", tiny, "--extractor", "digits", "--out", out, "--features")
    said = command_of(statistics.main, *options)
    assert said.returncode == 0, said.stderr
    assert "1497 images, 64 features" in said.stdout
    return out


def test_statistics_are_of_float32(tiny, tmp_path, monkeypatch):
    """As the scores that are compared with them: without TF32 in Inception's convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    said = command_of(statistics.main, "--config", tiny, "--extractor", "digits", "--out", tmp_path / "s.npz")
    assert said.returncode == 0, said.stderr
    assert not torch.backends.cudnn.allow_tf32


def test_statistics_of_a_source(digits_statistics, tmp_path):
    found, about = statistics.read(str(digits_statistics))
    assert found.features is not None
    np.testing.assert_allclose(found.mean, found.features.mean(0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(found.features.astype(np.float64), rowvar=False), atol=1e-9)
    assert about["protocol"]["data"] == {
        "source": "digits", "split": "train", "images": 1497, "size": 8, "pipeline": "digits", "augment": False,
    }  # fmt: skip
    assert fid.frechet(found, found) == pytest.approx(0, abs=1e-4)
    np.savez(tmp_path / "jit.npz", mu=found.mean.astype(np.float32), sigma=found.covariance)  # as others write them
    plain, about = statistics.read(str(tmp_path / "jit.npz"))
    assert fid.frechet(plain, found) == pytest.approx(0, abs=1e-3)
    assert about["protocol"] is None


@pytest.mark.parametrize("crop", ["adm", "fast"])
def test_protocol_tells_crops_apart(tmp_path, crop):
    """The fast crop's pixels are not those of the ADM crop, so a score must say which it saw."""
    if crop == "fast":
        pytest.importorskip("simplejpeg")
    (tmp_path / "cat").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 16), (60 * i, 9, 90)).save(tmp_path / "cat" / f"{i}.jpg")
    config = from_dict({
        "data": {"source": "folder", "heldout_path": str(tmp_path), "crop": crop, "workers": 0},
        "model": {"image_size": 8, "patch_size": 4, "num_classes": 1},
    })  # fmt: skip
    look = features.Extractor(
        "mean", "0" * 64, ("a", "b"), (3, 3), lambda x: (x.float().mean((2, 3)), x.float().std((2, 3)))
    )
    _, protocol = statistics.of_source(config.data, config.model, "heldout", look, ONE)
    library = "simplejpeg-" if crop == "fast" else f"pillow-{PIL.__version__}/"
    assert protocol["data"]["pipeline"].startswith(library)
    assert protocol["data"]["pipeline"].endswith(f"/{crop}-8/alpha-white")


def test_bad_statistics(digits_statistics, tmp_path):
    found, about = statistics.read(str(digits_statistics))
    extractor = features.Extractor("digits 64", "0" * 64, ("hidden", "logits"), (64, 10), lambda x: (x, x))
    with pytest.raises(UserError, match="were made with digits 64"):
        statistics.check_extractor(about, 64, extractor, "x.npz")
    with pytest.raises(UserError, match="have 2048 features, layer hidden of digits 64 gives 64"):
        statistics.check_extractor(about, 2048, extractor, "x.npz")
    cases = {
        "mu": {"sigma": found.covariance},
        "expected": {"mu": found.mean[:3], "sigma": found.covariance},
        "not finite": {"mu": found.mean * np.nan, "sigma": found.covariance},
    }
    for says, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError, match=says):
            statistics.read(str(tmp_path / "bad.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="not a readable"):
        statistics.read(str(tmp_path / "bad.npz"))
    wrong = command_of(statistics.main, "--config", "none.yaml", "--out", tmp_path / "o.npz")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
