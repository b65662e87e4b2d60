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
    first = paper.first_of(paper.rows())
    assert first["table6a_t7"] == first["table6b_half"] == first["figure6_shared"] == "table2_base"
    assert first["figure6_separate"] == "table2_separate"
    left_out = {"table5_mp20", "table2_adversarial"}  # other data; a training that goes on from another
    assert set(every.runs) == set(first.values()) - left_out
    assert every.then
    assert every.table


def test_the_claims_name_runs_and_columns_that_exist(paper):
    claims = sweep.read(ROOT / "configs" / "claims" / "claims.yaml")
    for claim in paper.rows()["claims"]:
        for column, run, relation, other in paper.tests_of(claim):
            assert column in claims.table
            assert run in claims.runs
            assert relation in ("below", "above", "like")
            assert isinstance(other, float) or other in claims.runs or other in claims.table
    for run in sweep.listed(claims):
        yaml_text.load(run.config, run.words()[2:])
        assert run.name.removesuffix(paper.LONG) in claims.runs
    assert {c for part in paper.rows()["columns"].values() for c in part} == set(claims.table)


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
        ([4, 5, 6], [1, 2, 3], "like", "did not hold"),
        ([1, 2, 3], [4, 5, 6], "like", "did not hold"),
        ([1, 2, 5], [4, 5, 6], "like", "not decidable"),
    ],
)
def test_verdicts(paper, a, b, relation, verdict):
    assert paper.decide(table(a=a, b=b), ["x", "a", relation, "b"])[0] == verdict


def test_verdicts_against_a_number_and_of_several_tests(paper):
    assert paper.decide(table(a=[1.5, 2, 3]), ["x", "a", "above", 1.0])[0] == "held"
    assert paper.summed(["held", "held"]) == "held"
    assert paper.summed(["held", "not decidable"]) == "held in part"
    assert paper.summed(["held", "not run"]) == "held in part"
    assert paper.summed(["did not hold", "not decidable"]) == "did not hold in part"
    assert paper.summed(["held", "not decidable", "did not hold"]) == "mixed"
    assert paper.summed(["not decidable", "not run"]) == "not decidable"
    assert paper.summed(["not run"]) == "not run"
    assert paper.summed(["held, fewer than 3 seeds", "not decidable"]) == "held in part, fewer than 3 seeds"


def test_a_set_of_scores_decides_together(paper):
    claim = {"tests": [["reconstruction", "a", "better", "b"], ["x", "a", "above", 1.0]]}
    assert paper.tests_of(claim) == [
        ["PSNR", "a", "above", "b"], ["feature distance", "a", "below", "b"], ["x", "a", "above", 1.0],
    ]  # fmt: skip


def test_long_runs_decide_where_both_sides_have_one(paper):
    found = table(a=[1, 2, 3], b=[4, 5, 6], c=[0, 0, 0], a_long=[7, 8, 9], b_long=[4, 5, 6])
    said = "\n".join(paper.claims([
        {"says": "one", "tests": [["x", "a", "below", "b"]]}, {"says": "two", "tests": [["x", "a", "below", "c"]]},
        {"says": "three", "tests": [["x", "a", "above", 5]]},
    ], found))  # fmt: skip
    assert "| x: `a` below `b` | 2 (1 to 3); 5 (4 to 6) | held | 8 (7 to 9); 5 (4 to 6) | did not hold |" in said
    assert "| x: `a` below `c` | 2 (1 to 3); 0 (0 to 0) | did not hold |  |  |" in said
    assert "| x: `a` above 5 | 2 (1 to 3) | did not hold | 8 (7 to 9) | held |" in said
    assert "Of 2 comparisons made at both lengths 0 came out the same, 2 turned to the opposite, 0 were" in said


def test_long_runs_decide_nothing_before_they_have_three_seeds(paper):
    found = table(a=[1, 2, 3], b=[4, 5, 6], a_long=[9], b_long=[4, 5, 6], few=[1], few_long=[1])
    tests = [["x", "a", "below", "b"], ["x", "few", "below", "b"], ["x", "none", "below", "b"]]
    said = "\n".join(paper.claims([{"says": "one", "tests": tests}], found))
    assert "| x: `a` below `b` | 2 (1 to 3); 5 (4 to 6) | held |  |  |" in said
    assert "| 1; 5 (4 to 6) | held, fewer than 3 seeds | 1; 5 (4 to 6) | held, fewer than 3 seeds |" in said
    assert "Of 1 comparisons made at both lengths 1 came out the same, 0 turned to the opposite, 0 were" in said
    assert "1 held in part, fewer than 3 seeds" in said


def test_a_part_of_a_sweep_does_not_replace_the_whole(paper, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    (tmp_path / "claims.json").write_text('{"rows": {"shared": {}, "separate": {}}}')
    (tmp_path / "table.json").write_text('{"rows": {"shared": {}}}')
    with pytest.raises(SystemExit, match="has no separate, which the page has"):
        paper.take(tmp_path / "table.json")


def test_a_finished_sweep_is_taken_in(paper, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    run = tmp_path / "runs" / "shared" / "seed_0"
    (run / "sweep").mkdir(parents=True)
    (run / "sweep" / "small.json").write_text('{"real": {"kid": 0.1}}')
    (run / "provenance.json").write_text('{"device": "x", "torch": "2", "threads": 1, "commit": "abc"}')
    (tmp_path / "runs" / "table.json").write_text('{"rows": {"shared": {"KID": {"values": {"0": 2.0}}}}}')
    (tmp_path / "runs" / "table.md").write_text("| a |\n")
    paper.take(tmp_path / "runs" / "table.json")
    found = (tmp_path / "results" / "claims.json").read_text()
    assert '"commit": "abc"' in found
    assert '"kid": 0.1' in found
