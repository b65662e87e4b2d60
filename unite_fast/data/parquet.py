"""Parquet files in Hugging Face's layout: a column ``image`` of {bytes, path} and an integer column ``label``.

Class names come from the schema's metadata where they are, else they are the labels' numbers. Read group by group:
good for reading in order (packing), too slow for training in random order, so it is no ``data.source``.

Compression, and dictionaries of values that repeat, let a small file unfold to any size. Images are compressed already,
so what unfolds to more than ``room`` is none, and is refused before or while it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import EncodedSource, check_bytes
from unite_fast.data.source import BadImage, numbered

MOST_BYTES, RATIO, MARGIN = 1 << 31, 16, 1 << 26  # of a row group; in proportion to its file; beyond that
BATCH = 64  # rows read at a time, at most
IMAGES = "image.bytes"


def room(table: Path) -> int:
    """The most bytes that the labels of a file, or the images of one of its row groups, may take in memory."""
    return min(MOST_BYTES, RATIO * table.stat().st_size + MARGIN)


def _class_names(metadata: dict[bytes, bytes] | None, largest: int, where: str) -> list[str]:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        names = None
    if isinstance(names, list) and len(names) > largest and all(isinstance(name, str) for name in names):
        return names
    return numbered(largest, where)


def list_parquet(
    tables: list[Path], field: str
) -> tuple[list[Path], list[tuple[int, int, int]], np.ndarray, list[str]]:
    """The files, (file, row group, rows) of every group, labels int64 (n,), class names. Raises UserError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{field} {tables[0].parent} holds Parquet files: pip install 'unite-fast[parquet]'") from None
    groups, labels, metadata = [], [], None
    for number, table in enumerate(tables):
        try:
            file = pq.ParquetFile(table)
            rows, schema = file.metadata.num_rows, file.schema_arrow
            kind, label = schema.field("image").type, schema.field("label").type
            if not pa.types.is_integer(label) or "bytes" not in [kind.field(i).name for i in range(kind.num_fields)]:
                raise ValueError("needs a column image {bytes, path} and an integer column label")
            if 8 * rows > room(table):
                raise ValueError(f"its {rows} labels unfold to more than {room(table)} bytes")
            column = file.read(columns=["label"]).column("label")
            if column.null_count:
                raise ValueError(f"{column.null_count} of its {rows} rows have no label")
            labels.append(np.asarray(column.to_numpy()))
            metadata = metadata or schema.metadata
            groups += [(number, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
        except Exception as error:  # pyarrow's own errors, OSError, KeyError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{field} {table}: cannot be read as images and labels ({reason})") from None
    everything = np.concatenate(labels).astype(np.int64)
    if not len(everything):
        raise UserError(f"{field} {tables[0].parent}: no images in its {len(tables)} Parquet files")
    if everything.min() < 0:
        raise UserError(f"{field} {tables[0].parent}: negative labels (a test split?)")
    return tables, groups, everything, _class_names(metadata, int(everything.max()), f"{field} {tables[0].parent}")


def _read_group(table: Path, number: int) -> Any:
    """The images' bytes of a row group. Raises BadImage for more than there is room for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, most, pieces, found = pq.ParquetFile(table), room(table), [], 0
    columns = [file.metadata.row_group(number).column(i) for i in range(file.metadata.num_columns)]
    size = max((c.total_uncompressed_size for c in columns if c.path_in_schema == IMAGES), default=0)
    step = min(BATCH, max(1, most // max(1, size)))  # no value is larger than all of them, and each may repeat one
    for batch in file.iter_batches(step, row_groups=[number], columns=[IMAGES], use_threads=False):
        found += batch.nbytes
        if max(found, size) > most:
            raise BadImage(f"row group {number} unfolds to {max(found, size)} bytes; {most} are allowed")
        pieces.append(batch.column(0).field("bytes"))
    return pa.chunked_array(pieces)


class Parquet(EncodedSource):
    """The images of Parquet files; the row group read last stays in memory."""

    def __init__(
        self,
        tables: list[Path],
        groups: list[tuple[int, int, int]],
        labels: np.ndarray,
        names: list[str],
        data: DataConfig,
        model: ModelConfig,
    ) -> None:
        super().__init__(torch.from_numpy(labels), names, data, model)
        self.tables, self._groups = tables, groups
        self._ends = np.cumsum([rows for _, _, rows in groups])
        self._held: tuple[int, Any] = (-1, None)  # number of the group, its images' bytes

    def __getstate__(self) -> dict:
        return vars(self) | {"_held": (-1, None)}

    def names_sha256(self) -> str:
        return files.digest([[table.name for table in self.tables], self._groups])

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        table, number, _ = self._groups[group]
        return f"{self.tables[table]}, row {row} of group {number}"

    def encoded(self, index: int) -> bytes:
        group, row = self._place(index)
        held, images = self._held
        if held != group:
            table, number, _ = self._groups[group]
            images = _read_group(self.tables[table], number)
            self._held = group, images
        data = images[row].as_py()
        if data is None:
            raise BadImage("no bytes")
        check_bytes(len(data))
        return data
