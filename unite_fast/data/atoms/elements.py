"""Chemical elements by atomic number, and the reason why a structure cannot be used."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from unite_fast.base.errors import UserError

_TABLE = """
H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu
Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es
"""
SYMBOLS = ("", *_TABLE.split())  # 0 is padding
NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS) if symbol} | {"D": 1, "T": 1}
LARGEST = len(SYMBOLS) - 1  # 99; a network's head of 100 types has 0 for padding


class BadStructure(Exception):
    """A structure that cannot be used. The message is ``kind: details``, without the structure's name."""


def atomic_numbers(symbols: Iterable[str]) -> np.ndarray:
    """int64 (n,). Raises BadStructure for what is no element or lies beyond einsteinium."""
    try:
        return np.array([NUMBERS[symbol] for symbol in symbols], dtype=np.int64)
    except KeyError as error:
        raise BadStructure(f"unknown element: {error.args[0]!r}; elements 1 to {LARGEST} are known") from None


def preload(what: str, *modules: str) -> None:
    """Imports modules of optional packages, so that processes forked later need not. Raises UserError, as ``extra``."""
    with extra(what):
        for module in modules:
            importlib.import_module(module)


@contextmanager
def extra(what: str) -> Iterator[None]:
    """Around the import of an optional package: one line when ``what`` needs it and it is not installed."""
    try:
        yield
    except ImportError as error:
        name = (error.name or "a package").split(".")[0]
        how = "pip install " + ("openbabel-wheel, which is under the GPL" if name == "openbabel" else name)
        raise UserError(f"{what} needs {name}, which is not installed; {how}") from None


def covalent_radii() -> np.ndarray:
    """float64 (100,), in Å, by atomic number; 0 for padding. RDKit's table. Raises UserError without rdkit."""
    with extra("the check of distances"):
        from rdkit import Chem
    table = Chem.GetPeriodicTable()
    return np.array([0.0, *(table.GetRcovalent(number) for number in range(1, LARGEST + 1))])
