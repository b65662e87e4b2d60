"""Attacks that no table lists one by one, bounded: python tests/faults/attack.py [NAME ...] [--most N] [--part 1/4]

    kill      training is killed at its n-th file operation; the next start ends with the bits of an undisturbed run
    errors    the n-th file operation of a command is refused by the system; one line or a warning, then it goes through
    interrupt Ctrl-C at the n-th file operation of a command: one line, and the same command goes through afterwards
    damage    each file of a run folder is emptied, cut, changed or replaced; never other parameters, never a traceback
    fuzz      inputs of every format with random changes: what cannot be read is one line, within limits of memory, time

Each trial is a fork of this process, which has everything imported. A file operation is what Python's audit hooks see:
opening, renaming, removing, making and listing. Every option of every command: tests/test_options.py.
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import sklearn.neural_network  # noqa: F401
import torch
import torch._dynamo  # as a first step would, in each fork anew
from forked import end_with
from PIL import Image

import sample
import train
from unite_fast import analyse, checkpoint, evaluate, export, interop, report, sweep
from unite_fast.base import command
from unite_fast.checkpoint import dcp  # noqa: F401
from unite_fast.data import index, pack
from unite_fast.evaluation import statistics
from unite_fast.evaluation.atoms import __main__ as score_atoms
from unite_fast.report import gallery

PROGRAMS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train.main, "sample": sample.main, "export": export.main, "report": report.main,
    "evaluate": evaluate.main, "statistics": statistics.main, "pack": pack.main, "index": index.main,
    "score-atoms": score_atoms.main, "analyse": analyse.main, "gallery": gallery.main, "sweep": sweep.main,
}  # fmt: skip
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "os.utime",
              "shutil.rmtree")  # fmt: skip
INTERRUPT = -1  # in place of an errno
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE, errno.EROFS)
SECONDS, MEMORY = 60.0, 8 << 30  # of one trial
EXTREMES = (b"999999999999", b"-1", b"1e400", b"\xff" * 8, b"[", b"!!int ''", b"\0")
BUG = 70  # the exit code of a traceback


class Outcome(NamedTuple):
    code: int  # negative: the signal
    said: str

    @property
    def is_clean(self) -> bool:
        """Ended by itself, with what a user can read."""
        return self.code in (0, 1, 2) and "Traceback" not in self.said and "Exception ignored" not in self.said


class Strike:
    """An audit hook that acts at the ``at``-th file operation below ``root``; it counts them in shared memory."""

    def __init__(self, root: Path, at: int = -1, code: int = 0) -> None:
        self.root, self.at, self.code = str(root), at, code
        self.count = mmap.mmap(-1, 8)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not str(arguments[0] if arguments else "").startswith(self.root):
            return
        number = int.from_bytes(self.count[:8], "little")
        self.count[:8] = (number + 1).to_bytes(8, "little")
        if number == self.at and self.code == INTERRUPT:
            signal.raise_signal(signal.SIGINT)
        elif number == self.at and self.code:
            raise OSError(self.code, os.strerror(self.code), str(arguments[0]))
        elif number == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def seen(self) -> int:
        return int.from_bytes(self.count[:8], "little")


def run(words: list[object], strike: Strike | None = None) -> Outcome:
    """A command in a fork of this process."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            _child([str(word) for word in words], output.fileno(), strike)
        deadline = time.monotonic() + SECONDS
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Outcome(BUG, f"still running after {SECONDS:g} s")
            time.sleep(0.005)
        output.seek(0)
        return Outcome(os.waitstatus_to_exitcode(status), output.read().decode(errors="replace"))


def _child(words: list[str], output: int, strike: Strike | None) -> None:
    def call() -> int:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        torch.set_num_threads(1)
        if strike is not None:
            sys.addaudithook(strike)
        return command.run(PROGRAMS[words[0]], words[1:])

    end_with(call, failed=BUG)


