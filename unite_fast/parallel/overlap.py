"""Gradients averaged over ranks while the backward still runs.

A micro-step has several backward passes (reconstruction, then one per flow mini-batch), which all add to ``.grad``, and
only the last addition of the last micro-step may be sent. torch's DistributedDataParallel cannot express this: it
expects each parameter once per backward and one forward() that leads to it. So the additions to each parameter are
counted in the first step, which is averaged after its backward; from then on a parameter is done when the last
micro-step has added to it as often. Parameters go into buckets in the order in which they were done, rank 0's order
on all ranks, in the first step too: whether a bucket left early or late, its sums are the same.

Gradients live in the buckets: from the second step on ``.grad`` is a view of a bucket, zero at the start of a step,
which backward adds to and the ranks average in place. Beside the transfer that costs the zeros and the first addition,
16 bytes per element where copies there and back took 24, and no memory. Where a CUDA graph has its own place for
gradients (``resident`` is false) they are copied into the buckets and back.

A replay runs no hooks, so nobody knows when a gradient is done: where the last backward is captured, too, everything is
averaged in ``finish``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.base import faults
from unite_fast.parallel.distributed import Ranks

BUCKET_ELEMENTS = 1 << 23  # 32 MiB: the last one, which nothing hides, takes a small part of a millisecond over NVLink
SLOT = 32  # elements: a gradient begins at a multiple of 128 bytes


class Bucket:
    """Gradients that are sent together: ``flat`` holds them, ``views`` are their shapes in it."""

    def __init__(self, indices: list[int], gradients: Sequence[Tensor]) -> None:
        self.indices = indices
        self.missing = len(indices)
        self.work: Any = None
        rooms = [-(-g.numel() // SLOT) * SLOT for g in gradients]
        self.flat = gradients[0].new_zeros(sum(rooms))
        parts = self.flat.split(rooms)
        self.views = [part[: g.numel()].view(g.shape) for part, g in zip(parts, gradients, strict=True)]


class Averager:
    """Averages the ``.grad`` of ``parameters`` over ranks: ``begin`` before each micro-step, ``finish`` after the last.

    overlap: false leaves all of it to ``finish``, with the same sums. averaged: the backward itself has done it
    (FSDP2), or there is one rank. resident: gradients may live in the buckets.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        ranks: Ranks,
        overlap: bool = True,
        averaged: bool = False,
        resident: bool = True,
    ) -> None:
        self.parameters, self.ranks, self.overlap, self.resident = parameters, ranks, overlap, resident
        self.averaged = averaged or ranks.world_size == 1
        self.number = 0
        self.expected: list[int] = []  # additions to each parameter in a micro-step
        self.seen = [0] * len(parameters)
        self.order: list[int] = []  # of the last additions in this micro-step
        self.buckets: list[Bucket] = []
        self.place: dict[int, Bucket] = {}
        self.sent = 0  # buckets on their way
        self.counts = self.armed = self.touched = False
        # On NCCL the mean is the sum's own business; gloo has none.
        self.mean = not self.averaged and dist.get_backend() == "nccl"
        if not self.averaged:
            for i, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._added(i))

    def begin(self, number: int, last: bool) -> None:
        """Before a micro-step of the step ``number``; ``last``: after it comes ``finish``."""
        self.number = number
        self.seen, self.order = [0] * len(self.parameters), []
        self.armed = self.overlap and last and bool(self.buckets)
        self.counts = self.armed or (last and not self.buckets)
        if self.resident and self.buckets and self.parameters[self.buckets[0].indices[0]].grad is None:
            self.touched = False
            for bucket in self.buckets:
                bucket.flat.zero_()
                self._attach(bucket)

    def _attach(self, bucket: Bucket) -> None:
        for i, view in zip(bucket.indices, bucket.views, strict=True):
            self.parameters[i].grad = view

    def _added(self, index: int) -> None:
        """Some thousand calls a step: those that need nothing return at once."""
        self.touched = True
        if not self.counts:
            return
        if self.armed and self.ranks.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a backward that sends gradients cannot be captured in a CUDA graph")
        self.seen[index] += 1
        if not self.buckets:
            self.order.append(index)
        elif self.seen[index] == self.expected[index]:
            self.place[index].missing -= 1
            while self.sent < len(self.buckets) and self.buckets[self.sent].missing == 0:
                self._send()
        elif 0 < self.expected[index] < self.seen[index]:
            raise RuntimeError(
                f"a gradient was added {self.seen[index]} times in a micro-step and {self.expected[index]} times in "
                "the first one, so it was averaged too early; set efficiency.overlap_gradients=false"
            )

    def _send(self) -> None:
        bucket = self.buckets[self.sent]
        if self.sent == 0:
            faults.strike("bwd", self.number, [self._gradient(i) for i in bucket.indices])
        if not self._holds(bucket):
            torch._foreach_copy_(bucket.views, [self._gradient(i) for i in bucket.indices])
        bucket.work = dist.all_reduce(bucket.flat, dist.ReduceOp.AVG if self.mean else dist.ReduceOp.SUM, async_op=True)
        self.sent += 1

    def _holds(self, bucket: Bucket) -> bool:
        return self._gradient(bucket.indices[0]) is bucket.views[0]

    def _gradient(self, index: int) -> Tensor:
        gradient = self.parameters[index].grad
        assert gradient is not None
        return gradient

    def _plan(self) -> None:
        """The buckets, from what the first step's last micro-step has shown."""
        with_gradient = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        done = list(dict.fromkeys(reversed(self.order)))[::-1]  # by their last additions
        order = done + [i for i in with_gradient if i not in set(done)]
        self.expected = self.seen
        indices: list[int] = []
        size = 0
        for i in self.ranks.decide(lambda: order):
            count = self.parameters[i].numel()
            if indices and size + count > BUCKET_ELEMENTS:
                self._open(indices)
                indices, size = [], 0
            indices.append(i)
            size += count
        self._open(indices)

    def _open(self, indices: list[int]) -> None:
        bucket = Bucket(indices, [self._gradient(i) for i in indices])
        self.buckets.append(bucket)
        self.place |= dict.fromkeys(indices, bucket)

    def drop_untouched(self) -> None:
        """After the last micro-step: no gradients where none were given."""
        if self.resident and self.buckets and not self.touched:
            for parameter in self.parameters:
                parameter.grad = None

    def finish(self) -> None:
        """Every gradient is the mean over ranks. All ranks must have gradients of the same parameters."""
        if self.averaged:
            faults.strike("bwd", self.number, [p.grad for p in self.parameters if p.grad is not None])
            return
        if not self.buckets:
            self._plan()
        while self.sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            bucket.work.wait()
            if not self.mean:
                bucket.flat /= self.ranks.world_size
            if self.resident:
                self._attach(bucket)
            else:
                torch._foreach_copy_([self._gradient(i) for i in bucket.indices], bucket.views)
            bucket.work, bucket.missing = None, len(bucket.indices)
        self.sent, self.armed = 0, False
