"""Batch sampling to files: the same bits for a seed, whatever the batch size and the number of processes.

Images are first written one by one to a folder (``OUT`` itself, or ``OUT.parts`` for a grid, npz or tar). Folder and
file keep the protocol: a rerun makes only what is missing, and what was made with other options or another checkpoint
is refused, or replaced if that is asked for.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast import sampling
from unite_fast.base import files, locks, outputs
from unite_fast.base.errors import UserError
from unite_fast.flow.field import Replays
from unite_fast.modality import pictures
from unite_fast.model.flops import sampling_flops
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.request import Request

PROTOCOL, LOCK = "protocol.json", ".lock"
FILES = (".png", ".npz", ".tar")


def _parts(out: str) -> Path:
    path = Path(out)
    if path.suffix in FILES:
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; name a file that can be written")
        return path.with_name(path.name + ".parts")
    if path.suffix.lower() in (*FILES, ".jpg", ".jpeg", ".webp", ".zip", ".gz"):
        raise UserError(f"--out {out}: write a folder, or a file that ends in {', '.join(FILES)}")
    return path


def _name(seed: int, label: int, null: int) -> str:
    return f"{seed:07d}.png" if label == null else f"{seed:07d}_class{label}.png"


def _carried(path: Path) -> dict[str, object] | None:
    """The protocol that a folder of images, a grid, npz or tar carries; None when there is none."""
    try:
        if path.is_dir():
            text = files.read_text(path / PROTOCOL)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                text = str(content["protocol"])
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                text = tar.pax_headers["comment"]
        else:
            from PIL import Image

            with Image.open(path) as grid:
                text = grid.info["protocol"]
        return json.loads(text)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError):
        return None


def is_there(request: Request, out: str, identity: str, overwrite: bool) -> bool:
    """Whether OUT is a grid, npz or tar of just these images. For one process, before ``generate``.

    Raises UserError when it was made otherwise; with ``overwrite`` it may be replaced, and images that were made
    otherwise are removed from a folder.
    """
    path, folder = Path(out), _parts(out)
    if folder != path and path.exists():
        found = _carried(path)
        if found == request.whole(identity):
            return True
        if not overwrite:
            why = "was made with other seeds, options or another checkpoint"
            why = why if found else "does not say what it was made with"
            raise UserError(f"{out} {why}; choose another --out, or replace it with --overwrite")
    file = folder / PROTOCOL
    if overwrite and file.is_file() and _carried(folder) != request.protocol(identity):
        with files.refusals(f"--overwrite {folder}"):
            for image in folder.glob("[0-9]*.png"):
                image.unlink()
            files.write_json(file, request.protocol(identity))
    return False


def is_made_here(folder: Path) -> bool:
    """Whether a folder of images is one of ``open_folder``."""
    return (folder / PROTOCOL).is_file()


def check_out(out: str, sources: list[Path], reconstruct: str | None = None) -> None:
    """Raises UserError where OUT lies in what is read, holds something else, or cannot be written.

    sources: those of the weights. reconstruct: the folder of images that is reconstructed, into a folder.
    """
    path = Path(out)
    if reconstruct:
        sources = [*sources, Path(reconstruct)]
    if path.suffix in FILES and not reconstruct:
        outputs.check_file(path, "--out", sources, lambda path: True)  # what is in it, ``is_there`` compares
    else:
        outputs.check_folder(path, "--out", sources, ours=is_made_here)


@contextlib.contextmanager
def alone(out: str, folder: Path, ranks: Ranks) -> Iterator[None]:
    """For one job at a time that makes the file OUT of parts in ``folder``; where OUT is that folder itself, it may be
    filled by several. Raises UserError."""
    held: list[Any] = []

    def take() -> None:
        with files.refusals(f"--out {out}"):
            folder.mkdir(parents=True, exist_ok=True)
            held.append(locks.take(folder / LOCK, out, "wait for it, or choose another --out"))

    if folder != Path(out):
        ranks.decide(take)
    try:
        yield
    finally:
        for lock in held:
            if folder.is_dir() and not set(os.listdir(folder)) - locks.traces(LOCK):
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()


REPLACE = "choose another --out, or replace them with --overwrite"


def open_folder(folder: Path, protocol: dict[str, object], ranks: Ranks, mend: str = REPLACE) -> None:
    """Creates the folder with its protocol, or checks that an existing one has the same. Raises UserError."""
    file = folder / PROTOCOL
    if file.is_file():
        if _carried(folder) != protocol:
            raise UserError(f"{folder} holds images of another checkpoint or other options; {mend}")
    elif folder.is_dir() and set(os.listdir(folder)) - locks.traces(LOCK):
        raise UserError(f"{folder} is not empty and was not made by this program; choose another --out")
    ranks.barrier()
    if ranks.is_main:
        with files.refusals(f"--out {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(file, protocol)
    ranks.barrier()


def chunks(pairs: list[tuple[int, int]], batch: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of (seed, label), sorted by seed, of whole tiles: as many as hold ``batch`` places, at least one."""
    per_chunk = max(1, batch // sampling.TILE)
    tiles = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0] // sampling.TILE)]
    for begin in range(0, len(tiles), per_chunk):
        yield list(itertools.chain.from_iterable(tiles[begin : begin + per_chunk]))


