"""The tables of launches: what they may say, which row a kernel gets, and how grids are fitted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cases
import pytest
import torch

from unite_kernels import launches
from unite_kernels.launches import FOLDER, Key, Launch, Row, Table, read, text_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_is_written_as_it_is_read(path, tmp_path):
    table = read(path)
    (tmp_path / path.name).write_text(text_of(table))
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_every_operation_is_in_the_default_table():
    ops = {key[:2] for key in read(FOLDER / f"{launches.DEFAULT}.json").rows}
    assert ops >= {(name, direction) for name in cases.CASES for direction in ("forward", "backward")}


def test_a_measured_row_survives(tmp_path):
    key, launch = Key("swiglu", "backward", 2048), Launch(rows=8, columns=256, warps=4, programs=5)
    row = Row(launch, "2026-12-24", {"3.6": 7})
    (tmp_path / "x.json").write_text(text_of(Table("NVIDIA H200", 132, {key: row})))
    assert read(tmp_path / "x.json") == Table("NVIDIA H200", 132, {key: row})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"launch": {"warp": 4}}, "launch has no warp; it has columns, programs, rows, stages, warps"),
        ({"launch": {"warps": "4"}}, "width and launch must be whole numbers"),
        ({"measured": "today"}, "measured must be a date"),
        ({"direction": "both"}, "neither forward nor backward"),
        ({"note": ""}, "and no more"),
        ({"by_triton": {"3.6": "9"}}, "so must by_triton"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, change, message):
    good = {"op": "adaln", "direction": "forward", "width": 768, "launch": {"warps": 4}, "measured": "not measured"}
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"device": "sm_90", "multiprocessors": 132, "rows": [good | change]}))
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith('sm_90.json: {"op": "adaln"')


def test_programs_follow_the_installed_triton(monkeypatch):
    """Of a launch that this project's Tritons compile to different numbers of registers."""
    for minor, programs in (("3.6", 9), ("3.8", 7), ("", 7)):
        monkeypatch.setattr(launches, "triton_minor", lambda minor=minor: minor)
        launches.launch_of.cache_clear()
        assert launches.launch_of("qk_norm_rope", "forward", 768, CPU).programs == programs
    launches.launch_of.cache_clear()


def test_widths_between_rows_take_the_next_larger_one():
    def at(width):
        return launches.launch_of("adaln", "forward", width, CPU)

    rows = launches.device_of(CPU).table.rows
    assert at(768) == rows[Key("adaln", "forward", 768)].launch
    assert at(769) == rows[Key("adaln", "forward", 1024)].launch
    assert at(1 << 20) == rows[Key("adaln", "forward", 2048)].launch
    with pytest.raises(ValueError, match="no backward of corruption"):
        launches.launch_of("corruption", "backward", 1, CPU)


def test_a_device_has_a_table_of_its_own_or_its_capability_s(tmp_path, monkeypatch):
    def device(name):
        properties = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=114)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        launches._device.cache_clear()
        return launches.device_of(torch.device("cuda", 0))

    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    (tmp_path / "sm_90.json").write_text(text_of(Table("sm_90", 132, {})))
    (tmp_path / "NVIDIA_H200.json").write_text(text_of(Table("NVIDIA H200", 132, {})))
    assert device("NVIDIA H200").table.device == "NVIDIA H200"
    assert device("NVIDIA H100 PCIe").table.device == "sm_90"
    assert device("NVIDIA H100 PCIe").multiprocessors == 114
    launches._device.cache_clear()


@pytest.mark.parametrize(
    ("groups", "steps", "slots", "taken"),
    [
        (64, 544, 4 * 132, 68),  # 512 programs on 528 slots, one round
        (64, 544, 3 * 132, 91),  # 384 on 396
        (192, 288, 4 * 132, 36),  # 1,536: three rounds of 36 beat one of 144 on 384 slots
        (192, 288, 3 * 132, 144),
        (1, 5, 528, 1),
        (528, 1, 528, 1),
    ],
)
def test_programs_fill_the_slots(groups, steps, slots, taken):
    assert launches.steps_per_program(groups, steps, slots) == taken
