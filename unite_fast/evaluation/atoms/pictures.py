"""Pictures of what was scored: structural formulas by RDKit, and balls and sticks, beside real ones.

``shown`` is what a result keeps of the structures themselves, so that a report can draw them later without RDKit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unite_fast.base import files
from unite_fast.data.atoms import Structure, Structures
from unite_fast.data.atoms.elements import extra
from unite_fast.evaluation.atoms.molecules import Perceived, aligned, perceive
from unite_fast.modality import molecule_pictures

MOST = 16  # structures of a kind
SEARCHED = 200  # for that many valid ones
COLUMNS = 8
FORMULA = (220, 170)  # pixels of a structural formula


def _entry(one: Structure, title: str) -> dict[str, Any]:
    cell = None if one.lattice is None else one.lattice.round(3).tolist()
    return {
        "title": title, "species": one.species.tolist(), "positions": one.positions.round(3).tolist(), "cell": cell,
    }  # fmt: skip


def formula(smiles: str) -> str:
    """The structural formula of a SMILES, SVG. Raises UserError without rdkit."""
    with extra("drawing formulas"):
        from rdkit import Chem
        from rdkit.Chem.Draw import rdMolDraw2D
    pen = rdMolDraw2D.MolDraw2DSVG(*FORMULA)
    pen.drawOptions().clearBackground = False
    pen.DrawMolecule(rdMolDraw2D.PrepareMolForDrawing(Chem.MolFromSmiles(smiles)))
    pen.FinishDrawing()
    return pen.GetDrawingText().split("?>")[-1].strip()


def _perceived(structures: list[Structure], scorer: str) -> list[Perceived]:
    return perceive([(one.species, one.positions) for one in structures], scorer, workers=1)


def shown(made: dict[str, Structures], scorer: str) -> dict[str, list[dict[str, Any]]]:
    """The first structures of each kind of ``runs.score``'s, as plain values: good and bad ones alike."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, structures in made.items():
        if name.endswith(" truth"):
            continue
        few = [structures[i] for i in range(min(MOST, len(structures)))]
        truth = made.get(name.replace(" reconstruction", " truth"))
        molecules = all(one.lattice is None for one in few)
        if truth is not None and name.endswith(" reconstruction"):
            found[name] = []
            for i, one in enumerate(few):
                real = truth[i]
                entry = _entry(real, real.smiles or real.name)
                if molecules and len(one.species) == len(real.species):
                    entry["other"] = aligned(one.positions, real.positions).round(3).tolist()
                found[name].append(entry)
        elif molecules:
            perceived = _perceived(few, scorer)
            found[name] = [
                _entry(one, seen.smiles or f"not valid: {seen.reason}")
                | ({"svg": formula(seen.smiles)} if seen.smiles else {})
                for one, seen in zip(few, perceived, strict=True)
            ]
        else:
            found[name] = [_entry(one, one.name) for one in few]
    return found


def _formulas(path: Path, smiles: list[str]) -> None:
    with extra("drawing formulas"):
        from rdkit import Chem
        from rdkit.Chem import Draw
    drawn = Draw.MolsToGridImage([Chem.MolFromSmiles(one) for one in smiles], molsPerRow=COLUMNS, subImgSize=FORMULA)
    with files.replacing(path) as file:
        drawn.save(file, format="PNG")


def save(folder: Path, made: dict[str, Structures], scorer: str) -> list[Path]:
    """PNGs in ``folder``: samples as they come, the formulas of the valid ones, reconstructions under the real ones."""
    written = []
    with files.refusals(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, structures in made.items():
            few = [structures[i] for i in range(min(MOST, len(structures)))]
            rows = [few[low : low + COLUMNS] for low in range(0, len(few), COLUMNS)]
            if name.endswith(" truth"):
                continue
            if name.endswith(" reconstruction"):
                real = made[name.replace(" reconstruction", " truth")]
                rows = [[real[i] for i in range(len(few))][:COLUMNS], few[:COLUMNS]]
            written.append(folder / f"{name.replace(' ', '_')}.png")
            molecule_pictures.save_grid(written[-1], rows)
            if name.endswith(" generation") and all(one.lattice is None for one in few):
                several = [structures[i] for i in range(min(SEARCHED, len(structures)))]
                smiles = [seen.smiles for seen in _perceived(several, scorer) if seen.smiles][:MOST]
                if smiles:
                    written.append(folder / f"{name.replace(' ', '_')}_formulas.png")
                    _formulas(written[-1], smiles)
    return written
