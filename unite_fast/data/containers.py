"""Which kind of container of encoded images a path holds: an image folder, tars, Parquet files, or packed shards."""

from __future__ import annotations

from pathlib import Path

from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.encoded import EncodedSource
from unite_fast.data.folder import Folder, list_folder
from unite_fast.data.listing import files_of
from unite_fast.data.packed import PackedEncoded, read_index
from unite_fast.data.parquet import Parquet, list_parquet, tables_of
from unite_fast.data.tar import Tar, list_tars


def open_container(root: Path, field: str, data: DataConfig, model: ModelConfig) -> EncodedSource:
    """The encoded images at ``root``, whatever their number of classes. ``field`` names the path in messages.

    Raises UserError.
    """
    if (root / "index.json").is_file() or (root / ".parts").is_dir():
        index = read_index(root, field)
        if index.format == "uint8":
            raise UserError(f"{field} {root} holds decoded images (uint8); read them with data.source=packed")
        return PackedEncoded(root, index, data, model)
    if tars := files_of(root, ".tar"):
        return Tar(*list_tars(tars, field, model.num_classes > 0), data, model)
    labelled = model.num_classes > 0
    if tables := tables_of(root):
        return Parquet(list_parquet(tables, field, data, labelled), data, model)
    return Folder(root, *list_folder(root, field, labelled), data, model)
