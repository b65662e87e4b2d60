"""Parquet files in Hugging Face's layout: a column of images, each {bytes, path} or bytes, and one of class numbers.

Columns are found by the schema: the one of images; among integers the one that the schema's metadata calls classes, or
the one called label. Where several could be meant, data.image_column and data.label_column choose. Class names come
from the metadata where they are, else they are the labels' numbers. A column of texts is one of class names.

Files are read group by group, which is good for reading in order (packing) and too slow in random order:
``data.source=parquet`` therefore holds the encoded images in memory, and refuses more than MOST_HELD bytes of them.
Compression, and dictionaries of values that repeat, let a small file unfold to any size. Images are compressed already,
so what unfolds to more than ``room`` is none, and is refused before or while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from unite_fast.base import files
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import LOOKED_AT, EncodedSource, check_bytes
from unite_fast.data.folder import place
from unite_fast.data.listing import files_of
from unite_fast.data.source import BadImage, check_channels, check_classes, numbered

MOST_BYTES = 1 << 31  # of a row group
BATCH = 64  # rows read at a time, at most
LOOKED_AT_GROUPS = 4  # row groups whose images are looked at before packing
MOST_HELD = 1 << 32  # bytes of encoded images in memory


class TooLarge(BadImage):
    """What a file would unfold to has no room."""


def room(table: Path) -> int:
    """The most bytes that the labels of a file, or the images of one of its row groups, may take in memory."""
    return min(MOST_BYTES, files.room(table))


class Tables(NamedTuple):
    """What there is to read."""

    files: list[Path]
    groups: list[tuple[int, int, int]]  # file, row group, rows of every group
    image_column: str
    labels: np.ndarray  # int64 (n,)
    class_names: list[str]


def _classes(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Class names by column, as Hugging Face's datasets writes them into a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        named = {str(column): feature.get("names") for column, feature in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {c: n for c, n in named.items() if isinstance(n, list) and n and all(isinstance(x, str) for x in n)}


def _images(schema: Any) -> list[str]:
    """Columns that can hold images."""

    def holds(kind: Any) -> bool:
        import pyarrow.types as types

        if types.is_struct(kind):
            return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [field.name for field in schema if holds(field.type)]


def _labels(schema: Any) -> list[str]:
    """Columns that can hold classes, the likeliest kind of them alone."""
    import pyarrow.types as types

    classes = [name for name in _classes(schema.metadata) if name in schema.names]
    numbers = [f.name for f in schema if types.is_integer(f.type)]
    called = [n for n in schema.names if n.lower() in ("label", "labels", "class", "cls", "target")]
    return classes or [name for name in called if name in numbers] or numbers or called


def _column(found: list[str], wanted: str, key: str, what: str, schema: Any, where: str) -> str:
    if wanted:
        if wanted not in schema.names:
            raise UserError(f"{where} has no column {wanted!r} ({key}); it has {', '.join(schema.names)}")
        return wanted
    if len(found) != 1:
        several = f"has several columns of {what}: {', '.join(found)}" if found else f"has no column of {what}"
        mend = f"name one with {key}=NAME" if found else f"it has {', '.join(schema.names)}; {key}=NAME names one"
        none = "; model.num_classes=0 needs none" if what == "classes" else ""
        raise UserError(f"{where} {several}; {mend}{none}")
    return found[0]


def _numbers(table: Path, label: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 (n,) of a file; where they are texts, places in the texts that are returned. Raises ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(table, read_dictionary=[label])  # of texts; numbers are read as they are
    column = file.read(columns=[label]).column(label)
    if column.null_count:
        raise ValueError(f"{column.null_count} of its {len(column)} rows have no label; model.num_classes=0 needs none")
    if pa.types.is_dictionary(column.type):
        whole = column.unify_dictionaries().combine_chunks()
        chunks = whole.chunks if isinstance(whole, pa.ChunkedArray) else [whole]
        places = [np.asarray(chunk.indices.to_numpy()) for chunk in chunks]
        return np.concatenate(places).astype(np.int64), chunks[0].dictionary.to_pylist()
    values = np.asarray(column.to_numpy())
    if values.dtype.kind not in "iu":
        raise ValueError(f"its column {label} is of {column.type}; classes are integers or texts")
    return values.astype(np.int64), None


def _joined(parts: list[tuple[np.ndarray, list[str] | None]], where: str) -> tuple[np.ndarray, list[str]]:
    """The labels of several files, and the texts that they stand for, sorted, if they are texts. Raises UserError."""
    texts = sorted({text for _, known in parts for text in known or ()})
    if texts and not all(known for _, known in parts):
        raise UserError(f"{where}: labels are texts in some files and numbers in others")
    if not texts:
        return np.concatenate([labels for labels, _ in parts]), []
    number = {text: i for i, text in enumerate(texts)}
    return np.concatenate([np.array([number[text] for text in known or ()])[labels] for labels, known in parts]), texts


def list_parquet(tables: list[Path], field: str, data: DataConfig, labelled: bool = True) -> Tables:
    """What the files hold; without ``labelled`` the labels are 0 and nameless. Raises UserError."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{field} {tables[0].parent} holds Parquet files: pip install pyarrow") from None
    groups, columns, total, image, label, named = [], [], 0, "", "", {}
    for number, table in enumerate(tables):
        where = f"{field} {table}"
        try:
            file = pq.ParquetFile(table)
            rows, schema = file.metadata.num_rows, file.schema_arrow
            if not number:
                image = _column(_images(schema), data.image_column, "data.image_column", "images", schema, where)
                if labelled:
                    label = _column(_labels(schema), data.label_column, "data.label_column", "classes", schema, where)
            if image not in _images(schema):
                raise ValueError(f"its column {image} does not hold images as {{bytes, path}} or bytes")
            named = named or _classes(schema.metadata)
            if 8 * rows > room(table):
                raise ValueError(f"its {rows} labels unfold to more than {room(table)} bytes")
            total += rows
            if labelled:
                columns.append(_numbers(table, label))
            groups += [(number, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
        except UserError:
            raise
        except Exception as error:  # pyarrow's own errors, OSError, KeyError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: cannot be read as images and labels ({reason})") from None
    root = f"{field} {tables[0].parent}"
    if not total:
        raise UserError(f"{root}: no images in its {len(tables)} Parquet files")
    if not labelled:
        return Tables(tables, groups, image, np.zeros(total, dtype=np.int64), [])
    labels, texts = _joined(columns, f"{root}, column {label}")
    if labels.min() < 0:
        raise UserError(f"{root}: negative labels (a test split?); model.num_classes=0 trains without labels")
    listed = texts or named.get(label) or []
    if len(listed) <= labels.max():
        listed = numbered(int(labels.max()), root)
    return Tables(tables, groups, image, labels, listed)


def _read_group(table: Path, number: int, column: str) -> Any:
    """The images' bytes of a row group. Raises TooLarge."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, most, pieces, found = pq.ParquetFile(table), room(table), [], 0
    nested = pa.types.is_struct(file.schema_arrow.field(column).type)
    path = f"{column}.bytes" if nested else column
    columns = [file.metadata.row_group(number).column(i) for i in range(file.metadata.num_columns)]
    size = max((c.total_uncompressed_size for c in columns if c.path_in_schema == path), default=0)
    step = min(BATCH, max(1, most // max(1, size)))  # no value is larger than all of them, and each may repeat one
    for batch in file.iter_batches(step, row_groups=[number], columns=[path], use_threads=False):
        found += batch.nbytes
        if max(found, size) > most:
            raise TooLarge(f"row group {number} unfolds to {max(found, size)} bytes; {most} are allowed")
        pieces.append(batch.column(0).field("bytes") if nested else batch.column(0))
    return pa.chunked_array(pieces)


class Parquet(EncodedSource):
    """The images of Parquet files; the row group read last stays in memory."""

    def __init__(self, tables: Tables, data: DataConfig, model: ModelConfig) -> None:
        super().__init__(torch.from_numpy(tables.labels), tables.class_names, data, model)
        self.tables, self._groups, self._column = tables.files, tables.groups, tables.image_column
        self._ends = np.cumsum([rows for _, _, rows in tables.groups])
        self._held: tuple[int, Any] = (-1, None)  # number of the group, its images' bytes

    def __getstate__(self) -> dict:
        return vars(self) | {"_held": (-1, None)}

    def names_sha256(self) -> str:
        return files.digest([[table.name for table in self.tables], self._groups])

    def looked_at(self) -> Sequence[int]:
        """Of a few row groups, evenly spread: each is read as a whole."""
        every = max(1, -(-len(self._groups) // LOOKED_AT_GROUPS))
        ends = self._ends.tolist()
        return [i for k in range(0, len(ends), every) for i in range(ends[k - 1] if k else 0, ends[k])][:LOOKED_AT]

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        table, number, _ = self._groups[group]
        return f"{self.tables[table]}, row {row} of group {number}"

    def file(self, index: int) -> Path:
        return self.tables[self._groups[self._place(index)[0]][0]]

    def encoded(self, index: int) -> bytes:
        group, row = self._place(index)
        held, images = self._held
        if held != group:
            table, number, _ = self._groups[group]
            images = _read_group(self.tables[table], number, self._column)
            self._held = group, images
        data = images[row].as_py()
        if data is None:
            raise BadImage("no bytes")
        check_bytes(len(data))
        return data


class Held(Parquet):
    """The images of Parquet files, encoded, in memory."""

    def __init__(self, tables: Tables, data: DataConfig, model: ModelConfig, most: int = MOST_HELD) -> None:
        """Raises UserError for more than ``most`` bytes."""
        super().__init__(tables, data, model)
        parts, lengths = [], []
        for index in range(len(self)):
            try:
                part = super().encoded(index)
            except TooLarge as error:
                raise UserError(f"{self.name(index)}: {error}") from None
            except BadImage:
                part = b""  # which ``encoded`` refuses as the file would
            parts.append(np.frombuffer(part, dtype=np.uint8))
            lengths.append(len(part))
            if (most := most - len(part)) < 0:
                folder = self.tables[0].parent
                raise UserError(
                    f"data.source=parquet holds its images in memory, and those of {folder} are too many; pack them "
                    f"with python -m unite_fast.data.pack {folder} DEST --size {model.image_size}, then "
                    "data.source=packed data.path=DEST"
                )
        self._pixels, self._places = np.concatenate(parts), np.cumsum([0, *lengths])
        self._held = (-1, None)

    def looked_at(self) -> Sequence[int]:
        return EncodedSource.looked_at(self)

    def encoded(self, index: int) -> bytes:
        data = self._pixels[self._places[index] : self._places[index + 1]].tobytes()
        check_bytes(len(data))
        return data


def tables_of(root: Path) -> list[Path]:
    """The Parquet files at ``root``, or, as Hugging Face lays repositories out, in its one folder that has some."""
    found = files_of(root, ".parquet")
    if not found and root.is_dir():
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("*.parquet"))]
        if len(folders) > 1:
            names = ", ".join(path.name for path in folders)
            raise UserError(f"{root} has several folders of Parquet files ({names}); name one of them")
        found = files_of(folders[0], ".parquet") if folders else []
    return found


def open_parquet(data: DataConfig, model: ModelConfig, split: str) -> Held:
    """The .parquet files at data.path (train) or data.heldout_path (heldout). Raises UserError."""
    field, root = place(data, split, "a folder of .parquet files, or a pattern such as 'FOLDER/train-*.parquet'")
    check_channels(model.channels, "data.source parquet")
    tables = tables_of(root)
    if not tables:
        raise UserError(f"{field} {root}: " + ("no .parquet files there" if root.exists() else "no such file"))
    listed = list_parquet(tables, field, data, model.num_classes > 0)
    check_classes(len(listed.class_names), model.num_classes, f"{field} {root}")
    return Held(listed, data, model)
