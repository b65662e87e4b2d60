"""Reference statistics for FID: computed from a data source, or read from .npz files such as those of JiT and ADM.

    python -m unite_fast.evaluation.statistics --config configs/imagenet_b.yaml data.path=imagenet/train \\
        --inception weights-inception-2015-12-05-6726825d.pth --out imagenet256.npz

The file holds "mu", "sigma" (float64), "count", "protocol" (JSON: extractor, source, split, images), and with
--features also "features", which KID and precision/recall need. Under torchrun the images are shared out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unite_fast import data
from unite_fast.base import command, files, outputs
from unite_fast.base.errors import UserError, first_line, idle
from unite_fast.base.files import file_sha256
from unite_fast.config import Config, DataConfig, EvaluationConfig, ModelConfig, choices, yaml_text
from unite_fast.data import Source
from unite_fast.efficiency import precision
from unite_fast.evaluation import features
from unite_fast.evaluation.features import Extractor
from unite_fast.evaluation.fid import Accumulator, Statistics
from unite_fast.modality import pictures
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks

TOLERANCE = 1e-5  # relative; published files hold sums of float32
LARGEST = 1e30  # of a mean or covariance, whose squares still are numbers


def read(path: str) -> tuple[Statistics, dict[str, Any]]:
    """(statistics, {"sha256", "count", "protocol"}) of an .npz with "mu" and "sigma". Raises UserError."""
    where, file = f"reference statistics {path}", Path(path)
    if not file.is_file():
        raise UserError(f"{where}: no such file; make it with python -m unite_fast.evaluation.statistics")
    try:
        files.check_zip(file)
        with np.load(file, allow_pickle=False) as content:
            missing = {"mu", "sigma"} - set(content.files)
            if missing:
                raise UserError(f"{where}: no array {sorted(missing)[0]!r} in it, only {', '.join(content.files)}")
            mean, covariance = _numbers(content, "mu"), _numbers(content, "sigma")
            kept = content["features"] if "features" in content.files else None
            count = int(content["count"]) if "count" in content.files else 0
            protocol = json.loads(str(content["protocol"])) if "protocol" in content.files else None
            if not 0 <= count < 1 << 53:
                raise ValueError(f"count is {count}")
    except UserError:
        raise
    except Exception as error:  # a damaged zip, or a header of impossible sizes, raises nearly anything
        raise UserError(f"{where}: not a readable .npz file ({first_line(error)})") from None
    _check(mean, covariance, protocol, where)
    about = {"sha256": file_sha256(file), "count": count, "protocol": protocol}
    return Statistics(mean, covariance, count, kept), about


def _numbers(content: Any, name: str) -> np.ndarray:
    """As float64. Raises ValueError for what would be made numbers without being any."""
    found = content[name]
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {found.dtype}, not numbers")
    return found.astype(np.float64)


def _check(mean: np.ndarray, covariance: np.ndarray, protocol: Any, where: str) -> None:
    """Raises UserError for what is no mean and covariance of features, and for a protocol of another form."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{where}: mu is {mean.shape} and sigma {covariance.shape}; expected (F,) and (F, F)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{where}: holds values that are not finite")
    if not max(np.abs(mean).max(initial=0.0), np.abs(covariance).max(initial=0.0)) < LARGEST:
        raise UserError(f"{where}: holds values above {LARGEST:g}; no features are so large")
    largest = float(np.abs(covariance).max(initial=0.0))
    if np.abs(covariance - covariance.T).max(initial=0.0) > TOLERANCE * largest:
        raise UserError(f"{where}: sigma is not symmetric, so no covariance; make the file again")
    if largest and (lowest := float(np.linalg.eigvalsh(covariance)[0])) < -TOLERANCE * largest * len(mean):
        raise UserError(f"{where}: sigma has the eigenvalue {lowest:.3g}, so it is no covariance; make the file again")
    made_with = protocol.get("extractor") if isinstance(protocol, dict) else protocol
    told = isinstance(made_with, dict) and all(isinstance(made_with.get(key), str) for key in ("sha256", "name"))
    if made_with is not None and not told:
        raise UserError(f"{where}: its protocol does not say with which extractor it was made; make the file again")


def check_extractor(reference: dict[str, Any], size: int, extractor: Extractor, path: str) -> None:
    """Raises UserError when statistics of ``size`` features do not belong to ``extractor``, if the file tells."""
    if size != extractor.sizes[0]:
        raise UserError(
            f"reference statistics {path} have {size} features, layer {extractor.layers[0]} of {extractor.name} "
            f"gives {extractor.sizes[0]}; use statistics of the same layer"
        )
    made_with = (reference["protocol"] or {}).get("extractor")
    if made_with is not None and made_with["sha256"] != extractor.sha256:
        raise UserError(
            f"reference statistics {path} were made with {made_with['name']} {made_with['sha256'][:8]}..., not with "
            f"{extractor.name} {extractor.sha256[:8]}..."
        )


