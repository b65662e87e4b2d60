"""Tensors in safetensors files, each whole in one file or in pieces over several: what ranks hold of a sharded tensor.

A piece stands under its tensor's name. Where it begins in the tensor stands in the file's metadata, in the form that
torch's HuggingFaceStorageReader reads. No file here can execute code when it is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.base.errors import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
PIECE = 1 << 24  # bytes written and hashed at a time; Python's lock is free meanwhile
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
Offsets = tuple[int, ...]


def sharding(offsets: Mapping[str, Offsets]) -> dict[str, str]:
    """The metadata of a file that holds pieces: {name: where the piece begins}. Empty when all begin at 0."""
    if not any(any(at) for at in offsets.values()):
        return {}
    return {SHARDING: json.dumps({name: {OFFSETS: list(at)} for name, at in offsets.items()})}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a safetensors file of CPU tensors, synced to disk; {"bytes", "sha256"} of it.

    The library's own writer would hold Python's lock for the whole file and need a second pass for the hash.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            for low in range(0, len(data), PIECE):
                piece = data[low : low + PIECE]
                digest.update(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            if tensor.numel():
                put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor and the file that holds it."""

    file: Path
    offsets: Offsets
    sizes: Offsets

    def overlaps(self, other: Piece) -> bool:
        sides = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + other_size and b < a + size for a, size, b, other_size in sides)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    dtype: torch.dtype
    shape: Offsets
    pieces: tuple[Piece, ...]


def index(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor that lies in ``files``, by name. Raises UserError for what is not whole or not safetensors."""
    found: dict[str, list[tuple[str, Piece]]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                begins = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    sizes = tuple(part.get_shape())
                    at = tuple(int(x) for x in begins[name][OFFSETS]) if name in begins else (0,) * len(sizes)
                    if len(at) != len(sizes) or any(x < 0 for x in at):
                        raise ValueError(f"{name} begins at {at} with {len(sizes)} dimensions")
                    found.setdefault(name, []).append((part.get_dtype(), Piece(path, at, sizes)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return {name: _assembled(name, parts) for name, parts in found.items()}


def _assembled(name: str, parts: list[tuple[str, Piece]]) -> Stored:
    dtypes, pieces = {dtype for dtype, _ in parts}, tuple(piece for _, piece in parts)
    where = f"{name} in {pieces[0].file.parent}"
    if len(dtypes) > 1 or len({len(p.sizes) for p in pieces}) > 1 or not dtypes <= set(BY_NAME):
        raise UserError(f"{where} has pieces of different kinds or of an unknown dtype")
    ends = [[a + size for a, size in zip(p.offsets, p.sizes, strict=True)] for p in pieces]
    shape = tuple(max(side) for side in zip(*ends, strict=True))
    if sum(math.prod(p.sizes) for p in pieces) != math.prod(shape) or not _disjoint(pieces):
        raise UserError(f"{where} is not whole: its pieces leave gaps or overlap")
    return Stored(BY_NAME[dtypes.pop()], shape, pieces)


def _disjoint(pieces: Sequence[Piece]) -> bool:
    """Pieces of rows, as FSDP2 makes them, are compared with their neighbours alone: there may be hundreds."""
    ordered = sorted(pieces, key=lambda p: p.offsets)
    by_rows = len({(p.offsets[1:], p.sizes[1:]) for p in ordered}) == 1
    pairs = itertools.pairwise(ordered) if by_rows else itertools.combinations(ordered, 2)
    return not any(a.overlaps(b) for a, b in pairs)


def read(stored: Mapping[str, Stored], names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Those tensors, or all, put together on the CPU. Raises UserError."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name in stored if names is None else names:
            entry = stored[name]
            try:
                for piece in entry.pieces:
                    if piece.file not in files:
                        files[piece.file] = stack.enter_context(safe_open(piece.file, "pt"))
                if len(entry.pieces) == 1:
                    tensors[name] = files[entry.pieces[0].file].get_tensor(name)
                    continue
                whole = torch.empty(entry.shape, dtype=entry.dtype)
                for piece in entry.pieces:
                    box = tuple(slice(a, a + size) for a, size in zip(piece.offsets, piece.sizes, strict=True))
                    whole[box] = files[piece.file].get_tensor(name)
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
            tensors[name] = whole
    return tensors
