"""What FID looks at: uint8 images -> (features, logits), by torch-fidelity's InceptionV3 or a small network of digits.

Shape letters: B batch, Q channels, S image size, F features, L logits.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast import data
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.digits import require
from unite_fast.modality.images import to_float

# The sha256 of torch-fidelity's weights, whose name has its first digits.
INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LAYERS = ("2048", "logits_unbiased")
SHALLOW = ("64", "192", "768", "2048")
# Of sFID (Nash et al. 2021, arXiv 2103.03841): the first 7 channels of Mixed_6d's 1x1 branch, 17 x 17 places.
SPATIAL, SPATIAL_CHANNELS, SPATIAL_SIDE = "spatial", 7, 17
# What results call a Fréchet distance of samples, r in front: of reconstructions; and how it is written.
WORDS = {"fid": "FID", "sfid": "sFID", "rfid": "rFID", "rsfid": "rsFID"}


def distance(layers: Sequence[str]) -> str:
    """Which of WORDS a Fréchet distance of samples in the first of these layers is."""
    return "sfid" if layers[0] == SPATIAL else "fid"


@dataclass(frozen=True)
class Extractor:
    """``compute`` maps uint8 images (B, Q, S, S) to float32 features (B, F) and logits (B, L); the rest names it."""

    name: str
    sha256: str
    layers: tuple[str, str]
    sizes: tuple[int, int]  # (F, L)
    compute: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def distance(self) -> str:
        """Which of WORDS its Fréchet distance of samples is."""
        return distance(self.layers)

    def named(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """A result whose distances are called "fid" and "rfid", under the names that they have in WORDS."""
        names = {"fid": self.distance, "rfid": f"r{self.distance}"}
        return {names.get(key, key): value for key, value in result.items()}

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "layers": list(self.layers)}


def inception(
    path: str, expected: str = INCEPTION, layers: tuple[str, str] = LAYERS, device: torch.device | str = "cpu"
) -> Extractor:
    """torch-fidelity's InceptionV3 with the weights of ``path``, in its own file format.

    expected: the first digits of the file's sha256. Raises UserError for a missing file, another hash, other content.
    """
    file = Path(path)
    where = f"Inception weights {path}"
    if not file.is_file():
        raise UserError(f"{where}: no such file; get {INCEPTION_FILE}: python -m unite_fast fetch inception")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(expected):
        raise UserError(f"{where}: sha256 {digest}, expected {expected}; scores of other weights do not compare")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways; each means that the file is not what it should be
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports torchvision: seconds

    known = FeatureExtractorInceptionV3.get_provided_features_list()
    if unknown := [layer for n, layer in enumerate(layers) if layer not in known and (n, layer) != (0, SPATIAL)]:
        raise UserError(f"Inception has no layer {unknown[0]}; choose from {', '.join(known)}, and {SPATIAL} for FID")
    # The class unpickles whatever it is given, so it gets a copy of tensors that were read safely.
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    names = [name for name in dict.fromkeys(layers) if name != SPATIAL]
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=checked)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not torch-fidelity's InceptionV3 ({str(error).splitlines()[0]})") from None
    network.to(device)
    spatial: list[Tensor] = []
    if SPATIAL in layers:
        if names == ["64"] or names == ["192"]:
            raise UserError(
                f"--layers {','.join(layers)}: the network ends before the {SPATIAL} layer; name a later one"
            )
        network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: spatial.append(output[:, :SPATIAL_CHANNELS].flatten(1))
        )

    @torch.no_grad()
    def compute(images: Tensor) -> tuple[Tensor, Tensor]:
        network.to(images.device)  # it may have been opened before the devices were given out
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        with torch.autocast(images.device.type, enabled=False):  # scores are float32 whatever drew the images
            found = dict(zip(names, network(rgb), strict=True))
        if spatial:
            found[SPATIAL] = spatial.pop()
        return found[layers[0]], found[layers[1]]

    sizes = {name: int(name) if name in SHALLOW else 1008 for name in names}
    sizes[SPATIAL] = SPATIAL_CHANNELS * SPATIAL_SIDE**2
    return Extractor(
        "torch-fidelity inception-v3-compat", digest, layers, (sizes[layers[0]], sizes[layers[1]]), compute
    )


def digits_network(reading: DataConfig, model: ModelConfig, device: torch.device | str = "cpu") -> Extractor:
    """A classifier of the digits with 64 hidden units, fitted from a fixed seed to the real training digits.

    Its hidden layer is what FID sees, its outputs what the Inception score sees. The same on every machine up to
    rounding; the hash in ``identity`` tells. Scores compare only with those of the same network.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    source = data.open_source(reading, model, "train")
    images = torch.stack([to_float(source.load(i)) for i in range(len(source))]).flatten(1).numpy()
    fitted: Any = MLPClassifier((64,), alpha=1e-2, max_iter=60, random_state=0, tol=0.0, n_iter_no_change=60)
    # One thread: the sums of matrix products, and with them the network's hash, depend on how many share the work.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it stops at max_iter, which is meant
        fitted.fit(images, source.labels.numpy())
    arrays = [np.ascontiguousarray(a, dtype=np.float32) for a in (*fitted.coefs_, *fitted.intercepts_)]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    w1, w2, b1, b2 = (torch.from_numpy(a).to(device) for a in arrays)

    def compute(images: Tensor) -> tuple[Tensor, Tensor]:
        v1, v2, c1, c2 = (tensor.to(images.device) for tensor in (w1, w2, b1, b2))
        hidden = (images.flatten(1).float() / 255 @ v1 + c1).relu()
        return hidden, hidden @ v2 + c2

    return Extractor("digits 64", digest, ("hidden", "logits"), (64, 10), compute)


def open_extractor(
    reading: DataConfig,
    model: ModelConfig,
    kind: str,
    weights: str = "",
    sha256: str = INCEPTION,
    layers: tuple[str, str] = LAYERS,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The "inception" network with the weights of a file, or the "digits" one. Raises UserError."""
    if kind == "digits":
        require(reading, "the digits network")
        return digits_network(reading, model, device)
    if not weights:
        raise UserError(f"FID needs {INCEPTION_FILE}: name it with --inception, or evaluation.inception of a run")
    if len(sha256) < 8:
        raise UserError(f"expected sha256 of the Inception weights {sha256!r}: give at least 8 digits")
    return inception(weights, sha256, layers, device)
