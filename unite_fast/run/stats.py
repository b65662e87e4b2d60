"""What a run reports: means of device-side metrics, one progress line, metrics.csv and metrics.jsonl.

Whoever asks gets the rows in TensorBoard or Weights & Biases as well; what fails there costs one warning.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from unite_fast.base import files
from unite_fast.base.errors import UserError, first_line
from unite_fast.config import TrainConfig
from unite_fast.training.means import SKIPPED

log = logging.getLogger("unite_fast.stats")


class Service(Protocol):
    """Where rows go besides the run folder."""

    def write(self, row: dict[str, float]) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def picture(self, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image("pictures", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A resumed run goes on under its own id, which wandb_id.txt in the run folder keeps."""

    def __init__(self, folder: Path, t: TrainConfig, values: dict[str, Any]) -> None:
        """values: the configuration as it is shown there."""
        import wandb

        file = folder / "wandb_id.txt"
        known = files.read_text(file, "replace").strip() if file.is_file() else None
        self.run = wandb.init(
            project=t.wandb_project, name=t.wandb_name or values["name"], dir=str(folder), config=values, id=known,
            mode="offline" if t.wandb_offline else "online", resume="allow",
        )  # fmt: skip
        files.write(file, self.run.id)

    def write(self, row: dict[str, float]) -> None:
        self.run.log({name: value for name, value in row.items() if not math.isnan(value)}, step=int(row["step"]))

    def picture(self, path: Path, step: int) -> None:
        import wandb

        self.run.log({"pictures": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_services(train: TrainConfig) -> None:
    """Raises UserError when a service is asked for whose package is not installed."""
    for package in ("tensorboard", "wandb"):
        if getattr(train, package) and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{package}=true needs {package}; pip install {package}")


def open_services(folder: Path, t: TrainConfig, values: dict[str, Any]) -> list[Service]:
    """The services that ``t`` asks for and that can be reached; the others cost a warning each."""
    makers: dict[str, Callable[[], Service]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: WeightsAndBiases(folder, t, values),
    }
    services = []
    for name, make in makers.items():
        if getattr(t, name):
            try:
                services.append(make())
            except Exception as error:  # whatever a service does, the run does not depend on it
                log.warning("%s cannot be used (%s); training goes on without it", name, first_line(error))
    return services


class Log:
    """metrics.jsonl and metrics.csv of a run folder: one row per log line, kept in step with checkpoints on resume."""

    def __init__(self, folder: Path, resumed_step: int, services: list[Service] | None = None) -> None:
        self.json_path, self.csv_path = folder / "metrics.jsonl", folder / "metrics.csv"
        self.header: list[str] = []
        self.services = services or []
        self.warned: set[object] = set()
        try:
            self._cut(resumed_step)
        except OSError as error:
            self._warn(self, error)

    def _cut(self, resumed_step: int) -> None:
        """Removes rows later than the checkpoint from which the run goes on: they will come again.

        Where lines cannot be read, the file as it was stays beside it as metrics.jsonl.damaged.
        """
        found, damaged = _parse(self.json_path)
        if damaged:
            aside = self.json_path.with_name(self.json_path.name + ".damaged")
            files.write(aside, self.json_path.read_bytes())
            log.warning("%d lines of %s cannot be read; it is kept as %s", damaged, self.json_path, aside.name)
        rows = [row for row in found if row["step"] <= resumed_step]
        files.write(self.json_path, "".join(_json(row) for row in rows))
        self._write_table(rows)

    def _write_table(self, rows: list[dict[str, float]]) -> None:
        """metrics.csv from all rows; its columns are those that any of them has, in the order of their coming."""
        self.header = list(dict.fromkeys(name for row in rows for name in row))
        table = [self.header, *([row.get(k, "") for k in self.header] for row in rows)]
        files.write(self.csv_path, _csv(table) if rows else "")

    def _warn(self, who: object, error: Exception) -> None:
        """Once for the files and once for each service."""
        if who not in self.warned:
            where = "" if who is self else f" to {type(who).__name__}"
            log.warning("metrics cannot be written%s (%s); training goes on", where, first_line(error))
        self.warned.add(who)

    def write(self, row: dict[str, float]) -> None:
        """A full or read-only disk costs the row and one warning, never the run. JSON has no NaN: it becomes null."""
        try:
            _append(self.json_path, _json(row))
            if set(row) <= set(self.header):
                _append(self.csv_path, _csv([[row.get(k, "") for k in self.header]]))
            else:  # the first row, or one of a start with other columns
                self._write_table(read_metrics(self.json_path))
        except OSError as error:
            self._warn(self, error)
        for service in self.services:
            try:
                service.write(row)
            except Exception as error:  # of somebody else's code, over a network
                self._warn(service, error)

    def picture(self, path: Path, step: int) -> None:
        """A grid of the run, to the services, once it is there."""
        for service in self.services if path.is_file() else ():
            try:
                service.picture(path, step)
            except Exception as error:
                self._warn(service, error)

    def close(self) -> None:
        """At the end of the run: what the services hold back is sent."""
        for service in self.services:
            try:
                service.close()
            except Exception as error:
                self._warn(service, error)


def _json(row: dict[str, float]) -> str:
    return json.dumps({k: None if math.isnan(v) else v for k, v in row.items()}) + "\n"


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    """Adds ``text`` on a line of its own, also after a line that a full disk has cut short."""
    with path.open("a+b") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + text.encode())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; lines that a crash or a full disk has damaged are left out."""
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[dict[str, float]], int]:
    """The rows, and how many whole lines are none. A row that stands whole behind one that was cut short is read."""
    rows, damaged = [], 0
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else ():
        row = _row(line)
        if row is None:
            damaged += line.endswith("\n")  # the last one may just have been begun
            begin = line.rfind('{"step"')
            row = _row(line[begin:]) if begin > 0 else None
        rows += [row] if row else []
    return rows, damaged


def _row(text: str) -> dict[str, float] | None:
    try:
        row = {k: math.nan if v is None else v for k, v in json.loads(text).items()}
        if not all(isinstance(value, int | float) for value in row.values()):
            return None
        return row | {"step": int(row["step"])}
    except (ValueError, AttributeError, KeyError, RecursionError, OverflowError):
        return None


class Meter:
    """Samples per second and time to go, from the wall clock."""

    def __init__(
        self, total_images: int, images_seen: int, flops_per_image: float, peak: float | None, world: int
    ) -> None:
        self.total, self.flops, self.peak, self.world = total_images, flops_per_image, peak, world
        self.last_time, self.last_images = time.perf_counter(), images_seen

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place inside does not count as training time."""
        begun = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - begun

    def rates(self, images_seen: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (images_seen - self.last_images) / max(now - self.last_time, 1e-9)
        self.last_time, self.last_images = now, images_seen
        values = {
            "images_per_second": rate,
            "tflops": rate * self.flops / 1e12,
            "seconds_left": (self.total - images_seen) / max(rate, 1e-9),
        }
        values["mfu"] = rate * self.flops / (self.peak * self.world) if self.peak else math.nan
        return values


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that tensors have held of a GPU's memory so far, from counters on the host; empty for a CPU."""
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def progress_line(row: dict[str, float], total_steps: int, terms: Sequence[str], thing: str, width: int = 0) -> str:
    """One line of the terminal: step, samples, loss and its terms, gradient norm, speed, memory, time to go.

    thing: a sample, in a word. width: columns that there are, into which as much goes as fits; 0: any number.
    """
    left = int(row["seconds_left"])
    speed = f"mfu {row['mfu']:.1%}" if row["mfu"] == row["mfu"] else f"{row['tflops'] * 1e3:.1f} GFLOP/s"
    # With how soon each is left out where there is little room.
    parts = [
        (0, f"step {row['step']:.0f}/{total_steps}"),
        (4, f"{thing}s {row['images_seen']:.0f}"),
        (0, f"loss {row['total']:.4f}"),
        *((2, f"{name} {row[name]:.4f}") for name in terms),
        *([(2, f"judged rightly {row['d_accuracy']:.0%}")] if "d_accuracy" in row else []),
        (3, f"latent std {row['latent_std']:.3f}"),
        (5, f"|grad| {row['grad_norm']:.3f}"),
        *([(0, f"skipped {row[SKIPPED]:.0f}")] if row[SKIPPED] else []),
        (6, f"lr {row['lr']:.2e}"),
        (1, f"{row['images_per_second']:.1f} {thing}s/s"),
        (8, speed),
        (7, f"data {row['data_wait']:.0%}"),
        *([(9, f"{row['memory_gib']:.1f} GiB")] if "memory_gib" in row else []),
        (0, f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"),
    ]
    for spare in range(9, 0, -1):
        if not width or len("  ".join(text for _, text in parts)) < width:
            break
        parts = [part for part in parts if part[0] != spare]
    return "  ".join(text for _, text in parts)


class Alarm(Protocol):
    def check(self, row: dict[str, float]) -> str:
        """A warning about a log line, or an empty string."""
        ...


class CollapseAlarm:
    """Latents that stop varying over samples carry nothing to decode.

    Speaks once: when the standard deviation falls below the threshold after having been above it, or when it never
    rose above it in the first ``patience`` steps.
    """

    def __init__(self, threshold: float, patience: int = 200) -> None:
        self.threshold, self.patience = threshold, patience
        self.seen_healthy = self.spoken = False

    def check(self, row: dict[str, float]) -> str:
        """The warning, or an empty string. A row of skipped steps says nothing."""
        if math.isnan(row["latent_std"]):
            return ""
        healthy = row["latent_std"] >= self.threshold
        self.seen_healthy |= healthy
        if healthy or self.spoken or not (self.seen_healthy or row["step"] >= self.patience):
            return ""
        self.spoken = True
        return (
            f"warning: the latents collapse: their standard deviation over samples is {row['latent_std']:.3f}, below "
            f"train.collapse_std {self.threshold}; lower objective.flow_weight"
        )


class DuelAlarm:
    """A discriminator that is always right, or that only guesses, has nothing to teach.

    Speaks once of each: after ``patience`` log lines in a row. Rows without a discriminator that learns say nothing.
    """

    HIGH, LOW = 0.99, 0.51  # share of images that are judged rightly

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.lines = {"wins": 0, "loses": 0}

    def check(self, row: dict[str, float]) -> str:
        """The warning, or an empty string."""
        accuracy = row.get("d_accuracy", math.nan)
        if math.isnan(accuracy) or not row["discriminator"]:
            return ""
        for outcome, there in {"wins": accuracy >= self.HIGH, "loses": accuracy <= self.LOW}.items():
            self.lines[outcome] = self.lines[outcome] + 1 if there else 0
            if self.lines[outcome] == self.patience:
                mend = "lower" if outcome == "wins" else "raise"
                return (
                    f"warning: the discriminator {outcome} outright: it judged {accuracy:.0%} of the images rightly in "
                    f"{self.patience} log lines; {mend} objective.adversarial.lr_ratio"
                )
        return ""


def tell(
    row: dict[str, float], total_steps: int, terms: Sequence[str], log: Log, alarms: Sequence[Alarm], thing: str
) -> None:
    """A log line: to the files and services of the run, and to the terminal, with the alarms that go off."""
    log.write(row)
    width = shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0
    print(progress_line(row, total_steps, terms, thing, width), flush=True)
    for alarm in alarms:
        if warning := alarm.check(row):
            print(warning, file=sys.stderr)
