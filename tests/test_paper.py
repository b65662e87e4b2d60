"""configs/paper and docs/PAPER.md are what scripts/paper.py makes of their data; its verdicts are what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from support import ROOT

from unite_fast import sweep
from unite_fast.config import yaml_text


@pytest.fixture(scope="module")
def paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("paper")


def test_what_is_generated_is_up_to_date(paper):
    made = paper.made()
    for path, text in made.items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python scripts/paper.py"
    assert {p for p in made if p.suffix == ".yaml"} == set((ROOT / "configs" / "paper").glob("*.yaml"))


def test_a_row_is_its_base_with_what_it_changes(paper):
    for name, row in paper.rows()["configs"].items():
        assert yaml_text.load(ROOT / "configs" / "paper" / f"{name}.yaml") == paper.config_of(name, row)
    base, half = (yaml_text.load(ROOT / "configs" / f) for f in ("imagenet_b.yaml", "paper/table6b_half.yaml"))
    assert half.model == base.model
    assert half.train.epochs == 120
    every = sweep.read(ROOT / "configs" / "paper" / "paper.yaml")
    assert len(every.runs) == len(paper.rows()["configs"]) - 1  # crystals are other data


def test_the_claims_name_runs_and_columns_that_exist(paper):
    claims = sweep.read(ROOT / "configs" / "claims" / "claims.yaml")
    for claim in paper.rows()["claims"]:
        for column, run, relation, other in claim["tests"]:
            assert column in claims.table
            assert run in claims.runs
            assert relation in ("below", "above")
            assert isinstance(other, float) or other in claims.runs or other in claims.table
    for run in sweep.listed(claims):
        yaml_text.load(run.config, run.words()[2:])


def table(**columns: list[float]) -> dict:
    return {run: {"x": {"values": {str(i): v for i, v in enumerate(values)}}} for run, values in columns.items()}


@pytest.mark.parametrize(
    ("a", "b", "relation", "verdict"),
    [
        ([1, 2, 3], [4, 5, 6], "below", "held"),
        ([1, 2, 3], [4, 5, 6], "above", "did not hold"),
        ([1, 2, 5], [4, 5, 6], "below", "not decidable"),
        ([1, 2], [4, 5, 6], "below", "held, fewer than 3 seeds"),
        ([], [4, 5, 6], "below", "not run"),
    ],
)
def test_verdicts(paper, a, b, relation, verdict):
    assert paper.decide(table(a=a, b=b), ["x", "a", relation, "b"])[0] == verdict


def test_verdicts_against_a_number_and_of_several_tests(paper):
    assert paper.decide(table(a=[1.5, 2, 3]), ["x", "a", "above", 1.0])[0] == "held"
    assert paper.summed(["held", "held"]) == "held"
    assert paper.summed(["held", "not decidable"]) == "in part: held 1, not decidable 1"
    assert paper.summed(["not run"]) == "not run"


def test_a_finished_sweep_is_taken_in(paper, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    run = tmp_path / "runs" / "shared" / "seed_0"
    (run / "scores").mkdir(parents=True)
    (run / "scores" / "small.json").write_text('{"real": {"kid": 0.1}}')
    (run / "provenance.json").write_text('{"device": "x", "torch": "2", "threads": 1, "commit": "abc"}')
    (tmp_path / "runs" / "table.json").write_text('{"rows": {"shared": {"KID": {"values": {"0": 2.0}}}}}')
    (tmp_path / "runs" / "table.md").write_text("| a |\n")
    paper.take(tmp_path / "runs" / "table.json")
    found = (tmp_path / "results" / "claims.json").read_text()
    assert '"commit": "abc"' in found
    assert '"kid": 0.1' in found
