"""How machine code is read and judged, on text and rows that are made up."""

from __future__ import annotations

import importlib

import pytest
from support import ROOT

ROW = {"spills": 0, "stack": 0, "programs": 6, "barriers": 3, "shuffles": 7, "wide": 0.9, "in_flight": 4096}
USAGE = "Function kernel:\n  REG:40 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0\n"
CODE = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   SHFL.BFLY PT, R12, R4, 0x10, 0x1f ;
        /*0050*/                   FADD R12, R12, R8 ;
        /*0060*/                   STG.E desc[UR4][R14.64], R12 ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
{spill}        /*0080*/                   EXIT ;
"""


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def limits():
    return importlib.import_module("kernel_limits")


def test_what_is_as_it_was_has_no_shortcoming(limits):
    assert limits.shortcomings(ROW, limits.held(ROW), 6) == []
    better = ROW | {"programs": 7, "barriers": 2, "shuffles": 0, "wide": 1.0, "in_flight": 8192}
    assert limits.shortcomings(better, limits.held(ROW), 6) == []
    assert limits.shortcomings(ROW, None, 0) == []  # not recorded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"barriers": 4}, ["barriers 4, was 3"]),
        ({"shuffles": 8}, ["shuffles 8, was 7"]),
        ({"wide": 0.8}, ["wide 0.8, was 0.9"]),
        ({"in_flight": 2048}, ["in_flight 2048, was 4096"]),
        ({"programs": 5}, ["5 programs per multiprocessor, 6 in the table of launches", "programs 5, was 6"]),
        ({"spills": 2, "stack": 16}, ["2 spills", "16 stack"]),
    ],
)
def test_what_is_worse_is_said(limits, change, said):
    assert limits.shortcomings(ROW | change, limits.held(ROW), 6) == said


def test_slots_that_stay_empty_are_remarked(limits):
    assert limits.remarks(ROW | {"programs": 9}, 7) == ["table 7 programs, fits 9"]
    assert limits.remarks(ROW, 6) == limits.remarks(ROW, 0) == []


def test_an_unknown_version_is_held_to_the_worst(limits):
    one, other = limits.held(ROW), limits.held(ROW | {"programs": 9, "barriers": 5, "wide": 1.0})
    recorded = {"3.6": {"a": one, "b": one}, "3.8": {"a": other}}
    assert limits.limits_of(recorded, "3.8") == {"a": other}
    assert limits.limits_of(recorded, "4.0") == {"a": one | {"barriers": 5}, "b": one}
    assert limits.limits_of({}, "3.6") == {}


def test_machine_code_is_read():
    read = importlib.import_module("machine_code").read
    row = read(USAGE.format(stack=0), CODE.format(spill=""))["kernel"]
    assert {k: row[k] for k in ("registers", "spills", "stack", "shared", "loop")} == {
        "registers": 40, "spills": 0, "stack": 0, "shared": 1024, "loop": True
    }  # fmt: skip
    assert (row["barriers"], row["shuffles"], row["loads"], row["stores"]) == (1, 1, 2, 1)
    assert (row["wide"], row["in_flight"]) == (round(32 / 36, 3), 32)
    spilled = read(USAGE.format(stack=8), CODE.format(spill="        /*0078*/                   STL [R1], R4 ;\n"))
    assert (spilled["kernel"]["spills"], spilled["kernel"]["stack"]) == (1, 8)
    with pytest.raises(RuntimeError, match="no machine code found for kernel"):
        read(USAGE.format(stack=0), "")
