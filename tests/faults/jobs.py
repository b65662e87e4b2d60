"""Training jobs of the fault tests: ranks on this machine over gloo, forked by ``launcher.py``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from unite_fast import checkpoint
from unite_fast.run.stats import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = Path(__file__).with_name("tiny.yaml").read_text()
STRAIGHT = ("train.max_steps=20", "train.checkpoint_every=5", "train.keep_last=10")
COMPARED = ("step", "images_seen", "total", "l2", "flow", "grad_norm", "lr")


class Rank:
    """A forked process of the launcher."""

    def __init__(self, launcher: Launcher, pid: int, output: Path) -> None:
        self.launcher, self.pid, self.output = launcher, pid, output
        self.code: int | None = None

    def wait(self, seconds: float = 60) -> int:
        """Its exit code. A rank that outlives ``seconds`` is killed, and the test fails."""
        if self.code is None:
            self.code = self.launcher.ask({"wait": self.pid, "seconds": seconds})
        if self.code is None:
            self.kill(signal.SIGKILL)
            self.code = self.launcher.ask({"wait": self.pid, "seconds": 10})
            pytest.fail(f"still running after {seconds} s: {self.said()}")
        return self.code

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.output.read_text()

    def until(self, text: str, seconds: float = 30) -> None:
        """Waits until the rank has printed ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < deadline, f"never said {text!r}: {self.said()}"
            time.sleep(0.02)


class Launcher:
    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launcher.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.server.stdout is not None
        self.server.stdout.readline()  # "ready", once everything is imported

    def ask(self, request: dict):
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, arguments: list, environment: dict[str, str], output: Path, folder: Path = ROOT) -> Rank:
        request = {"start": [str(a) for a in arguments], "environment": environment}
        output.write_text("")
        return Rank(self, self.ask(request | {"folder": str(folder), "output": str(output)}), output)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """Runs of one folder: train.py on one or more ranks of this machine, over gloo."""

    def __init__(self, launcher: Launcher, folder: Path, config: str = TINY) -> None:
        self.launcher, self.folder, self.run = launcher, folder, folder / "run"
        folder.mkdir(exist_ok=True)
        self.config = folder / "tiny.yaml"
        self.config.write_text(config)
        self.starts = 0

    def start(self, *overrides: str, ranks: int = 2, fault: str = "", own: dict[int, list[str]] | None = None,
              environment: dict[str, str] | None = None, program: str = "train.py") -> list[Rank]:  # fmt: skip
        """Starts the ranks and returns at once. own: further overrides of single ranks."""
        base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        if fault:
            base |= {"UNITE_FAST_TESTING": "1", "UNITE_FAST_FAULT": fault}
        self.starts += 1
        arguments = [program, "--config", self.config, f"run_dir={self.run}", *overrides]
        return [
            self.launcher.start(
                [*arguments, *(own or {}).get(rank, [])],
                base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
                self.folder / f"output_{self.starts}_{rank}.txt",
            )
            for rank in range(ranks)
        ]

    def train(self, *overrides: str, seconds: float = 60, code: int | None = 0, **options) -> str:
        """Runs to the end; every rank must give ``code`` (None: any). Returns what rank 0 and then the others said."""
        ranks = self.start(*overrides, **options)
        codes = [rank.wait(seconds) for rank in ranks]
        said = "".join(rank.said() for rank in ranks)
        assert code is None or codes == [code] * len(codes), (codes, said)
        return said

    @property
    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())

    def steps(self) -> list[int]:
        """Of the whole checkpoints."""
        return sorted(int(p.parent.name[5:]) for p in (self.run / "checkpoints").glob("step-*[0-9]/manifest.json"))

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in (self.run / "checkpoints").glob("*.incomplete"))

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Of a checkpoint, whole, however many files it has."""
        return checkpoint.read(self.folder_of(step))

    def folder_of(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:07d}"

    def files(self, step: int) -> list[Path]:
        """The files of tensors of a checkpoint."""
        return sorted(self.folder_of(step).glob("training*.safetensors"))

    def counters(self, step: int) -> dict:
        content = json.loads((self.folder_of(step) / "state.json").read_text())
        content.pop("config")
        return content

    def rows(self, columns: Sequence[str] = COMPARED) -> list[list[float]]:
        return [[row[k] for k in columns] for row in read_metrics(self.run / "metrics.jsonl")]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())
