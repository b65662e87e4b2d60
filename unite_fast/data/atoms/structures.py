"""Molecules and crystals in memory: packed arrays, moved to a device whole, gathered into padded batches.

All of QM9 is 36 MB. An atom has one triple of coordinates: Cartesian and centred in a molecule, fractional in [0, 1)
in a crystal, whose Cartesian positions are ``fractional @ lattice``. What tells them apart is the lattice: zeros for a
molecule.

Shape letters: S structures, A atoms of all of them, B structures of a batch, M slots of a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unite_fast.base import files
from unite_fast.base.errors import UserError, first_line
from unite_fast.data.encoded import Names

FORMAT = "unite-fast structures 1"
BUDGET = 1 << 21  # numbers of an array over pairs or triples of atoms
ARRAYS = ("species", "coordinates", "lattices", "offsets", "labels")


class Structure(NamedTuple):
    """One molecule or crystal."""

    species: np.ndarray  # (n,) atomic numbers
    coordinates: np.ndarray  # (n, 3): Å in a molecule, fractional in a crystal
    lattice: np.ndarray | None  # (3, 3), rows a, b, c in Å; None for a molecule
    name: str
    smiles: str = ""  # as the source states it

    @property
    def positions(self) -> np.ndarray:
        """Cartesian, (n, 3), in Å."""
        return self.coordinates if self.lattice is None else self.coordinates @ self.lattice


class Padded(NamedTuple):
    """A batch on one device. Slots beyond a structure's atoms hold zeros."""

    species: Tensor  # (B, M) int64, 0 is padding
    positions: Tensor  # (B, M, 3) float32, Å
    fractional: Tensor  # (B, M, 3) float32; zeros for a molecule
    lattice: Tensor  # (B, 3, 3) float32, rows a, b, c in Å; zeros for a molecule
    sizes: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64

    @property
    def mask(self) -> Tensor:
        """(B, M) bool: which slots hold an atom."""
        return torch.arange(self.species.shape[1], device=self.sizes.device) < self.sizes[:, None]


