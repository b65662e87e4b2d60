"""Sweeps: runs by seeds, what is finished stays, the table, the job array."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import ROOT, TINY, command, command_of

from unite_fast import checkpoint, sweep
from unite_fast.base.errors import RunError
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
  - {{command: [small, "{{run}}"], makes: found.json}}
table:
  score: [found.json, result, "0"]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(out=tmp_path / "runs"))
    return tmp_path


def leave(words: list[str], state: str = "finished") -> None:
    """What a run of train.py with these words leaves of its configuration and its end."""
    said = command("train.py", *words, "--print-config")
    assert said.returncode == 0, said.stderr
    folder = Path(words[-1].removeprefix("run_dir="))
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(said.stdout)
    (folder / "status.json").write_text(json.dumps({"state": state}))


@pytest.fixture
def called(monkeypatch) -> list[list[str]]:
    """The commands that a sweep starts, which do at once what they would; those with "fails" in them fail."""
    calls, start = [], sweep._call

    def run(words: list[str], log: Path) -> None:
        calls.append(words)
        if "fails" in words:
            start(["bash", "-c", "exit 3"], log)
        elif words[3] == "train":
            leave(words[4:])
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
    settled = command_of(sweep.main, place / "sweep.yaml", "train.log_every=1", "efficiency.kernels=auto")
    assert settled.returncode == 0, settled.stderr  # the machine chose eager
    changed = command_of(sweep.main, place / "sweep.yaml", "train.log_every=1", "optim.lr=1")
    assert changed.returncode == 2
    assert "was made with optim.lr=0.002, this sweep says 1.0" in changed.stderr
    alone = command_of(sweep.main, place / "sweep.yaml", "--collect", "--only", "other")
    assert "| other | 2 |" in alone.stdout
    assert "plain" not in alone.stdout
    assert json.loads((place / "runs" / "table.json").read_text())["rows"].keys() == {"plain", "other"}


def test_what_has_stopped_before_its_end_is_not_scored(place, called, monkeypatch):
    """train.max_minutes, or a signal, ends a run with code 0."""
    monkeypatch.setattr(sys.modules[__name__], "leave", functools.partial(leave, state="time_limit"))
    said = command_of(sweep.main, place / "sweep.yaml")
    assert said.returncode == 1
    assert "plain/seed_0 has stopped before its end; the same command goes on" in said.stderr
    assert len(called) == 1


def test_a_part_begins_beside_another(place, called):
    for name in ("plain", "other"):
        said = command_of(sweep.main, place / "sweep.yaml", "--only", name)
        assert said.returncode == 0, said.stderr
        (place / "runs" / "table.json").unlink()  # as long as the first part is at work
    assert {Path(words[-1]).parent.name for words in called[1::2]} == {"plain", "other"}


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


def test_a_column_that_leads_nowhere_is_said_once(place, called):
    """Its file is there and its keys are not; of a file that is not there nothing is said."""
    text = (place / "sweep.yaml").read_text()
    more = '  lost: [found.json, results, "0"]\n  none: [other.json, a]\n  nan: [nan.json, a]\n'
    (place / "sweep.yaml").write_text(text + more)
    assert command_of(sweep.main, place / "sweep.yaml").returncode == 0
    for seed in (0, 3):
        (place / f"runs/plain/seed_{seed}/nan.json").write_text('{"a": NaN}')
    said = command_of(sweep.main, place / "sweep.yaml", "--collect").stdout
    where = place / "runs" / "plain" / "seed_0"
    line = f"no number in: lost (results 0 in {where / 'found.json'}), nan (a in {where / 'nan.json'}); look at the"
    assert said.count("no number in") == said.count(line) == 1
    rows = json.loads((place / "runs" / "table.json").read_text())["rows"]
    assert rows["plain"].keys() == {"score"}


def test_a_failure_stops_the_sweep_and_says_where(place, called):
    text = (place / "sweep.yaml").read_text().replace("small", "small, fails")
    (place / "sweep.yaml").write_text(text)
    said = command_of(sweep.main, place / "sweep.yaml")
    assert said.returncode == 1
    assert len(called) == 2
    assert said.stderr.endswith(f"its output is at the end of {place / 'runs' / 'plain' / 'seed_0.log'}\n")


def test_a_program_that_fails_leaves_its_words(tmp_path):
    words, log = ["bash", "-c", "echo why; exit 3"], tmp_path / "a" / "log"
    with pytest.raises(RunError, match=f"^bash -c 'echo why; exit 3' ended with code 3; its output .* end of {log}$"):
        sweep._call(words, log)
    assert log.read_text() == "why\n"


PROGRAM = """
import pathlib, signal, sys, time
asked, note = [], pathlib.Path(sys.argv[1])
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
note.write_text("")
while not asked:
    time.sleep(0.01)
