"""Images per second of the data sources, per core, in one interleaved run on real JPEGs.

    python benchmarks/bench_loader.py                  every variant on one thread, on this machine's CPU
    python benchmarks/bench_loader.py --device cuda    the whole sources as well, onto the GPU (DALI: mixed)
    python benchmarks/bench_loader.py --check          no times: every image of an epoch through every source

The files are crops of scikit-learn's two sample photographs in the sizes of ImageNet's, quality 85 to 95, written to a
temporary folder and packed from there; all of it stays in the page cache. Each variant turns encoded or packed images
into uint8 (B, 3, 256, 256) on one thread. What it makes is compared with the Pillow ADM crop first; a variant that is
off by more than it should prints no speed. Rates are per second of CPU time, so that other work on the machine does
not count; ratios are taken within rounds. Rows go to benchmarks/results/<device>/loader.jsonl.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from harness import quantiles, record
from PIL import Image
from torch import Tensor

from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import Batch, Order, open_source, stream
from unite_fast.data.dali import CHUNK, Dali, Runner
from unite_fast.data.pack import pack
from unite_fast.data.packed import Packed
from unite_fast.data.rate import measure
from unite_kernels.gather import gather_rows

SIZE, CLASSES = 256, 4
SHAPES = [(500, 375), (375, 500), (500, 333), (400, 400), (640, 427), (300, 260)]
SOURCES = (("dali", "folder"), ("packed", "packed"))
DECODED, GATHERED = 32, 256  # images per call, for variants that decode and for those that copy
# Gray levels from the Pillow ADM crop that a variant may be off on average; the set has images that DALI halves not.
ALLOWED = {"pillow": 0.0, "fast": 0.02, "packed": 0.0, "packed_batch": 0.0, "dali": 0.3, "torchvision": 0.3}


def write_photographs(root: Path, count: int) -> None:
    """``count`` different JPEGs in ``CLASSES`` class folders."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    for k in range(count):
        width, height = SHAPES[k % len(SHAPES)]
        height = min(height, 427)
        left, top = generator.integers(0, 641 - width), generator.integers(0, 428 - height)
        folder = root / f"class_{k % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = photographs[k // 2 % 2].crop((left, top, left + width, top + height))
        image.save(folder / f"{k:05d}.jpg", quality=int(generator.integers(85, 96)))


def opened(source: str, path: Path, crop: str = "adm"):
    data = DataConfig(source=source, path=str(path), crop=crop, flip=False)  # type: ignore[arg-type]
    return open_source(data, ModelConfig(image_size=SIZE, num_classes=CLASSES))


def torchvision_crop(data: bytes) -> Tensor:
    """torchvision's decoder and its antialiased bicubic resize of uint8 tensors, then the center."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as F

    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    height, width = image.shape[1:]
    shape = [round(side * SIZE / min(height, width)) for side in (height, width)]
    image = F.resize(image, shape, interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    top, left = (shape[0] - SIZE) // 2, (shape[1] - SIZE) // 2
    return image[:, top : top + SIZE, left : left + SIZE]


def variants(root: Path) -> dict[str, tuple[int, Callable[[Tensor], Tensor]]]:
    """name -> images per call, and a function from indices (n,) to images (n, 3, SIZE, SIZE)."""
    folder, fast = opened("folder", root / "folder"), opened("folder", root / "folder", "fast")
    packed, dali = opened("packed", root / "packed"), opened("dali", root / "folder")
    assert isinstance(packed, Packed)
    assert isinstance(dali, Dali)
    run = Runner(SIZE, "adm", torch.device("cpu"), 1)
    pinned = torch.empty(GATHERED, 3, SIZE, SIZE, dtype=torch.uint8)  # stands for a block of pinned memory
    shards = [packed.shards.images_of(k) for k in range(len(packed.index.shards))]

    def one_by_one(source) -> Callable[[Tensor], Tensor]:
        return lambda indices: torch.stack([source.read(i, None, 0) for i in indices.tolist()])

    def through_dali(indices: Tensor) -> Tensor:
        samples = [dali._prepare(i, None) for i in indices.tolist()]
        return torch.stack([image for image in dali._decode(samples, run) if isinstance(image, Tensor)])

    def gathered(indices: Tensor) -> Tensor:
        out = pinned[: len(indices)]
        gather_rows(shards, *packed.shards.locate(indices), out)
        return out

    return {
        "pillow": (DECODED, one_by_one(folder)),
        "fast": (DECODED, one_by_one(fast)),
        "torchvision": (
            DECODED,
            lambda indices: torch.stack([torchvision_crop(folder.encoded(i)) for i in indices.tolist()]),
        ),
        "dali": (CHUNK, through_dali),
        "packed": (GATHERED, gathered),
        "packed_batch": (GATHERED, packed.gather),  # into fresh pageable memory, as when training on a CPU
    }


def differences(table: dict[str, tuple[int, Callable[[Tensor], Tensor]]], count: int) -> dict[str, tuple[int, float]]:
    """Largest and mean difference from Pillow in gray levels. Stops the program when a variant is off."""
    indices = torch.arange(0, count, max(1, count // 64))[:DECODED]
    truth = table["pillow"][1](indices).int()
    found = {}
    for name, (_, function) in table.items():
        error = (function(indices).int() - truth).abs()
        found[name] = int(error.max()), error.float().mean().item()
        if found[name][1] > ALLOWED[name]:
            raise SystemExit(f"{name}: {found[name][1]:.3f} gray levels from the Pillow crop; no speed is reported")
    return found


def check_epochs(root: Path, count: int, step: int = 120) -> None:
    """An epoch of each source against folder's, for 1, 2 and 3 ranks, and resumed at every step. Stops at a difference.

    ``step``: images per step over all ranks. DALI's pixels may differ; its order, labels and flips may not.
    """
    steps = -(-count // step)

    def take(source, start: int, number: int, rank: int = 0, world: int = 1) -> list[Batch]:
        return list(islice(stream(source, 0, start * step, step, rank, world), number))

    def require(same: bool, what: str) -> None:
        if not same:
            raise SystemExit(f"check failed: {what}")

    reference = take(opened("folder", root / "folder"), 0, steps)
    samples = torch.cat([b.samples for b in reference])
    require(torch.equal(samples, torch.arange(steps * step)), "positions of folder")
    order = Order(count, 0).indices(0, count)
    require(torch.equal(order.sort().values, torch.arange(count)), "each image once in an epoch")
    for name, path in (("packed", "packed"), ("dali", "folder")):
        source, worst, total = opened(name, root / path), 0, 0.0
        for world in (1, 2, 3):
            ranks = [take(source, 0, steps, rank, world) for rank in range(world)]
            for k, parts in enumerate(zip(*ranks, strict=True)):
                images, labels, positions = (
                    torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "samples")
                )
                require(torch.equal(labels, reference[k].labels), f"{name}, {world} ranks: labels of step {k}")
                require(torch.equal(positions, reference[k].samples), f"{name}, {world} ranks: order of step {k}")
                off = (images.int() - reference[k].images.int()).abs()
                require(name != "packed" or not off.any(), f"packed, {world} ranks: pixels of step {k}")
                worst, total = max(worst, int(off.max())), total + off.float().mean().item() / (3 * steps)
        whole = take(source, 0, steps)
        for k in range(steps):
            again = take(source, k, 1)[0]
            require(
                all(torch.equal(a, b) for a, b in zip(again, whole[k], strict=True)), f"{name}: resumed at step {k}"
            )
        print(
            f"{name}: {count} images in the order of folder, each once, on 1, 2 and 3 ranks, resumed at each of "
            f"{steps} steps; off by at most {worst} gray levels, mean {total:.4f}",
            flush=True,
        )


def cpu_rates(
    table: dict[str, tuple[int, Callable[[Tensor], Tensor]]], count: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(images per CPU second, images per second) of each variant, one sample per round, the order turned each time."""
    generator = torch.Generator().manual_seed(0)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    names = list(table)
    for k in range(-1, rounds):  # the first round warms up
        for name in names[k % len(names) :] + names[: k % len(names)]:
            n, function = table[name]
            calls = 8 if n == GATHERED else 2
            indices = torch.randint(count, (calls, n), generator=generator)
            wall, cpu = time.perf_counter(), time.process_time()
            for row in indices:
                function(row)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if k >= 0:
                rates[name].append((calls * n / cpu, calls * n / wall))
    return rates


