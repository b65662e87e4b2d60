"""Gradients averaged over ranks while the backward still runs.

A micro-step has several backward passes (reconstruction, then one per flow mini-batch), which all add to ``.grad``, and
only the last addition of the last micro-step may be sent. torch's DistributedDataParallel cannot express this: it
expects each parameter once per backward and one forward() that leads to it. So the additions to each parameter are
counted in the first step, which is averaged after its backward; from then on a parameter is done when the last
micro-step has added to it as often. Parameters go into buckets in the order in which they were done, rank 0's order
on all ranks, in the first step too: whether a bucket left early or late, its sums are the same.

Cost beside the transfer: one copy of the gradients there and one back, 16 bytes per element, and memory for one copy.
Once a backward is captured in a CUDA graph, everything is averaged in ``finish``.
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


class Bucket:
    def __init__(self, indices: list[int]) -> None:
        self.indices = indices
        self.missing = len(indices)
        self.flat: Tensor | None = None
        self.work: Any = None


class Averager:
    """Averages the ``.grad`` of ``parameters`` over ranks: ``begin`` before each micro-step, ``finish`` after the last.

    overlap: false leaves all of it to ``finish``, with the same sums. averaged: the backward itself has done it
    (FSDP2), or there is one rank.
    """

    def __init__(
        self, parameters: Sequence[Tensor], ranks: Ranks, overlap: bool = True, averaged: bool = False
    ) -> None:
        self.parameters, self.ranks, self.overlap = parameters, ranks, overlap
        self.averaged = averaged or ranks.world_size == 1
        self.number = 0
        self.expected: list[int] = []  # additions to each parameter in a micro-step
        self.seen = [0] * len(parameters)
        self.order: list[int] = []  # of the last additions in this micro-step
        self.buckets: list[Bucket] = []
        self.place: dict[int, Bucket] = {}
        self.sent = 0  # buckets on their way
        self.armed = False
        if not self.averaged:
            for i, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._added(i))

    def begin(self, number: int, last: bool) -> None:
        """Before a micro-step of the step ``number``; ``last``: after it comes ``finish``."""
        self.number = number
        self.seen, self.order = [0] * len(self.parameters), []
        self.armed = self.overlap and last and bool(self.buckets)

    def _added(self, index: int) -> None:
        """Some thousand calls a step: those that need nothing return at once."""
        if self.buckets and not self.armed:
            return
        if self.ranks.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if self.sent:
                raise RuntimeError("a backward was captured in a CUDA graph after gradients had been sent")
            self.overlap = self.armed = False  # a replay runs no hooks, so nobody knows when a gradient is done
            return
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
        bucket.flat = torch.cat([self._gradient(i).reshape(-1) for i in bucket.indices])
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self.sent += 1

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
        bucket, size = Bucket([]), 0
        for i in self.ranks.decide(lambda: order):
            count = self.parameters[i].numel()
            if bucket.indices and size + count > BUCKET_ELEMENTS:
                self.buckets.append(bucket)
                bucket, size = Bucket([]), 0
            bucket.indices.append(i)
            size += count
        self.buckets.append(bucket)
        self.place = {i: bucket for bucket in self.buckets for i in bucket.indices}

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
            flat, gradients = bucket.flat, [self._gradient(i) for i in bucket.indices]
            assert flat is not None
            bucket.work.wait()
            flat /= self.ranks.world_size
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
            bucket.flat, bucket.work, bucket.missing = None, None, len(bucket.indices)
        self.sent, self.armed = 0, False
