"""Crystals: CSV files in MP20's format, CIF files, and the real structures that Python and Debian packages hold.

Every cell is Niggli-reduced and put in the orientation of its six parameters, as in the published preparation of MP20;
the order of atoms is the source's. From CSV files cells are taken as they are, elsewhere they are made primitive
first. pymatgen does all of it.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unite_fast.base.errors import UserError, first_line
from unite_fast.data.atoms.checks import Read
from unite_fast.data.atoms.elements import BadStructure, atomic_numbers, extra, preload
from unite_fast.data.atoms.parallel import mapped
from unite_fast.data.atoms.structures import Structure, pack
from unite_fast.data.order import permutation

CSV_PARTS = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
ALL_CSV = "all.csv"
ADIT_SLICES = (27_138, 36_184)  # of all.csv: train, then valid, then test, not shuffled
AVOGADRO = Path("/usr/share/avogadro2/crystals")  # Debian's package libavogadro-data
LARGEST = 20  # atoms of a cell of MP20
CENTRED = 4  # times a primitive cell is the most that a conventional one holds
HELD_OUT = 0.1


def to_pymatgen(crystal: Structure) -> Any:
    """A pymatgen Structure of a crystal."""
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal

    assert crystal.lattice is not None, f"{crystal.name} is a molecule"
    return Crystal(Lattice(crystal.lattice), crystal.species.tolist(), crystal.coordinates)


def of_pymatgen(structure: Any, name: str, primitive: int = 0) -> Structure:
    """A crystal of a pymatgen Structure. Raises BadStructure when it is disordered or cannot be reduced.

    ``primitive`` 0 keeps the cell; a number makes it primitive first, and refuses, unreduced, one that could not come
    down to so many atoms.
    """
    from pymatgen.core import Lattice

    for number, site in enumerate(structure, 1):
        if not site.is_ordered:
            raise BadStructure(f"disordered: site {number} holds {site.species_string}")
    if primitive and len(structure) > CENTRED * primitive:
        raise BadStructure(f"too many atoms: {len(structure)} in the conventional cell")
    try:
        if primitive:
            structure = structure.get_primitive_structure()
        reduced = structure.get_reduced_structure()
        lattice = Lattice.from_parameters(*reduced.lattice.parameters).matrix
    except Exception as error:  # pymatgen raises whatever its arithmetic raises for impossible cells
        raise BadStructure(f"no reduced cell: {first_line(error)}") from None
    species = atomic_numbers(site.specie.symbol for site in reduced)
    return Structure(species, np.asarray(reduced.frac_coords, dtype=np.float64), np.array(lattice), name)


def of_cif(text: str, name: str, primitive: int = 0) -> Structure:
    """The first crystal of a CIF; ``primitive`` as in ``of_pymatgen``. Raises BadStructure."""
    from pymatgen.core import Structure as Crystal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding of coordinates, missing symmetry: what counts is checked
        try:
            crystal = Crystal.from_str(text, fmt="cif")
        except Exception as error:  # of a damaged file, pymatgen's parser raises anything
            raise BadStructure(f"broken CIF: {first_line(error)}") from None
        return of_pymatgen(crystal, name, primitive)


def _parsed(job: tuple[str, str, int]) -> Structure | str:
    """Runs in the workers: a crystal or the reason why there is none."""
    name, text, primitive = job
    try:
        return of_cif(text, name, primitive)
    except BadStructure as error:
        return str(error)


def of_cifs(texts: Sequence[tuple[str, str]], primitive: int, workers: int = 0) -> Read:
    """Crystals of (name, CIF) pairs, in order, parsed by ``workers`` processes (0: one per core)."""
    preload("reading crystals", "pymatgen.core", "pymatgen.io.cif")
    good: list[Structure] = []
    bad: list[tuple[str, str]] = []
    jobs = [(name, text, primitive) for name, text in texts]
    for (name, _), found in zip(texts, mapped(_parsed, jobs, workers), strict=True):
        if isinstance(found, str):
            bad.append((name, found))
        else:
            good.append(found)
    return Read(pack(good), bad)


def rows_of(path: Path) -> list[tuple[str, str]]:
    """(material_id or line, CIF) of every row of a CSV file. Raises UserError."""
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "cif" not in (reader.fieldnames or ()):
                lfs = any("git-lfs" in name for name in reader.fieldnames or ())
                pointer = "; it is a pointer of Git LFS: git lfs pull" if lfs else ""
                raise UserError(f"{path} has no column cif{pointer}")
            for number, row in enumerate(reader, 1):
                rows.append((f"{path.name}:{row.get('material_id') or number}", row["cif"] or ""))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    return rows


def read_csv(root: Path, part: str, workers: int = 0) -> Read:
    """``part`` of "train", "valid", "test" of a folder in MP20's format: train.csv, val.csv, test.csv, or all.csv.

    all.csv is cut as the all-atom diffusion transformer (ADiT) does: 27,138, 9,046 and the rest, in the file's order.
    A smaller one is cut in the same proportions. Raises UserError.
    """
    if (root / CSV_PARTS[part]).is_file():
        return of_cifs(rows_of(root / CSV_PARTS[part]), primitive=0, workers=workers)
    if not (root / ALL_CSV).is_file():
        raise UserError(f"{root} has neither {CSV_PARTS[part]} nor {ALL_CSV}")
    rows = rows_of(root / ALL_CSV)
    cuts = ADIT_SLICES if len(rows) > ADIT_SLICES[1] else (len(rows) * 6 // 10, len(rows) * 8 // 10)
    low, high = {"train": (0, cuts[0]), "valid": cuts, "test": (cuts[1], len(rows))}[part]
    return of_cifs(rows[low:high], primitive=0, workers=workers)


def prototypes() -> list[Structure]:
    """Real crystals of pymatgen's AFLOW library of prototypes (Mehl et al. 2017): ordered, at most 20 atoms."""
    with extra("data.source crystals"):
        from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
    found = []
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        tags = entry["tags"]
        try:
            crystal = of_pymatgen(entry["snl"].structure, f"aflow:{tags['aflow']}:{tags['mineral']}", primitive=LARGEST)
        except BadStructure:  # the library holds alloys with mixed sites
            continue
        if len(crystal.species) <= LARGEST:
            found.append(crystal)
    return found


