"""What ``sample.py`` does, by modality: where it may write, samples to files, reconstructions of a user's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from unite_fast.base.errors import UserError
from unite_fast.modality import Modality
from unite_fast.sampling import generate, reconstruct, structures


class Maker(NamedTuple):
    """The functions of ``generate.py`` and ``reconstruct.py``, and those that stand for them."""

    check_out: Callable[..., None]
    make: Callable[..., str]
    reconstruct: Callable[..., str]


MAKERS: dict[str, Maker] = {  # by the modality's ``thing``
    "image": Maker(
        generate.check_out,
        generate.make,
        reconstruct.reconstruct_folder,
    ),
    "structure": Maker(
        structures.check_out,
        structures.make,
        structures.reconstruct_files,
    ),
}


def maker_of(modality: Modality) -> Maker:
    """Raises UserError for a modality whose samples have no files yet."""
    maker = MAKERS.get(modality.thing)
    if maker is None:
        raise UserError(f"{modality.thing}s have no files; give them a row of sampling/makers.py")
    return maker