class Place:
    """A run of the digits, what comes of going on with it, and the folder in which trials are made."""

    def __init__(self, root: Path) -> None:
        self.root, self.begun = root, root / "begun"
        self.trial = root / "trial"
        self.config = root / "tiny.yaml"
        self.config.write_text(Path(__file__).with_name("tiny.yaml").read_text())
        self.expect(run(self.train(self.begun, 4)))
        shutil.copytree(self.begun, self.trial)
        self.expect(run(self.train(self.trial, 6)))
        self.end = self.tensors(self.trial)

    def expect(self, outcome: Outcome) -> None:
        assert outcome.code == 0, outcome.said

    def train(self, folder: Path, steps: int) -> list[object]:
        return ["train", "--config", self.config, f"run_dir={folder}", f"train.max_steps={steps}",
                "train.checkpoint_every=2", "train.image_every=3", "train.keep_last=2"]  # fmt: skip

    def tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        found = checkpoint.newest(folder / "checkpoints")[0]
        return checkpoint.read(found) if found is not None and checkpoint.step_of(found) == 6 else {}

    def ends_right(self, folder: Path) -> bool:
        found = self.tensors(folder)
        return found.keys() == self.end.keys() and all(torch.equal(found[n], t) for n, t in self.end.items())

    def fresh(self) -> Path:
        """The run as it was begun, for one trial."""
        shutil.rmtree(self.trial, ignore_errors=True)
        return Path(shutil.copytree(self.begun, self.trial))

    def goes_on(self) -> str:
        """Why the trial's run does not end as it should when it is started again; empty when it does."""
        outcome = run(self.train(self.trial, 6))
        if outcome.code:
            return f"does not go on: {outcome.said[-300:]}"
        return "" if self.ends_right(self.trial) else "ends with other parameters"


def chosen(count: int, most: int, rng: random.Random) -> list[int]:
    return list(range(count)) if count <= most else sorted(rng.sample(range(count), most))


Trials = Iterator[tuple[str, Callable[[], str]]]  # what is done, and what does it: why it was not survived, or ""


def kill(place: Place, most: int, rng: random.Random) -> Trials:
    counting = Strike(place.fresh())
    place.expect(run(place.train(place.trial, 6), counting))

    def trial(number: int) -> str:
        outcome = run(place.train(place.fresh(), 6), Strike(place.trial, number))
        killed = "" if outcome.code == -signal.SIGKILL else f"ended with {outcome.code}: {outcome.said[-300:]}"
        return killed or place.goes_on()

    for number in chosen(counting.seen(), most, rng):
        yield f"operation {number} of training", partial(trial, number)


def commands_of(place: Place, out: Path) -> list[list[object]]:
    """What users start, short; each leaves what it makes in ``out``."""
    reference = place.root / "reference.npz"
    place.expect(run(["statistics", "--config", place.config, "--extractor", "digits", "--out", reference]))
    scoring = ["--checkpoint", place.begun, "--extractor", "digits", "--reference", reference, "--count", "10",
               "--solver", "euler", "--steps", "2"]  # fmt: skip
    return [
        place.train(place.trial, 6),
        ["sample", "--checkpoint", place.begun, "--seeds", "0-3", "--out", out / "s"],
        ["sample", "--checkpoint", place.begun, "--seeds", "0-3", "--out", out / "s.npz"],
        ["export", place.begun, "--out", out / "e", "--overwrite"],
        ["report", place.begun, "--out", out / "r.html"],
        ["evaluate", "rfid", "--checkpoint", place.begun, "--extractor", "digits", "--out", out / "rfid.json"],
        ["evaluate", "heldout", "--checkpoint", place.begun, "--out", out / "heldout.json"],
        ["evaluate", "fid", *scoring, "--out", out / "fid.json"],
        ["evaluate", "search", *scoring, "--grid", "1,2,1", "--out", out / "search.json"],
        ["statistics", "--config", place.config, "--extractor", "digits", "--out", out / "s.npz"],
        ["analyse", place.begun, "--only", "entropy,dynamics", "--out", out / "a"],
        ["gallery", "between-seeds", place.begun, "--seeds", "3,8", "--labels", "1", "--out", out / "g.png"],
    ]


