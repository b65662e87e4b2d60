"""Structures as a source of batches: resident on the device, in the order of a run, each sample in its own pose.

    for batch in stream(AtomSource(structures, slots=29), seed, start=seen, global_batch=512): ...

Order, ranks and resume are those of ``data/stream.py``. A pose is a function of (seed, position in the run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unite_fast.base.errors import UserError
from unite_fast.config import SOURCES, DataConfig, ModelConfig
from unite_fast.data.atoms import open_structures
from unite_fast.data.atoms.augment import LANES, posed, reordered
from unite_fast.data.atoms.structures import Padded, Structures, join
from unite_fast.data.batch import Batch
from unite_fast.data.source import NoPath, Request, Source, check_classes, to_device

NAMES = SOURCES["structures"]


class AtomSource(Source):
    """``structures``, padded to ``slots`` atoms. ``class_names`` name the labels: data sets, when several are joined.

    A batch's content: species (B, M) int64, positions (B, M, 3) in Å, fractional (B, M, 3), lattice (B, 3, 3), as in
    ``Padded``; its sizes are the numbers of atoms, or None with ``sizes`` false. ``poses``, ``shuffle``: whether each
    sample has a pose, and an order of its atoms, of its own. ``pad_multiple``: where above 0, a training batch holds
    similar sizes, and only as many slots as its largest sample needs, rounded up to a multiple of it. Raises
    ValueError for structures larger than ``slots``.
    """

    def __init__(
        self,
        structures: Structures,
        slots: int,
        class_names: Sequence[str] = ("atoms",),
        poses: bool = True,
        shuffle: bool = False,
        sizes: bool = True,
        pad_multiple: int = 0,
    ) -> None:
        if slots < structures.largest:
            raise ValueError(f"{slots} slots cannot hold structures of up to {structures.largest} atoms")
        super().__init__(structures.labels.cpu(), list(class_names), flip=False)
        self.slots, self.poses, self.shuffle, self.sizes = slots, poses, shuffle, sizes
        self.lanes = LANES + (slots if shuffle else 0)
        self.pad_multiple = pad_multiple
        self.lengths = structures.sizes.cpu() if sizes else None
        self.kinds = self.lengths if pad_multiple else None
        self._structures = {torch.device("cpu"): structures.to("cpu")}  # one copy per device in use

    def on(self, device: torch.device) -> Structures:
        """All structures on ``device``."""
        if device not in self._structures:
            self._structures[device] = self._structures[torch.device("cpu")].to(device)
        return self._structures[device]

    def name(self, index: int) -> str:
        return self.on(torch.device("cpu")).names[index]

    def pipeline_id(self, device: str = "cpu") -> str:
        how = ("posed" if self.poses else "as read") + (", shuffled" if self.shuffle else "")
        how += f", sizes in steps of {self.pad_multiple}" if self.pad_multiple else ""
        return f"atoms:{self.slots}:{how}:{self.on(torch.device('cpu')).digest()}"

    def few(self, indices: Tensor) -> Batch:
        return self._batch(self.on(torch.device("cpu")).gather(indices, self.slots), indices)

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        raise TypeError("a structure is more than one tensor; take it from batches")

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        """As Source.batches; nothing is read from files any more, so ``workers`` and ``timeout`` mean nothing."""
        resident = self.on(device)
        for indices, positions, augment in plan:
            slots, largest = self._slots(indices) if augment else (self.slots, None)
            padded = resident.gather(to_device(indices, device), slots, largest)
            if augment and (self.poses or self.shuffle):
                drawn = to_device(self.uniforms(seed, positions), device)
                places = slice(LANES, LANES + padded.species.shape[1])
                padded = reordered(padded, drawn[:, places]) if self.shuffle else padded
                padded = posed(padded, drawn[:, :LANES]) if self.poses else padded
            yield self._batch(padded, to_device(positions, device))

    def _slots(self, indices: Tensor) -> tuple[int, int | None]:
        """Of a training batch, and its most atoms where that is known."""
        if self.kinds is None:
            return self.slots, None
        largest = int(self.kinds[indices].max())
        return min(self.slots, -(-largest // self.pad_multiple) * self.pad_multiple), largest

    def _batch(self, padded: Padded, positions: Tensor) -> Batch:
        content = {name: getattr(padded, name) for name in ("species", "positions", "fractional", "lattice")}
        return Batch(content, padded.labels, positions, padded.sizes if self.sizes else None)


def read_structures(data: DataConfig, largest: int, split: str) -> tuple[Structures, list[str]]:
    """What ``data`` names, of at most ``largest`` atoms, and the data sets' names. Raises UserError."""
    a, parts = data.atoms, []
    part = a.part if split == "train" else a.heldout_part
    if data.source == "joint" and not a.joint:
        raise UserError("data.source=joint needs data.atoms.joint, as [qm9, mp20:FOLDER]")
    named = a.joint if data.source == "joint" else (f"{data.source}:{data.path}",)
    for entry in named:
        name, _, path = entry.partition(":")
        if name not in NAMES or name == "joint":
            known = ", ".join(one for one in NAMES if one != "joint")
            raise UserError(f"data.atoms.joint: {name!r} is not known; one of {known}")
        kind = name if name != "structures" else "packed" if path.endswith(".safetensors") else "files"
        wanted = part
        if split != "train" and data.heldout_path and data.source != "joint":
            path, wanted = data.heldout_path, "all"
        elif kind == "packed" and split != "train":
            raise NoPath("data.heldout_path is empty: a packed file is one part, so name another for the held-out")
        options = {"split": a.split, "max_heavy_atoms": a.max_heavy_atoms, "workers": data.workers}
        parts.append(open_structures(kind, path, wanted, largest, data.on_error, **options))
    return (parts[0] if data.source != "joint" else join(parts)), [entry.partition(":")[0] for entry in named]


def open_atoms(data: DataConfig, model: ModelConfig, split: str) -> AtomSource:
    """Molecules or crystals of at most ``model.num_latents`` atoms. Raises UserError."""
    structures, names = read_structures(data, model.num_latents, split)
    check_classes(len(names), model.num_classes, f"data.source {data.source}")
    a = data.atoms
    per_atom = model.atoms.registers == "per_atom"
    multiple = a.pad_multiple if per_atom else 0
    return AtomSource(structures, model.num_latents, names, a.poses, a.order == "random", per_atom, multiple)
