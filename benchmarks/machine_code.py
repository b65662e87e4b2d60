"""What a kernel's machine code for sm_90 needs and does: registers, spills, programs per multiprocessor, its loop.

Of a kernel's innermost loops the longest that reads global memory is described, per iteration: instructions, barriers,
shuffles, global accesses by width, and the bytes that a program has asked for when it first waits for one of them. They
are those of the loads before the first use of a loaded value, or, where loads go to shared memory ahead of their use
(LDGSTS), of an iteration times the iterations that may be on their way. Lanes that a mask always switches off count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Of a multiprocessor of sm_90 (CUDA C++ Programming Guide, compute capability 9.0).
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 228 * 1024
REGISTERS_OF_A_WARP = 256  # are given out in multiples of this
RESERVED_SHARED = 1024  # of every program

USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"\.text\.(\S+):(.*?)(?=\n\.text\.|\n\s*\.section|\Z)", flags=re.S)
LINE = re.compile(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);)", flags=re.M)
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # of an access; 4 without such a suffix


class Instruction(NamedTuple):
    name: str  # with its suffixes; "" for a label
    operands: str  # or the label
    predicate: str = ""

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        return next((BYTES[suffix] for suffix in self.name.split(".") if suffix in BYTES), 4)


class Loop(NamedTuple):
    """Of one iteration."""

    instructions: int = 0
    barriers: int = 0
    shuffles: int = 0
    loads: int = 0
    stores: int = 0
    wide: float = 0.0  # part of the bytes that are loaded and stored 16 at a time
    in_flight: int = 0  # bytes that a thread has asked for at once


def programs_at_once(registers: int, warps: int, shared: int) -> int:
    """Programs that fit on a multiprocessor together."""
    of_a_warp = -(-registers * 32 // REGISTERS_OF_A_WARP) * REGISTERS_OF_A_WARP
    by_registers = REGISTERS // of_a_warp // 4 * 4 // warps  # the four parts of a multiprocessor hold equally many
    return min(by_registers, WARPS // warps, PROGRAMS, SHARED // (shared + RESERVED_SHARED))


def instructions(text: str) -> list[Instruction]:
    return [Instruction(m[3] or "", m[1] or m[4], m[2] or "") for m in LINE.finditer(text)]


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of innermost loops: from a label to the branch back to it, with no other such branch between."""
    labels = {found.operands: i for i, found in enumerate(code) if not found.name}
    spans = []
    for i, found in enumerate(code):
        if found.kind == "BRA" and (target := re.search(r"\.L_x_\d+", found.operands)) and labels[target[0]] < i - 1:
            spans.append((labels[target[0]], i))
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            yield [found for found in code[first : last + 1] if found.name]


def _registers(operand: str, bytes_: int) -> set[int]:
    found = re.match(r"R(\d+)", operand)
    return set(range(int(found[1]), int(found[1]) + max(1, bytes_ // 4))) if found else set()


def _asked_for(body: list[Instruction]) -> int:
    """Bytes of the loads that are issued before a value of theirs is used, the most at any use."""
    pending: dict[int, int] = {}  # register -> index of its load
    sizes: list[int] = []
    most = 0
    for found in body * 2:  # the second time with the loads that the first one issued for it
        used = [int(n) for n in re.findall(r"\bR(\d+)", found.operands)]
        if found.kind == "LDG":
            target, address = found.operands.split(",", 1)
            used = [int(n) for n in re.findall(r"\bR(\d+)", address)]
        waited = {pending[n] for n in used if n in pending}
        if waited:
            most = max(most, sum(sizes[i] for i in set(pending.values())))
            pending = {n: i for n, i in pending.items() if i not in waited}
        if found.kind == "LDG":
            sizes.append(found.bytes)
            pending |= {n: len(sizes) - 1 for n in _registers(target.strip(), found.bytes)}
    return most


def _on_their_way(body: list[Instruction]) -> int:
    """Bytes of an iteration's copies to shared memory, times the iterations whose copies may be outstanding."""
    copied = sum(found.bytes for found in body if found.kind == "LDGSTS" and found.bytes >= 8)
    groups = sum(found.kind == "LDGDEPBAR" for found in body)
    waits = [
        int(found.operands.split(",")[1], 16) for found in body if found.kind == "DEPBAR" and "," in found.operands
    ]
    return copied * (groups + max(waits, default=0)) // groups if groups else copied


def describe(body: list[Instruction]) -> Loop:
    kinds = [found.kind for found in body]
    loads = [found for found in body if found.kind in ("LDG", "LDGSTS")]
    stores = [found for found in body if found.kind == "STG"]
    sizes = [found.bytes for found in (*loads, *stores)]
    return Loop(
        len(body),
        sum(kind == "BAR" for kind in kinds),
        sum(kind == "SHFL" for kind in kinds),
        len(loads),
        len(stores),
        round(sum(size for size in sizes if size == 16) / sum(sizes), 3),
        max(_asked_for(body), _on_their_way(body)),
    )


def longest_loop(text: str) -> Loop:
    """That of a function's text; a Loop of zeros where there is none."""
    bodies = [body for body in loops(instructions(text)) if any(i.kind in ("LDG", "LDGSTS") for i in body)]
    return describe(max(bodies, key=len)) if bodies else Loop()


def read(usage: str, code: str) -> dict[str, dict[str, Any]]:
    """By function, from what ``cuobjdump -res-usage`` and ``nvdisasm -c`` print: registers, spills, stack, shared, the
    numbers of its loop, and whether it has one."""
    rows = {}
    texts = dict(FUNCTION.findall(code))
    for name, registers, stack, shared, local in USAGE.findall(usage):
        if not (text := texts.get(name, "")):
            raise RuntimeError(f"no machine code found for {name}")
        # STL and LDL are the spills themselves; a stack that is only reserved would not show in them.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", text)) + int(local)
        row = {"registers": int(registers), "spills": spills, "stack": int(stack), "shared": int(shared)}
        loop = longest_loop(text)
        rows[name] = row | loop._asdict() | {"loop": bool(loop.instructions)}
    return rows