def errors(place: Place, most: int, rng: random.Random, codes: tuple[int, ...] = ERRNOS) -> Trials:
    out = place.root / "out"
    commands = commands_of(place, out)

    def trial(words: list[object], number: int, code: int) -> str:
        place.fresh()
        shutil.rmtree(out, ignore_errors=True)
        outcome = run(words, Strike(place.root, number, code))
        clean = outcome.is_clean or (code == INTERRUPT and outcome.code == 130 and "Traceback" not in outcome.said)
        why = "" if clean else f"ended with {outcome.code}: {outcome.said[-400:]}"
        if not why and words[0] == "train":
            return place.goes_on()
        if why or "skipping " in outcome.said:  # it went on with an older checkpoint, and said so
            return why
        again = run(words)
        return "" if again.code == 0 else f"is refused afterwards: {again.said[-300:]}"

    for words in commands if most >= len(commands) else rng.sample(commands, most):
        counting = Strike(place.root)
        place.fresh()
        shutil.rmtree(out, ignore_errors=True)
        place.expect(run(words, counting))
        for number in chosen(counting.seen(), max(1, most // len(commands)), rng):
            code = rng.choice(codes)
            named = errno.errorcode.get(code, "Ctrl-C")
            yield (
                f"{named} at operation {number} of {' '.join(map(str, words[:2]))}",
                partial(trial, words, number, code),
            )


def interrupt(place: Place, most: int, rng: random.Random) -> Trials:
    return errors(place, most, rng, (INTERRUPT,))


def damages(path: Path, rng: random.Random) -> dict[str, Callable[[], object]]:
    content = path.read_bytes()
    flipped = bytearray(content or b"\0")
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)

    def folder() -> None:
        path.unlink()
        path.mkdir()

    def pipe() -> None:
        path.unlink()
        os.mkfifo(path)

    return {
        "emptied": lambda: path.write_bytes(b""), "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "changed by a bit": lambda: path.write_bytes(flipped), "gone": path.unlink, "a folder": folder, "a pipe": pipe,
        "a list": lambda: path.write_text("[1]"), "a number": lambda: path.write_text("1e999"),
        "of other types": lambda: path.write_text(json.dumps({"step": "x", "result": 3, "rows": {}, "config": [1]})),
        "noise": lambda: path.write_bytes(rng.randbytes(200)),
    }  # fmt: skip


def damage(place: Place, most: int, rng: random.Random) -> Trials:
    place.fresh()
    names = sorted(str(p.relative_to(place.trial)) for p in place.trial.rglob("*") if p.is_file())
    trials = [(name, kind) for name in names for kind in damages(place.trial / name, rng)]
    out = place.root / "out"

    def trial(name: str, kind: str, rng: random.Random) -> str:
        damages(place.fresh() / name, rng)[kind]()
        shutil.rmtree(out, ignore_errors=True)
        others = [["report", place.trial, "--out", out / "r.html"], ["export", place.trial, "--out", out / "e"]]
        said = [run(words) for words in others] + [run(place.train(place.trial, 6))]
        why = next((f"ended with {o.code}: {o.said[-400:]}" for o in said if not o.is_clean), "")
        if not why and said[-1].code == 0 and not place.ends_right(place.trial):
            return "ends with other parameters"
        return why

    for number in chosen(len(trials), most, rng):
        name, kind = trials[number]
        yield f"{name} {kind}", partial(trial, name, kind, random.Random(rng.random()))


def tables(picture: bytes, out: Path) -> dict[str, tuple[bytes, Callable[[Path], list[object]]]]:
    """A Parquet file of images, where pyarrow is installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return {}
    content = io.BytesIO()
    images = pa.array([{"bytes": picture}] * 4, pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), content)
    return {"x.parquet": (content.getvalue(), lambda p: ["pack", p, out, "--size", 8, "--workers", 0])}


def seeds_of(place: Place) -> dict[str, tuple[bytes, Callable[[Path], list[object]]]]:
    """An input of each format, and the command that reads it from a path."""
    picture, archive, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    with tarfile.open(None, "w", archive) as tar:
        for name, content in (("a.png", picture.getvalue()), ("a.cls", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    np.savez(arrays, mu=np.zeros(64), sigma=np.eye(64), count=100, protocol=np.array("{}"))
    exported = place.root / "exported"
    place.expect(run(["export", place.begun, "--out", exported]))
    official = place.root / "official.pt"
    interop.save_reference(official, checkpoint.load_model(place.begun)[0])
    swept = f"config: {place.config}\nout: {place.root / 'out'}\nseeds: [0]\nruns: {{a: [train.max_steps=1]}}\nthen: []"
    sampling: list[object] = ["--seeds", "0", "--out", place.root / "out" / "s"]
    scoring = ["evaluate", "fid", "--checkpoint", place.begun, "--extractor", "digits", "--count", "10", "--out",
               place.root / "out" / "f.json", "--reference"]  # fmt: skip
    return tables(picture.getvalue(), place.root / "out" / "p") | {
        "x.pt": (official.read_bytes(), lambda p: ["sample", "--checkpoint", p, *sampling]),
        "x.yaml": (place.config.read_bytes(), lambda p: ["train", "--print-config", "--config", p]),
        "sweep.yaml": (swept.encode(), lambda p: ["sweep", "--collect", p]),
        "x.tar": (archive.getvalue(), lambda p: ["index", p]),
        "x.npz": (arrays.getvalue(), lambda p: [*scoring, p]),
        "x.safetensors": (
            (exported / "model.safetensors").read_bytes(), lambda p: ["sample", "--checkpoint", p, *sampling]
        ),
        "p/x.png": (
            picture.getvalue(),
            lambda p: ["sample", "--checkpoint", place.begun, "--reconstruct", p.parent, "--out", place.root / "out"],
        ),
        "x.xyz": (b"3\n\nO 0 0 0\nH 0.76 0.59 0\nH -0.76 0.59 0\n", lambda p: ["score-atoms", p, "--workers", "1"]),
    }  # fmt: skip


def changed(content: bytes, rng: random.Random) -> bytes:
    """With up to eight random changes: bits, bytes, pieces cut, doubled or replaced by numbers of extreme size."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(min(len(found), 1 << 12) or 1) if rng.random() < 0.7 else rng.randrange(len(found) or 1)
        size = rng.randint(1, 16)
        kind = rng.randrange(5)
        if kind == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        else:
            found[at : at + size] = rng.choice(EXTREMES)
    return bytes(found)


def fuzz(place: Place, most: int, rng: random.Random) -> Trials:
    inputs = seeds_of(place)
    folder = place.root / "fuzzed"

    def trial(name: str, rng: random.Random) -> str:
        content, reading = inputs[name]
        for left in (folder, place.root / "out"):
            shutil.rmtree(left, ignore_errors=True)
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(changed(content, rng))
        outcome = run(reading(path))
        return "" if outcome.is_clean else f"ended with {outcome.code}: {outcome.said[-400:]}"

    for number in range(most):
        name = list(inputs)[number % len(inputs)]
        yield f"{name} {number}", partial(trial, name, random.Random(rng.random()))


ATTACKS: dict[str, Callable[[Place, int, random.Random], Trials]] = {
    "kill": kill, "errors": errors, "interrupt": interrupt, "damage": damage, "fuzz": fuzz,
}  # fmt: skip


def attack(name: str, place: Place, most: int, seed: int, part: int = 0, parts: int = 1) -> tuple[int, list[str]]:
    """(how many trials, those that were not survived), of one of ``parts`` equal parts."""
    tried, failed = 0, []
    for what, trial in itertools.islice(ATTACKS[name](place, most, random.Random(f"{name} {seed}")), part, None, parts):
        tried += 1
        if why := trial():
            failed.append(f"{name}: {what}: {why}")
    return tried, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ATTACKS))
    parser.add_argument("--most", type=int, default=300, help="trials of each (default 300)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts of each, to share them out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    part, parts = (int(number) for number in arguments.part.split("/"))
    torch.set_num_threads(1)
    table, everything = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for name in arguments.names or ATTACKS:
            began = time.monotonic()
            tried, failed = attack(name, place, arguments.most, arguments.seed, part - 1, parts)
            table.append(f"{name:10}{tried:>8}{tried - len(failed):>10}{time.monotonic() - began:>8.0f} s")
            everything += failed
    print("\n\n".join(everything))
    print(f"\n{'attack':10}{'tried':>8}{'survived':>10}")
    print("\n".join(table))
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
