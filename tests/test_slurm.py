"""scripts/slurm/train.sbatch, with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support import ROOT

# Both write down how they were called; srun ends as the test says.
SRUN = '#!/bin/bash\necho "srun $*" >> calls\nexit "$SRUN_CODE"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo node1 || echo "scontrol $*" >> calls\n'


def calls(folder: Path, state: str, code: int) -> list[str]:
    """Of a job whose ranks end with ``code`` and leave a status.json of this state."""
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / "status.json").write_text(json.dumps({"state": state, "reason": "", "step": 5}))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SRUN_CODE": str(code), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "12",
    }  # fmt: skip
    words = ["bash", str(ROOT / "scripts" / "slurm" / "train.sbatch"), "configs/tiny.yaml", "seed=3"]
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
    srun, *rest = calls(tmp_path, state, code)
    assert rest == (["scontrol requeue 7"] if again else [])
    assert "--cpus-per-task=12 " in srun
    assert srun.endswith("--config configs/tiny.yaml run_dir=runs/tiny resume=auto seed=3")
