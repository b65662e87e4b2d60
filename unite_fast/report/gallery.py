"""Pictures that show what a model has learned, one command each.

python -m unite_fast gallery guidance runs/pets                      a row per guidance scale, a column per class
python -m unite_fast gallery classes runs/pets                       a row per class, a column per seed: same noise
python -m unite_fast gallery between-seeds runs/pets --seeds 3,8     samples of noise between two seeds'
python -m unite_fast gallery between-images runs/pets a.png b.png    decoded between the latents of two images
python -m unite_fast gallery nearest runs/pets                       samples, and the nearest images of the training
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from unite_fast import checkpoint, data, sampling
from unite_fast.base import files, outputs
from unite_fast.base.errors import UserError, idle
from unite_fast.config import DataConfig, SampleConfig
from unite_fast.data.folder import read_image
from unite_fast.data.transforms import transform
from unite_fast.efficiency import precision
from unite_fast.evaluation import small
from unite_fast.modality import pictures
from unite_fast.modality.images import to_float
from unite_fast.modality.pictures import Words
from unite_fast.model.unite import UNITE
from unite_fast.sampling.reconstruct import tokens
from unite_fast.sampling.request import classes_of, parse_seeds
from unite_kernels import backend

SCALES = "1,1.5,2,3,5"
MARK = "gallery"  # a text that the picture's file carries
MOST_CLASSES, SEEDS, STEPS, NEIGHBOURS = 10, 8, 9, 3


class Shown(NamedTuple):
    """A model and what is asked of it."""

    model: UNITE
    how: SampleConfig
    reading: DataConfig
    t_max: float
    names: Sequence[str]
    labels: list[int]  # one per class that is shown
    seeds: list[int]
    scales: list[float]
    images: list[str]

    def called(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else f"class {label}" if label < self.null else "no class"

    @property
    def null(self) -> int:
        return self.model.config.num_classes

    def sample(self, labels: Sequence[int], seeds: Sequence[int], **options: Any) -> Tensor:
        """(B, Q, S, S), an image per label and seed."""
        return sampling.sample(self.model, torch.tensor(labels), self.how, seeds=seeds, **options)


def guidance(s: Shown) -> tuple[list[Tensor], Words]:
    rows = [s.sample(s.labels, [s.seeds[0]] * len(s.labels), cfg_scale=scale) for scale in s.scales]
    return rows, Words(f"seed {s.seeds[0]}", [s.called(y) for y in s.labels], [f"guidance {w:g}" for w in s.scales])


def classes(s: Shown) -> tuple[list[Tensor], Words]:
    rows = [s.sample([label] * len(s.seeds), s.seeds) for label in s.labels]
    return rows, Words("", [f"seed {seed}" for seed in s.seeds], [s.called(y) for y in s.labels])


def between_seeds(s: Shown) -> tuple[list[Tensor], Words]:
    """On the arc between the two noises, of which every point is as long as noise is."""
    if len(s.seeds) < 2:
        raise UserError("gallery between-seeds: give two seeds, as --seeds 3,8")
    ends = sampling.initial_noise(s.model, s.seeds[:2], s.model.latent_tokens.device)
    parts = torch.linspace(0, 1, STEPS)
    angles = (parts * math.pi / 2).to(ends)[:, None, None]
    noise = angles.cos() * ends[0] + angles.sin() * ends[1]
    rows = []
    for label in s.labels:
        rows.append(sampling.sample(s.model, torch.full((STEPS,), label), s.how, noise=noise))
    above = [f"seed {s.seeds[0]}", *[f"{p:.0%}" for p in parts[1:-1].tolist()], f"seed {s.seeds[1]}"]
    return rows, Words("", above, [s.called(y) for y in s.labels])


def between_images(s: Shown) -> tuple[list[Tensor], Words]:
    config = s.model.config
    if len(s.images) != 2:
        raise UserError("gallery between-images: name two images behind the checkpoint")
    found = []
    for path in s.images:
        image = read_image(path, "L" if config.channels == 1 else "RGB", s.reading.alpha)
        found.append(transform(image, config.image_size, "adm", False, None))
    real = torch.stack(found).float().to(s.model.latent_tokens.device) / 255
    z = tokens(s.model, real, torch.arange(2), s.t_max)
    parts = torch.linspace(0, 1, STEPS).to(z)[:, None, None]
    decoded = s.model.decode(s.model.normalise(torch.lerp(z[:1], z[1:], parts))).float().clamp(0, 1)
    row = torch.cat([real[:1], decoded, real[1:]])
    above = [Path(s.images[0]).name, *[f"{k / (STEPS - 1):.0%}" for k in range(STEPS)], Path(s.images[1]).name]
    return [row], Words("", above, [])


def nearest(s: Shown) -> tuple[list[Tensor], Words]:
    """By pixels: a sample that is a copy is seen at once."""
    source = data.open_source(s.reading, s.model.config)
    made = s.sample(s.labels, [s.seeds[0]] * len(s.labels)).cpu()
    distances, places = small.nearest(made, source, NEIGHBOURS)
    near = [torch.stack([to_float(source.load(int(i))) for i in column]) for column in places.T]
    above = [f"{s.called(y)} {distance:.2f}" for y, distance in zip(s.labels, distances.tolist(), strict=True)]
    title = "distance: root of the mean square of pixels' differences"
    return [made, *near], Words(
        title, above, ["sample", "nearest", *[f"{k + 1}. nearest" for k in range(1, NEIGHBOURS)]]
    )


KINDS: dict[str, Callable[[Shown], tuple[list[Tensor], Words]]] = {
    "guidance": guidance,
    "classes": classes,
    "between-seeds": between_seeds,
    "between-images": between_images,
    "nearest": nearest,
}


def is_gallery(path: Path) -> bool:
    """Whether a file is a picture that this command made."""
    try:
        with Image.open(files.regular(path)) as picture:
            return MARK in picture.info
    except Exception:  # Pillow's readers raise many kinds
        return False


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("checkpoint", metavar="PATH", help="run folder, step-N folder, export, or official .pt")
    add("images", nargs="*", metavar="IMAGE", help="two, for between-images")
    add("--out", type=Path, metavar="FILE.png", help="default: gallery_KIND.png in the run folder's report/, or here")
    add("--labels", help="classes by name or number, as dog,cat (default: the first ten)")
    add("--seeds", help="as 0-7 (default: 0-7)")
    add("--scales", help=f"guidance scales (default: {SCALES})")
    add("--weights", default="ema", metavar="NAME", help="ema (default), model, or another average that it has")
    add("--debug", action="store_true", help="show tracebacks")
    a = parser.parse_args(argv)
    unused = {"--images": a.images and a.kind != "between-images", "--scales": a.scales and a.kind != "guidance"}
    for option in (name for name, given in unused.items() if given):
        raise idle(option, f"with gallery {a.kind}")
    located = checkpoint.locate(a.checkpoint)
    run = checkpoint.run_of(located)
    out = a.out or (run / "report" if run else Path()) / f"gallery_{a.kind.replace('-', '_')}.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: name a .png file")
    read = [*checkpoint.reads(located), *map(Path, a.images)]
    outputs.check_file(out, "--out", read, is_gallery if a.out else lambda path: True)
    model, config = checkpoint.load_model(located, a.weights)
    if "pixels" not in model.modality.analyses:
        raise UserError(f"gallery is for images; this is a model of {model.modality.thing}s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision.setup(device)
    model.to(device)
    model.use_kernels(backend.best(device))
    names, count = checkpoint.class_names(located), model.config.num_classes
    labels = classes_of(a.labels, count, names) if a.labels else list(range(min(count, MOST_CLASSES))) or [0]
    if a.kind == "between-seeds" and not a.labels:
        labels = labels[:3]
    try:
        scales = [float(part) for part in (a.scales or SCALES).split(",")]
    except ValueError:
        raise UserError(f"--scales {a.scales}: write numbers such as {SCALES}") from None
    how = config.sample if count else dataclasses.replace(config.sample, cfg_scale=1.0)
    seeds = parse_seeds(a.seeds or f"0-{SEEDS - 1}")
    shown = Shown(model, how, config.data, config.objective.tokenizer_t_max, names, labels, seeds, scales, a.images)
    with torch.no_grad():
        rows, words = KINDS[a.kind](shown)
    pictures.save_labelled(out, [row.cpu() for row in rows], words, {MARK: a.kind})
    print(f"gallery of {a.kind} in {out}")
    return 0
