"""Molecules and crystals from a run's start to its files: resume, ranks, samples, reconstructions, scores, report."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from atoms_support import TINY, config, structures
from ranks import on_ranks
from support import ROOT, command, command_of

from unite_fast import checkpoint, evaluate, export, report
from unite_fast.base import faults
from unite_fast.base.errors import UserError
from unite_fast.config import batch_split
from unite_fast.data import stream
from unite_fast.data.atoms import Structure, files, writers
from unite_fast.data.atoms.source import AtomSource
from unite_fast.evaluation.atoms import runs
from unite_fast.model.unite import build
from unite_fast.objective import Objective
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_fast.training.step import TrainStep


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    pytest.importorskip("rdkit")  # whose table of radii tells the unit of positions
    folder = tmp_path_factory.mktemp("atoms")
    structures().select(range(12)).labelled(0).save(folder / "all.safetensors")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def run_of(packed, name: str, *overrides: object):
    return command(
        "train.py", "--config", packed / "tiny.yaml", f"run_dir={packed / name}", "model.num_classes=1", "device=cpu",
        "data.source=structures", f"data.path={packed / 'all.safetensors'}",
        f"data.heldout_path={packed / 'all.safetensors'}", *overrides,
    )  # fmt: skip


def tensors(folder):
    return checkpoint.read(checkpoint.locate(folder))


def test_a_run_resumes_with_the_same_bits(packed):
    whole = run_of(packed, "whole", "train.max_steps=6", "train.image_every=6")
    assert whole.returncode == 0, whole.stderr
    assert (packed / "whole" / "samples" / "step_0000006.png").is_file()
    for steps in (2, 6):
        assert run_of(packed, "parts", f"train.max_steps={steps}").returncode == 0
    a, b = tensors(packed / "whole"), tensors(packed / "parts")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    model, _ = checkpoint.load_model(packed / "whole")
    assert model.embedder.sizes_seen.tolist() == [[0, 0, 2, 2, 2, 2, 2, 2]]


def test_a_step_without_a_finite_gradient_is_skipped(packed, monkeypatch):
    monkeypatch.setenv("UNITE_FAST_TESTING", "1")
    monkeypatch.setenv("UNITE_FAST_FAULT", "nan@step=2,phase=fwd")
    found = run_of(packed, "poisoned", "train.max_steps=3")
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in (packed / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    monkeypatch.delenv("UNITE_FAST_FAULT")
    faults.arm(0)


def test_what_does_not_fit_is_one_line(packed):
    for override, words in (
        ("model.num_classes=3", "has 1 classes but model.num_classes is 3"),
        ("model.num_latents=4", "too many atoms"),
        ("model.modality=images", "does not give model.modality images"),
        ("data.source=joint", "needs data.atoms.joint"),
        ("data.source=digits", "data.source=digits"),
    ):
        found = run_of(packed, "bad", "train.max_steps=1", override)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1
    model = build(config().model)
    with pytest.raises(UserError, match="needs a source of molecules"):
        model.modality.prepare(model, object())


def test_a_run_is_planned_before_its_data_are_there():
    """Its scores need them, too."""
    said = command("train.py", "--config", ROOT / "configs" / "mp20.yaml", "--dry-run", "evaluation.atoms_epoch=40")
    assert said.returncode == 0, said.stderr
    assert "data.path is not given: 27,136 crystals of MP20 are assumed" in said.stdout
    said = command("train.py", "--config", ROOT / "configs" / "mp20.yaml", "evaluation.atoms_epoch=40")
    assert said.stderr == "error: data.path is empty; data.source=mp20 needs a folder\n"


def stepped(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Three steps of a joint model, then its samples and reconstructions."""
    settings = config()
    source = AtomSource(structures(), settings.model.num_latents, ("molecules", "crystals"))
    state = assemble.fresh_state(settings, ranks)
    state.model.modality.prepare(state.model, source)
    state.model.train()
    objective = Objective.open(settings.model, settings.objective, settings.efficiency)
    step = TrainStep(state, settings, ranks, batch_split(settings.train, ranks.world_size), len(source), objective)
    batches = stream(source, 0, 0, settings.train.global_batch, ranks.rank, ranks.world_size)
    losses = [step(next(batches))["total"] for _ in range(3)]
    model, labels = state.model.eval(), [k % 2 for k in range(40)]
    made = runs.samples(model, list(range(40)), labels, settings.sample, ranks)
    back = runs.reconstructions(model, structures(), structures().labels, 0.01, ranks)
    found = {"losses": torch.stack(losses)} | {f"made {k}": v for k, v in made.arrays().items()}
    return found | {f"back {k}": v for k, v in back.arrays().items()} | dict(model.named_parameters())


