"""What makes a structure unusable, and what becomes of those that are.

Readers report what they cannot read; everything else is checked here, on the packed arrays: numbers that are not
finite, elements, too many atoms, cells without volume, atoms on top of each other. Positions in the wrong unit are a
mistake of the whole source, found by the distance to the nearest neighbour in units of the sum of covalent radii,
which is about 1 in molecules and crystals alike.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.data.atoms.elements import LARGEST, SYMBOLS, covalent_radii
from unite_fast.data.atoms.structures import Structures

ENOUGH = 5000  # structures that show the unit
OVERLAP = 0.5  # Å; the shortest bond, H-H, is 0.74
MIN_VOLUME = 0.1  # Å^3
USUAL = (0.6, 1.6)  # the median over atoms of distance to the nearest neighbour / sum of covalent radii
UNITS = {1 / 0.529177: "bohr, 0.529177 Å", 0.1: "nm, 10 Å", 100.0: "pm, 0.01 Å"}
log = logging.getLogger("unite_fast.data")


@dataclass(frozen=True)
class Read:
    """What a reader found: structures, and name and reason (``kind: details``) of those that it could not read."""

    structures: Structures
    bad: list[tuple[str, str]] = field(default_factory=list)


def neighbours(structures: Structures) -> tuple[Tensor, Tensor]:
    """Distance to the nearest neighbour in Å and which atom that is, (S, M) each, M atoms of the largest structure.

    Periodic images count, an atom's own as well; exact for reduced cells. Infinite where there is no neighbour.
    """
    batch = structures.gather(torch.arange(len(structures)), structures.largest)
    pairs = batch.mask[:, :, None] & batch.mask[:, None, :]
    near = torch.full(batch.mask.shape, torch.inf)
    which = torch.zeros(batch.mask.shape, dtype=torch.int64)
    crystals = bool((batch.lattice != 0).any())
    for cell in [(x, y, z) for x in (0, -1, 1) for y in (0, -1, 1) for z in (0, -1, 1)] if crystals else [(0, 0, 0)]:
        shift = torch.tensor(cell, dtype=torch.float32) @ batch.lattice  # (B, 3)
        image = batch.positions + shift[:, None]
        distance = torch.cdist(batch.positions, image, compute_mode="donot_use_mm_for_euclid_dist")
        zero = torch.eye(batch.mask.shape[1], dtype=torch.bool)
        own = zero if cell == (0, 0, 0) else zero & ~(batch.lattice != 0).flatten(1).any(1)[:, None, None]
        distance = torch.where(pairs & ~own, distance, torch.inf)
        least, place = distance.min(-1)
        which = torch.where(least < near, place, which)
        near = torch.minimum(near, least)
    return near, which


def _finite_volumes(structures: Structures) -> tuple[Tensor, Tensor]:
    """Whether all numbers of a structure are finite, bool (S,), and the volumes of the cells in Å^3, float64 (S,)."""
    owner = torch.repeat_interleave(torch.arange(len(structures)), structures.sizes)
    wrong = torch.bincount(owner[~structures.coordinates.isfinite().all(1)], minlength=len(structures)) > 0
    lattice_good = structures.lattices.isfinite().flatten(1).all(1)
    lattices = torch.where(lattice_good[:, None, None], structures.lattices, torch.eye(3)).double()
    return lattice_good & ~wrong, torch.linalg.det(lattices).abs()


def faults(structures: Structures, largest: int) -> dict[int, str]:
    """Index and reason of every structure that cannot be used by a network with ``largest`` slots."""
    found: dict[int, str] = {}

    def add(which: Tensor, reason) -> None:
        for index in which.nonzero()[:, 0].tolist():
            found.setdefault(index, reason(index))

    sizes = structures.sizes
    finite, volumes = _finite_volumes(structures)
    owner = torch.repeat_interleave(torch.arange(len(structures)), sizes)
    strange = (structures.species == 0) | (structures.species > LARGEST)
    add(sizes == 0, lambda i: "no atoms: the structure is empty")
    add(~finite, lambda i: "not a number: a coordinate or a cell is NaN or infinite")
    add(
        torch.bincount(owner[strange], minlength=len(structures)) > 0,
        lambda i: f"unknown element: an atomic number outside 1 to {LARGEST}",
    )
    add(structures.periodic & (volumes < MIN_VOLUME), lambda i: f"flat cell: its volume is {volumes[i]:.2g} Å^3")
    add(sizes > largest, lambda i: f"too many atoms: {sizes[i]}, and the network takes {largest}")
    usable = torch.tensor([i for i in range(len(structures)) if i not in found], dtype=torch.int64)
    sound = structures.select(usable) if len(found) else structures
    for low, part in sound.parts(2):
        near, which = neighbours(part)
        least, atom = near.min(1)
        for row in (least < OVERLAP).nonzero()[:, 0].tolist():
            a, b = int(atom[row]), int(which[row, atom[row]])
            pair = f"atoms {min(a, b) + 1} and {max(a, b) + 1} are" if a != b else f"atom {a + 1} and its image are"
            found[int(usable[low + row])] = f"overlapping atoms: {pair} {least[row]:.2f} Å apart"
    return dict(sorted(found.items()))


def typical_distance(structures: Structures, largest: int) -> tuple[float, bool]:
    """(the median over atoms of distance to the nearest neighbour / sum of the two covalent radii, whether it is sure).

    Structures with overlapping atoms count when there are no others, which makes it unsure; those of more than
    ``largest`` atoms do not. NaN without any pair.
    """
    finite, volumes = _finite_volumes(structures)
    sound = finite & (structures.sizes > 0) & (structures.sizes <= largest) & (~structures.periodic | (volumes > 0))
    # Enough to judge by, spread over the source.
    some = structures.select(sound.nonzero()[:, 0][:: max(1, len(structures) // ENOUGH)])
    radii = torch.from_numpy(covalent_radii()).float()
    apart, overlapping = [torch.zeros(0)], [torch.zeros(0)]
    for _, part in some.parts(2):
        near, which = neighbours(part)
        species = part.gather(torch.arange(len(part)), part.largest).species.clamp(max=LARGEST)
        ratio = near / (radii[species] + radii[species.gather(1, which)])
        there = near.isfinite() & (species > 0)
        good = (near.min(1).values >= OVERLAP)[:, None]
        apart.append(ratio[there & good])
        overlapping.append(ratio[there & ~good])
    sure = sum(map(len, apart)) > 0
    together = torch.cat(apart if sure else overlapping)
    return (float(together.median()) if len(together) else float("nan")), sure


def check_units(structures: Structures, where: str, largest: int) -> None:
    """Raises UserError when the typical distance between neighbours is not that of atoms in Å."""
    ratio, sure = typical_distance(structures, largest)
    unit = next((text for factor, text in UNITS.items() if 0.8 < ratio / factor < 1.25), None)
    if np.isnan(ratio) or USUAL[0] <= ratio <= USUAL[1] or not (sure or unit):
        return
    guess = f"; they look like {unit} each" if unit else ""
    raise UserError(f"{where}: nearest neighbours are {ratio:.2g} bond lengths apart: positions must be in Å{guess}")


def summary(bad: list[tuple[str, str]], total: int) -> str:
    """One line: how many structures cannot be used, by kind, and the first of them."""
    kinds = Counter(reason.split(":")[0] for _, reason in bad)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    name, reason = bad[0]
    return f"{len(bad):,} of {total:,} structures cannot be used ({counted}); the first is {name}: {reason}"


def admit(read: Read, where: str, largest: int, on_error: str) -> Structures:
    """The structures of ``read`` that can be used, by a network with ``largest`` slots.

    ``on_error`` "fail" raises UserError for the first bad structure and counts the others; "skip" leaves them out and
    logs a line for each. Raises UserError for positions in another unit than Å, and when nothing is left.
    """
    structures = read.structures
    check_units(structures, where, largest)
    found = faults(structures, largest)
    bad = [*read.bad, *((structures.names[index], reason) for index, reason in found.items())]
    total = len(structures) + len(read.bad)
    if not total:
        raise UserError(f"{where} holds no structures")
    if bad:
        line = f"{where}: {summary(bad, total)}"
        if len(bad) == total:
            raise UserError(f"{line}; nothing is left")
        if on_error == "fail":
            raise UserError(f"{line}; mend or remove them, or set data.on_error=skip")
        for name, reason in bad:
            log.warning("left out: %s: %s", name, reason)
        log.warning("%s", line)
    good = [index for index in range(len(structures)) if index not in found]
    return structures if len(good) == len(structures) else structures.select(good)


def describe(structures: Structures) -> str:
    """A line: how many, of which sizes and elements, bytes and hash."""
    counts = torch.bincount(structures.species.long(), minlength=1)
    present = [(int(count), SYMBOLS[number]) for number, count in enumerate(counts) if count and number]
    common = ", ".join(f"{symbol} {count:,}" for count, symbol in sorted(present, reverse=True)[:6])
    more = f" and {len(present) - 6} more elements" if len(present) > 6 else ""
    crystals = int(structures.periodic.sum())
    kinds = [f"{len(structures) - crystals:,} molecules"] * (crystals < len(structures))
    kinds += [f"{crystals:,} crystals"] * (crystals > 0)
    sizes = structures.sizes
    least = int(sizes.min()) if len(sizes) else 0
    return (
        f"{' and '.join(kinds) or 'nothing'} of {least} to {structures.largest} atoms ({common}{more}), "
        f"{structures.nbytes / 1e6:.1f} MB, sha256 {structures.digest()[:16]}"
    )
