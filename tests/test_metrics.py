"""metrics.jsonl and metrics.csv across starts: what a disk has damaged costs the rows that it damaged."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from unite_fast.run.stats import Log, read_metrics


def write(folder: Path, steps: range) -> None:
    log = Log(folder, 0)
    for step in steps:
        log.write({"step": step, "total": step / 7})


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[float]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("harm", "lost"),
    [
        (lambda rows: [*rows[:9], rows[9][:14] + rows[10], *rows[11:]], {10}),  # cut short, the next behind it
        (lambda rows: [*rows[:9], "\x00" * 8 + "\n", *rows[10:]], {10}),
        (lambda rows: [*rows[:4], "[]\n", *rows[5:19], '{"step": "x"}\n', *rows[20:]], {5, 20}),
        (lambda rows: [*rows[:4], '{"step": 5, "total": {"a": []}}\n', *rows[5:]], {5}),
    ],
)
def test_a_damaged_line_costs_its_row_alone(harm, lost, tmp_path):
    write(tmp_path, range(1, 31))
    path = tmp_path / "metrics.jsonl"
    damaged = "".join(harm(path.read_text().splitlines(keepends=True)))
    path.write_text(damaged)
    Log(tmp_path, 25).write({"step": 26, "total": 1.0})
    expected = [step for step in range(1, 27) if step not in lost]
    assert steps(tmp_path) == expected
    assert [int(row["step"]) for row in table(tmp_path)] == expected
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == damaged


def test_a_row_after_a_torn_one_has_a_line_of_its_own(tmp_path):
    write(tmp_path, range(1, 4))
    log = Log(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tot')  # what a full disk leaves
    log.write({"step": 5, "total": 1.0})
    assert steps(tmp_path) == [1, 2, 3, 5]


def test_a_last_line_cut_short_is_no_damage(tmp_path):
    write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    Log(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_columns_that_a_later_start_adds(tmp_path):
    """On another device a run logs its memory, too: both files have it."""
    write(tmp_path, range(1, 3))
    log = Log(tmp_path, 2)
    for step in (3, 4):
        log.write({"step": step, "total": 1.0, "memory_gib": step / 2})
    assert [row["memory_gib"] for row in table(tmp_path)] == ["", "", "1.5", "2.0"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["memory_gib"] == 1.5
