"""Scores while training: when they are due, that they are those of the commands, that the run does not change."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import command_on_ranks, on_ranks
from stepping import load_tiny
from support import TINY, command, command_of
from test_evaluation_fid import weights  # noqa: F401  (a fixture)

import train as train_program
from unite_fast import checkpoint, evaluate, export
from unite_fast.config import EvaluationConfig
from unite_fast.evaluation import statistics
from unite_fast.parallel.distributed import Ranks
from unite_fast.parallel.tensors import whole
from unite_fast.run import monitor

# 16 images per step, 1,497 per epoch: the end of a tenth of an epoch, 150 images, falls into steps 10 and 19.
SCORED = (
    "evaluation.fid_epoch=0.1", "evaluation.rfid_epoch=0.2", "evaluation.count=40", "evaluation.extractor=digits",
    "evaluation.precision=fp32", "train.max_steps=20", "train.checkpoint_every=10", "train.keep_last=5",
    "optim.lr=6e-3", "sample.cfg_scale=1.4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the configuration, statistics of the real digits, and a run that is scored on the way."""
    path = tmp_path_factory.mktemp("monitored")
    (path / "tiny.yaml").write_text(TINY)
    words = ("--config", path / "tiny.yaml", "--extractor", "digits", "--out", path / "real.npz")
    assert command_of(statistics.main, *words).returncode == 0
    said = train(path, "scored", *SCORED)
    assert "the guidance search at step 10 at w = " in said
    return path


def train(folder: Path, name: str, *overrides: str) -> str:
    words = (
        "--config",
        folder / "tiny.yaml",
        f"run_dir={folder / name}",
        f"evaluation.reference={folder / 'real.npz'}",
    )
    result = command("train.py", *words, *overrides)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def tensors(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / name / "checkpoints" / f"step-{step:07d}")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())


def scores(folder: Path, name: str) -> dict[str, dict]:
    found = sorted((folder / name / "scores" / "training").iterdir())
    return {path.name: json.loads(path.read_text()) for path in found}


def figures(content: dict) -> list:
    """What does not depend on the clock."""
    keys = ("fid", "is", "evaluations", "rfid", "psnr")
    return [{k: r["result"][k] for k in keys if k in r["result"]} for r in [*content.get("rows", []), content]]


def test_due():
    due = functools.partial(monitor.due, EvaluationConfig(fid_epoch=1, sweep_epoch=3, rfid_epoch=2), 30)
    found = {seen: kinds for seen in range(30, 700, 30) if (kinds := due(seen, 100))}
    assert found == {
        120: ["search"], 210: ["search", "rfid"], 300: ["sweep"], 420: ["search", "rfid"], 510: ["search"],
        600: ["sweep", "rfid"],
    }  # fmt: skip
    assert due(0, 100) == []
    assert due(90, 100, last=True) == ["search"]  # the next step would end the epoch; there is none
    assert due(60, 100, last=True) == []
    assert due(120, 100, last=True) == ["search"]
    assert monitor.due(EvaluationConfig(), 1024, 1024, 1024) == []


def test_the_run_is_the_same_with_and_without(folder):
    train(folder, "plain", *SCORED[5:])
    for step in (10, 20):
        assert same(tensors(folder, "scored", step), tensors(folder, "plain", step))
    rows = [
        [{k: row[k] for k in ("step", "total", "flow", "grad_norm")} for row in map(json.loads, text.splitlines())]
        for text in ((folder / name / "metrics.jsonl").read_text() for name in ("scored", "plain"))
    ]
    assert rows[0] == rows[1]


