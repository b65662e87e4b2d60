"""Samples and reconstructions of molecules and crystals as files: .sdf, .xyz, .extxyz, or a folder of .cif.

Each tile of samples is first written to ``OUT.parts``, so that a rerun makes only what is missing; OUT is written at
the end, whole. ``OUT.json``, in a folder ``protocol.json``, says what it was made with; what was made otherwise is
refused, or replaced if that is asked for.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast import sampling
from unite_fast.base import files, outputs
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig
from unite_fast.data.atoms import Structures, pack, writers
from unite_fast.data.atoms import files as readers
from unite_fast.data.atoms.checks import admit
from unite_fast.data.atoms.source import AtomSource
from unite_fast.data.atoms.structures import load
from unite_fast.flow.field import Replays
from unite_fast.model.unite import UNITE
from unite_fast.parallel.distributed import Ranks
from unite_fast.sampling.generate import PROTOCOL, made_once, open_folder, speed
from unite_fast.sampling.reconstruct import reconstruct
from unite_fast.sampling.request import Request


def _is_file(path: Path) -> bool:
    return path.suffix.lower() in writers.SUFFIXES


def _protocol(path: Path) -> Path:
    return path.with_name(f"{path.name}.json") if _is_file(path) else path / PROTOCOL


def _carried(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(files.read_text(_protocol(path)))
    except (OSError, ValueError, RecursionError):
        return None


def _parts(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def check_out(out: str, sources: list[Path], given: str | None = None) -> None:
    """Raises UserError where OUT lies in what is read, is of another kind, or cannot be written.

    sources: those of the weights. given: the structures that are reconstructed.
    """
    path = Path(out)
    sources = [*sources, Path(given)] if given else sources
    if _is_file(path):
        outputs.check_file(path, "--out", sources, ours=lambda path: True)  # what is in it, ``is_there`` compares
    elif path.suffix.lower() not in ("", ".cif"):
        raise UserError(f"--out {out}: one of {', '.join(writers.SUFFIXES)}, or a folder, which gets .cif files")
    else:
        outputs.check_folder(path, "--out", sources, ours=lambda path: (path / PROTOCOL).is_file())


def _refuse_others(out: str, wanted: dict[str, object], overwrite: bool) -> bool:
    """Whether OUT is there and was made so. Raises UserError when it was made otherwise and may not be replaced."""
    path = Path(out)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    found = _carried(path)
    if found == json.loads(json.dumps(wanted)):
        return True
    if not overwrite:
        why = "was made with other seeds, options or another checkpoint" if found else "does not say how it was made"
        raise UserError(f"{out} {why}; choose another --out, or replace it with --overwrite")
    return False


def _is_there(request: Request, out: str, identity: str, overwrite: bool) -> bool:
    """Whether OUT holds just these samples. For one process. Raises UserError."""
    there = _refuse_others(out, request.whole(identity), overwrite)
    if overwrite and not there:
        with files.refusals(f"--overwrite {out}"):
            for left in _parts(Path(out)).glob("*[0-9].safetensors"):
                left.unlink()
            (_parts(Path(out)) / PROTOCOL).unlink(missing_ok=True)
    return there


def _check_kinds(model: UNITE, labels: list[int], path: Path) -> None:
    periodic = model.state_dict()["atom_embed.periodic"].tolist()
    for kind in sorted({periodic[label] for label in labels}):
        writers.check(path, kind)


def make(
    model: UNITE, request: Request, out: str, ranks: Ranks, identity: str, overwrite: bool, replays: Replays | None
) -> str:
    """The samples in OUT, made where they are missing; a line that says so. All ranks together. Raises UserError."""
    _check_kinds(model, request.labels, Path(out))
    return made_once(
        out, _parts(Path(out)), (len(request.seeds), "structures"), ranks,
        there=lambda: _is_there(request, out, identity, overwrite),
        fill=lambda: _generate(model, request, out, ranks, identity, replays),
        merge=lambda: _merge(request, out, identity),
    )  # fmt: skip


def _generate(model: UNITE, request: Request, out: str, ranks: Ranks, identity: str, replays: Replays | None) -> str:
    """Writes this rank's missing tiles; returns a line on the speed. Raises UserError."""
    folder = _parts(Path(out))
    open_folder(folder, request.whole(identity), ranks)
    tiles: dict[int, list[tuple[int, int]]] = {}
    for seed, label in sorted(zip(request.seeds, request.labels, strict=True)):
        tiles.setdefault(seed // sampling.TILE, []).append((seed, label))
    own = sorted(tiles)[ranks.rank :: ranks.world_size]
    counts: dict[str, float] = {}
    made, began = 0, time.perf_counter()
    for tile in own:
        part = folder / f"{tile:07d}.safetensors"
        if part.is_file():
            continue
        seeds, labels = ([pair[i] for pair in tiles[tile]] for i in (0, 1))
        options = {"counts": counts, "replays": replays, "guide": request.guide}
        found = sampling.sample_tiles(model, seeds, labels, request.how, **options)
        items = model.modality.items(found)
        bad = [seed for seed, one in zip(seeds, items, strict=True) if not np.isfinite(one.positions).all()]
        if bad:
            raise UserError(f"the model gives a structure that is not finite (seed {bad[0]})")
        several = model.config.num_classes > 1
        names = [f"seed {s}" + (f" class {y}" if several else "") for s, y in zip(seeds, labels, strict=True)]
        pack([one._replace(name=name) for one, name in zip(items, names, strict=True)]).save(part)
        made += len(seeds)
    rate = speed(model, made, counts, time.perf_counter() - began, ranks.world_size) if made else "nothing was missing"
    asked = sum(len(tiles[tile]) for tile in own)
    return f"made {made} of {asked} ({rate})" if ranks.world_size == 1 else rate


def _write(path: Path, structures: list[Structures], order: list[tuple[int, int]], protocol: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writers.write(path, (structures[part][place] for part, place in order))
    files.write_json(_protocol(path), protocol)


def _merge(request: Request, out: str, identity: str) -> None:
    """Turns OUT.parts into OUT, in the order of the seeds."""
    path, folder = Path(out), _parts(Path(out))
    tiles = sorted({seed // sampling.TILE for seed in request.seeds})
    parts = [load(folder / f"{tile:07d}.safetensors") for tile in tiles]
    places: dict[int, tuple[int, int]] = {}
    for number, tile in enumerate(tiles):
        members = sorted(seed for seed in request.seeds if seed // sampling.TILE == tile)
        places |= {seed: (number, k) for k, seed in enumerate(members)}
    _write(path, parts, [places[seed] for seed in request.seeds], request.whole(identity))
    shutil.rmtree(folder)


def labels_of(model: UNITE, structures: Structures) -> Tensor:
    """For each structure the first class of its kind, int64 (S,). Raises UserError for a kind that the model lacks."""
    periodic = model.state_dict()["atom_embed.periodic"].cpu()
    labels = torch.zeros(len(structures), dtype=torch.int64)
    for kind, word in ((False, "molecules"), (True, "crystals")):
        which, classes = structures.periodic == kind, (periodic == kind).nonzero()[:, 0]
        if which.any() and not len(classes):
            name = structures.names[int(which.nonzero()[0])]
            raise UserError(f"{name}: the model was not trained on {word}")
        labels[which] = classes[0] if len(classes) else 0
    return labels


@torch.no_grad()
def reconstruct_files(
    model: UNITE, source: str, out: str, batch: int, ranks: Ranks, t_max: float, identity: str, reading: DataConfig
) -> str:
    """Writes what the model makes of the structures of a file or folder, in their order; returns a line.

    reading: not looked at; of images.

    Raises UserError.
    """
    path, slots = Path(out), model.config.num_latents
    wanted: dict[str, object] = {"reconstructions of": source, "checkpoint": identity}
    if ranks.decide(lambda: _refuse_others(out, wanted, overwrite=False)):
        return f"{out} holds these reconstructions already; nothing to do"
    given = admit(readers.read_path(Path(source), slots), f"--reconstruct {source}", slots, "fail")
    labels = labels_of(model, given)
    for kind in given.periodic.unique().tolist():
        writers.check(path, kind)
    reader = AtomSource(given, slots, sizes=model.config.atoms.registers == "per_atom")
    mine, right = [], 0
    for numbers in torch.arange(len(given)).split(batch)[ranks.rank :: ranks.world_size]:
        few = reader.few(numbers)
        content = model.modality.content({name: value.to(ranks.device) for name, value in few.content.items()})
        sizes = None if few.sizes is None else few.sizes.to(ranks.device)
        found = reconstruct(model, content, numbers, t_max, labels[numbers].to(ranks.device), sizes)
        right += int((found["species"] == content["species"]).all(1).sum())
        items = model.modality.items(found)
        named = [one._replace(name=given.names[i]) for i, one in zip(numbers.tolist(), items, strict=True)]
        mine.append((int(numbers[0]), named))
    everyone = sorted((part for some in ranks.gather(mine) for part in some), key=lambda part: part[0])
    total = sum(ranks.gather(right))
    if ranks.is_main:
        with files.refusals(f"--out {out}"):
            together = pack([one for _, part in everyone for one in part])
            _write(path, [together], [(0, k) for k in range(len(together))], wanted)
    return (
        f"{len(given)} structures, {total} with all elements right, in {out}; "
        f"python -m unite_fast score-atoms {out} --of {source} compares them"
    )