time.sleep(0.6)
note.write_text(f"saved, asked {len(asked)} times")
"""


def test_ctrl_c_waits_for_what_the_run_saves(tmp_path):
    def interrupt() -> None:
        while not (tmp_path / "note").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweep._call([sys.executable, "-c", PROGRAM, str(tmp_path / "note")], tmp_path / "log")
    assert (tmp_path / "note").read_text() == "saved, asked 1 times"


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


PYTHON = """\
#!/bin/bash
printf '%s\\0' "$@" >> calls; printf '\\n' >> calls
[[ " $* " != *" small "* ]] || echo '{{"result": [5]}}' > {run}/found.json
"""
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@"
"""
SCONTROL = """\
#!/bin/bash
echo node1
"""


def test_a_task_of_the_array_trains_and_measures_its_member(place):
    """Task 3, with stand-ins for SLURM's commands and one for Python, whose training is then done for it."""
    assert command_of(sweep.main, place / "sweep.yaml", "--slurm", place / "array.sh").returncode == 0
    run = place / "runs" / "other" / "seed_3"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON.format(run=run))):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    (place / "scripts").symlink_to(ROOT / "scripts")
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "1"}
    environment = {"PATH": f"{place}:{os.environ['PATH']}", **task}

    def started() -> list[list[str]]:
        """The words of each Python that the task starts."""
        words = ["bash", str(place / "array.sh")]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        calls = (place / "calls").read_text().splitlines()
        (place / "calls").unlink()
        return [call.split("\0")[:-1] for call in calls]

    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "preempted"}')
    ((program, *words),) = started()  # it goes back into the queue, and is not measured
    assert program == "train.py"
    (run / "status.json").unlink()
    said = command(program, *words)
    assert said.returncode == 0, said.stderr
    assert "finished: 1 of 1 steps" in said.stdout
    assert started() == [["train.py", *words], ["-m", "unite_fast", "small", str(run)]]
    assert started() == [["train.py", *words]]  # what is measured is not measured again
    assert "| other | 1 | 5 |" in command_of(sweep.main, place / "sweep.yaml", "--collect").stdout
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / "python").rename(place / ".venv" / "bin" / "python")
    (run / "found.json").unlink()
    assert len(started()) == 2  # the checkout's Python, for both


WRONG = {
    "runs:": ("no runs", "it needs runs"),
    "seeds: [0, 3]": ("seeds: [a]", "seeds must be a list of whole numbers"),
    "overrides: [train.max_steps=1]": ("overrides: no", "overrides must be a list"),
    "  plain:": ("  pl/ain:", "is no name of a folder"),
    "table:": ("tables:", "unknown key 'tables'"),
    "[model.time_shift=1.0]": ("[model.time_shaft=1.0]", "did you mean"),
    "makes: found.json": ("makes: [1]", "what it makes"),
    "[small, ": ("[smal, ", "then: no command 'smal'; choose one of train, "),
    '[small, "{run}"]': ("[]", "then: no command ''"),
    "then:": ("then: 3\nthem:", "then must be a list of commands"),
    "out: ": ("out: 7 #", "out must be a folder"),
    "config: tiny.yaml\nout: ": ("config: tiny.yaml\nout: $NO_SUCH_VARIABLE/", "has no NO_SUCH_VARIABLE"),
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
