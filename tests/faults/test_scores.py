"""F33, F34: scores while training that fail, die or are stopped on one of two ranks; training is as without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import STRAIGHT, TINY, equal
from support import command_of

from unite_fast.evaluation import statistics

fault = pytest.mark.fault


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[str, ...]:
    """Overrides: a search at the ends of 75, 150, 225 and 300 images, in steps 5, 10, 15 and 19."""
    folder = tmp_path_factory.mktemp("statistics")
    (folder / "tiny.yaml").write_text(TINY)
    words = ("--config", folder / "tiny.yaml", "--extractor", "digits", "--out", folder / "real.npz")
    assert command_of(statistics.main, *words).returncode == 0
    return (
        *STRAIGHT, "evaluation.fid_epoch=0.05", "evaluation.count=80", "evaluation.extractor=digits",
        "evaluation.precision=fp32", f"evaluation.reference={folder / 'real.npz'}",
    )  # fmt: skip


def found(run: Path) -> dict[str, list[float]]:
    files = sorted((run / "scores" / "training").glob("*.json"))
    return {path.name: [row["result"]["fid"] for row in json.loads(path.read_text())["rows"]] for path in files}


@fault("F33", "a score that raises on one rank", "all ranks note it, training and later scores are unaffected")
def test_one_rank_fails(job, jobs, straight, scored):
    said = job.train(*scored, fault="raise@rank=1,step=5,phase=eval")
    assert "the guidance search at step 5 failed, training goes on: injected fault" in said
    assert "the guidance search at step 5 failed, training goes on: rank 1: injected fault" in said
    assert list(found(job.run)) == [f"step_{step:07d}_search.json" for step in (10, 15, 19)]
    assert equal(job.tensors(20), straight.tensors(20))
    assert job.rows() == straight.rows()
    strict = jobs("strict")
    said = strict.train(*scored, "train.on_eval_error=fail", code=1, fault="raise@rank=1,step=5,phase=eval")
    assert said.count("error: ") == 2
    assert strict.status["state"] == "failed"


@fault("F33", "a rank killed during a score", "the job ends; its resume is exact and scores what was lost")
def test_one_rank_is_killed(job, straight, scored):
    job.train(*scored, code=None, fault="kill@rank=1,step=10,phase=eval")
    assert job.steps()[-1] == 5
    job.train(*scored)
    assert list(found(job.run)) == [f"step_{step:07d}_search.json" for step in (5, 10, 15, 19)]
    assert equal(job.tensors(20), straight.tensors(20))


@fault("F34", "a signal to one rank during a score", "all ranks stop in the score, save; its resume finishes it first")
def test_one_rank_is_asked_to_stop(job, jobs, straight, scored):
    undisturbed = jobs("undisturbed")
    undisturbed.train(*scored)
    job.train(*scored, fault="term@rank=1,step=10,phase=eval")
    assert (job.status["state"], job.status["step"], job.status["last_good"]) == ("preempted", 10, 10)
    assert list(found(job.run)) == ["step_0000005_search.json"]
    said = job.train(*scored)
    assert said.index("the guidance search at step 10") < said.index("step 11/20")
    for other in (job, undisturbed):
        assert equal(other.tensors(20), straight.tensors(20))
        assert other.rows() == straight.rows()
    assert found(job.run) == found(undisturbed.run)