def fid_by_command(folder: Path, run: str, scale: float) -> float:
    """Of the run's checkpoint of step 10, by ``evaluate fid``."""
    out = folder / f"{run}_fid.json"
    said = command_of(
        evaluate.main, "fid", "--checkpoint", folder / run / "checkpoints" / "step-0000010", "--reference",
        folder / "real.npz", "--extractor", "digits", "--out", out, "--cfg", scale,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return json.loads(out.read_text())["result"]["fid"]


def test_scores_are_those_of_the_commands(folder):
    """At step 10 the checkpoint holds the weights that were scored."""
    found = scores(folder, "scored")
    assert list(found) == ["step_0000010_search.json", "step_0000019_rfid.json", "step_0000019_search.json"]
    search = found["step_0000010_search.json"]
    assert [row["settings"]["cfg_scale"] for row in search["rows"]][:2] in ([1.2, 1.4], [1.4, 1.2])
    assert search["result"]["fid"] == min(row["result"]["fid"] for row in search["rows"])
    assert search["epoch"] == pytest.approx(160 / 1497)
    assert {"checkpoint", "extractor", "reference", "seeds", "environment"} <= set(search["protocol"])
    assert found["step_0000019_rfid.json"]["protocol"]["data"] == {
        "source": "digits", "split": "heldout", "images": 300, "size": 8, "pipeline": "digits", "augment": False,
    }  # fmt: skip
    assert fid_by_command(folder, "scored", search["best"]["cfg_scale"]) == search["result"]["fid"]


def test_a_score_while_training_is_repeated_from_its_file(folder, tmp_path):
    """Of the checkpoint of its step, or of an export of that; another step's weights are refused."""
    run = folder / "scored"
    file, step = run / "scores" / "training" / "step_0000010_search.json", run / "checkpoints" / "step-0000010"
    words = ("fid", "--protocol", file, "--reference", folder / "real.npz", "--extractor", "digits", "--checkpoint")
    out = tmp_path / "again.json"
    assert command_of(export.main, step, "--out", tmp_path / "export").returncode == 0
    for source in (step, tmp_path / "export"):
        said = command_of(evaluate.main, *words, source, "--out", out)
        assert said.returncode == 0, said.stderr
        score, content = json.loads(file.read_text()), json.loads(out.read_text())
        assert content["result"]["fid"] == score["result"]["fid"]
        assert content["protocol"]["settings"] == score["best_overall"]
    said = command_of(evaluate.main, *words, run, "--out", out)
    assert said.returncode == 2
    assert "--checkpoint has sha256" in said.stderr
    assert said.stderr.endswith("... (step 10 of training)\n")
    other = file.with_name("step_0000019_rfid.json")
    said = command_of(evaluate.main, "fid", "--protocol", other, "--checkpoint", run)
    assert "nor a search while training" in said.stderr


def test_the_best_scale_is_kept(folder):
    """In the checkpoint; the second search begins there."""
    found = scores(folder, "scored")
    best = found["step_0000010_search.json"]["best"]["cfg_scale"]
    assert checkpoint._read_counters(folder / "scored" / "checkpoints" / "step-0000010")["best_cfg_scale"] == best
    asked = [row["settings"]["cfg_scale"] for row in found["step_0000019_search.json"]["rows"]]
    assert sorted(asked[:2]) == pytest.approx([best - 0.2, best])


def test_a_sweep_tries_intervals_and_orders(folder):
    train(
        folder,
        "swept",
        *SCORED[2:],
        "optim.ema_extra=[0.5]",
        "evaluation.weights=ema_0.5",
        "evaluation.sweep_epoch=0.1",
        "train.max_steps=10",
    )
    (content,) = scores(folder, "swept").values()
    assert content["protocol"]["checkpoint"]["weights"] == "ema_0.5"
    lows = [row["settings"]["cfg_interval"][0] for row in content["rows"]]
    assert set(lows) == {0.0, 0.05, 0.15, 0.2}
    assert "cfg_first" in [row["settings"]["cfg_order"] for row in content["rows"]]
    assert content["best"]["cfg_interval"] == [0.0, 1.0]  # the next search keeps the run's interval


def test_a_stop_during_a_score(folder, monkeypatch):
    """Noticed between two tiles; the resumed run finishes the score first and ends as if nothing had happened."""
    from unite_fast.evaluation import generation

    drawn, draw = [], generation.draw

    def interrupted(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(generation, "draw", interrupted)
    train(folder, "stopped", *SCORED)
    assert len(drawn) == 3
    status = json.loads((folder / "stopped" / "status.json").read_text())
    assert (status["state"], status["step"], status["last_good"]) == ("preempted", 10, 10)
    left = {path.name for path in (folder / "stopped" / "scores" / "training").iterdir()}
    assert left == {"step_0000010_search.jsonl", "step_0000010_search.jsonl.partial-0-of-1"}
    said = train(folder, "stopped", *SCORED)
    assert said.index("the guidance search at step 10") < said.index("step 11/20")
    assert len(drawn) == 2 * sum(len(c.get("rows", [])) for c in scores(folder, "stopped").values())  # no tile twice
    assert same(tensors(folder, "stopped", 20), tensors(folder, "scored", 20))
    ours, expected = scores(folder, "stopped"), scores(folder, "scored")
    assert {k: figures(v) for k, v in ours.items()} == {k: figures(v) for k, v in expected.items()}


def test_the_best_scale_survives_a_kill_after_a_stop(folder, monkeypatch):
    """The checkpoint of the stop has the scale of before the search; the next start finishes it, but dies unsaved."""
    from unite_fast.evaluation import generation

    draw = generation.draw

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "draw", interrupted)
        train(folder, "late", *SCORED)
    step = folder / "late" / "checkpoints" / "step-0000010"
    assert checkpoint._read_counters(step)["best_cfg_scale"] == 0  # none yet
    with monkeypatch.context() as patch:
        patch.setenv("UNITE_FAST_TESTING", "1")
        patch.setenv("UNITE_FAST_FAULT", "raise@rank=0,step=11,phase=load")
        words = ("--config", folder / "tiny.yaml", f"run_dir={folder / 'late'}")
        with pytest.raises(RuntimeError, match="injected fault"):
            command("train.py", *words, f"evaluation.reference={folder / 'real.npz'}", *SCORED)
    ((name, content),) = scores(folder, "late").items()
    content["best"]["cfg_scale"] = 1.8  # whatever this tiny model's is, one that no other file has
    (folder / "late" / "scores" / "training" / name).write_text(json.dumps(content))
    assert "the guidance search at step 10" not in train(folder, "late", *SCORED)
    asked = [row["settings"]["cfg_scale"] for row in scores(folder, "late")["step_0000019_search.json"]["rows"]]
    assert sorted(asked[:2]) == pytest.approx([1.6, 1.8])


def test_the_best_scale_of_a_finished_run_is_saved(folder, monkeypatch):
    """The stop came in the score after the last step."""
    from unite_fast.evaluation import generation

    draw = generation.draw

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "draw", interrupted)
        train(folder, "last", *SCORED, "train.max_steps=10")
    before = tensors(folder, "last", 10)
    said = train(folder, "last", *SCORED, "train.max_steps=10")
    assert "finished: 10 of 10 steps" in said
    best = scores(folder, "last")["step_0000010_search.json"]["best"]["cfg_scale"]
    step = folder / "last" / "checkpoints" / "step-0000010"
    assert checkpoint._read_counters(step)["best_cfg_scale"] == best
    assert not checkpoint.verify(step)
    assert same(tensors(folder, "last", 10), before)