def speed(model: UNITE, images: int, counts: dict[str, float], seconds: float, processes: int) -> str:
    """One line: images/s, NFE, passes, FLOPs. Places of a tile that nobody asked for cost, but are no images."""
    solutions, passes = counts["solutions"], counts["passes"] / counts["solutions"]
    flops = sampling_flops(model.config, passes)
    done = flops * solutions * sampling.TILE / seconds
    return (
        f"{images / seconds:.1f} images/s on each of {processes} processes, "
        f"NFE {counts['evaluations'] / solutions:.4g}, {passes:.4g} passes, "
        f"{flops / 1e9:.4g} GFLOP per image, {done / 1e12:.3g} TFLOP/s"
    )


def _is_whole(path: Path) -> bool:
    """Whether an image is there; an empty file, which a broken disk may leave, is none."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def generate(
    model: UNITE, request: Request, out: str, ranks: Ranks, identity: str, replays: Replays | None = None
) -> str:
    """Writes this rank's missing images; returns a line on the speed."""
    folder = _parts(out)
    open_folder(folder, request.protocol(identity), ranks)
    pairs = sorted(zip(request.seeds, request.labels, strict=True))
    tiles = sorted({seed // sampling.TILE for seed in request.seeds})[ranks.rank :: ranks.world_size]
    own = set(tiles)
    pairs = [(s, y) for s, y in pairs if s // sampling.TILE in own]
    missing = [(s, y) for s, y in pairs if not _is_whole(folder / _name(s, y, request.null))]
    started = time.perf_counter()
    counts: dict[str, float] = {}
    for chunk in chunks(missing, request.batch):
        images = sampling.sample_tiles(
            model,
            [s for s, _ in chunk],
            [y for _, y in chunk],
            request.how,
            counts=counts,
            replays=replays,
            guide=request.guide,
        )
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        if not all(finite):
            raise UserError(f"the model gives an image that is not finite (seed {chunk[finite.index(False)][0]})")
        for (seed, label), image in zip(chunk, pictures.to_uint8(images), strict=True):
            pictures.save_png(folder / _name(seed, label, request.null), image)
    seconds = time.perf_counter() - started
    rate = speed(model, len(missing), counts, seconds, ranks.world_size) if missing else "nothing was missing"
    return f"made {len(missing)} of {len(pairs)} ({rate})" if ranks.world_size == 1 else rate


def _read(path: Path) -> Tensor:
    from PIL import Image

    array = np.asarray(Image.open(path))
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def make(
    model: UNITE, request: Request, out: str, ranks: Ranks, identity: str, overwrite: bool, replays: Replays | None
) -> str:
    """The images in OUT, made where they are missing; a line that says so. All ranks together. Raises UserError."""
    return made_once(
        out, _parts(out), (len(request.seeds), "images"), ranks,
        there=lambda: is_there(request, out, identity, overwrite),
        fill=lambda: generate(model, request, out, ranks, identity, replays),
        merge=lambda: merge(request, out, identity),
    )  # fmt: skip


def made_once(
    out: str, parts: Path, what: tuple[int, str], ranks: Ranks, there: Callable[[], bool], fill: Callable[[], str],
    merge: Callable[[], None],
) -> str:  # fmt: skip
    """``fill`` by all ranks and ``merge`` by one, unless ``there``, asked of one, has found OUT made; a line.

    what: (32, "images"). parts: the folder that ``fill`` fills.
    """
    with alone(out, parts, ranks):
        if ranks.decide(there):
            return f"{out} holds these {what[1]} already; nothing to do"
        made = fill()
        ranks.barrier()
        if ranks.is_main:
            merge()
        return f"{made}; {what[0]} {what[1]} in {out}"


def _save_grid(path: Path, images: Tensor, request: Request, protocol: str) -> None:
    """With class names above the columns where each column is of one class."""
    names, labels = request.class_names, request.labels
    width = pictures.columns(len(set(labels)), near=10)
    in_turn = all(label == labels[i % width] for i, label in enumerate(labels))
    above = (
        [names[label] if label < len(names) else "no class" for label in labels[:width]] if names and in_turn else []
    )
    title = "" if request.how.cfg_scale == 1 else f"guidance {request.how.cfg_scale:g}"
    pictures.save_labelled(path, list(images.split(width)), pictures.Words(title, above), {"protocol": protocol})


def merge(request: Request, out: str, identity: str) -> None:
    """Turns OUT.parts into the grid, the npz or the tar that OUT names.

    An npz holds uint8 "arr_0" (n, S, S, Q), as ADM's evaluator reads it, "labels" and "seeds".

    Each holds its protocol as JSON: the grid in the PNG's text, the npz in "protocol", the tar in its header's comment.
    """
    folder, path = _parts(out), Path(out)
    if folder == path:
        return
    names = [_name(s, y, request.null) for s, y in zip(request.seeds, request.labels, strict=True)]
    protocol = json.dumps(request.whole(identity))
    if path.suffix == ".tar":
        with (
            files.replacing(path) as file,
            tarfile.open(None, "w", file, format=tarfile.PAX_FORMAT, pax_headers={"comment": protocol}) as tar,
        ):
            for name in names:
                content = files.read(folder / name)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        images = torch.stack([_read(folder / name) for name in names])
        if path.suffix == ".npz":
            with files.replacing(path) as file:
                labels, seeds = np.array(request.labels), np.array(request.seeds)
                pixels = images.permute(0, 2, 3, 1).numpy()
                np.savez(file, arr_0=pixels, labels=labels, seeds=seeds, protocol=np.array(protocol))
        else:
            _save_grid(path, images.float() / 255, request, protocol)
    shutil.rmtree(folder)