def write(path: str, statistics: Statistics, protocol: dict[str, Any]) -> None:
    """Writes the file whole or not at all. Raises UserError when it cannot."""
    file = Path(path)
    arrays: dict[str, Any] = {"mu": statistics.mean, "sigma": statistics.covariance, "count": statistics.count}
    if statistics.features is not None:
        arrays["features"] = statistics.features
    with files.refusals(f"--out {path}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as opened:
            np.savez(opened, protocol=np.array(json.dumps(protocol)), **arrays)


def described(kind: str, size: int, split: str, source: Source, device: torch.device) -> dict[str, Any]:
    """What a protocol says of a source of a ``data.source`` kind, center-cropped to ``size``, nothing random."""
    return {
        "source": kind, "split": split, "images": len(source), "size": size,
        "pipeline": source.pipeline_id(device.type), "augment": False,
    }  # fmt: skip


@torch.no_grad()
def of_source(
    reading: DataConfig,
    model: ModelConfig,
    split: str,
    extractor: Extractor,
    ranks: Ranks,
    keep: bool = False,
    batch: int = 64,
) -> tuple[Statistics, dict[str, Any]]:
    """Statistics of all images of a data source, center-cropped, without flips, and the protocol that says so."""
    source = data.open_source(reading, model, split)
    accumulator = Accumulator(len(source), extractor.sizes, ranks.device, keep)
    share = (ranks.rank, ranks.world_size, ranks.device)
    batches = data.all_images(source, batch, *share, reading.workers, reading.timeout)
    for found in batches:
        images = found.images if found.images.dtype == torch.uint8 else pictures.to_uint8(found.images)
        accumulator.add(found.samples, *extractor.compute(images))
    accumulator.reduce(ranks)
    said = described(reading.source, model.image_size, split, source, ranks.device)
    return accumulator.statistics(), {"extractor": extractor.identity(), "data": said}


def is_statistics(path: Path) -> bool:
    """Whether a file is one that ``write`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {"mu", "sigma", "protocol"} <= set(content.files)
    except Exception:  # a file of any kind
        return False


def check_out(arguments: argparse.Namespace, reading: DataConfig) -> None:
    """Raises UserError where --out lies in what is read, holds something else, or cannot be written."""
    read = reading.path if arguments.split == "train" else reading.heldout_path
    sources = [path for path in (read, arguments.config, arguments.inception) if path]
    outputs.check_file(Path(arguments.out), "--out", sources, is_statistics)


def add_extractor_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--extractor",
        choices=choices(EvaluationConfig, "extractor"),
        default="inception",
        help="what looks at the images",
    )
    add("--inception", metavar="FILE", default="", help=f"its weights: {features.INCEPTION_FILE}")
    add("--inception-sha256", metavar="HEX", default=features.INCEPTION, help="first digits of that file's sha256")
    add(
        "--layers",
        default=",".join(features.LAYERS),
        metavar="FID,IS",
        help="its layers (default: %(default)s); spatial,logits_unbiased: sFID",
    )


def open_extractor(
    arguments: argparse.Namespace, reading: DataConfig, model: ModelConfig, device: torch.device
) -> Extractor:
    """The extractor that the options of ``add_extractor_options`` ask for. Raises UserError."""
    layers = tuple(arguments.layers.split(","))
    if len(layers) != 2:
        raise UserError(f"--layers {arguments.layers}: write two names such as {','.join(features.LAYERS)}")
    if arguments.extractor != "inception":
        given = {
            "--inception": arguments.inception,
            "--inception-sha256": arguments.inception_sha256 != features.INCEPTION,
            "--layers": layers != features.LAYERS,
        }
        for option in (name for name, asked in given.items() if asked):
            raise idle(option, f"with --extractor {arguments.extractor}")
    return features.open_extractor(
        reading,
        model,
        arguments.extractor,
        arguments.inception,
        arguments.inception_sha256,
        (layers[0], layers[1]),
        device,
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.evaluation.statistics", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML of a run: its data section and image size count")
    add("--split", choices=("train", "heldout"), default="train")
    add("--out", required=True, metavar="FILE.npz")
    add("--features", action="store_true", help="also keep the features, for KID and precision/recall")
    add("--device", choices=choices(Config, "device"), default="auto")
    add("--debug", action="store_true", help="show tracebacks")
    add("overrides", nargs="*", metavar="section.key=value")
    add_extractor_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    config = yaml_text.load(arguments.config, arguments.overrides)
    for override in arguments.overrides:
        if not override.startswith(("data.", "model.")):
            raise idle(f"override {override}", "here: the data section and the images' size count")
    ranks = distributed.start(arguments.device)
    try:
        ranks.decide(lambda: check_out(arguments, config.data))
        precision.setup(ranks.device)
        extractor = open_extractor(arguments, config.data, config.model, ranks.device)
        found, protocol = of_source(config.data, config.model, arguments.split, extractor, ranks, arguments.features)
        if ranks.is_main:
            write(arguments.out, found, protocol)
            print(f"{found.count} images, {len(found.mean)} features of {extractor.name}, in {arguments.out}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(command.run(main))
