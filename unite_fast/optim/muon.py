"""Muon's orthogonalisation (Jordan, 2024), batched over tensors of equal shape and divided over ranks.

Newton-Schulz of UNITE-B is 3.81 TFLOP a step: 12 ms on one GPU, a few when each of 8 ranks does an eighth. A plan, the
same on all ranks, deals the matrices out: those of one shape stay together in as few batches as an even share of the
FLOPs allows, and each batch goes to the rank with the least work. A rank's batches lie in its row of a buffer:

    whole     every rank holds whole matrices (one process, DDP). All write what is to be orthogonalised into the
              buffer, each rank replaces its own row, and the rows are all-gathered.
    sharded   every rank holds some rows of each matrix (FSDP2). An all-to-all brings the rows to the owner of a matrix;
              a second one takes the orthogonalised rows back. With HSDP each group of shards does this for itself.

There are up to ``BUCKETS`` buffers: while one travels, the next is computed, and AdamW runs while the last ones travel.
They have the dtype of the iteration, so in bf16 nothing is rounded that was not rounded before. All ranks apply the
same bits, whoever made them; on a CPU they are the bits of one rank that does everything. On a GPU the library may
choose another product for another number of matrices.

Under DDP every rank keeps all of the momentum: a rank's own share would save 0.6 ms of memory traffic a step at UNITE-B
and have to be gathered at each checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unite_kernels.newton_schulz import newton_schulz

NS_EPS = 1e-6
BUCKETS = 4
BUCKET_ELEMENTS = 1 << 22  # below this a further buffer costs more than it hides
BATCHES_PER_SHARE = 4  # a batch is at most a quarter of an even share of the work, or one matrix
# torch 2.14 warns about the name that 2.11 knows.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def newton_schulz_flops(shape: Sequence[int], steps: int = 5) -> int:
    """Dense products of the iteration on one matrix."""
    n, k = min(shape), max(shape)
    return steps * (4 * n * n * k + 2 * n**3)


@dataclass(frozen=True)
class Piece:
    """Matrices of one shape that one rank orthogonalises as one batch."""

    shape: tuple[int, int]
    names: tuple[str, ...]
    owner: int
    bucket: int = 0
    offset: int = 0  # of the first element in the owner's row


@dataclass(frozen=True)
class Plan:
    """Who orthogonalises what. ``sizes``: elements of a row of each bucket's buffer."""

    ranks: int
    sharded: bool
    pieces: tuple[Piece, ...]
    sizes: tuple[int, ...]

    @property
    def names(self) -> set[str]:
        return {name for piece in self.pieces for name in piece.names}

    def slot(self, shape: Sequence[int]) -> tuple[int, int]:
        """The part of a matrix that one rank contributes: all of it, or its rows (padded to those of the others)."""
        return (math.ceil(shape[0] / self.ranks) if self.sharded else shape[0]), shape[1]

    def batch(self, piece: Piece, row: Tensor) -> Tensor:
        """The slots of a piece in a row (size,) of its buffer: (matrices, rows, columns)."""
        slot = self.slot(piece.shape)
        count = len(piece.names)
        return row[piece.offset : piece.offset + count * math.prod(slot)].view(count, *slot)


