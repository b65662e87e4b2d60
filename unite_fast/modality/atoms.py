"""Molecules and crystals: atoms as context, one register per atom, a ViT that ends in elements and places.

Register i and atom i have the same number, so predictions are compared place by place. The choices that the paper
leaves open, and their reasons, are the keys of ``AtomsConfig`` and ``AtomLossConfig``.

Shape letters: B batch, M slots (``num_latents``: the most atoms), C latent dim, D width, Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unite_fast.base.errors import UserError
from unite_fast.config import AtomLossConfig, EfficiencyConfig, ModelConfig, ObjectiveConfig
from unite_fast.data import Source
from unite_fast.data.atoms import Structure, lattice
from unite_fast.data.atoms.elements import LARGEST
from unite_fast.data.atoms.source import AtomSource
from unite_fast.data.batch import Batch, slots_taken
from unite_fast.layers import Linear, adamw_parameter, sincos_1d, use_adamw
from unite_fast.layers.vit import ViT
from unite_fast.modality import molecule_pictures
from unite_fast.modality.pictures import Words
from unite_kernels import philox

SIZE_STREAM = 1 << 18  # of the numbers of atoms of samples
TYPES = LARGEST + 1  # 0 is no atom
NANOMETRE = 10.0  # Å
Content = Mapping[str, Tensor]
MP20 = 27_136  # crystals of MP20's training set
CARD = """\
---
library_name: unite-fast
{license}tags: [flow-matching, molecule-generation]
---
# {name}

