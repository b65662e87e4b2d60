"""A pipe in the place of any file that a command is told to read: one line, and no waiting for a writer."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from support import command_of, tiny_run

import sample
import train
from unite_fast.__main__ import VERBS
from unite_fast.base import files

MODULES = {"train.py": train, "sample.py": sample}
MODULES |= {verb: importlib.import_module(module) for verb, (module, _) in VERBS.items()}

TRAIN = "train.py --config tiny.yaml run_dir=new"
FID = "evaluate fid --checkpoint run --count 20 --out o.json"
READ = [
    "train.py --config pipe", "train.py --config based.yaml", "doctor --config pipe",
    "statistics --config pipe --out s",
    *(f"{TRAIN} {key}=pipe" for key in ("init_from", "resume")),
    *(
        f"{TRAIN} model.num_classes=2 data.source={source} data.path=pipe"
        for source in ("folder", "tar", "parquet", "packed", "idx", "dali model.channels=3")
    ),
    *(f"{TRAIN} data.source=idx model.num_classes=2 data.path={folder}" for folder in ("idx", "idx_gz")),
    f"{TRAIN} data.source=packed model.num_classes=2 data.path=pack_index",
    f"{TRAIN} data.source=folder model.num_classes=2 data.path=photos data.workers=0 model.channels=3 train.epochs=20",
    f"{TRAIN} model.channels=3 objective.perceptual_weight=1 objective.perceptual_trunk=pipe.pth",
    f"{TRAIN} evaluation.fid_epoch=1 evaluation.count=20 evaluation.extractor=digits evaluation.reference=pipe.npz",
    f"{TRAIN} evaluation.rfid_epoch=1 evaluation.extractor=inception evaluation.inception=pipe",
    *(f"train.py --config atoms.yaml data.source={source} data.path=pipe{suffix}" for source, suffix in (
        ("structures", ""), ("structures", ".xyz"), ("structures", ".cif"), ("structures", ".sdf"),
        ("structures", ".safetensors"), ("mp20", ""), ("qm9", ""),
    )),
    *(f"train.py --config atoms.yaml data.source={source} data.path={folder}" for source, folder in (
        ("structures", "cifs"), ("mp20", "csv"), ("qm9", "gdb9"), ("qm9", "edm"),
    )),
    "sample.py --checkpoint pipe --out o.png", "sample.py --checkpoint pipe.pt --out o.png",
    "sample.py --checkpoint pipe.safetensors --out o.png", "sample.py --checkpoint broken --out o.png",
    "sample.py --checkpoint run --autoguidance pipe.pt --cfg 2 --out o.png",
    *(f"sample.py --checkpoint run --reconstruct {given} --out again" for given in ("pipe", "pipe.png", "photos")),
    f"{FID} --extractor digits --reference pipe.npz", f"{FID} --protocol pipe",
    f"{FID} --inception pipe --reference pipe.npz",
    "evaluate table --checkpoint pipe.pt --extractor digits --reference pipe.npz",
    "evaluate search --checkpoint run --extractor digits --reference pipe.npz --count 20",
    "evaluate rfid --checkpoint run --inception pipe --out o.json",
    "evaluate heldout --checkpoint pipe.pt --out o.json",
    "evaluate atoms --checkpoint pipe.pt",
    "export pipe.pt --out e", "export broken --out e", "report pipe", "analyse pipe", "analyse run --against pipe",
    "sweep pipe", "sweep sweep.yaml",
    "small pipe --classifier c.safetensors",
    "small run --classifier pipe.safetensors", "gallery guidance pipe", "gallery between-images run pipe.png a.png",
    "pack pipe packed --size 8",
    "pack photos packed --size 8 --workers 0",
    "index pipe.tar", "pack-atoms files pipe.xyz", "pack-atoms qm9 pipe", "pack-atoms mp20 csv --part train",
    "score-atoms pipe.xyz", "score-atoms pipe.safetensors", "score-atoms atoms.xyz --of pipe.sdf",
    "score-atoms atoms.xyz --real pipe.xyz", "score-atoms atoms.xyz --training pipe.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tiny_run(tmp_path_factory.mktemp("pipes"), "train.max_steps=1")
    shutil.copytree(place / "run", place / "broken")
    (step,) = (place / "broken" / "checkpoints").iterdir()
    pipes = [*(f"pipe{suffix}" for suffix in (
        "", ".pt", ".pth", ".npz", ".png", ".tar", ".xyz", ".cif", ".sdf", ".safetensors"))]  # fmt: skip
    pipes += [f"idx/{kind}-{what}-ubyte" for kind in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    pipes += [f"idx_gz/train-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    pipes += ["pack_index/index.json", "photos/a/p.png", "cifs/a.cif", "csv/train.csv", "gdb9/gdb9.sdf"]
    pipes += ["gdb9/uncharacterized.txt", "edm/train.npz", "edm/valid.npz", "edm/test.npz"]
    tensors = next(path for path in step.iterdir() if path.suffix == ".safetensors")
    tensors.unlink()
    pipes.append(str(tensors.relative_to(place)))
    for pipe in pipes:
        (place / pipe).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place / pipe)
    for name in ("photos/b/1.png", "photos/a/1.png", "a.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / name)
    (place / "based.yaml").write_text("base: pipe\nname: x\n")
    (place / "sweep.yaml").write_text("config: pipe\nruns: {a: []}\n")
    (place / "atoms.yaml").write_text(
        "model: {modality: atoms, num_latents: 20, num_classes: 1}\nobjective: {flow_steps: 1}\n"
    )
    (place / "atoms.xyz").write_text("3\n\nO 0 0 0\nH 0.76 0.59 0\nH -0.76 0.59 0\n")
    return place


@pytest.fixture(scope="module")
def waited(place):
    """A function: the pipes on which somebody has waited since its last call.

    A process of its own looks for readers and lets them go on: a library may wait without ever looking up. A reader
    that returns at once it hardly meets.
    """
    pipes = [path for path in place.rglob("*") if path.is_fifo()]
    told, tells = os.pipe()
    os.set_blocking(told, False)
    if not (watcher := os.fork()):
        while True:
            time.sleep(0.1)
            for pipe in pipes:
                with contextlib.suppress(OSError):  # nobody reads
                    writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                    os.write(tells, f"{pipe.name} ".encode())
                    os.close(writing)

    def look() -> list[str]:
        with contextlib.suppress(BlockingIOError):
            return os.read(told, 1 << 16).decode().split()
        return []

    yield look
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    os.close(told)
    os.close(tells)


@pytest.mark.parametrize("words", READ)
def test_one_line(place, waited, monkeypatch, words):
    monkeypatch.chdir(place)
    name, *arguments = words.split()
    said = command_of(MODULES[name].main, *arguments)
    assert not waited()
    assert said.returncode in (1, 2), said
    lines = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said.stderr
    assert "Traceback" not in said.stderr
    assert any(
        word in lines[0] for word in ("pipe", "idx", "csv", "cifs", "gdb9", "edm", "photos", "broken", "pack_", "DALI")
    ), lines


@pytest.mark.parametrize("read", [files.read, files.file_sha256, files.regular, files.check_zip])
def test_readers(place, waited, read):
    with pytest.raises(OSError, match="no regular file"):
        read(place / "pipe")
    assert not waited()
