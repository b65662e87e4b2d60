"""The images that a pack was made of, each as it was then: what has been written anew since is no longer what it holds.

Of each image is kept when its file was written and a hash of its bytes. A copy, or an archive that is unpacked again,
has other times and the same bytes: only bytes count, and they are read only where the time is another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from unite_fast.base import files
from unite_fast.data.encoded import EncodedSource
from unite_fast.data.source import BadImage

NAME = "made_of.npy"  # in a pack: int64 (images of the source, 2), a row as ``state_of`` gives it


def state_of(source: EncodedSource, index: int) -> tuple[int, int]:
    """When the file that holds an image was written, in ns, and a hash of the image; 0 where it could not be read."""
    try:
        return _written(source, index), _hash(source, index)
    except (BadImage, OSError):
        return 0, 0


def _written(source: EncodedSource, index: int) -> int:
    return os.stat(source.file(index)).st_mtime_ns


def _hash(source: EncodedSource, index: int) -> int:
    return int.from_bytes(hashlib.sha256(source.encoded(index)).digest()[:8], "little", signed=True)


def changed(source: EncodedSource, places: Iterable[int], states: Iterable[Sequence[int]]) -> str:
    """The name of the first of these images that is not the one of ``states``, where those say it; empty for none."""
    for index, (written, content) in zip(places, states, strict=True):
        try:
            same = content == 0 or _written(source, index) == written or _hash(source, index) == content
        except (BadImage, OSError):
            same = False
        if not same:
            return source.name(index)
    return ""


def write(pack: Path, states: Sequence[Sequence[int]]) -> None:
    """Into the folder of a pack. Raises OSError."""
    with files.replacing(pack / NAME, sync=True) as file:
        np.save(file, np.array(states, dtype=np.int64).reshape(-1, 2))


def read(pack: Path, count: int) -> list[list[int]]:
    """Of the ``count`` images that a pack was made of; empty where it does not say."""
    try:
        states = np.load(files.regular(pack / NAME), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return []
    return states.tolist() if states.shape == (count, 2) and states.dtype == np.int64 else []
