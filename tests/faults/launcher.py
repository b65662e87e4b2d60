"""A server that has imported the training program and forks it: a rank starts in a blink instead of in seconds.

One JSON request per line on stdin, one answer per line on stdout:
    {"start": [arguments], "environment": {...}, "folder": cwd, "output": file} -> pid
    {"wait": pid, "seconds": s} -> exit code (negative: the signal that ended it), or null when it still runs
"""

from __future__ import annotations

import json
import os
import sys
import time

import agent
import sklearn.datasets  # what a run imports late is imported here, once: half of a short run's time
import sklearn.neural_network  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from forked import end_with

import sample
import train
import unite_fast.base.command
from unite_fast import export
from unite_fast.checkpoint import dcp  # noqa: F401
from unite_fast.run import garbage

PROGRAMS = {"train.py": train.main, "sample.py": sample.main, "export": export.main, "agent": agent.main}


def run(request: dict) -> None:
    """In the forked child; never returns."""

    def call() -> int:
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        if limit := request["environment"].get("FILE_SIZE_LIMIT"):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        torch.set_num_threads(1)
        program, *arguments = request["start"]
        return unite_fast.base.command.run(PROGRAMS[program], arguments)

    end_with(call, failed=1)


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def main() -> None:
    garbage.keep()  # a rank that looked through all that is imported would copy it
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run(request)
            answer: int | None = pid
        else:
            answer = wait(request["wait"], request["seconds"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # tidying up what was imported would take seconds
