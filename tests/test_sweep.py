"""Sweeps: runs by seeds, what is finished stays, the table, the job array; and base files of configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import TINY, command, command_of

from unite_fast import checkpoint, sweep
from unite_fast.base.errors import RunError, UserError
from unite_fast.config import yaml_text

SWEEP = """\
config: tiny.yaml
out: {out}
seeds: [0, 3]
overrides: [train.max_steps=1]
runs:
  plain:
  other: [model.time_shift=1.0]
then:
  - {{command: [measure, "{{run}}"], makes: found.json}}
table:
  score: [found.json, result, "0"]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(out=tmp_path / "runs"))
    return tmp_path


@pytest.fixture
def called(monkeypatch) -> list[list[str]]:
    """The commands that a sweep starts, done here without processes of their own; those with "fails" in them fail."""
    calls: list[list[str]] = []

    def run(words: list[str], log: Path) -> None:
        calls.append(words)
        log.parent.mkdir(parents=True, exist_ok=True)
        if any("fails" in word for word in words):
            raise RunError("failed")
        if words[3] == "train":
            said = command("train.py", *words[4:])
            assert said.returncode == 0, said.stderr
        else:
            (Path(words[-1]) / "found.json").write_text(json.dumps({"result": [len(calls)]}))

    monkeypatch.setattr(sweep, "_call", run)
    return calls


def test_runs_by_seeds_once_and_their_table(place, called):
    said = command_of(sweep.main, place / "sweep.yaml", "train.log_every=1")
    assert said.returncode == 0, said.stderr
    assert len(called) == 8
    order = [Path(words[-1]).relative_to(place / "runs").as_posix() for words in called[1::2]]
    assert order == ["plain/seed_0", "other/seed_0", "plain/seed_3", "other/seed_3"]
    resolved = yaml_text.load(place / "runs/other/seed_3/config.resolved.yaml")
    assert (resolved.name, resolved.seed, resolved.model.time_shift) == ("other", 3, 1.0)
    rows = json.loads((place / "runs" / "table.json").read_text())["rows"]
    assert rows["plain"]["score"] == {"mean": 4.0, "low": 2.0, "high": 6.0, "values": {"0": 2.0, "3": 6.0}}
    assert "| plain | 2 | 4 (2 to 6) |" in (place / "runs" / "table.md").read_text()
    assert (place / "runs" / "table.png").stat().st_size > 1000
    (place / "runs/other/seed_3/found.json").unlink()
    assert command_of(sweep.main, place / "sweep.yaml", "train.log_every=1").returncode == 0
    assert len(called) == 9  # only what was missing
    changed = command_of(sweep.main, place / "sweep.yaml", "train.log_every=1", "optim.lr=1")
    assert changed.returncode == 2
    assert "was made with optim.lr=0.002, this sweep says 1.0" in changed.stderr
    alone = command_of(sweep.main, place / "sweep.yaml", "--collect", "--only", "other")
    assert "| other | 2 |" in alone.stdout
    assert "plain" not in alone.stdout


def test_a_result_of_an_earlier_checkpoint_is_made_again(tmp_path):
    run = sweep.Run("a", 0, tmp_path, tmp_path / "tiny.yaml", [])
    newest = tmp_path / "checkpoints" / "step-0000002"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text("{}")
    path, now = tmp_path / "found.json", checkpoint.identity(newest)
    assert not sweep.is_made(run, path)
    for protocol in ({"checkpoint": {"sha256": now}}, {"checkpoints": {"a": {"sha256": now}}}, {}, {"checkpoint": 1}):
        path.write_text(json.dumps({"protocol": protocol}))
        assert sweep.is_made(run, path)
    for protocol in ({"checkpoint": {"sha256": "0"}}, {"checkpoints": {"a": {"sha256": "0"}}}):
        path.write_text(json.dumps({"protocol": protocol}))
        assert not sweep.is_made(run, path)
    path.write_text("[1]")
    assert sweep.is_made(run, path)


