"""Storage for torch.distributed.checkpoint in safetensors files: each rank writes one, none of them a pickle.

torch plans who writes and who reads which piece of a tensor (``DefaultSavePlanner``, ``DefaultLoadPlanner``), so what
DDP, FSDP2, HSDP or one process saved can be loaded by any of them. Its own storage would describe the pieces in a
pickle and would not notice a changed byte; here the pieces describe themselves (``shards``) and each file is hashed
while it is written.

Importing this module takes most of a second, so it is imported where it is needed.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from unite_fast.base import faults, files
from unite_fast.checkpoint.shards import Piece, Stored, sharding, write_tensors

SINGLE = "training.safetensors"


def file_name(number: int, count: int) -> str:
    """Of the ``number``-th of ``count`` files of a checkpoint, as on the Hugging Face hub."""
    return SINGLE if count == 1 else f"training-{number:05d}-of-{count:05d}.safetensors"


class Planner(torch_dcp.DefaultSavePlanner):
    """Plans from the live tensors, of which only shapes and placements matter, and hands out a copy of their content.

    copies: for each name what this rank held of the tensor at the step that is saved, on the CPU.
    """

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def resolve_data(self, write_item: torch_dcp.WriteItem) -> Tensor:
        return self.copies[write_item.index.fqn]


class Writer(torch_dcp.StorageWriter):
    """One safetensors file per rank in ``folder``; then ``finish`` gets {file: {"bytes", "sha256"}} on rank 0.

    What any rank raises, all ranks see as CheckpointException.
    """

    def __init__(self, folder: Path, step: int, commit: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.step, self.commit = folder, step, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The others begin to write only after the plan, which rank 0 makes after this."""
        if is_coordinator:
            files.remove_folder(self.folder)
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: torch_dcp.SavePlan) -> torch_dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[torch_dcp.SavePlan]) -> list[torch_dcp.SavePlan]:
        writing = [i for i, plan in enumerate(plans) if plan.items]
        names = {i: file_name(number, len(writing)) for number, i in enumerate(writing, 1)}
        return [dataclasses.replace(plan, storage_data=names.get(i, "")) for i, plan in enumerate(plans)]

    def write_data(self, plan: torch_dcp.SavePlan, planner: torch_dcp.SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, tuple[int, ...]] = {}
        for item in plan.items:
            data = item.tensor_data
            if data is None or item.index.fqn in tensors:
                raise TypeError(f"{item.index.fqn} is no tensor, or this rank holds two pieces of it")
            if data.chunk.sizes.numel() or not data.size.numel():  # an uneven split leaves nothing to some ranks
                tensors[item.index.fqn] = planner.resolve_data(item)  # type: ignore[assignment]
                offsets[item.index.fqn] = tuple(data.chunk.offsets)
        written: list[WriteResult] = []
        if plan.items:
            digest = write_tensors(self.folder / plan.storage_data, tensors, sharding(offsets))
            written = [WriteResult(plan.items[0].index, digest["bytes"], (plan.storage_data, digest))]
        faults.strike("ckpt.write", self.step)
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.commit(dict(result.storage_data for rank in results for result in rank))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(torch_dcp.StorageReader):
    """Reads what ``shards.index`` found, by slices: a rank reads no more than what it needs."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in entry.pieces],
            )
            for name, entry in self.stored.items()
        }
        return Metadata(dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: torch_dcp.LoadPlan) -> torch_dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[torch_dcp.LoadPlan]) -> list[torch_dcp.LoadPlan]:
        return plans

    def read_data(self, plan: torch_dcp.LoadPlan, planner: torch_dcp.LoadPlanner) -> Future[None]:
        by_file: dict[Path, list[torch_dcp.ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._piece(item.storage_index).file, []).append(item)
        for path, items in by_file.items():
            with safe_open(path, "pt") as file:
                for item in items:
                    _copy(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, index: MetadataIndex) -> Piece:
        assert index.offset is not None
        at = tuple(index.offset)
        return next(p for p in self.stored[index.fqn].pieces if p.offsets == at)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _copy(file: Any, item: torch_dcp.ReadItem, planner: torch_dcp.LoadPlanner) -> None:
    name, sizes = item.storage_index.fqn, tuple(item.lengths)
    if not sizes:  # 0-d tensors have no slices
        value = file.get_tensor(name)
    else:
        box = tuple(slice(a, a + size) for a, size in zip(item.storage_offsets, sizes, strict=True))
        value = file.get_slice(name)[box]
    target = planner.resolve_tensor(item).detach()
    target.copy_(value)
    planner.commit_tensor(item, target)


def _quiet() -> None:
    """A single process is no mistake here."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")


def save(
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    writer: Writer,
    group: dist.ProcessGroup | None,
) -> None:
    """Writes this rank's part: ``copies`` of ``tensors``. All ranks of ``group`` must call; None is a single process.

    Tensors that are not DTensors are passed by one rank each. Raises OSError on all ranks when the disk of any of them
    refused, RuntimeError when anything else failed.
    """
    _quiet()
    try:
        torch_dcp.save(
            dict(tensors), storage_writer=writer, planner=Planner(copies), process_group=group, no_dist=group is None
        )
    except torch_dcp.CheckpointException as error:
        raise _cause(error.failures.items()) from None


def _cause(failures: Iterable[tuple[int, Any]]) -> BaseException:
    """The first failure; OSError only when all of them are."""
    errors = [wrapped[0] for _, wrapped in sorted(failures, key=lambda f: f[0])]
    other = [e for e in errors if not isinstance(e, OSError)]
    return (other or errors)[0]


@torch.no_grad()
def load(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Fills ``tensors`` in place, of which each rank has all or its shards; every rank reads by itself.

    Shapes must be those of ``stored``. Raises OSError or SafetensorError for files that changed meanwhile.
    """
    _quiet()
    planner = torch_dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        torch_dcp.load(dict(tensors), storage_reader=Reader(stored), planner=planner, no_dist=True)
    except torch_dcp.CheckpointException as error:
        raise _cause(error.failures.items()) from None