def avogadro(root: Path = AVOGADRO, workers: int = 0) -> list[Structure]:
    """Real crystals that the molecular editor Avogadro brings, when they are installed: ordered, at most 20 atoms."""
    paths = sorted(root.glob("*/*.cif"))
    texts = [(f"avogadro:{path.parent.name}/{path.stem}", path.read_text(errors="replace")) for path in paths]
    read = of_cifs(texts, primitive=LARGEST, workers=workers).structures
    return [read[i] for i in range(len(read)) if 0 < int(read.sizes[i]) <= LARGEST]


def identity(crystal: Structure) -> tuple[str, int]:
    """Reduced formula and number of the space group, by which two sources' crystals are told to be the same."""
    whole = to_pymatgen(crystal)
    return whole.composition.reduced_formula, whole.get_space_group_info(0.1)[1]


def read_packages(root: Path = AVOGADRO, workers: int = 0) -> Read:
    """The real crystals of pymatgen, and those of Avogadro below ``root`` that are new by formula and space group."""
    kept: dict[tuple[str, int], Structure] = {}
    own = prototypes()
    more = avogadro(root, workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for crystal in own + more:
            kept.setdefault(identity(crystal), crystal)
    return Read(pack(kept.values()))


def held_out(count: int, share: float = HELD_OUT, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): indices, ascending, of ``count`` structures without a published split; int64.

    A function of ``count`` and ``seed``; at least one of two or more is held out.
    """
    number = max(1, int(count * share)) if count > 1 else 0
    order = permutation(count, seed, 0).numpy()
    return np.sort(order[number:]), np.sort(order[:number])
