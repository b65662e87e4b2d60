"""F48: two nodes of two ranks, under an agent of torchrun each, that meet through c10d."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from jobs import STRAIGHT, Job, Rank, free_port

fault = pytest.mark.fault
# As README has it. An agent that keeps its store over restarts says in the first round alone where it is.
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Nodes:
    """The agents of a job's two nodes; the first keeps the meeting."""

    def __init__(self, job: Job) -> None:
        self.job, self.endpoint = job, f"127.0.0.1:{free_port()}"
        self.agents: list[Rank] = []

    def start(self, node: int) -> Rank:
        words = ["agent", int(node == 0), self.endpoint, 2, "--config", self.job.config, f"run_dir={self.job.run}"]
        output = self.job.folder / f"agent_{len(self.agents)}.txt"
        self.agents.append(self.job.launcher.start([*words, *STRAIGHT], ANEW, output))
        return self.agents[-1]

    def lose(self, agent: Rank) -> None:
        """Agent and ranks at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)


@pytest.fixture
def nodes(job):
    made = Nodes(job)
    yield made
    for agent in made.agents:
        made.lose(agent)


@fault("F48", "a node is lost, and started again", "the other one's agent waits; all ranks meet and resume")
def test_a_lost_node(nodes, job, straight):
    """The agents then count different numbers of restarts."""
    first, lost = nodes.start(0), nodes.start(1)
    first.until("step 8/", 120)
    nodes.lose(lost)
    again = nodes.start(1)
    assert [agent.wait(180) for agent in (first, again)] == [0, 0], first.said() + again.said()
    assert "step-0000005 at step 5: the newest that verifies" in first.said()
    assert len(job.rows()) == 20
    for ours, expected in zip(job.rows(), straight.rows(), strict=True):
        assert ours[:2] == expected[:2]
        assert ours == pytest.approx(expected, rel=2e-3)  # four ranks where there were two
