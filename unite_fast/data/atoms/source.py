"""Structures as a source of batches: resident on the device, in the order of a run, each sample in its own pose.

    for batch in stream(AtomSource(structures, slots=29), seed, start=seen, global_batch=512): ...

Order, ranks and resume are those of ``data/stream.py``. A pose is a function of (seed, position in the run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unite_fast.data.atoms.augment import LANES, posed
from unite_fast.data.atoms.structures import Structures
from unite_fast.data.batch import Batch
from unite_fast.data.source import Request, Source, to_device


class AtomSource(Source):
    """``structures``, padded to ``slots`` atoms. ``class_names`` name the labels: data sets, when several are joined.

    A batch's content: species (B, M) int64, positions (B, M, 3) in Å, fractional (B, M, 3), lattice (B, 3, 3), as in
    ``Padded``; its sizes are the numbers of atoms. Raises ValueError for structures larger than ``slots``.
    """

    lanes = LANES

    def __init__(
        self, structures: Structures, slots: int, class_names: Sequence[str] = ("atoms",), poses: bool = True
    ) -> None:
        if slots < structures.largest:
            raise ValueError(f"{slots} slots cannot hold structures of up to {structures.largest} atoms")
        super().__init__(structures.labels.cpu(), list(class_names), flip=False)
        self.slots, self.poses = slots, poses
        self._structures = {torch.device("cpu"): structures.to("cpu")}  # one copy per device in use

    def on(self, device: torch.device) -> Structures:
        """All structures on ``device``."""
        if device not in self._structures:
            self._structures[device] = self._structures[torch.device("cpu")].to(device)
        return self._structures[device]

    def name(self, index: int) -> str:
        return self.on(torch.device("cpu")).names[index]

    def pipeline_id(self, device: str = "cpu") -> str:
        return f"atoms:{self.slots}:{'posed' if self.poses else 'as read'}:{self.on(torch.device('cpu')).digest()}"

    def read(self, index: int, draw: Tensor | None, seed: int) -> Tensor:
        raise TypeError("a structure is more than one tensor; take it from batches")

    def batches(
        self, plan: Iterator[Request], seed: int, device: torch.device, workers: int, timeout: float
    ) -> Iterator[Batch]:
        """As Source.batches; nothing is read from files any more, so ``workers`` and ``timeout`` mean nothing."""
        resident = self.on(device)
        for indices, positions, augment in plan:
            padded = resident.gather(to_device(indices, device), self.slots)
            if augment and self.poses:
                padded = posed(padded, to_device(self.uniforms(seed, positions), device))
            content = {name: getattr(padded, name) for name in ("species", "positions", "fractional", "lattice")}
            yield Batch(content, padded.labels, to_device(positions, device), padded.sizes)