@dataclass(frozen=True)
class Structures:
    """S structures. Make one with ``pack``; the arrays lie on one device, the names on the host."""

    species: Tensor  # (A,) uint8
    coordinates: Tensor  # (A, 3) float32
    lattices: Tensor  # (S, 3, 3) float32
    offsets: Tensor  # (S + 1,) int64: atoms of structure i are offsets[i] .. offsets[i + 1] - 1
    labels: Tensor  # (S,) int64: the data set, when several are joined
    names: Names
    smiles: Names | None = None  # as the source states them
    largest: int = field(default=0)  # atoms of the largest structure

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Structure:
        """A structure on the host, coordinates in float64."""
        low, high = self.offsets[index : index + 2].tolist()
        lattice = self.lattices[index].double().cpu().numpy()
        return Structure(
            self.species[low:high].cpu().numpy().astype(np.int64),
            self.coordinates[low:high].double().cpu().numpy(),
            lattice if lattice.any() else None,
            self.names[index],
            self.smiles[index] if self.smiles is not None else "",
        )

    @property
    def sizes(self) -> Tensor:
        """Atoms of each structure, int64 (S,)."""
        return self.offsets.diff()

    @property
    def periodic(self) -> Tensor:
        """Which are crystals, bool (S,)."""
        return self.lattices.flatten(1).any(1)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in ARRAYS)

    def arrays(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ARRAYS}

    def to(self, device: torch.device | str) -> Structures:
        return replace(self, **{name: array.to(device) for name, array in self.arrays().items()})

    def digest(self) -> str:
        """sha256 of the arrays that batches are made of, in hexadecimal; the names are no part of it."""
        return _hash(self.arrays())

    def histogram(self) -> Tensor:
        """How many structures have 0, 1, ... ``largest`` atoms, int64 (largest + 1,), on the host."""
        return torch.bincount(self.sizes.cpu(), minlength=self.largest + 1)

    def labelled(self, label: int) -> Structures:
        """The same structures, all with ``label``."""
        return replace(self, labels=torch.full_like(self.labels, label))

    def select(self, indices: Tensor | np.ndarray | Sequence[int]) -> Structures:
        """The structures ``indices`` (int64), in this order. On the host."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64)).reshape(-1)
        here = self.to("cpu")
        sizes = here.sizes[chosen]
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        atoms = torch.arange(int(offsets[-1])) + torch.repeat_interleave(here.offsets[chosen] - offsets[:-1], sizes)
        numbers = chosen.tolist()
        return Structures(
            here.species[atoms],
            here.coordinates[atoms],
            here.lattices[chosen],
            offsets,
            here.labels[chosen],
            Names([self.names[i] for i in numbers]),
            None if self.smiles is None else Names([self.smiles[i] for i in numbers]),
            int(sizes.max()) if len(sizes) else 0,
        )

    def parts(self, power: int) -> Iterator[tuple[int, Structures]]:
        """Consecutive parts and where each begins, small enough for arrays of (structures, atoms ** power) numbers."""
        low, widest = 0, 1
        sizes = self.sizes.tolist()
        for high, size in enumerate(sizes):
            wider = max(widest, size)
            if high > low and (high - low + 1) * wider**power > BUDGET:
                yield low, self.select(range(low, high))
                low, wider = high, max(1, size)
            widest = wider
        if low < len(sizes):
            yield low, self.select(range(low, len(sizes)))

    def heavy_atoms(self) -> Tensor:
        """Atoms other than hydrogen of each structure, int64 (S,)."""
        before = torch.cat([self.offsets.new_zeros(1), (self.species > 1).long().cumsum(0)])
        return before[self.offsets].diff()

    def gather(self, indices: Tensor, slots: int, largest: int | None = None) -> Padded:
        """The structures ``indices`` (B,) int64, padded to ``slots`` atoms, on the device of the arrays.

        largest: the most atoms of one of these, where the caller knows it; else of all. Nothing is read back from the
        device. Raises ValueError when ``slots`` is fewer.
        """
        largest = self.largest if largest is None else largest
        if slots < largest:
            raise ValueError(f"{slots} slots cannot hold structures of up to {largest} atoms")
        indices = indices.to(self.offsets.device, non_blocking=True)
        start = self.offsets[indices]
        sizes = self.offsets[indices + 1] - start
        place = torch.arange(slots, device=start.device)
        there = place < sizes[:, None]
        atoms = torch.where(there, start[:, None] + place, 0)
        species = torch.where(there, self.species[atoms].long(), 0)
        coordinates = torch.where(there[..., None], self.coordinates[atoms], 0.0)
        lattice = self.lattices[indices]
        crystal = lattice.flatten(1).any(1)[:, None, None]
        zeros = torch.zeros_like(coordinates)
        # Nine products and six sums per atom in full float32, whatever torch allows of matrix products.
        cartesian = (coordinates[..., None] * lattice[:, None]).sum(-2)
        return Padded(
            species,
            torch.where(crystal, cartesian, coordinates),
            torch.where(crystal, coordinates, zeros),
            lattice,
            sizes,
            self.labels[indices],
        )

    def save(self, path: Path) -> None:
        """Writes a .safetensors file, whole or not at all. Raises UserError."""
        from safetensors.torch import save

        tensors = {name: array.cpu().contiguous() for name, array in self.arrays().items()}
        tensors |= {"names": _text(self.names)}
        if self.smiles is not None:
            tensors |= {"smiles": _text(self.smiles)}
        with files.refusals(str(path)), files.replacing(path) as file:
            file.write(save(tensors, {"format": FORMAT, "sha256": _hash(tensors)}))


def _hash(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].cpu().contiguous().numpy()
        total.update(f"{name} {array.dtype} {array.shape};".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()


def _text(names: Names) -> Tensor:
    text = json.dumps([names[i] for i in range(len(names))])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def is_packed(path: Path) -> bool:
    """Whether a file is one that ``Structures.save`` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(files.regular(path), "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load(path: Path) -> Structures:
    """What ``Structures.save`` wrote. Raises UserError when the file is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(files.regular(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {first_line(error)}; write it again with python -m unite_fast.data.atoms") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no packed structures; write them with python -m unite_fast.data.atoms")
    if metadata.get("sha256") != _hash(tensors):
        raise UserError(f"{path} is damaged: its sha256 is not the recorded one; write it again")
    texts = {
        name: Names(json.loads(tensors[name].numpy().tobytes())) for name in ("names", "smiles") if name in tensors
    }
    sizes = tensors["offsets"].diff()
    largest = int(sizes.max()) if len(sizes) else 0
    arrays = {name: tensors[name] for name in ARRAYS}
    return Structures(**arrays, names=texts["names"], smiles=texts.get("smiles"), largest=largest)


def of_arrays(
    species: np.ndarray,
    coordinates: np.ndarray,
    sizes: np.ndarray,
    names: Sequence[str],
    lattices: np.ndarray | None = None,
    smiles: Sequence[str] | None = None,
) -> Structures:
    """Structures of flat arrays: species (A,), coordinates (A, 3), sizes (S,), lattices (S, 3, 3) or None.

    Subtracts the unweighted mean of a molecule's positions, and reduces a crystal's coordinates modulo 1, in float64.
    """
    coordinates = np.asarray(coordinates, dtype=np.float64).reshape(-1, 3)
    sizes = np.asarray(sizes, dtype=np.int64)
    cells = np.zeros((len(sizes), 3, 3)) if lattices is None else np.asarray(lattices)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.stack([np.bincount(owner, coordinates[:, axis], len(sizes)) for axis in range(3)], 1)
    with np.errstate(invalid="ignore"):  # infinite ones are reported by checks.py
        centred = coordinates - (sums / np.maximum(sizes, 1)[:, None])[owner]
        wrapped = (coordinates % 1.0).astype(np.float32)
    wrapped[wrapped == 1.0] = 0.0  # what rounds up
    crystal = np.any(cells != 0, axis=(1, 2), keepdims=True)[owner, 0]
    return Structures(
        torch.from_numpy(np.clip(species, 0, 255).astype(np.uint8)),  # 255 is no element either
        torch.from_numpy(np.where(crystal, wrapped, centred.astype(np.float32))),
        torch.from_numpy(cells.astype(np.float32)),
        torch.from_numpy(np.concatenate([[0], sizes.cumsum()]).astype(np.int64)),
        torch.zeros(len(sizes), dtype=torch.int64),
        Names(list(names)),
        None if smiles is None else Names(list(smiles)),
        int(sizes.max()) if len(sizes) else 0,
    )


def pack(structures: Iterable[Structure]) -> Structures:
    """Structures of single ones, in this order, with label 0; see ``of_arrays``."""
    listed = list(structures)
    nothing = [np.zeros((0, 3))]
    return of_arrays(
        np.concatenate([s.species for s in listed] or [np.zeros(0)]),
        np.concatenate([s.coordinates for s in listed] or nothing),
        np.array([len(s.species) for s in listed], dtype=np.int64),
        [s.name for s in listed],
        np.array([np.zeros((3, 3)) if s.lattice is None else s.lattice for s in listed]).reshape(-1, 3, 3),
        [s.smiles for s in listed] if any(s.smiles for s in listed) else None,
    )


def join(parts: Sequence[Structures]) -> Structures:
    """Several data sets end to end; those of the k-th get the label k."""
    offsets = [parts[0].offsets]
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + offsets[-1][-1])
    listed = {"names": [part.names for part in parts], "smiles": [part.smiles for part in parts]}
    texts = {
        key: [
            names[i] if names is not None else ""
            for names, part in zip(several, parts, strict=True)
            for i in range(len(part))
        ]
        for key, several in listed.items()
    }
    return Structures(
        torch.cat([part.species for part in parts]),
        torch.cat([part.coordinates for part in parts]),
        torch.cat([part.lattices for part in parts]),
        torch.cat(offsets),
        torch.cat([torch.full_like(part.labels, k) for k, part in enumerate(parts)]),
        Names(texts["names"]),
        Names(texts["smiles"]) if any(texts["smiles"]) else None,
        max(part.largest for part in parts),
    )