def test_two_ranks_are_one():
    alone = stepped(Ranks(0, 1, torch.device("cpu")))
    ranks = on_ranks(2, stepped)
    losses = torch.stack([both.pop("losses") for both in ranks]).mean(0)
    torch.testing.assert_close(losses, alone.pop("losses"), rtol=1e-5, atol=1e-5)
    for both in ranks:
        for name, value in alone.items():
            if value.is_floating_point():
                torch.testing.assert_close(both[name], value.detach(), rtol=2e-4, atol=2e-4, msg=name)
            else:
                assert torch.equal(both[name], value), name


@pytest.fixture(scope="module")
def run(packed):
    """A run of three steps that scores itself once."""
    found = run_of(packed, "scored", "train.max_steps=3", "evaluation.atoms_epoch=2", "evaluation.count=6")
    assert found.returncode == 0, found.stderr
    return packed / "scored"


def read(path) -> list:
    found = files.read_path(path, 100, workers=1)
    assert not found.bad
    return [found.structures[i] for i in range(len(found.structures))]


def test_samples_go_to_files(run, tmp_path, monkeypatch):
    """Equal for a seed whatever it is asked with; a rerun makes nothing; other options are refused or replace."""
    base = ("sample.py", "--checkpoint", run, "--device", "cpu")
    out = tmp_path / "made.extxyz"
    made = command(*base, "--out", out, "--seeds", "0-4,40")
    assert made.returncode == 0, made.stderr
    assert "6 structures in" in made.stdout
    items = read(out)
    assert [f'name="seed {k}"' in out.read_text() for k in (0, 4, 40, 5)] == [True, True, True, False]
    few = command(*base, "--out", tmp_path / "few.xyz", "--seeds", "40,2")
    assert few.returncode == 0, few.stderr
    for mine, other in zip(read(tmp_path / "few.xyz"), (items[5], items[2]), strict=True):
        assert mine.species.tolist() == other.species.tolist()
        torch.testing.assert_close(torch.tensor(mine.coordinates), torch.tensor(other.coordinates))
    assert "already; nothing to do" in command(*base, "--out", out, "--seeds", "0-4,40").stdout
    refused = command(*base, "--out", out, "--seeds", "0-3")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert command(*base, "--out", out, "--seeds", "0-3", "--overwrite").returncode == 0
    assert len(read(out)) == 4
    for wrong, words in ((tmp_path / "cifs", "is for crystals"), (tmp_path / "a.png", "folder, which gets .cif")):
        found = command(*base, "--out", wrong, "--seeds", "0")
        assert found.returncode == 2
        assert words in found.stderr


def test_a_stopped_sampling_goes_on(run, tmp_path, monkeypatch):
    from unite_fast import sampling

    base = ("sample.py", "--checkpoint", run, "--device", "cpu", "--seeds", "0,32,64", "--out", tmp_path / "a.xyz")
    whole, calls = sampling.sample_tiles, []

    def once(model, seeds, *rest, **options):
        calls.append(seeds)
        if len(calls) == 2:
            raise UserError("stopped here")
        return whole(model, seeds, *rest, **options)

    monkeypatch.setattr(sampling, "sample_tiles", once)
    assert command(*base).returncode == 2
    assert not (tmp_path / "a.xyz").exists()
    found = command(*base)
    assert found.returncode == 0, found.stderr
    assert calls == [[0], [32], [32], [64]]
    assert len(read(tmp_path / "a.xyz")) == 3
    assert not (tmp_path / "a.xyz.parts").exists()