@pytest.mark.parametrize("same_weights", [True, False])
def test_a_kill_during_a_score(folder, monkeypatch, same_weights):
    """Its step was not saved. What was scored counts when the run comes to the same weights again, and only then."""
    from unite_fast.evaluation import generation

    name, drawn, draw = f"killed_{same_weights}", [], generation.draw

    def interrupted(*arguments):
        drawn.append(1)
        if len(drawn) == 4:  # two tiles make a score
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(generation, "SAVE_SECONDS", 0)
    monkeypatch.setattr(generation, "draw", interrupted)
    options = (*SCORED, "train.checkpoint_every=5")
    words = ("--config", folder / "tiny.yaml", f"run_dir={folder / name}")
    assert command("train.py", *words, f"evaluation.reference={folder / 'real.npz'}", *options).returncode == 130
    assert checkpoint.newest_first(folder / name / "checkpoints")[0].name == "step-0000005"
    progress = folder / name / "scores" / "training" / "step_0000010_search.jsonl"
    (row,) = map(json.loads, progress.read_text().splitlines())
    if not same_weights:
        progress.write_text(json.dumps(row | {"identity": "others"}) + "\n")
    train(folder, name, *options)
    ours, expected = scores(folder, name), scores(folder, "scored")
    assert {k: figures(v) for k, v in ours.items()} == {k: figures(v) for k, v in expected.items()}
    tiles = 2 * sum(len(content.get("rows", [])) for content in ours.values())
    assert len(drawn) == tiles + 1 + (0 if same_weights else 3)


