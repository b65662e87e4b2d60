"""Every end of a run says why, where it is saved, and how to go on."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal

from support import command

from unite_fast.run.session import Session

KEYS = ("train.max_steps=3", "train.checkpoint_every=2")


def test_a_run_that_is_done(tiny, tmp_path):
    words = ("--config", tiny, f"run_dir={tmp_path / 'run'}", *KEYS)
    for _ in range(2):  # a second start has nothing to do, and says the same
        done = command("train.py", *words)
        first, *more = done.stdout.splitlines()[-4:]
        assert re.match(r"finished: 3 of 3 steps, \d+:\d\d minutes", first), done.stderr
        assert first.endswith(f"saved in {tmp_path / 'run' / 'checkpoints' / 'step-0000003'}")
        assert [line.split(":")[0] for line in more] == ["to see it", "to sample", "to go on"]
        assert more[1].endswith(f"--checkpoint {tmp_path / 'run'} --out samples.png")
        with (tmp_path / "run" / "starts.jsonl").open("ab") as starts:  # of a disk that lies: kept, and no obstacle
            starts.write(b"\x9b\xff")
    said = (tmp_path / "run" / "starts.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in said[::2]] == [0, 3]
    assert said[1::2] == [b"\x9b\xff"] * 2


def test_the_time_is_over(tiny, tmp_path):
    done = command("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *KEYS, "train.max_minutes=1e-6")
    assert done.stdout.splitlines()[-2:] == [
        f"stopped at step 1 of 3: train.max_minutes is over; saved in {tmp_path / 'run'}/checkpoints/step-0000001",
        "to go on: start the same command again",
    ]


def test_ctrl_c(tiny, tmp_path, monkeypatch):
    boundary = Session.boundary

    def interrupted(session, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return boundary(session, step)

    monkeypatch.setattr(Session, "boundary", interrupted)
    done = command("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *KEYS)
    assert done.returncode == 0
    said = f"stopped at step 2 of 3: SIGINT on rank 0; saved in {tmp_path / 'run'}/checkpoints/step-0000002"
    assert done.stdout.splitlines()[-2] == said


def test_an_error(tiny, tmp_path, monkeypatch):
    boundary = Session.boundary

    def broken(session, step):
        if step == 3:
            raise RuntimeError("out of memory")
        return boundary(session, step)

    monkeypatch.setattr(Session, "boundary", broken)
    done = command("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *KEYS)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory")
    said = "ended after step 2 by an error; saved until step 2, from where the same command goes on"
    assert done.stdout.splitlines()[-1] == said


def test_held_out_images_are_scored_while_training(tiny, tmp_path):
    """PSNR and L1, without any network that looks at images."""
    keys = ("evaluation.heldout_epoch=0.02", "evaluation.count=20", *KEYS)
    done = command("train.py", "--config", tiny, f"run_dir={tmp_path / 'run'}", *keys)
    assert "the score of held-out samples at step 2: psnr" in done.stdout, done.stderr
    found = json.loads((tmp_path / "run" / "scores" / "training" / "step_0000002_heldout.json").read_text())
    assert found["result"]["images"] == 300
    assert found["protocol"]["extractor"] is None
    assert found["result"].keys() >= {"psnr", "l1", "flow", "flow_t0.3", "cosine", "cosine_mean"}
    assert found["result"]["explained"] < 1
    assert "rfid" not in found["result"]


def test_a_profile_of_two_steps(tiny, tmp_path):
    """A trace with the parts of a step by name, a table of them, and the numbers of a run without."""
    words = ("--config", tiny, *KEYS, "train.micro_batch=16", "model.encoder.depth=2", "efficiency.kernels=fused")
    done = command("train.py", *words, f"run_dir={tmp_path / 'traced'}", "train.profile=2-3")
    assert f"profile of steps 2 to 3 in {tmp_path / 'traced' / 'profile'}" in done.stdout, done.stderr
    with gzip.open(tmp_path / "traced" / "profile" / "trace.json.gz") as file:
        found = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"tokenize", "denoise", "decode", "losses", "update"} <= found
    table = (tmp_path / "traced" / "profile" / "table.txt").read_text().splitlines()
    assert [line.split()[:2] for line in table[1:6]] == [
        ["tokenize", "1.0"], ["denoise", "2.0"], ["decode", "1.0"], ["losses", "1.0"], ["update", "1.0"],
    ]  # fmt: skip
    assert command("train.py", *words, f"run_dir={tmp_path / 'plain'}").returncode == 0
    rows = [[json.loads(line)["total"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("traced", "plain")]  # fmt: skip
    assert rows[0] == rows[1]
    assert "as 10-12" in command("train.py", *words, f"run_dir={tmp_path / 'x'}", "train.profile=3").stderr