def plan(shapes: Mapping[str, Sequence[int]], ranks: int = 1, sharded: bool = False) -> Plan:
    """Deals the matrices of these names and shapes out to ``ranks``; a function of its arguments alone."""
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        rows, columns = shape
        by_shape[rows, columns].append(name)
    share = sum(newton_schulz_flops(shape) * len(names) for shape, names in by_shape.items()) / ranks
    batches = []
    for shape, names in by_shape.items():
        work = newton_schulz_flops(shape) * len(names)
        count = min(len(names), math.ceil(BATCHES_PER_SHARE * work / share)) if ranks > 1 else 1
        edges = [len(names) * i // count for i in range(count + 1)]
        batches += [(shape, tuple(names[a:b])) for a, b in itertools.pairwise(edges)]
    batches.sort(key=lambda b: (newton_schulz_flops(b[0]) * len(b[1]), b[0], b[1]), reverse=True)
    load = [0] * ranks
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    for shape, names in batches:
        owner = load.index(min(load))
        load[owner] += newton_schulz_flops(shape) * len(names)
        owned[owner].append(Piece(shape, names, owner))
    return _fill(Plan(ranks, sharded, (), ()), owned)


def _fill(empty: Plan, owned: list[list[Piece]]) -> Plan:
    """Places each rank's pieces in buckets that hold about equal parts of its elements."""

    def elements(piece: Piece) -> int:
        return math.prod(empty.slot(piece.shape)) * len(piece.names)

    totals = [sum(map(elements, pieces)) for pieces in owned]
    buckets = 1 if empty.ranks == 1 else max(1, min(BUCKETS, sum(totals) // BUCKET_ELEMENTS))
    sizes = [0] * buckets
    placed = []
    for pieces, total in zip(owned, totals, strict=True):
        before, offsets = 0, [0] * buckets
        for piece in pieces:
            size = elements(piece)
            bucket = min(buckets - 1, buckets * (before + size // 2) // total)
            placed.append(dataclasses.replace(piece, bucket=bucket, offset=offsets[bucket]))
            offsets[bucket] += size
            before += size
        sizes = [max(a, b) for a, b in zip(sizes, offsets, strict=True)]
    used = [i for i, size in enumerate(sizes) if size]
    placed = [dataclasses.replace(piece, bucket=used.index(piece.bucket)) for piece in placed]
    return Plan(empty.ranks, empty.sharded, tuple(placed), tuple(sizes[i] for i in used))


@dataclass
class Orthogonaliser:
    """One step's work on the matrices of ``plan``: fill ``slots``, then ``start``, then ``updates``.

    group: the ranks that share the work, all of which call in the same order; None for one rank.
    """

    plan: Plan
    steps: int
    dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.buffers = [torch.empty(self.plan.ranks, n, device=self.device, dtype=self.dtype) for n in self.plan.sizes]
        self.work: list[dist.Work | None] = []

    def slots(self, parts: Mapping[str, Tensor], bucket: int | None = None) -> dict[str, Tensor]:
        """Views of the buffers, all or one, shaped as this rank's ``parts`` of the matrices (all rows, or some): by
        name, contiguous. Before ``start`` for what is to be orthogonalised, after it the updates."""
        found = {}
        for piece in self.plan.pieces:
            if bucket in (None, piece.bucket):
                batch = self.plan.batch(piece, self.buffers[piece.bucket][piece.owner])
                found |= {n: slot[: len(parts[n])] for n, slot in zip(piece.names, batch.unbind(0), strict=True)}
        return found

    def start(self) -> None:
        """Orthogonalises this rank's share, and sends each bucket on its way as soon as it is done."""
        if self.plan.sharded:
            self._start_sharded()
            return
        for bucket, buffer in enumerate(self.buffers):
            for piece in self._own(bucket):
                batch = self.plan.batch(piece, buffer[self.rank])
                batch.copy_(self._newton_schulz(batch))
            self.work.append(
                all_gather(buffer.view(-1), buffer[self.rank], group=self.group, async_op=True)
                if self.plan.ranks > 1
                else None
            )

    def _start_sharded(self) -> None:
        sent = []
        for buffer in self.buffers:
            gathered = torch.empty_like(buffer)
            sent.append((gathered, dist.all_to_all_single(gathered, buffer, group=self.group, async_op=True)))
        for bucket, (gathered, arriving) in enumerate(sent):
            arriving.wait()
            for piece in self._own(bucket):
                parts = torch.stack([self.plan.batch(piece, row) for row in gathered], dim=1)  # (count, ranks, rows, k)
                whole = parts.flatten(1, 2)
                rows = piece.shape[0]
                whole[:, :rows] = self._newton_schulz(whole[:, :rows])
                for row, part in zip(gathered, parts.unbind(1), strict=True):
                    self.plan.batch(piece, row).copy_(part)
            self.work.append(dist.all_to_all_single(self.buffers[bucket], gathered, group=self.group, async_op=True))

    def updates(self, parts: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """``slots`` of the orthogonalised matrices, bucket after bucket as they arrive."""
        for bucket, work in enumerate(self.work):
            if work is not None:
                work.wait()
            yield self.slots(parts, bucket)

    def _newton_schulz(self, batch: Tensor) -> Tensor:
        return newton_schulz(batch, self.steps, eps=NS_EPS, dtype=self.dtype)

    def _own(self, bucket: int) -> list[Piece]:
        return [p for p in self.plan.pieces if p.owner == self.rank and p.bucket == bucket]
