"""What a process takes itself for: alone, a rank of torchrun, or a rank of srun, by the variables that each sets."""

from __future__ import annotations

import socket

import pytest
from support import command

from unite_fast.base import launcher
from unite_fast.base.errors import UserError
from unite_fast.parallel import distributed

# As SLURM sets them (its manual pages of sbatch, salloc and srun), for a job of 8 tasks on one node.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NTASKS_PER_NODE": "8"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "5"}
SHELL = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # salloc as an interactive step
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}

FOUND = {
    "nothing": ({}, (0, 1, 0)),
    "torchrun": (TORCHRUN, (1, 2, 1)),
    "shell of salloc": (JOB, (0, 1, 0)),
    "shell of salloc in a step": (SHELL, (0, 1, 0)),
    "shell of sbatch": (BATCH, (0, 1, 0)),
    "srun": (STEP, (5, 8, 5)),
    "torchrun in sbatch": (BATCH | TORCHRUN, (1, 2, 1)),
    "torchrun in srun": (STEP | {"SLURM_STEP_NUM_TASKS": "1"} | TORCHRUN, (1, 2, 1)),
}


@pytest.fixture
def environment(monkeypatch):
    """A function that leaves of all launchers' variables those given."""

    def only(values: dict[str, str]) -> None:
        for name in JOB | BATCH | STEP | TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return only


@pytest.mark.parametrize("case", FOUND)
def test_rank_and_world(case, environment):
    values, expected = FOUND[case]
    environment(values)
    assert (launcher.rank(), launcher.world_size(), launcher.local_rank()) == expected


@pytest.mark.parametrize("values", [JOB, BATCH, SHELL], ids=["salloc", "sbatch", "interactive step"])
def test_a_program_in_a_shell_of_slurm_is_alone(values, environment):
    environment(values)
    assert distributed.start("cpu").world_size == 1


@pytest.mark.parametrize("known", [{}, {"MASTER_ADDR": "node1"}, {"MASTER_PORT": "29500"}], ids=str)
def test_srun_without_a_meeting_point(known, environment, tiny, tmp_path):
    """One line that names what is missing; of eight ranks the first prints it."""
    words = ("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", "device=cpu")
    environment(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"} | known)
    refused = command(*words)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    missing = " and no ".join(name for name in launcher.MEETING_POINT if name not in known)
    assert f"8 processes, but no {missing} to meet at" in refused.stderr
    assert "export MASTER_ADDR and MASTER_PORT before srun" in refused.stderr
    environment(STEP | known)
    assert command(*words).stderr == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 but WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a number"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc' in the environment is not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "but no MASTER_ADDR to meet at"),
    ],
    ids=str,
)
def test_an_environment_that_contradicts_itself(values, words, environment, tiny, tmp_path):
    """One line and exit code 2, in training and sampling alike, and nothing is made."""
    environment(values)
    for program in (
        ("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", "device=cpu"),
        ("sample.py", "--checkpoint", tmp_path / "none", "--seeds", "0", "--out", tmp_path / "s.npz"),
    ):
        refused = command(*program)
        if "MASTER_PORT" in values and program[0] == "sample.py":
            continue  # it looks at the checkpoint first
        assert refused.returncode == 2, refused
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(environment, tiny, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        words = ("--config", tiny, f"run_dir={tmp_path / 'run'}", "device=cpu", "comm.train_timeout=5")
        refused = command("train.py", *words, "train.micro_batch=8")
    assert refused.returncode == 2
    assert f"no meeting at 127.0.0.1:{port}" in refused.stderr
    assert refused.stderr.count("\n") == 1


NODES = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    "other", [{}, *({name: value} for name, value in zip(NODES, ("1", "0", "False"), strict=True))]
)
def test_nodes_that_could_not_join_again_are_told(other, monkeypatch):
    """tests/faults/test_nodes.py loses one, with the variable that the line names."""
    for name, value in (NODES | other).items():
        monkeypatch.setenv(name, value)
    said = launcher.lost_for_good()
    assert len(said) == (not other)
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node" in line for line in said)


def test_a_torchrun_that_has_ended_before_its_rank_began(monkeypatch):
    """Its rank would train on alone, in the way of the next start: nothing tells it of a parent that it never saw."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.socket() as store:
        store.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        with pytest.raises(UserError, match=r"torchrun is gone: nobody answers at localhost:\d+; start it again"):
            launcher.check_torchrun()
        store.listen()
        launcher.check_torchrun()
