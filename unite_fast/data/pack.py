"""Packs images into shards, cropped once by the ADM center crop (packed.py says what the files are).

    python -m unite_fast.data.pack SOURCE DEST [--size 256] [--format uint8|jpeg|png] [--workers N] [--stats]
                                   [--unlabelled] [--alpha white|black|refuse] [--label-column NAME]
    python -m unite_fast.data.pack verify DEST

SOURCE is an image folder, a folder of tars (with indexes) or of Parquet files, or one such file. The training crop is
deterministic and only the flip is random, so packed uint8 images are what the folder source would give, bit for bit;
jpeg shards are smaller but not exact. The same command again continues where an earlier one was stopped: a shard is
written under another name and renamed when it is complete, so every shard that has its name is whole. Nothing outside
DEST is written. --stats writes stats.tsv, the input list of FID statistics: one line per packed image with its
number, class, the sha256 of its pixels (RGB, H x W x 3) and the name in SOURCE.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unite_fast.base import files, locks, outputs, progress
from unite_fast.base.command import run
from unite_fast.base.errors import UserError, idle
from unite_fast.base.files import file_sha256
from unite_fast.base.parent import end_with_parent
from unite_fast.config import DataConfig, ModelConfig, choices
from unite_fast.data.containers import open_container
from unite_fast.data.encoded import EncodedSource
from unite_fast.data.loader import skip_limit
from unite_fast.data.made_of import changed, read, state_of, write
from unite_fast.data.packed import FORMATS, Format, Index, Shard, shard_name
from unite_fast.data.source import BadImage, WorkerError
from unite_fast.data.verify import verify, write_stats

SOURCE = "source.sha256"  # of what a finished pack was made of: Plan.names_sha256
LOCK = ".lock"  # in PARTS
PARTS = ".parts"  # of an unfinished pack: plan.json, and one .json per finished shard


@dataclass(frozen=True)
class Plan:
    """What is to be packed. Two packs with equal plans give equal files."""

    size: int
    format: Format
    quality: int  # of jpeg
    per_shard: int  # images of the source; fewer are packed when some are unreadable and skipped
    on_error: str
    samples: int
    names_sha256: str  # of the samples' names, labels and sizes in bytes
    pipeline: str
    class_names: list[str]

    @property
    def shards(self) -> int:
        return -(-self.samples // self.per_shard)

    def samples_of(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.samples))


def make_plan(
    source: EncodedSource, root: Path, size: int, format: Format, quality: int, per_shard: int, on_error: str
):
    """The plan of packing ``source``, which lies at ``root``."""
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(
            f"{os.path.relpath(source.name(i), root)}\0{label}\0{source.length(i)}\n".encode("utf-8", "surrogateescape")
        )
    names = digest.hexdigest()
    return Plan(
        size, format, quality, per_shard, on_error, len(source), names, source.pipeline_id(), source.class_names
    )  # fmt: skip


def encode(image: Tensor, format: Format, quality: int) -> bytes:
    """The record of an image uint8 (3, size, size)."""
    if format == "uint8":
        return image.numpy().tobytes()
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if format == "jpeg":
        picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    else:
        picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def pack_shard(source: EncodedSource, plan: Plan, dest: Path, number: int, done: Any) -> None:
    """Writes one shard, then the part that describes it. ``done``: a shared counter of images, or None.

    Raises UserError for an unreadable image (with on_error=fail) and OSError when it cannot write.
    """
    digest, offset = hashlib.sha256(), 0
    labels, extents, skipped, states = [], [], [], []
    with files.replacing(dest / shard_name(number), sync=True) as file:
        for index in plan.samples_of(number):
            states.append(state_of(source, index))
            try:
                record = encode(source.read(index, None, 0), plan.format, plan.quality)
            except BadImage as error:
                if plan.on_error == "fail":
                    raise UserError(
                        f"{source.name(index)}: {error}; mend or remove it, or leave it out with --on-error skip"
                    ) from None
                skipped.append((source.name(index), str(error)))
                continue
            finally:
                if done is not None:
                    with done.get_lock():
                        done.value += 1
            file.write(record)
            digest.update(record)
            labels.append(int(source.labels[index]))
            extents.append((offset, len(record)))
            offset += len(record)
    part = {"bytes": offset, "sha256": digest.hexdigest(), "labels": labels, "extents": extents, "skipped": skipped}
    part["states"] = states
    files.write(dest / PARTS / f"{number:05d}.json", json.dumps(part), sync=True)


_job: tuple[EncodedSource, Plan, Path, Any] | None = None  # of a packing process


def _start(*job: Any) -> None:
    global _job
    _job = job  # type: ignore[assignment]
    end_with_parent()
    torch.set_num_threads(1)


def _work(number: int) -> None:
    assert _job is not None, "the pool's initializer runs first"
    source, plan, dest, done = _job
    pack_shard(source, plan, dest, number, done)


def _bar(plan: Plan, finished: list[int]) -> tqdm:
    initial = sum(len(plan.samples_of(number)) for number in finished)
    return progress.bar(total=plan.samples, initial=initial, unit="image", desc="packing", smoothing=0.05)


def _in_processes(
    source: EncodedSource, plan: Plan, dest: Path, numbers: list[int], workers: int, bar: tqdm
) -> Iterator[int]:
    """Packs the shards ``numbers``; yields each when it is done."""
    context = get_context("fork" if sys.platform == "linux" else None)
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(source, plan, dest, done))
    try:
        futures: dict[Future[None], int] = {pool.submit(_work, number): number for number in numbers}
        start = bar.n
        while futures:
            finished, _ = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(start + done.value - bar.n)
            for future in finished:
                future.result()
                yield futures.pop(future)
    except BrokenProcessPool:
        raise WorkerError("a packing process died (out of memory?); the same command continues") from None
    finally:
        with contextlib.suppress(RuntimeError):  # of a pool that had no memory to start with: that has been raised
            pool.shutdown(wait=True, cancel_futures=True)


def prepare(dest: Path, source_path: Path, source: EncodedSource, plan: Plan) -> list[int]:
    """Makes DEST, or finds what an interrupted run with the same plan left there: the finished shards whose images are
    still the same.

    Raises UserError when DEST holds anything else or there is not enough room.
    """
    parts = dest / PARTS
    outputs.check(dest, "DEST", [source_path])
    text = json.dumps(vars(plan), indent=1)
    if parts.is_dir() and not parts.is_symlink() and (parts / "plan.json").is_file():
        if files.read(parts / "plan.json") != text.encode():
            raise UserError(f"{dest} holds an unfinished pack of other images or options; remove it, or choose another")
    elif dest.exists() and (not dest.is_dir() or set(dest.iterdir()) - {parts} or parts.is_symlink()):
        raise UserError(f"{dest} exists and is not an unfinished pack; choose a new or empty folder")
    else:
        parts.mkdir(parents=True, exist_ok=True)  # of a start that the disk refused it may be there, without a plan
        files.write(parts / "plan.json", text, sync=True)
    finished = []
    for number in range(plan.shards):
        part, shard = parts / f"{number:05d}.json", dest / shard_name(number)
        if part.is_file() and shard.is_file():
            found = json.loads(part.read_bytes())
            states, whole = found.get("states"), shard.stat().st_size == found["bytes"]
            if whole and not (states and changed(source, plan.samples_of(number), states)):
                finished.append(number)
    if plan.format == "uint8":
        left = plan.samples - sum(len(plan.samples_of(number)) for number in finished)
        needed, free = left * 3 * plan.size**2, shutil.disk_usage(dest).free
        if needed > free:
            raise UserError(f"{dest}: {needed / 2**30:.1f} GiB are needed, but {free / 2**30:.1f} GiB are free")
    return finished


def check_skipped(dest: Path, plan: Plan, numbers: list[int], reported: dict[str, str]) -> None:
    """Reports newly skipped images and stops when there are too many. Raises UserError."""
    limit = skip_limit(plan.samples)
    for number in numbers:
        for name, reason in json.loads((dest / PARTS / f"{number:05d}.json").read_bytes())["skipped"]:
            if name not in reported:
                tqdm.write(f"left out: {name}: {reason}", file=sys.stderr)
            reported[name] = reason
    if len(reported) > limit:
        raise UserError(
            f"{len(reported)} of {plan.samples} images are unreadable, more than the {limit} "
            "that --on-error skip allows"
        )


def finish(dest: Path, plan: Plan) -> Index:
    """Writes labels, extents, index and manifest from the parts, which are then removed."""
    parts = [json.loads((dest / PARTS / f"{number:05d}.json").read_bytes()) for number in range(plan.shards)]
    arrays: dict[str, np.ndarray] = {
        "labels.npy": np.array([x for part in parts for x in part["labels"]], dtype=np.int32)
    }
    if plan.format != "uint8":
        arrays["extents.npy"] = np.array([x for p in parts for x in p["extents"]], dtype=np.int64).reshape(-1, 2)
    hashes = {shard_name(number): part["sha256"] for number, part in enumerate(parts)}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.write(dest / name, buffer.getvalue(), sync=True)
        hashes[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    index = Index(
        format=plan.format,
        size=plan.size,
        crop=plan.pipeline,
        class_names=plan.class_names,
        shards=[Shard(len(part["labels"]), part["bytes"], part["sha256"]) for part in parts],
        labels_sha256=hashes["labels.npy"],
        extents_sha256=hashes.get("extents.npy", ""),
        skipped=[(name, reason) for part in parts for name, reason in part["skipped"]],
    )
    files.write(dest / "index.json", index.to_json(), sync=True)
    hashes["index.json"] = file_sha256(dest / "index.json")
    files.write(dest / "manifest.sha256", "".join(f"{h}  {name}\n" for name, h in sorted(hashes.items())), sync=True)
    write(dest, [state for part in parts for state in part.get("states", ())])
    files.write(dest / SOURCE, f"{plan.names_sha256}\n", sync=True)
    shutil.rmtree(dest / PARTS)
    return index


def pack(
    source_path: Path,
    dest: Path,
    size: int = 256,
    format: Format = "uint8",
    workers: int = 0,
    quality: int = 95,
    per_shard: int = 2048,
    on_error: str = "fail",
    stats: bool = False,
    reading: DataConfig | None = None,
    labelled: bool = True,
) -> None:
    """Packs SOURCE into DEST; ``workers=0`` packs in this process. Raises UserError and WorkerError.

    reading: what becomes of transparency, and which columns of Parquet files are read.
    """
    data = replace(reading or DataConfig(), path=str(source_path), crop="adm", flip=False)
    source = open_container(source_path, "SOURCE", data, ModelConfig(image_size=size, num_classes=int(labelled)))
    if not labelled:
        source.forget_labels()
    for line in source.remarks():
        print(line, file=sys.stderr)
    plan = make_plan(source, source_path, size, format, quality, per_shard, on_error)
    if not (dest / "index.json").is_file():
        finished, skipped = prepare(dest, source_path, source, plan), {}
        lock = locks.take(dest / PARTS / LOCK, dest, "wait for it, or choose another folder")
        try:
            check_skipped(dest, plan, finished, skipped)
            numbers = [number for number in range(plan.shards) if number not in set(finished)]
            with _bar(plan, finished) as bar:
                if workers:
                    for number in _in_processes(source, plan, dest, numbers, workers, bar):
                        check_skipped(dest, plan, [number], skipped)
                else:
                    for number in numbers:
                        pack_shard(source, plan, dest, number, None)
                        bar.update(len(plan.samples_of(number)))
                        check_skipped(dest, plan, [number], skipped)
            finish(dest, plan)
        except OSError as error:
            raise UserError(f"{dest}: {error.strerror or error}; mend that, then the same command continues") from None
        finally:
            lock.release()
    else:
        check_same(dest, source, plan)
    if stats:
        write_stats(dest, source, source_path)


def check_same(dest: Path, source: EncodedSource, plan: Plan) -> None:
    """Raises UserError unless the finished pack at DEST looks like one of ``plan``."""
    from unite_fast.data.packed import check_sizes, read_index

    index = read_index(dest, "DEST")
    packed = sum(shard.count for shard in index.shards) + len(index.skipped)
    found = (index.format, index.size, index.crop, index.class_names, packed)
    if found != (plan.format, plan.size, plan.pipeline, plan.class_names, plan.samples):
        raise UserError(f"{dest} holds a pack of other images or options; choose a new or empty folder")
    with contextlib.suppress(FileNotFoundError):  # earlier packs do not say it
        if files.read_text(dest / SOURCE, "replace").strip() != plan.names_sha256:
            raise UserError(
                f"{dest} holds a pack of images that had other names, classes or sizes; choose a new or empty folder"
            )
    states = read(dest, plan.samples)
    if states and (name := changed(source, range(plan.samples), states)):
        raise UserError(f"{dest} holds a pack from before {name} was written anew; choose a new or empty folder")
    check_sizes(dest, index)


def main(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:
        parser = argparse.ArgumentParser(prog="python -m unite_fast.data.pack verify", description=verify.__doc__)
        parser.add_argument("dest", type=Path, metavar="DEST")
        print(verify(parser.parse_args(argv[1:]).dest))
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.data.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--size", type=int, default=256, help="pixels, height and width (default 256)")
    parser.add_argument("--format", choices=FORMATS, default="uint8")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0: this one")
    parser.add_argument("--quality", type=int, default=95, help="of --format jpeg (default 95, 4:4:4)")
    parser.add_argument("--per-shard", type=int, default=2048, help="images per shard (default 2048)")
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="skip: leave unreadable images out"
    )
    parser.add_argument("--stats", action="store_true", help="also write stats.tsv, the input list of FID statistics")
    parser.add_argument("--unlabelled", action="store_true", help="leave labels out, for model.num_classes=0")
    parser.add_argument(
        "--alpha", choices=choices(DataConfig, "alpha"), default="white", help="what transparent parts are laid on"
    )
    parser.add_argument("--image-column", default="", metavar="NAME", help="of Parquet files, where it cannot be told")
    parser.add_argument("--label-column", default="", metavar="NAME", help="of Parquet files, where it cannot be told")
    a = parser.parse_args(argv)
    if a.size < 1 or a.per_shard < 1 or a.workers < 0 or not 1 <= a.quality <= 100:
        raise UserError("--size and --per-shard must be positive, --workers not negative, --quality from 1 to 100")
    if a.quality != 95 and a.format != "jpeg":
        raise idle("--quality", f"with --format {a.format}")
    started = time.monotonic()
    reading = DataConfig(alpha=a.alpha, image_column=a.image_column, label_column=a.label_column)
    options = (a.workers, a.quality, a.per_shard, a.on_error, a.stats, reading, not a.unlabelled)
    pack(a.source, a.dest, a.size, a.format, *options)
    print(f"{a.dest} is complete ({time.monotonic() - started:.0f} s); use data.source=packed data.path={a.dest}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