def test_reconstructions_of_a_users_files(run, tmp_path):
    own = [structures()[i] for i in (3, 0, 5)]
    writers.write(tmp_path / "own.xyz", own)
    base = ("sample.py", "--checkpoint", run, "--device", "cpu", "--reconstruct", tmp_path / "own.xyz")
    found = command(*base, "--out", tmp_path / "back.xyz")
    assert found.returncode == 0, found.stderr
    assert "3 structures" in found.stdout
    assert [len(one.species) for one in read(tmp_path / "back.xyz")] == [len(one.species) for one in own]
    assert "already" in command(*base, "--out", tmp_path / "back.xyz").stdout
    salt = (np.ones((3, 3)) - np.eye(3)) * 2.82
    crystal = Structure(np.array([11, 17]), np.array([[0.0, 0, 0], [0.5, 0.5, 0.5]]), salt, "rock salt")
    writers.write(tmp_path / "crystal.extxyz", [crystal])
    refused = command(*base[:-1], tmp_path / "crystal.extxyz", "--out", tmp_path / "c.extxyz")
    assert refused.returncode == 2
    assert "was not trained on crystals" in refused.stderr


@pytest.fixture(scope="module")
def scored(run):
    """The run with its scores by command, what that said, and the structures."""
    found = command_of(
        evaluate.main, "atoms", "--checkpoint", run, "--count", 6, "--workers", 1, "--device", "cpu",
        "--save", run / "structures",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return run, found.stdout


def test_scores_are_those_of_the_run(scored):
    """While training, and afterwards by command: the same numbers, since samples are functions of their seeds."""
    run, said = scored
    (path,) = (run / "scores" / "training").glob("*_atoms.json")
    during = json.loads(path.read_text())
    assert during["kind"] == "atoms"
    assert "NaN" not in path.read_text()  # of what there is none, none is said
    (path,) = (run / "scores").glob("atoms_*.json")
    after = json.loads(path.read_text())
    assert after["result"] == during["result"]
    assert {"structures reconstruction match", "structures generation valid"} <= after["result"].keys()
    assert "truth" not in after["result"]
    assert len(read(run / "structures" / "structures_generation.extxyz")) == 6
    assert "6 generated molecules" in said
    assert (run / "report" / "structures_generation.png").is_file()


def test_report_and_export(scored, tmp_path):
    run, _ = scored
    assert command_of(report.main, run).returncode == 0
    page = (run / "report" / "index.html").read_text()
    assert "structures generation valid" in page
    assert "positions loss" in page
    assert page.count('<canvas class="atoms"') == 12 + 6  # held-out ones with their reconstructions, samples
    assert "https://" not in page.split("<h2>Configuration")[0].replace("http://www.w3.org", "")
    exported = command_of(export.main, run, "--out", tmp_path / "export")
    assert exported.returncode == 0, exported.stderr
    card = (tmp_path / "export" / "README.md").read_text()
    assert "atoms" in card
    assert "images" not in card
    (one, _), (two, _) = checkpoint.load_model(run), checkpoint.load_model(tmp_path / "export")
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_dry_run_counts_atoms(packed):
    found = run_of(packed, "planned", "--dry-run")
    assert found.returncode == 0, found.stderr
    for words in ("FLOPs/structure", "atom embedding", "12 structures/epoch"):
        assert words in found.stdout


def test_molecules_and_crystals_together(packed, tmp_path):
    """The data set is the label: it says of which kind a sample is, and so where it can be written."""
    pytest.importorskip("pymatgen.core")
    structures().select(range(12, 24)).labelled(0).save(tmp_path / "crystals.safetensors")
    both = f"[structures:{packed / 'all.safetensors'}, structures:{tmp_path / 'crystals.safetensors'}]"
    trained = command(
        "train.py", "--config", packed / "tiny.yaml", f"run_dir={tmp_path / 'both'}", "device=cpu", "train.max_steps=2",
        "data.source=joint", f"data.atoms.joint={both}",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    model, _ = checkpoint.load_model(tmp_path / "both")
    assert model.embedder.periodic.tolist() == [False, True]
    assert model.embedder.sizes_seen.sum(1).tolist() == [12, 12]
    base = ("sample.py", "--checkpoint", tmp_path / "both", "--device", "cpu", "--cfg", "1.5", "--seeds", "0-3")
    made = command(*base, "--labels", "1", "--out", tmp_path / "cifs")
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "cifs").glob("*.cif"))) == 4
    refused = command(*base, "--labels", "0,1", "--out", tmp_path / "both.sdf")
    assert refused.returncode == 2
    assert "no cell" in refused.stderr
    mixed = command(*base, "--labels", "0,1", "--out", tmp_path / "both.extxyz")
    assert mixed.returncode == 0, mixed.stderr
    assert [line.count("Lattice") for line in (tmp_path / "both.extxyz").read_text().splitlines() if "pbc" in line] == [
        0, 1, 0, 1,
    ]  # fmt: skip
