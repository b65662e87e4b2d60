"""What the card can do today, at the sizes and layouts of a step: roofline_measure.py, one row for each."""

from __future__ import annotations

import roofline_measure
import step_work
import torch
from training import configuration

from gpu_parts import Bench
from unite_fast.efficiency import precision


def run(bench: Bench) -> None:
    precision.setup(bench.device)
    model, batch = ("tiny", 4) if bench.toy else ("b", min(64, bench.batches()[0]))
    work = step_work.step(configuration(model, 3, batch, bench.device, ()), batch)
    dtype = torch.float32 if bench.toy else torch.bfloat16
    for row in roofline_measure.rows(work, bench.device, dtype, 2 if bench.toy else 5):
        bench.row("ceiling", batch=batch, **row)
