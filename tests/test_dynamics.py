"""Curves of runs: losses of the log, scores while training, what is said of them."""

from __future__ import annotations

import json
import math

import pytest

from unite_fast.analysis import dynamics, plots
from unite_fast.evaluation import results


def test_curves_leave_out_what_is_not_finite():
    rows = [{"step": s, "flow": v} for s, v in ((1, 4.0), (2, 1.0), (3, math.nan), (4, 2.0))]
    found = dynamics.of_run(rows, ["flow", "lpips"])
    assert found["curves"] == {"flow": [[1.0, 2.0, 4.0], [4.0, 1.0, 2.0]]}
    assert found["summary"]["flow"] == {"end": 2.0, "lowest": 1.0, "at": 2.0, "change": 0.5}


def test_a_curve_ends_higher_or_lower_than_it_was_early():
    falls = [math.exp(-s / 30) for s in range(100)]
    for values, says in ((falls, math.exp(-70 / 30)), (falls[::-1], math.exp(70 / 30))):
        (found,) = dynamics.summary({"flow": [list(range(100)), values]}).values()
        assert found["change"] == pytest.approx(says)  # rows 90 to 99 over rows 20 to 29


def score(kind: str, step: object, weights: str = "ema", **result: object) -> dict:
    return {"kind": kind, "step": step, "protocol": {"checkpoint": {"weights": weights}}, "result": result}


def test_scores_are_curves_of_their_own(tmp_path):
    """Beside losses of the same name; a sweep goes on with the curve of a search; what is damaged is left out."""
    scores = [
        score("sweep", 30, fid=1.0, resumed_at=0),
        score("search", 10, fid=9.0, images_per_second=5.0),
        score("search", 20, fid=3.0, evaluations=100.0),
        score("heldout", 20, "model", flow=0.5, images=4.0),
        score("heldout", 30, flow=0.7, x0=math.nan, psnr=None),
        score("heldout", "40", flow=1.0),
        {"kind": "rfid", "step": 10, "result": {"rfid": 4.0, "psnr": True}, "protocol": 3},
        {"kind": ["x"], "step": 10, "result": {"a": 1.0}},
    ]
    rows = [{"step": step, "flow": 2.0} for step in (1, 2)]
    found = dynamics.of_run(rows, ["flow"], scores)
    assert found["curves"] == {
        "flow": [[1, 2], [2, 2]], "search fid": [[10, 20, 30], [9, 3, 1]], "heldout flow": [[20, 30], [0.5, 0.7]],
        "rfid rfid": [[10], [4]],
    }  # fmt: skip
    assert found["scored"] == {"search fid": "ema", "heldout flow": "model, ema", "rfid rfid": ""}
    assert found["summary"]["search fid"] == {"end": 1, "lowest": 1, "at": 30, "change": pytest.approx(1 / 9)}
    assert found["summary"]["heldout flow"]["change"] == pytest.approx(1.4)
    without = dynamics.of_run(rows, ["flow"], [])
    assert without == dynamics.of_run(rows, ["flow"])
    assert without.keys() == {"curves", "summary"}
    assert dynamics.of_run([], ["flow"]) == {}
    plots.dynamics(tmp_path / "a.png", {"a": found, "b": without})
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_scores_of_a_run_are_found(tmp_path):
    folder = tmp_path / results.WHILE_TRAINING
    folder.mkdir(parents=True)
    for content in (score("search", 10, fid=9.0), score("rfid", 10, rfid=4.0), score("search", 9, fid=8.0)):
        (folder / f"step_{content['step']:07d}_{content['kind']}.json").write_text(json.dumps(content))
    for step, text in enumerate(("", "[1]", '{"result": 3}', "[" * 100_000, "{")):
        (folder / f"step_{step:07d}_search.json").write_text(text)
    (folder / "step_0000009_search.jsonl").write_text("{}")
    assert [(c["step"], c["kind"]) for c in results.while_training(tmp_path)] == [
        (9, "search"), (10, "rfid"), (10, "search"),
    ]  # fmt: skip
    assert results.while_training(tmp_path / "none") == []
