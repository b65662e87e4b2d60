"""How every Triton kernel is launched: one table per device, plain data that a sweep may rewrite.

``launch_tables/<name>.json``, one file per device. The name is that of the device, with "_" for what is no letter or
digit (NVIDIA_H200), or of its compute capability (sm_90); a device without either takes DEFAULT's. A table is

    {"device": "sm_90", "multiprocessors": 132, "rows": [row, ...]}

multiprocessors is what grids are fitted to where there is no GPU; on one its own number counts. A row has

    op            adaln, adaln_mid, adaln_tail, qk_norm_rope, swiglu, lpips_head, corruption
    direction     "forward" or "backward"
    width         D of adaln* and qk_norm_rope, F of swiglu, channels of lpips_head, values per sample of corruption. A
                  width without a row takes the next larger one's, or else the largest's.
    launch        the numbers below; one that is left out is 0
    measured      the date of the measurement that chose the launch, "2026-12-24", or "not measured"
    by_triton     optional: programs (below) with a minor version of Triton whose code takes fewer registers, {"3.6": 9}

    rows          rows (tokens) of a tile; the backward of adaln and adaln_mid takes 1
    columns       columns (swiglu), heads (qk_norm_rope) or Philox calls (corruption) of a tile
    warps         of a program, 32 threads each
    stages        of the pipeline that loads ahead in the loops
    programs      that a multiprocessor holds at once, from registers, warps and shared memory: the grid is fitted to
                  it, and `make check-kernels` compares it with the compiled code. 0: the grid follows from the tensors

``text_of`` makes the files: one row per line, sorted.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).with_name("launch_tables")
DEFAULT = "sm_90"
NOT_MEASURED = "not measured"
STEPS_OF_A_PROGRAM = 4  # what starting and ending a program costs, in steps of its loop: an assumption


@dataclass(frozen=True)
class Launch:
    """What a row sets; see above."""

    rows: int = 0
    columns: int = 0
    warps: int = 0
    stages: int = 0
    programs: int = 0


class Key(NamedTuple):
    op: str
    direction: str
    width: int


@dataclass(frozen=True)
class Row:
    launch: Launch
    measured: str = NOT_MEASURED
    by_triton: dict[str, int] = field(default_factory=dict)

    def with_triton(self, minor: str) -> Launch:
        """The launch with a minor version of Triton, "3.6"; "" where there is none."""
        return replace(self.launch, programs=self.by_triton.get(minor, self.launch.programs))


@dataclass(frozen=True)
class Table:
    device: str
    multiprocessors: int
    rows: dict[Key, Row]


def read(path: Path) -> Table:
    """Raises ValueError, naming file and row, for anything that the description above does not allow."""
    data = json.loads(path.read_text())
    rows: dict[Key, Row] = {}
    known = {field.name for field in fields(Launch)}
    for found in data["rows"]:
        where = f"{path.name}: {json.dumps(found)}"
        if found.keys() - {"by_triton"} != {"op", "direction", "width", "launch", "measured"}:
            raise ValueError(
                f"{where} must have op, direction, width, launch, measured, perhaps by_triton, and no more"
            )
        launch, measured, by_triton = found["launch"], found["measured"], found.get("by_triton", {})
        if unknown := launch.keys() - known:
            raise ValueError(f"{where}: launch has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        numbers = (*launch.values(), *by_triton.values(), found["width"])
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{where}: width and launch must be whole numbers from 0 on, and so must by_triton")
        if measured != NOT_MEASURED and not re.fullmatch(r"\d{4}-\d\d-\d\d", measured):
            raise ValueError(f"{where}: measured must be a date, 2026-12-24, or {NOT_MEASURED!r}")
        key = Key(found["op"], found["direction"], found["width"])
        if key in rows or found["direction"] not in ("forward", "backward"):
            raise ValueError(f"{where} is there twice, or its direction is neither forward nor backward")
        rows[key] = Row(Launch(**launch), measured, by_triton)
    return Table(data["device"], data["multiprocessors"], rows)


def text_of(table: Table) -> str:
    """The table as ``read`` reads it."""
    lines = []
    for key, row in sorted(table.rows.items()):
        launch = {name: number for name, number in asdict(row.launch).items() if number}
        more = {"by_triton": row.by_triton} if row.by_triton else {}
        lines.append("    " + json.dumps({**key._asdict(), "launch": launch, "measured": row.measured, **more}))
    head = f'{{\n  "device": {json.dumps(table.device)},\n  "multiprocessors": {table.multiprocessors},\n  "rows": [\n'
    return head + ",\n".join(lines) + "\n  ]\n}\n"


def names_of(device: str, capability: tuple[int, int]) -> tuple[str, str]:
    """The file names, without .json, of a device's table, the first that exists to be taken."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_"), f"sm_{capability[0]}{capability[1]}"


@cache
def triton_minor() -> str:
    """The installed Triton's version as by_triton has it; "" without one."""
    try:
        return minor_of(version("triton"))
    except PackageNotFoundError:
        return ""


def minor_of(version: str) -> str:
    """3.6 of 3.6.0."""
    return ".".join(version.split(".")[:2])


class Device(NamedTuple):
    """What launches depend on."""

    table: Table
    multiprocessors: int


def device_of(device: torch.device) -> Device:
    """That of ``device``; DEFAULT's table where it is no GPU."""
    return _device(None if device.type != "cuda" else device)


@cache
def _device(gpu: torch.device | None) -> Device:
    if gpu is None:
        table = read(FOLDER / f"{DEFAULT}.json")
        return Device(table, table.multiprocessors)
    found = torch.cuda.get_device_properties(gpu)
    paths = [FOLDER / f"{name}.json" for name in (*names_of(found.name, (found.major, found.minor)), DEFAULT)]
    return Device(read(next(path for path in paths if path.is_file())), found.multi_processor_count)


@cache
def launch_of(op: str, direction: str, width: int, device: torch.device) -> Launch:
    """The launch of one operation's kernel on ``device``, with the Triton that is installed."""
    table = device_of(device).table
    widths = sorted(key.width for key in table.rows if key[:2] == (op, direction))
    if not widths:
        raise ValueError(f"the table of launches of {table.device} has no {direction} of {op}")
    return table.rows[Key(op, direction, next((w for w in widths if w >= width), widths[-1]))].with_triton(
        triton_minor()
    )


def slots_of(launch: Launch, device: torch.device) -> int:
    """Programs that run at once on ``device``."""
    return launch.programs * device_of(device).multiprocessors


@cache
def steps_per_program(groups: int, steps: int, slots: int) -> int:
    """How many steps of its loop a program takes, when ``groups`` times ``steps`` are to be done by ``slots`` at once.

    A program takes steps of one group. The number that ends soonest: the steps of a program, and STEPS_OF_A_PROGRAM for
    its start and end, times the rounds in which the programs come.
    """

    def duration(taken: int) -> int:
        rounds = -(-groups * -(-steps // taken) // slots)
        return rounds * (taken + STEPS_OF_A_PROGRAM)

    candidates = {-(-steps // parts) for parts in range(1, steps + 1)}
    return min(sorted(candidates, reverse=True), key=duration)