def test_two_ranks_give_the_same_scores(folder):
    words = ("--config", folder / "tiny.yaml", f"run_dir={folder / 'two'}", *SCORED, "device=cpu", "train.max_steps=10")
    words += (f"evaluation.reference={folder / 'real.npz'}", f"init_from={folder / 'scored'}")
    result = command_on_ranks(2, train_program.main, *words)
    assert result.returncode == 0, result.stderr
    two = scores(folder, "two")["step_0000010_search.json"]
    step = folder / "two" / "checkpoints" / "step-0000010"
    for row in two["rows"]:
        out = folder / "one.json"
        settings = row["settings"]
        words = ("--checkpoint", step, "--reference", folder / "real.npz", "--extractor", "digits", "--count", 40)
        words += ("--kernels", "eager", "--cfg", settings["cfg_scale"], "--out", out)
        assert command_of(evaluate.main, "fid", *words).returncode == 0
        assert row["result"]["fid"] == pytest.approx(json.loads(out.read_text())["result"]["fid"], rel=1e-9)


def test_a_score_that_fails_leaves_the_run_alone(folder, monkeypatch):
    from unite_fast.evaluation import generation

    def broken(*arguments):
        raise ValueError("no luck")

    monkeypatch.setattr(generation, "draw", broken)
    said = train(folder, "failed", *SCORED)
    assert "the guidance search at step 10 failed, training goes on: no luck" in said
    assert same(tensors(folder, "failed", 20), tensors(folder, "scored", 20))
    words = (
        "--config",
        folder / "tiny.yaml",
        f"run_dir={folder / 'strict'}",
        f"evaluation.reference={folder / 'real.npz'}",
    )
    result = command("train.py", *words, *SCORED, "train.on_eval_error=fail")
    assert result.returncode == 1
    assert "error: the guidance search at step 10 failed: no luck" in result.stderr


def test_one_process_is_scored_under_any_strategy(folder):
    train(folder, "alone", *SCORED, "train.strategy=fsdp2", "train.max_steps=10")
    name = "step_0000010_search.json"
    assert figures(scores(folder, "alone")[name]) == figures(scores(folder, "scored")[name])


def scored_on_ranks(ranks: Ranks, overrides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    settings = load_tiny(*overrides)
    state = train_program.train(settings, ranks, train_program.Inputs.open(settings))
    return {name: whole(p.detach()) for name, p in state.optimizer.parameters.items()}


def test_sharded_weights_are_scored_and_pictured(folder):
    """On two ranks: the scores of the checkpoint, by the command; the run is that without them."""
    where = (f"run_dir={folder / 'sharded'}", f"evaluation.reference={folder / 'real.npz'}", "train.image_every=10")
    ten = ("train.strategy=fsdp2", "train.max_steps=10")
    quiet = (*SCORED[5:], *ten, f"run_dir={folder / 'unscored'}")
    first, second = on_ranks(2, scored_on_ranks, (*SCORED, *ten, *where))
    assert same(first, second)
    assert same(first, on_ranks(2, scored_on_ranks, quiet)[0])
    assert (folder / "sharded" / "samples" / "step_0000010.png").is_file()
    search = scores(folder, "sharded")["step_0000010_search.json"]
    assert fid_by_command(folder, "sharded", search["best"]["cfg_scale"]) == pytest.approx(
        search["result"]["fid"], rel=1e-6
    )


def test_what_is_missing_is_said_before_training(folder, weights, tmp_path):  # noqa: F811
    def error(*overrides: str) -> str:
        words = ("--config", folder / "tiny.yaml", f"run_dir={tmp_path / 'run'}", *SCORED, *overrides)
        result = command("train.py", *words)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    real = f"evaluation.reference={folder / 'real.npz'}"
    assert "evaluation.reference names no statistics" in error()
    assert "no such file" in error("evaluation.reference=nowhere.npz")
    assert "nearest that do: 40 or 50" in error(real, "evaluation.count=45")
    assert "name it with --inception, or evaluation.inception" in error(real, "evaluation.extractor=inception")
    wrong = (real, "evaluation.extractor=inception", f"evaluation.inception={weights[0]}")
    assert "expected 6726825d" in error(*wrong)
    assert "have 64 features" in error(*wrong, f"evaluation.inception_sha256={weights[1]}")
    assert "evaluation.weights=ema_0.5 is not among the run's: ema, model" in error(real, "evaluation.weights=ema_0.5")
    assert not (tmp_path / "run").exists()