def whole_sources(root: Path, device: torch.device, workers: int, seconds: float) -> list[dict]:
    """Rows of entire sources with their threads or processes, onto the device, wall clock."""
    rows = []
    for name, path, crop in [("folder", "folder", c) for c in ("adm", "fast")] + [(n, p, "adm") for n, p in SOURCES]:
        source = opened(name, root / path, crop)
        rate = measure(source, 256, seconds, device, workers)
        pipeline = source.pipeline_id(device.type)
        print(f"{name:8}{crop:6}{workers} workers  {rate.line()}  {pipeline}")
        rows.append(
            {"kind": "whole source", "variant": f"{name}/{crop}", "workers": workers, "pipeline": pipeline}
            | {"images_per_second": rate.images_per_second, "n": rate.images, "seconds": rate.seconds}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--workers", type=int, default=min(16, len(os.sched_getaffinity(0))), help="of the whole sources"
    )
    parser.add_argument("--check", action="store_true", help="compare whole epochs of the sources; no times")
    a = parser.parse_args()
    device = torch.device(a.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_photographs(root / "folder", a.images)
        pack(root / "folder", root / "packed", SIZE, workers=len(os.sched_getaffinity(0)), per_shard=512)
        if a.check:
            check_epochs(root, a.images)
            return
        table = variants(root)
        off = differences(table, a.images)
        load = os.getloadavg()[0]
        rates = cpu_rates(table, a.images, a.rounds)
        rows = []
        for variant, values in rates.items():
            cpu, wall = ([v[k] for v in values] for k in (0, 1))
            ratio = quantiles([v[0] / p[0] for v, p in zip(values, rates["pillow"], strict=True)])
            q = quantiles(cpu)
            print(
                f"{variant:14}{q['median']:9,.0f} images/s per core (p20 {q['p20']:,.0f}, p80 {q['p80']:,.0f})"
                f"  {ratio['median']:7.2f} x Pillow  off by at most {off[variant][0]}, mean {off[variant][1]:.4f}"
            )
            rows.append(
                {"kind": "per core", "variant": variant, "shape": [table[variant][0], 3, SIZE, SIZE], "dtype": "uint8"}
                | {"n": len(values), "images": a.images, "images_per_cpu_second": q}
                | {"images_per_second": quantiles(wall), "ratio_to_pillow": ratio}
                | {"max_difference": off[variant][0], "mean_difference": off[variant][1]}
            )
        rows += whole_sources(root, device, a.workers, 5.0)
        packages = ("pillow", "simplejpeg", "torchvision", "nvidia-dali-cuda130")
        common = {"versions": {name: version(name) for name in packages}, "load": [load, os.getloadavg()[0]]}
        print(f"rows written to {record('loader', device, [row | common for row in rows])}")


if __name__ == "__main__":
    main()
