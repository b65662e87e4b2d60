"""What torchrun or SLURM's srun says of this process: its rank, among how many. Reads the environment, nothing else.

SLURM sets SLURM_NTASKS and SLURM_PROCID in the shells of sbatch and salloc, too, where a program is one process alone.
SLURM_STEP_NUM_TASKS comes from srun, with the processes that it starts, and SLURM's variables count only beside it.
"""

from __future__ import annotations

import os
import socket

from unite_fast.base.errors import CommonError, UserError

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


def _number(name: str, slurm: str, default: int) -> int:
    step = "SLURM_STEP_NUM_TASKS" in os.environ
    source = name if name in os.environ else slurm
    if source not in os.environ or (source == slurm and not step):
        return default
    text = os.environ[source].strip()
    if not (text.isascii() and text.isdecimal()):
        raise CommonError(f"{source}={text!r} in the environment is not a number; unset it, or start with torchrun")
    return int(text)


def rank() -> int:
    """Of this process, 0 without a launcher. Raises CommonError where the environment contradicts itself."""
    number, world = _number("RANK", "SLURM_PROCID", 0), world_size()
    if number >= world:
        said = f"but WORLD_SIZE={world}" if "WORLD_SIZE" in os.environ else "and no WORLD_SIZE"
        raise CommonError(
            f"the environment says RANK={number} {said}; unset RANK, or start all processes with torchrun"
        )
    return number


def world_size() -> int:
    """How many processes were started together. Raises CommonError."""
    number = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    if number < 1:
        raise CommonError("WORLD_SIZE=0 in the environment; unset it, or start with torchrun")
    return number


def local_rank() -> int:
    """Among the processes of this node, so the number of its GPU."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def check_torchrun() -> None:
    """Raises UserError when the torchrun that started this process has ended: it holds the store where ranks meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    where = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", "", 0)
    try:
        socket.create_connection(where, timeout=10).close()
    except ConnectionRefusedError:
        raise UserError(f"torchrun is gone: nobody answers at {where[0]}:{where[1]}; start it again") from None
    except (OSError, OverflowError):  # of the network: who needs it will say so
        return


def lost_for_good() -> list[str]:
    """A line where torchrun restarts several nodes but one that was lost could not join again.

    Its agents keep one store over restarts, and a new agent is not told where that is; they make another one for each
    round where the variable says so.
    """
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not (several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return []
    return [
        "restarts       a lost node cannot join again; start with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node"
    ]


def check_meeting_point() -> None:
    """Raises CommonError when several processes are not told where they meet."""
    missing = [name for name in MEETING_POINT if not os.environ.get(name, "").strip()]
    if world_size() > 1 and missing:
        raise CommonError(
            f"{world_size()} processes, but no {' and no '.join(missing)} to meet at; start them with torchrun, or "
            f"export {' and '.join(MEETING_POINT)} before srun, as scripts/slurm/train.sbatch does"
        )
    port = os.environ.get("MASTER_PORT", "0")
    if world_size() > 1 and not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise CommonError(f"MASTER_PORT={port!r} in the environment is not a port; give a number below 65536")
