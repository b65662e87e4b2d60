"""Molecules and crystals as pictures: balls and sticks, seen from one side, drawn by Pillow alone.

Bonds are drawn between atoms that are close, whatever their order; ``evaluation.atoms`` judges them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from unite_fast.data.atoms import Structure
from unite_fast.modality import pictures

SIDE = 160  # pixels of a picture
SCALE = 4  # drawn so much larger, then reduced: smooth edges
COLOURS = {1: (225, 225, 225), 6: (70, 70, 75), 7: (48, 80, 220), 8: (220, 40, 30), 9: (60, 190, 80)}
OTHER = ((150, 110, 190), (200, 140, 60), (90, 160, 170), (170, 90, 110))
RADII = {1: 0.31, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57}  # covalent, Å (Cordero 2008); the others here: 1.3
BOND = 1.25  # times the sum of the radii
TURN = np.array([[0.87, -0.25, 0.43], [0.0, 0.87, 0.5], [-0.5, -0.43, 0.75]])  # a three-quarter view


def radius(number: int) -> float:
    return RADII.get(number, 1.3)


def colour(number: int) -> tuple[int, int, int]:
    return COLOURS.get(number, OTHER[number % len(OTHER)])


def bonds(species: np.ndarray, positions: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of atoms of a molecule that are close enough to be bonded."""
    radii = np.array([radius(int(number)) for number in species])
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    near = apart < BOND * (radii[:, None] + radii[None])
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(near, 1))]


def draw(structure: Structure, side: int = SIDE) -> np.ndarray:
    """(side, side, 3) uint8, on white; what is not finite stays white."""
    from PIL import Image, ImageDraw

    wide = side * SCALE
    canvas = Image.new("RGB", (wide, wide), "white")
    if len(structure.species) and np.isfinite(structure.positions).all():
        centred = structure.positions - structure.positions.mean(0)
        places = centred @ TURN.T
        zoom = 0.42 * wide / max(2.0, float(np.abs(places[:, :2]).max()) + 0.5)
        flat = wide / 2 + places[:, :2] * np.array([zoom, -zoom])
        pen = ImageDraw.Draw(canvas)
        things: list[tuple[float, tuple[int, ...]]] = [(float(z), (i,)) for i, z in enumerate(places[:, 2])]
        if structure.lattice is None:
            pairs = bonds(structure.species, structure.positions)
            things += [(float(min(places[i, 2], places[j, 2])) - 0.01, (i, j)) for i, j in pairs]
        for _, members in sorted(things):
            x, y = flat[members[0]]
            if len(members) == 2:
                pen.line([x, y, *flat[members[1]]], fill=(140, 140, 145), width=max(2, int(0.14 * zoom)))
                continue
            number = int(structure.species[members[0]])
            size = zoom * (0.18 + 0.28 * radius(number))
            pen.ellipse(
                [x - size, y - size, x + size, y + size], fill=colour(number), outline=(40, 40, 40), width=SCALE
            )
    return np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))


def save_grid(path: Path, rows: list[list[Structure]], side: int = SIDE, words: pictures.Words | None = None) -> None:
    """Rows of structures as one PNG, with ``words`` around them."""
    drawn = [
        torch.stack([torch.from_numpy(draw(one, side).copy()).permute(2, 0, 1).float() / 255 for one in row])
        for row in rows
    ]
    pictures.save_labelled(path, drawn, words or pictures.Words())
