"""scripts/slurm/train.sbatch, with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from unite_fast.config import batch_split
from unite_fast.config.yaml_text import load
from unite_fast.efficiency import compatibility

# Both write down how they were called; srun ends as the test says.
SRUN = '#!/bin/bash\necho "srun $*" >> calls\nexit "$SRUN_CODE"\n'
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo node1 || echo "scontrol $*" >> calls\n'


def calls(
    folder: Path,
    state: str,
    code: int,
    *overrides: str,
    run: str = "runs/tiny",
    script: Path | str = SCRIPT,
    **further: str,
) -> list[str]:
    """Of a job whose ranks end with ``code`` and leave a status.json of this state in ``run``."""
    (folder / run).mkdir(parents=True)
    (folder / run / "status.json").write_text(json.dumps({"state": state, "reason": "", "step": 5}))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SRUN_CODE": str(code), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "12", **further,
    }  # fmt: skip
    words = ["bash", str(script), *(["configs/tiny.yaml"] if Path(script) == SCRIPT else []), *overrides]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("state", "code", "again"),
    [
        ("preempted", 0, True),
        ("time_limit", 0, True),
        ("finished", 0, False),
        ("failed", 1, False),
        ("preempted", 2, False),  # the status of an earlier start; this one was refused before it wrote its own
    ],
)
def test_a_stopped_run_is_queued_again_and_a_failed_start_is_not(tmp_path, state, code, again):
    srun, *rest = calls(tmp_path, state, code, "seed=3")
    assert rest == (["scontrol requeue 7"] if again else [])
    assert "--cpus-per-task=12 " in srun
    assert srun.endswith("--config configs/tiny.yaml resume=auto seed=3 run_dir=runs/tiny")


def test_the_state_is_read_where_the_run_lies(tmp_path):
    _, *rest = calls(tmp_path, "preempted", 0, "run_dir=elsewhere", "seed=3", "run_dir=last one", run="last one")
    assert rest == ["scontrol requeue 7"]


def test_python_is_that_of_the_checkout_or_the_one_that_is_named(tmp_path):
    for name, further, expected in (
        ("installed", {}, "python"),
        ("checkout", {}, ".venv/bin/python"),
        ("named", {"PYTHON": "env/bin/python3"}, "env/bin/python3"),
    ):
        folder = tmp_path / name
        (folder / ".venv" / "bin").mkdir(parents=True)
        if name != "installed":
            (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
        srun = calls(folder, "finished", 0, **further)[0]
        assert f"--kill-on-bad-exit=1 {expected} train.py" in srun


def test_the_log_needs_no_folder():
    """SLURM opens it before the script runs and makes no folder for it."""
    found = re.search(r"^#SBATCH --output=(\S+)$", SCRIPT.read_text(), re.M)
    assert found is not None
    assert "/" not in found[1]


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_examples_for_more_nodes(tmp_path, nodes):
    """Sound shell, a header of its own, a configuration that its ranks can run, and scripts/slurm's ending."""
    script = ROOT / "examples" / "slurm" / f"nodes_{nodes}.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.M))
    assert header["nodes"] == str(nodes)
    shared = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(), re.M))
    assert header | {"nodes": "1", "job-name": "unite"} == shared
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    words = ("data.source=synthetic", "objective.perceptual_weight=0", "run_dir=here")
    srun, *rest = calls(tmp_path, "preempted", 0, *words, run="here", script=script)
    assert rest == ["scontrol requeue 7"]
    config, *given = srun.split("--config ")[1].split()
    loaded = load(str(ROOT / config), [word for word in given if not word.startswith(("resume=", "run_dir="))])
    world = nodes * int(header["ntasks-per-node"])
    compatibility.check(loaded.efficiency, loaded.train, world)
    assert batch_split(loaded.train, world)[0] >= 8
