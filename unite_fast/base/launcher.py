"""What torchrun or SLURM's srun says of this process: its rank, among how many. Reads the environment, nothing else.

SLURM sets SLURM_NTASKS and SLURM_PROCID in the shells of sbatch and salloc, too, where a program is one process alone.
SLURM_STEP_NUM_TASKS comes from srun, with the processes that it starts, and SLURM's variables count only beside it.
"""

from __future__ import annotations

import os

from unite_fast.base.errors import CommonError

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


def _number(name: str, slurm: str, default: int) -> int:
    if name in os.environ:
        return int(os.environ[name])
    return int(os.environ.get(slurm, default)) if "SLURM_STEP_NUM_TASKS" in os.environ else default


def rank() -> int:
    """Of this process, 0 without a launcher."""
    return _number("RANK", "SLURM_PROCID", 0)


def world_size() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def local_rank() -> int:
    """Among the processes of this node, so the number of its GPU."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def check_meeting_point() -> None:
    """Raises CommonError when several processes are not told where they meet."""
    missing = [name for name in MEETING_POINT if name not in os.environ]
    if world_size() > 1 and missing:
        raise CommonError(
            f"{world_size()} processes, but no {' and no '.join(missing)} to meet at; start them with torchrun, or "
            f"export {' and '.join(MEETING_POINT)} before srun, as scripts/slurm/train.sbatch does"
        )
