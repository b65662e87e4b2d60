"""Scores of molecules and crystals, each with the rule that computed it.

    molecules.py      valid, unique, novel; match and RMSD of reconstructions
    edm.py            bonds by a table of lengths: stable atoms and molecules, and validity as EDM defines it
    crystals.py       valid structure and composition, match and rms, unique, novel
    distributions.py  how far sizes, elements, bonds, angles, densities and energies are from real ones
    report.py         all of them as one result, with the same scores of real structures beside them, and as a table

    python -m unite_fast.evaluation.atoms SAMPLES --real REAL --training TRAINING
    python -m unite_fast.evaluation.atoms RECONSTRUCTIONS --of TRUTH

Numbers of different rules are not comparable: "unique" is a share of the valid here, and in some papers a share of all
samples; "valid" depends on how bonds are perceived. So every result says which rules it used, and of which versions.
"""
