"""Reconstruction of a folder of images: each original beside what the tokenizer and decoder make of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig
from unite_fast.data.folder import read_image
from unite_fast.data.listing import images_below
from unite_fast.data.transforms import transform
from unite_fast.modality import Content, pictures
from unite_fast.modality.images import psnr
from unite_fast.model.unite import TOKENIZE_SEED, UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.generate import open_folder
from unite_kernels import corruption


def reconstruct(
    model: UNITE,
    content: Content,
    places: Tensor,
    t_max: float,
    labels: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Any:
    """What the tokenizer and decoder make of a content, finished: of images (B, Q, S, S) clamped to [0, 1], float32.

    places: int64 (B,), which noise and time each sample gets; t_max: ``objective.tokenizer_t_max`` of the training.
    labels, sizes: int64 (B,), where the modality has use for them.
    """
    places = places.to(model.latent_tokens.device)
    prediction = model.decode(tokens(model, content, places, t_max, sizes), sizes)
    return model.modality.finished(model, prediction, torch.zeros_like(places) if labels is None else labels, sizes)


def tokens(model: UNITE, content: Content, places: Tensor, t_max: float, sizes: Tensor | None = None) -> Tensor:
    """Normalised latents (B, K, C) of a content; places, t_max, sizes: as of ``reconstruct``."""
    places = places.to(model.latent_tokens.device)
    noise, t = corruption.draw_tokenizer(TOKENIZE_SEED, places, model.latent_shape, t_max)
    return model.tokenize(content, noise, t, sizes)


@torch.no_grad()
def reconstruct_folder(
    model: UNITE, source: str, out: str, batch: int, ranks: Ranks, t_max: float, identity: str, reading: DataConfig
) -> str:
    """Writes OUT/<name>.png (original | reconstruction) for an image or all of a folder; a line with the mean PSNR.

    identity: of the weights and how they compute, which OUT keeps; that of another network is refused. Images are
    center-cropped, and transparency is laid on ``reading.alpha``, as in training. Raises UserError for a place that is
    missing or empty, and for unreadable images.
    """
    root = Path(source)
    if not root.exists():
        raise UserError(f"--reconstruct {source}: no such file or folder")
    files = [root] if root.is_file() else [Path(path) for path in images_below(root)]
    root = root.parent if root.is_file() else root
    if not files:
        raise UserError(f"--reconstruct {source}: no .jpg, .png or .webp images in it")
    folder = Path(out)
    open_folder(folder, {"reconstructions of": identity}, ranks, "choose another --out, or remove it")
    stems = Counter(p.with_suffix("") for p in files)
    twins = {p for p in files if stems[p.with_suffix("")] > 1}  # a.jpg beside a.png: both keep their suffix
    mine = files[ranks.rank :: ranks.world_size]
    mode = "L" if model.config.channels == 1 else "RGB"
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for begin in range(0, len(mine), batch):
        chunk = mine[begin : begin + batch]
        tensors = []
        for path in chunk:
            image = read_image(path, mode, reading.alpha, "; mend or remove it")
            tensors.append(transform(image, model.config.image_size, "adm", False, None))
        images = torch.stack(tensors).to(ranks.device).float() / 255
        places = torch.arange(len(files))[ranks.rank :: ranks.world_size][begin : begin + batch]
        reconstruction = reconstruct(model, images, places, t_max)
        total += torch.stack([psnr(images, reconstruction).double().sum(), torch.tensor(len(chunk)).to(total)])
        for path, image, made in zip(chunk, images, reconstruction, strict=True):
            target = folder / path.relative_to(root)
            target = target.with_name(target.name + ".png") if path in twins else target.with_suffix(".png")
            pictures.save_grid(target, [torch.stack([image, made])])
    if ranks.world_size > 1:
        ranks.average_([total])
    return f"{len(files)} images, mean PSNR {float(total[0] / total[1]):.2f} dB, in {out}"