A UNITE model ([arXiv 2603.22283](https://arxiv.org/abs/2603.22283)) of atoms: one transformer that tokenizes molecules
or crystals and generates them. {parameters:,} parameters, up to {latents} atoms, a latent of width {width} per atom,
{classes} data sets. {weights}{step}, written by unite-fast {version}{commit}.

{sampling}{scores}A score means something only together with its protocol: the rule by which bonds are
perceived and its version, the held-out structures by hash, number of samples, solver, steps, guidance, weights (EMA or
raw), seeds, and the commit.
"""


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width, bias=False), nn.SiLU(), nn.Linear(width, width))


def _sinusoid(slots: int, width: int) -> Tensor:
    """(1, M, D): sines, then cosines, of i pi / 2048^(2k / D), as ADiT's."""
    rate = math.pi * 2048.0 ** -(torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = torch.arange(slots, dtype=torch.float64)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()[None]


class AtomTokens(nn.Module):
    """Atoms -> context tokens (B, M, D); and, of the training set, what generation has to know.

    sizes_seen (Y, M + 1): how many samples of each class have so many atoms; periodic (Y,): which classes are crystals.
    """

    places: Tensor
    sizes_seen: Tensor
    periodic: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, slots = config.encoder.width, config.num_latents
        self.species = nn.Embedding(TYPES, width)
        self.positions = _mlp(3, width)
        self.fractional = _mlp(3, width)
        self.lattice = _mlp(6, width) if config.atoms.lattice_input else None
        self.register_buffer("places", _sinusoid(slots, width), persistent=False)
        seen = torch.zeros(config.num_classes, slots + 1, dtype=torch.int64)
        seen[:, slots] = 1  # until a source says otherwise
        self.register_buffer("sizes_seen", seen)
        self.register_buffer("periodic", torch.zeros(config.num_classes, dtype=torch.bool))

    def forward(self, content: Content, sizes: Tensor | None = None) -> Tensor:
        crystal = content["lattice"].flatten(1).any(1)[:, None, None]
        x = self.species(content["species"]) + self.positions(content["positions"])
        x = x + self.places[:, : x.shape[1]]
        cell = self.fractional(content["fractional"])
        if self.lattice is not None:
            cell = cell + self.lattice(content["cell"])[:, None]
        return x + torch.where(crystal, cell, 0)


class AtomDecoder(ViT):
    """(B, M, in_features) -> types (B, M, 100) logits, positions and fractional (B, M, 3), cell (B, 6), in float32.

    Positions are in nm; a cell is its lengths over the cube root of the number of atoms, in Å, and angles in radians.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.decoder)
        width = model.decoder.width
        self.latent_positions = adamw_parameter(sincos_1d(torch.arange(model.num_latents), width).float()[None])
        self.types = use_adamw(Linear(width, TYPES))
        self.positions = use_adamw(Linear(width, 3))
        self.fractional = use_adamw(Linear(width, 3))
        self.cell = use_adamw(Linear(width, 6))

    def forward(self, z: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        x = self.with_class_token(self.decoder_embed(z) + self.latent_positions[:, : z.shape[1]])
        x = self.run(x, None if sizes is None else slots_taken(sizes + 1, x.shape[1]))
        with torch.autocast(x.device.type, enabled=False):
            x = self.decoder_norm(x.float())
            atoms = x[:, 1:]
            return {
                "types": self.types(atoms),
                "positions": self.positions(atoms),
                "fractional": self.fractional(atoms),
                "cell": self.cell(x[:, 0]),
            }


def centred(positions: Tensor, there: Tensor) -> Tensor:
    """Positions (B, M, 3) less the mean of those that are ``there`` (B, M, 1) float; the others are 0."""
    mean = (positions * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return (positions - mean) * there


class AtomLosses(nn.Module):
    """ADiT's terms without its Kullback-Leibler term.

    Each sample counts alike, whatever its size, so that the loss does not depend on how a batch is cut; in a term that
    a sample does not have (a molecule has no cell) it counts as 0.
    """

    def __init__(self, config: AtomLossConfig, absent: bool) -> None:
        """absent: whether the slots without an atom have to say so."""
        super().__init__()
        self.wrapped, self.absent = config.wrapped, absent
        names = ("types", "positions", "fractional", "lengths", "angles")
        self.weights = {name: getattr(config, name) for name in names if getattr(config, name)}

    def compile_parts(self, region: Callable[..., Any]) -> None:
        pass

    def forward(self, content: Content, prediction: Content, sizes: Tensor | None = None) -> dict[str, Tensor]:
        species = content["species"]
        there = (species > 0).float()[..., None]
        count = there.sum((1, 2)).clamp_min(1)
        crystal = content["lattice"].flatten(1).any(1).float()

        def per_sample(error: Tensor) -> Tensor:
            """The mean over atoms and coordinates of an error (B, M, 3)."""
            return (error * there).sum((1, 2)) / (3 * count)

        surprise = F.cross_entropy(prediction["types"].transpose(1, 2), species, reduction="none")
        moved = centred(prediction["positions"], there) - centred(content["positions"] / NANOMETRE, there)
        shifted = prediction["fractional"] - content["fractional"]
        if self.wrapped:
            shifted = shifted - shifted.detach().round()
        cell = (prediction["cell"] - content["cell"]).square()
        terms = {
            "types": surprise.mean(1) if self.absent else (surprise * there[..., 0]).sum(1) / count,
            "positions": per_sample(moved.square()) * (1 - crystal),
            "fractional": per_sample(shifted.square()) * crystal,
            "lengths": cell[:, :3].mean(1) * crystal,
            "angles": cell[:, 3:].mean(1) * crystal,
        }
        return {name: terms[name].mean() for name in self.weights}


class Atoms:
    """The modality of molecules and crystals; see ``Modality``.

    A content and a finished prediction are alike: species (B, M) int64, 0 where there is no atom, positions (B, M, 3)
    in Å, fractional (B, M, 3), lattice (B, 3, 3) in Å, zeros for a molecule.
    """

    embedder_name, thing, embedding = "atom_embed", "structure", "atom embedding"
    scores, analyses = ("heldout", "atoms"), ()
    shared_pipeline, card, assumed = False, CARD, (MP20, "crystals of MP20")
    embedder = staticmethod(AtomTokens)
    decoder = staticmethod(AtomDecoder)

    def content(self, given: Tensor | Content) -> dict[str, Tensor]:
        """With "cell" (B, 6), as the decoder predicts it."""
        if isinstance(given, Tensor):
            raise TypeError("atoms are more than one tensor: species, positions, fractional, lattice")
        if "cell" in given:
            return dict(given)
        lengths, angles = lattice.parameters(given["lattice"])
        count = (given["species"] > 0).sum(1).clamp_min(1).to(lengths.dtype)
        return dict(given) | {"cell": torch.cat([lengths / count[:, None] ** (1 / 3), torch.deg2rad(angles)], dim=1)}

    def losses(
        self, model: ModelConfig, objective: ObjectiveConfig, efficiency: EfficiencyConfig, files: bool = True
    ) -> AtomLosses:
        return AtomLosses(objective.atoms, absent=model.atoms.registers == "fixed")

    def prepare(self, model: Any, source: Source) -> None:
        if not isinstance(source, AtomSource):
            raise UserError("model.modality=atoms needs a source of molecules or crystals")
        structures, seen = source.on(torch.device("cpu")), model.embedder.sizes_seen
        seen.zero_()
        for label in range(len(seen)):
            own = structures.labels == label
            seen[label] += torch.bincount(structures.sizes[own], minlength=seen.shape[1]).to(seen.device)
            model.embedder.periodic[label] = bool(structures.periodic[own].any())

    def context_tokens(self, model: ModelConfig) -> int:
        """Atoms."""
        return model.num_latents

    def decoder_tokens(self, model: ModelConfig) -> int:
        return 1 + model.num_latents

    def missing(self, objective: ObjectiveConfig) -> str:
        return ""

    def epoch(self, model: ModelConfig, samples: int) -> tuple[int, str]:
        return (samples or MP20, "epoch") if model.encoder.width >= 256 else (0, "")

    def embedding_flops(self, model: ModelConfig) -> float:
        """An MLP for each atom's place, one for its place in the cell, one for that."""
        tokens, width, lattice = model.num_latents, model.encoder.width, int(model.atoms.lattice_input)
        return 2 * width * (2 * (tokens * 2 * 3 + lattice * 6) + 3 * (tokens * 2 + lattice) * width)

    def registers(self, config: ModelConfig, content: Content) -> int:
        return content["species"].shape[1]

    def perceptual_flops(self, model: ModelConfig) -> float:
        return 0.0

    def outputs(self, model: ModelConfig) -> int:
        """Kinds, positions and places in the cell of each atom, and the cell."""
        return model.num_latents * (100 + 3 + 3) + 6

    def example(self, model: ModelConfig, batch: int, device: torch.device | str = "cpu") -> Batch:
        slots = model.num_latents
        content = {
            "species": torch.ones(batch, slots, dtype=torch.int64, device=device),
            "positions": torch.empty(batch, slots, 3, device=device),
            "fractional": torch.empty(batch, slots, 3, device=device),
            "lattice": torch.empty(batch, 3, 3, device=device),
            "cell": torch.empty(batch, 6, device=device),
        }
        samples = torch.arange(batch, device=device)
        sizes = torch.full_like(samples, slots) if model.atoms.registers == "per_atom" else None
        return Batch(content, samples % model.num_classes, samples, sizes)

    def draw_sizes(self, model: Any, seeds: Tensor, labels: Tensor) -> Tensor | None:
        if model.config.atoms.registers == "fixed":
            return None
        seen = model.embedder.sizes_seen[labels].double()  # (B, M + 1)
        below = seen.cumsum(1) / seen.sum(1, keepdim=True).clamp_min(1)
        drawn = philox.uniform(0, SIZE_STREAM, seeds.to(labels.device)).double()
        return (below <= drawn[:, None]).sum(1).clamp(1, seen.shape[1] - 1)

    def finished(
        self, model: Any, prediction: Content, labels: Tensor, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = prediction["types"].float()
        if sizes is None:
            species = types.argmax(-1)
        else:  # these are atoms of some kind
            species = torch.where(slots_taken(sizes, types.shape[1]), types[..., 1:].argmax(-1) + 1, 0)
        there = (species > 0)[..., None]
        count = there.sum((1, 2)).clamp_min(1)
        lengths = prediction["cell"][:, :3].float() * count[:, None] ** (1 / 3)
        cells = lattice.matrix(lengths, torch.rad2deg(prediction["cell"][:, 3:].float()))
        crystal = model.embedder.periodic[labels][:, None, None]
        moved = prediction["fractional"].float() % 1.0
        fractional = torch.where(crystal & there & (moved < 1.0), moved, 0.0)
        cells = torch.where(crystal, cells, 0.0)
        free = centred(prediction["positions"].float() * NANOMETRE, there.float())
        positions = torch.where(crystal, (fractional[..., None] * cells[:, None]).sum(-2), free)
        return {"species": species, "positions": positions, "fractional": fractional, "lattice": cells}

    def original(self, content: Content) -> dict[str, Tensor]:
        return {name: content[name] for name in ("species", "positions", "fractional", "lattice")}

    def items(self, finished: Content) -> list[Structure]:
        """One by one, on the host; they have no names yet."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self.original(finished).items()}
        found = []
        for species, positions, fractional, cell in zip(*arrays.values(), strict=True):
            there, crystal = species > 0, bool(np.any(cell != 0))
            where = fractional if crystal else positions
            found.append(
                Structure(
                    species[there], where[there].astype(np.float64), cell.astype(np.float64) if crystal else None, ""
                )
            )
        return found

    def show(self, path: Path, rows: list[Any], words: Words) -> None:
        molecule_pictures.save_grid(path, [self.items(row) for row in rows], words=words)

    def likeness(self, content: Mapping[str, Tensor], made: Any) -> str:
        return ""
