"""The keys of molecules and crystals: sections of ``model``, ``objective`` and ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unite_fast.config.option import option


@dataclass(frozen=True)
class AtomsConfig:
    """How molecules and crystals become tokens, where model.modality is atoms."""

    # ADiT, whose numbers the paper compares with, has one latent per atom, and 16 numbers for a whole molecule could
    # not give the paper's 0.039 A; the text does not say it.
    registers: Literal["per_atom", "fixed"] = option(
        "per_atom", "latents of a sample: one per atom, or always num_latents, of which the decoder calls some absent"
    )
    # ADiT's encoder sees no lattice, which one atom at the origin cannot tell.
    lattice_input: bool = option(True, "whether the encoder sees a crystal's lengths and angles")


@dataclass(frozen=True)
class AtomLossConfig:
    """Weights of the reconstruction's terms, where model.modality is atoms: those of ADiT's autoencoder."""

    types: float = option(1.0, "cross entropy of the elements")
    positions: float = option(10.0, "squared error of a molecule's centred positions, nm^2")
    fractional: float = option(10.0, "squared error of a crystal's fractional coordinates")
    lengths: float = option(1.0, "squared error of a cell's lengths over the cube root of its atoms, A^2")
    angles: float = option(10.0, "squared error of a cell's angles, radians^2")
    wrapped: bool = option(False, "fractional coordinates: to the nearest periodic image; ADiT: false")


@dataclass(frozen=True)
class AtomDataConfig:
    """Of the sources of molecules and crystals."""

    split: Literal["edm", "adit_sizes"] = option("edm", "qm9: EDM's published one, or one of ADiT's sizes")
    part: Literal["train", "valid", "test", "all"] = option("train", "what is trained on")
    heldout_part: Literal["valid", "test"] = option("test", "what is held out, where heldout_path is empty")
    max_heavy_atoms: int = option(0, "leaves out structures with more atoms other than hydrogen; 0: none")
    # The order is part of what is learned: a register belongs to the atom of its number.
    order: Literal["file", "random"] = option("file", "atoms as in the file, as ADiT; or another order at each sight")
    # Molecules of 14 of 23 atoms on average fill 89 % of such a batch's slots, and 61 % of all.
    pad_multiple: int = option(
        0, "above 0: similar sizes share a batch, padded to a multiple of this; 0: all are padded to num_latents"
    )
    poses: bool = option(True, "random rotations of each sample, and translations of crystals in their cells")
    joint: tuple[str, ...] = option((), "joint: sources together, the k-th with label k, as [qm9, mp20:FOLDER]")
