"""Ways of computing a step together: the runs that docs/COMPOSITION.md names, and what it says is refused."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from ranks import on_ranks
from support import ROOT
from test_distributed import settings

from unite_fast import data
from unite_fast.efficiency import compiling
from unite_fast.objective import Objective
from unite_fast.optim import muon
from unite_fast.parallel import overlap
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble, health
from unite_fast.training.step import TrainStep
from unite_fast.training.weights import weights_of

EVERY = os.environ.get("COMPOSITION") == "all"
ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ("model.encoder.depth=2", "objective.flow_steps=1", "train.global_batch=8", "optim.warmup_epochs=0")
Found = dict[str, list[list[float]]]


@pytest.fixture(scope="module")
def composition() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("composition")


def losses(ranks: Ranks, words: tuple[str, ...], options: tuple[str, ...], steps: int) -> list[list[float]]:
    """Total and flow of each step; a score halfway, where there is one."""
    config = settings(*SMALL, *words)
    source, batch = data.open_source(config.data, config.model), config.train.global_batch
    state = assemble.fresh_state(config, ranks)
    state.model.train()
    parts = 2 if "accumulation" in options else 1
    objective = Objective.open(config.model, config.objective, config.efficiency)
    step = TrainStep(state, config, ranks, (batch // ranks.world_size // parts, parts), len(source), objective)
    stream = data.stream(source, 0, 0, batch, ranks.rank, ranks.world_size, ranks.device, 0, 30.0)
    rows = []
    for number in range(steps):
        metrics = step(next(stream))
        row = torch.stack([metrics["total"], metrics["flow"]]).float()
        ranks.average_([row])
        rows.append(row.tolist())
        if number == steps // 2 and "scores" in options:
            with weights_of(state, state.optimizer.ema) as model, torch.no_grad():
                if ranks.is_main:  # what a rank does with it is its own business
                    rows[-1].append(float(model.decode(torch.ones(1, *model.latent_shape)).square().mean()))
        if "replica check" in options and number % 10 == 9:
            health.check_replicas(state, ranks)
    return rows


def together(ranks: Ranks, runs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]], steps: int) -> Found:
    compiling.BACKEND = "eager"  # what the compiler is given, without its code
    overlap.BUCKET_ELEMENTS, muon.BUCKET_ELEMENTS = 8192, 4096
    return {name: losses(ranks, words, options, steps) for name, (words, options) in runs.items()}


@pytest.fixture(scope="module")
def found(composition) -> Found:
    """Of every run, on rank 0, and of the plain steps by their precision."""
    asked = "" if EVERY else composition.ASKED
    runs = {n: (composition.overrides(*run), run.options) for n, run in composition.RUNS.items() if n not in asked}
    made: Found = {}
    for count in sorted(set(composition.RANKS.values())):
        mine = {n: v for n, v in runs.items() if composition.RANKS[composition.RUNS[n].strategy] == count}
        made |= on_ranks(count, together, mine, composition.STEPS, seconds=900)[0]
    for precision in composition.TOLERANCE:
        # Several averages change no loss, and a warm-up of the main one what is scored.
        words = (*composition.OPTIONS[precision][1], *composition.OPTIONS["several averages"][1])
        made[precision] = losses(ALONE, words, ("scores",), composition.STEPS)
    return made


@pytest.mark.parametrize("name", "ABCDEFGHIJKLMNO")
def test_a_run_is_the_plain_one(composition, found, name):
    if name not in found:
        pytest.skip("takes long; COMPOSITION=all runs it")
    precision = composition.precision_of(composition.RUNS[name])
    for row, plain in zip(found[name], found[precision], strict=True):
        assert row == pytest.approx(plain, rel=0, abs=composition.TOLERANCE[precision] * plain[0])


def test_what_is_tolerated_would_be_noticed(composition, found):
    """The losses move by far more in those steps than a run may differ."""
    for precision, tolerance in composition.TOLERANCE.items():
        first, last = (found[precision][i][0] for i in (0, -1))
        assert abs(last / first - 1) > 5 * tolerance


def test_the_table_is_what_is_so(composition):
    assert composition.TARGET.read_text() == composition.text(), "run python scripts/composition.py"
    assert set(composition.RUNS) == set("ABCDEFGHIJKLMNO")
    for run in composition.RUNS.values():
        assert not composition.refusal(*run)
        keys = [composition.OPTIONS[option][0] for option in run.options]
        assert len(keys) == len(set(keys)), "one value of a key"


def test_whatever_can_run_is_run_somewhere(composition):
    """Each option under some strategy, each strategy with some options; refused ones in one line that says the mend."""
    for option in composition.OPTIONS:
        assert option in composition.GPU or composition.shown_by("", (option,)), option
    for said in composition.refusals():
        assert "\n" not in said
        assert "; " in said
