"""Parquet files in Hugging Face's layout: a column ``image`` of {bytes, path} and an integer column ``label``.

Class names come from the schema's metadata where they are, else they are the labels' numbers. Read group by group:
good for reading in order (packing), too slow for training in random order, so it is no ``data.source``.
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

MOST_ROWS, MOST_BYTES = 1 << 27, 1 << 33  # of all files; of a row group


def _class_names(metadata: dict[bytes, bytes] | None, largest: int, where: str) -> list[str]:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError):
        names = None
    if isinstance(names, list) and len(names) > largest and all(isinstance(name, str) for name in names):
        return names
    return numbered(largest, where)


def list_parquet(
    tables: list[Path], field: str
) -> tuple[list[Path], list[tuple[int, int, int]], np.ndarray, list[str]]:
    """The files, (file, row group, rows) of every group, labels int64 (n,), class names. Raises UserError."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{field} {tables[0].parent} holds Parquet files: pip install 'unite-fast[parquet]'") from None
    groups, labels, metadata, rows = [], [], None, 0
    for number, table in enumerate(tables):
        try:
            file = pq.ParquetFile(table)
            rows += file.metadata.num_rows
            if rows > MOST_ROWS:  # a column of equal labels takes no room in a file, and 8 bytes each in memory
                raise ValueError(f"{rows} rows; {MOST_ROWS} at most")
            column = file.read(columns=["label"]).column("label")
            labels.append(np.asarray(column.to_numpy()))
            metadata = metadata or file.schema_arrow.metadata
            groups += [(number, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
            kind = file.schema_arrow.field("image").type
        except Exception as error:  # pyarrow's own errors, OSError, KeyError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{field} {table}: cannot be read as images and labels ({reason})") from None
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if "bytes" not in names or labels[-1].dtype.kind not in "iu":
            raise UserError(f"{field} {table}: needs a column image {{bytes, path}} and an integer column label")
    everything = np.concatenate(labels).astype(np.int64)
    if not len(everything):
        raise UserError(f"{field} {tables[0].parent}: no images in its {len(tables)} Parquet files")
    if everything.min() < 0:
        raise UserError(f"{field} {tables[0].parent}: negative labels (a test split?)")
    return tables, groups, everything, _class_names(metadata, int(everything.max()), f"{field} {tables[0].parent}")


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
        self._held: tuple[int, Any] = (-1, None)  # number of the group, its column of images

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
        import pyarrow.parquet as pq

        group, row = self._place(index)
        held, images = self._held
        if held != group:
            table, number, _ = self._groups[group]
            file = pq.ParquetFile(self.tables[table])
            if (size := file.metadata.row_group(number).total_byte_size) > MOST_BYTES:
                raise BadImage(f"a row group of {size} bytes, more than the {MOST_BYTES} allowed")
            images = file.read_row_group(number, columns=["image"]).column("image")
            self._held = group, images
        data = images[row].as_py()["bytes"]
        if data is None:
            raise BadImage("no bytes")
        check_bytes(len(data))
        return data
