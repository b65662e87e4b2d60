"""A long run with a random fault every 20 to 40 steps: python tests/faults/soak.py [seed]

Faults: kill -9 of a rank, SIGTERM, the newest checkpoint cut short, one of its bits flipped. At the same world size the
final state must equal that of the undisturbed run bit for bit. A second disturbed run changes from two ranks to one and
back; its parameters must agree within rounding.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from jobs import Job, Launcher, equal

STEPS = 300
FAULTS = ("kill", "term", "truncate", "flip")
OPTIONS = (f"train.max_steps={STEPS}", "train.epochs=100", "train.checkpoint_every=10", "train.keep_last=3")


def damage(job: Job, how: str) -> str:
    newest = sorted((job.run / "checkpoints").glob("step-*[0-9]"))[-1]
    path = sorted(newest.glob("training*.safetensors"))[-1]
    if how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    return newest.name


def disturbed(job: Job, rng: random.Random, worlds: tuple[int, ...]) -> int:
    """Runs to the end through faults; how many there were."""
    step = starts = 0
    while True:
        step += rng.randint(20, 40)
        how, ranks = rng.choice(FAULTS), worlds[starts % len(worlds)]
        name = "term" if how == "term" else "kill"
        fault = f"{name}@rank={rng.randrange(ranks)},step={step},phase={rng.choice(('fwd', 'bwd', 'opt'))}"
        if step >= STEPS:
            job.train(*OPTIONS, ranks=ranks, seconds=600)
            return starts
        said = job.train(*OPTIONS, ranks=ranks, fault=fault, seconds=600, code=None)
        where = damage(job, how) if how in ("truncate", "flip") else ""
        chosen = [line for line in said.splitlines() if line.startswith(("resuming", "starting"))]
        print(f"{ranks} ranks, {chosen[0].split('checkpoints/')[-1]}; then {how} {where} at step {step}", flush=True)
        starts += 1


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    launcher = Launcher()
    with tempfile.TemporaryDirectory() as folder:
        straight = Job(launcher, Path(folder) / "straight")
        straight.train(*OPTIONS, seconds=600)
        expected = straight.tensors(STEPS)
        same = Job(launcher, Path(folder) / "same")
        count = disturbed(same, random.Random(seed), (2,))
        exact = equal(same.tensors(STEPS), expected) and same.rows() == straight.rows()
        print(f"{STEPS} steps, {count} faults, two ranks: {'bit-equal' if exact else 'DIFFERENT'}", flush=True)
        other = Job(launcher, Path(folder) / "other")
        count = disturbed(other, random.Random(seed + 1), (2, 1))
        final = other.tensors(STEPS)
        ratio = max(
            float((final[n] - v).norm() / v.norm().clamp(min=1e-3)) for n, v in expected.items() if n.startswith("ema.")
        )
        close = ratio < 0.02 and all(torch.isfinite(v).all() for v in final.values())
        print(f"{STEPS} steps, {count} faults, 2 -> 1 -> 2 ranks: EMA within {ratio:.1e} {'' if close else 'TOO FAR'}")
    return 0 if exact and close else 1


if __name__ == "__main__":
    sys.exit(main())
