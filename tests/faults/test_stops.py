"""F25, F28-F32, F43: signals, budgets, hangs, and two jobs in one folder."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from jobs import STRAIGHT, equal
from test_images import folder_job, images  # noqa: F401  (a fixture)
from test_resume import torchrun

fault = pytest.mark.fault
SLOW = "sleep@phase=fwd,seconds=0.1,steps=1000"  # per micro-batch, so that a signal meets a run in progress


def says_how_it_ended(said, why):
    """Once, whatever the number of ranks: why, where it is saved, how to go on."""
    assert said.count(f": {why}; saved in ") == 1, said
    assert said.count("stopped at step ") == said.count("to go on: start the same command again") == 1


def resumes_exactly(job, straight):
    """What was stopped goes on to the undisturbed end."""
    stopped = job.status["step"]
    assert stopped in job.steps()
    assert job.status["last_good"] == stopped
    said = job.train(*STRAIGHT)
    assert f"at step {stopped}: the newest that verifies" in said
    assert said.count("finished: 20 of 20 steps") == said.count("to sample: ") == said.count("to go on: ") == 1
    assert equal(job.tensors(20), straight.tensors(20))
    assert job.rows() == straight.rows()
    assert job.status["state"] == "finished"


@fault("F25", "hung collective", "the peer raises within the timeout, its stacks are dumped, the job ends")
def test_stopped_rank(job):
    ranks = job.start("train.max_steps=20", "comm.train_timeout=8", fault="stop@rank=1,step=5,phase=bwd")
    ranks[0].until("step 4/")
    started = time.monotonic()
    assert ranks[0].wait(30) == 1
    assert "another rank is gone or stuck" in ranks[0].said()
    assert time.monotonic() - started < 15
    ranks[1].kill(signal.SIGKILL)
    ranks[1].wait()
    log = (job.run / "logs" / "rank_000.log").read_text()
    assert "Timeout (0:00:06" in log  # faulthandler
    assert "overlap.py" in log
    assert "in finish" in log
    assert job.status["state"] == "failed"


@fault("F25", "hung collective", "the same in a save, which the other rank does not commit alone")
def test_stopped_while_saving(job):
    words = ("train.max_steps=2000", "train.epochs=1000", "train.checkpoint_every=5", "comm.train_timeout=8")
    ranks = job.start(*words, fault="stop@rank=1,step=10,phase=ckpt.write")
    started = time.monotonic()
    assert ranks[0].wait(40) == 1
    assert time.monotonic() - started < 30
    ranks[1].kill(signal.SIGKILL)
    ranks[1].wait()
    assert job.steps() == [5]
    assert job.status["state"] == "failed"


@fault("F28", "SIGTERM to torchrun", "all ranks stop after the same step, save, status preempted, within the grace")
def test_sigterm_to_torchrun(jobs, images):  # noqa: F811
    """With decoding workers, which the signal to a rank's group must not end."""
    job, straight = folder_job(jobs, images), folder_job(jobs, images, "straight")
    for one in (job, straight):
        config = one.config.read_text().replace("workers: 0", "workers: 1").replace("epochs: 1,", "epochs: 2,")
        one.config.write_text(config)
    straight.train(*STRAIGHT)
    process = torchrun(job, *STRAIGHT, restarts=0, fault=SLOW)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 30
    assert job.status["state"] == "preempted"
    assert "SIGTERM" in job.status["reason"]
    resumes_exactly(job, straight)


@fault("F29", "SIGUSR1 or SIGTERM to one rank", "all ranks stop after the same step, save, exit 0; resume is exact")
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_signal_to_one_rank(job, straight, number, rank):
    ranks = job.start(*STRAIGHT, fault=SLOW)
    ranks[0].until("step 3/")
    ranks[rank].kill(number)
    assert [r.wait() for r in ranks] == [0, 0]
    assert job.status["state"] == "preempted"
    assert job.status["reason"] == f"{number.name} on rank {rank}"
    assert 3 <= job.status["step"] < 20
    resumes_exactly(job, straight)


@fault("F30", "wall-time budget", "saves, exits 0, status time_limit; the same command goes on")
def test_time_limit(job, straight):
    said = job.train(*STRAIGHT, "train.max_minutes=0.03", fault=SLOW)
    says_how_it_ended(said, "train.max_minutes is over")
    assert job.status["state"] == "time_limit"
    assert job.status["step"] < 20
    resumes_exactly(job, straight)


@fault("F31", "second SIGTERM in a save", "the save finishes; nothing is torn")
def test_second_sigterm(job, straight):
    ranks = job.start(*STRAIGHT, fault=f"{SLOW};sleep@phase=ckpt.write,seconds=1.5")
    ranks[0].until("step 2/")
    ranks[0].kill(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not job.leftovers():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks[0].kill(signal.SIGTERM)
    assert [r.wait() for r in ranks] == [0, 0]
    assert job.leftovers() == []
    resumes_exactly(job, straight)


@fault("F32", "Ctrl-C once", "the step is finished and saved, exit 0")
def test_interrupted_once(job, straight):
    ranks = job.start(*STRAIGHT, fault=SLOW)
    ranks[0].until("step 3/")
    for rank in ranks:  # a terminal interrupts every process, and torchrun interrupts them once more
        rank.kill(signal.SIGINT)
        rank.kill(signal.SIGINT)
    assert [r.wait() for r in ranks] == [0, 0]
    says_how_it_ended("".join(r.said() for r in ranks), "SIGINT on rank 0")
    assert job.status["state"] == "preempted"
    resumes_exactly(job, straight)


@fault("F32", "Ctrl-C twice", "exit at once with 130; no torn checkpoint; the next start goes on")
def test_interrupted_twice(job, straight):
    job.train("train.max_steps=3", *STRAIGHT[1:], ranks=1)
    (rank,) = job.start(*STRAIGHT, ranks=1, fault=f"{SLOW};sleep@phase=ckpt.write,seconds=60")
    rank.until("step 4/")
    rank.kill(signal.SIGINT)
    deadline = time.monotonic() + 20
    while not job.leftovers():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.2)  # beyond the time in which a repeated signal counts as the same one
    started = time.monotonic()
    rank.kill(signal.SIGINT)
    assert rank.wait(10) == 130
    assert time.monotonic() - started < 15
    assert job.steps() == [3]
    said = job.train("train.max_steps=4", *STRAIGHT[1:], ranks=1)
    assert "at step 3: the newest that verifies" in said
    assert job.leftovers() == []


@fault("F43", "two jobs in one folder", "the second is refused with process and host; the first goes on")
def test_two_jobs(job, straight):
    ranks = job.start(*STRAIGHT, fault=SLOW.replace("0.1", "0.4"))  # not at its end before the second has asked
    ranks[0].until("step 2/")
    started = time.monotonic()
    said = job.train(*STRAIGHT, code=2)
    assert time.monotonic() - started < 10
    assert f"is in use by pid {ranks[0].pid} on {socket.gethostname()}" in said
    assert said.count("error:") == 1
    assert [r.wait() for r in ranks] == [0, 0]
    assert equal(job.tensors(20), straight.tensors(20))
    assert os.path.exists(job.run / "run.lock")