def test_a_failure_stops_the_sweep_and_says_where(place, called):
    text = (place / "sweep.yaml").read_text().replace("measure", "fails")
    (place / "sweep.yaml").write_text(text)
    said = command_of(sweep.main, place / "sweep.yaml")
    assert said.returncode == 1
    assert len(called) == 2


def test_a_program_that_fails_leaves_its_words(tmp_path):
    words = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
    with pytest.raises(RunError, match="ended with code 3"):
        sweep._call(words, tmp_path / "a" / "log")
    assert (tmp_path / "a" / "log").read_text() == "why\n"


def test_the_job_array_is_bash_and_has_every_run(place):
    said = command_of(sweep.main, place / "sweep.yaml", "--slurm", place / "array.sh")
    assert said.returncode == 0, said.stderr
    text = (place / "array.sh").read_text()
    assert "#SBATCH --array=0-3" in text
    assert "#SBATCH --gpus-per-node=8" in text
    assert subprocess.run(["bash", "-n", place / "array.sh"], check=False).returncode == 0
    case = next(line for line in text.splitlines() if line.startswith("3) "))
    assert "model.time_shift=1.0" in case
    assert "seed=3" in case
    assert not (place / "runs").exists()
    again = command_of(sweep.main, place / "sweep.yaml", "--slurm", place / "array.sh")
    assert again.returncode == 0
    (place / "notes").write_text("mine")
    assert command_of(sweep.main, place / "sweep.yaml", "--slurm", place / "notes").returncode == 2


WRONG = {
    "runs:": ("no runs", "it needs runs"),
    "seeds: [0, 3]": ("seeds: [a]", "seeds must be a list of whole numbers"),
    "overrides: [train.max_steps=1]": ("overrides: no", "overrides must be a list"),
    "  plain:": ("  pl/ain:", "is no name of a folder"),
    "table:": ("tables:", "unknown key 'tables'"),
    "[model.time_shift=1.0]": ("[model.time_shaft=1.0]", "did you mean"),
    "makes: found.json": ("makes: [1]", "what it makes"),
    "config: tiny.yaml": ("config: none.yaml", "No such file"),
}


@pytest.mark.parametrize("part", WRONG)
def test_what_is_wrong_is_one_line(place, called, part):
    instead, words = WRONG[part]
    text = (place / "sweep.yaml").read_text()
    text = "out: x" if instead == "no runs" else text.replace(part, instead)
    (place / "sweep.yaml").write_text(text)
    said = command_of(sweep.main, place / "sweep.yaml")
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert words in said.stderr
    assert not called


# --- base ---


def test_a_file_begins_with_its_base(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "first.yaml").write_text("optim: {lr: 0.5, clip: 2}\nmodel: {encoder: small}")
    (tmp_path / "below" / "second.yaml").write_text("base: ../first.yaml\nname: second\noptim: {lr: 0.25}")
    (tmp_path / "below" / "third.yaml").write_text("base: second.yaml\nmodel: {encoder: {depth: 5}}")
    found = yaml_text.load(tmp_path / "below" / "third.yaml", ["optim.eps=1e-5"])
    assert (found.name, found.optim.lr, found.optim.clip, found.optim.eps) == ("second", 0.25, 2, 1e-5)
    assert (found.model.encoder.depth, found.model.encoder.width) == (5, 384)
    shown = command("train.py", "--config", tmp_path / "below" / "third.yaml", "--print-config").stdout
    assert "base:" not in shown.splitlines()
    (tmp_path / "resolved.yaml").write_text(shown)
    assert yaml_text.load(tmp_path / "resolved.yaml") == yaml_text.load(tmp_path / "below" / "third.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a.yaml", "this file is its own base"),
        ("base: b.yaml", "this file is its own base"),
        ("base: nowhere.yaml", r"a\.yaml: base .*nowhere\.yaml: No such file"),
        ("base: [x]", "base must be the path"),
        ("base:", "base must be the path"),
    ],
)
def test_bases_that_are_none(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match=words):
        yaml_text.load(tmp_path / "a.yaml")


def test_an_override_has_no_base():
    with pytest.raises(UserError, match="unknown key 'base'"):
        yaml_text.load(None, ["base=x.yaml"])
