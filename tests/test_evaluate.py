"""The evaluation commands on a tiny model of the digits: protocols, reruns, interruption, search, users' mistakes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import command_on_ranks
from support import TINY, command, command_of

from unite_fast import checkpoint, data, evaluate, export, sampling
from unite_fast.base.errors import UserError
from unite_fast.config import EfficiencyConfig, EvaluationConfig, ObjectiveConfig, SampleConfig
from unite_fast.evaluate import commands, context
from unite_fast.evaluation import fid, generation, guidance_search, reconstruction, statistics
from unite_fast.evaluation.features import digits_network
from unite_fast.evaluation.generation import Settings
from unite_fast.parallel.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder, with reference statistics beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "tiny.yaml").write_text(TINY)
    options = ("--config", folder / "tiny.yaml", f"run_dir={folder / 'run'}", "train.max_steps=60", "optim.lr=6e-3")
    assert command("train.py", *options).returncode == 0
    said = command_of(
        statistics.main, "--config", folder / "tiny.yaml", "--extractor", "digits", "--features", "--out",
        folder / "real.npz",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return folder


def options(trained: Path, out: Path, *more: object) -> tuple[object, ...]:
    common = ("--checkpoint", trained / "run", "--extractor", "digits", "--out", out, "--device", "cpu")
    return (*common, "--reference", trained / "real.npz", "--count", 100, *more)


def run(trained: Path, name: str, out: Path, *more: object) -> dict:
    said = command_of(evaluate.main, name, *options(trained, out, *more))
    assert said.returncode == 0, said.stderr
    return json.loads(out.read_text())


def test_a_score_carries_its_protocol_and_is_repeated_from_it(trained, tmp_path):
    first = run(trained, "fid", tmp_path / "a.json", "--pairs", "--kid-subset", 50, "--cfg", 1.5, "--solver", "heun")
    assert first["protocol"]["settings"] | {"steps": 2} == {
        "count": 100, "labels": "equal", "solver": "heun", "steps": 2, "cfg_scale": 1.5, "cfg_interval": [0.0, 1.0],
        "cfg_order": "norm_first", "last": "state", "precision": "fp32", "kernels": "eager", "compile": False,
        "uint8": "truncated", "tile": 32,
    }  # fmt: skip
    assert {"commit", "dirty", "torch", "device"} <= set(first["protocol"]["environment"])
    assert all(len(first["protocol"][part]["sha256"]) == 64 for part in ("checkpoint", "extractor", "reference"))
    assert {"fid", "is", "kid", "precision", "recall"} <= set(first["result"])
    assert first["result"]["evaluations"] == 4
    assert first["result"]["passes"] == 7  # guided at both ends of every step but t = 1
    again = run(trained, "fid", tmp_path / "b.json", "--protocol", tmp_path / "a.json")
    assert again["protocol"]["settings"] == first["protocol"]["settings"]
    assert again["result"]["fid"] == first["result"]["fid"]
    assert again["protocol"]["kid_subset"] == 50
    assert again["result"]["kid"] == first["result"]["kid"]
    other = run(trained, "fid", tmp_path / "c.json", "--protocol", tmp_path / "a.json", "--labels", "random")
    assert other["result"]["fid"] != first["result"]["fid"]


def test_a_run_is_scored_as_while_training(trained, tmp_path, monkeypatch):
    """What the run's configuration says of its scores, however it differs from the defaults."""
    words = ("--config", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "train.max_steps=2")
    said = command("train.py", *words, "evaluation.count=40", "evaluation.weights=model", "efficiency.kernels=fused",
                   "sample.solver=exp3", "sample.cfg_scale=1.5", "evaluation.extractor=digits",
                   f"evaluation.reference={trained / 'real.npz'}")  # fmt: skip
    assert said.returncode == 0, said.stderr
    words = ("--checkpoint", tmp_path / "run", "--out", tmp_path / "fid.json")
    said = command_of(evaluate.main, "fid", *words)
    assert said.returncode == 0, said.stderr
    protocol = json.loads((tmp_path / "fid.json").read_text())["protocol"]
    config = checkpoint.saved_config(checkpoint.locate(tmp_path / "run"))
    assert protocol["settings"] == generation.of_run(config.sample, config.evaluation, config.efficiency).described()
    assert protocol["settings"] == {
        "count": 40, "labels": "equal", "solver": "exp3", "steps": 2, "cfg_scale": 1.5, "cfg_interval": [0.0, 1.0],
        "cfg_order": "norm_first", "last": "state", "precision": "fp32", "kernels": "fused", "compile": False,
        "uint8": "truncated", "tile": 32,
    }  # fmt: skip
    assert protocol["checkpoint"]["weights"] == "model"
    assert protocol["extractor"]["name"] == "digits 64"
    assert checkpoint.found_scale(checkpoint.locate(tmp_path / "run")) == 0
    monkeypatch.setattr(checkpoint, "found_scale", lambda located: 2.5)  # by scores while training
    assert command_of(evaluate.main, "fid", *words).returncode == 0
    assert json.loads((tmp_path / "fid.json").read_text())["protocol"]["settings"]["cfg_scale"] == 2.5


def test_defaults_stand_once():
    """In config/keys.py: a score's settings are those of a run that says nothing."""
    assert Settings() == generation.of_run(SampleConfig(), EvaluationConfig(), EfficiencyConfig())
    assert reconstruction.Settings() == reconstruction.of_run(ObjectiveConfig(), EvaluationConfig(), EfficiencyConfig())


def test_an_official_checkpoint_brings_its_guidance(reference, tmp_path):
    """The scale that its training found, on the interval of that search; options still win."""
    content = torch.load(reference / "tiny.pt", weights_only=True)
    shutil.copy(reference / "tiny.json", tmp_path / "a.json")
    for found, used in ((2.6, (2.6, (0.1, 1.0))), (None, (1.0, (0.0, 1.0))), (float("nan"), (1.0, (0.0, 1.0)))):
        torch.save(content | {"current_best_cfg_scale": found}, tmp_path / "a.pt")
        config = checkpoint.load_model(tmp_path / "a.pt")[1]
        assert (config.sample.cfg_scale, config.sample.cfg_interval) == used
        assert (config.evaluation.precision, config.efficiency.kernels) == ("fp32", "fused")  # as published; faster
    torch.save(content | {"current_best_cfg_scale": 2.6}, tmp_path / "a.pt")
    words = ("--checkpoint", tmp_path / "a.pt", "--seeds", "0", "--solver", "euler", "--steps", "1")
    said = command("sample.py", *words, "--out", tmp_path / "a").stdout.splitlines()[0]
    used = "ema weights; euler, steps 1, w 2.6 for t in [0.1, 1.0], norm_first, last state"
    assert said == f"{tmp_path / 'a.pt'} (step {content['step']}), {used}"
    said = command("sample.py", *words, "--cfg", "1", "--out", tmp_path / "b").stdout.splitlines()[0]
    assert said.endswith("; euler, steps 1, w 1, last state")


def test_a_protocol_brings_its_weights(trained, tmp_path):
    """All weights of a checkpoint share its manifest's hash."""
    raw, protocol = run(trained, "fid", tmp_path / "a.json", "--weights", "model"), ("--protocol", tmp_path / "a.json")
    again = run(trained, "fid", tmp_path / "b.json", *protocol)
    assert again["protocol"]["checkpoint"] == raw["protocol"]["checkpoint"]
    assert again["protocol"]["checkpoint"]["weights"] == "model"
    assert again["result"]["fid"] == raw["result"]["fid"] != run(trained, "fid", tmp_path / "c.json")["result"]["fid"]
    said = command_of(evaluate.main, "fid", *options(trained, tmp_path / "d.json", *protocol, "--weights", "ema"))
    assert (said.returncode, said.stderr) == (2, "error: --weights is ema, the protocol was made with model\n")
    raw["protocol"]["extractor"]["layers"] = ["768", "logits"]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    said = command_of(evaluate.main, "fid", *options(trained, tmp_path / "d.json", *protocol))
    assert said.returncode == 2
    assert said.stderr.endswith("the protocol was made with 768,logits\n")


def test_the_score_is_that_of_the_images(trained, tmp_path):
    """Against images drawn and scored in one piece."""
    found = run(trained, "fid", tmp_path / "a.json")
    model, config = checkpoint.load_model(trained / "run")
    extractor = digits_network(config.data, config.model)
    labels = torch.arange(100) % 10
    images = sampling.sample(model, labels, seeds=range(100), solver="euler", steps=2)
    features = extractor.compute((images * 255).to(torch.uint8))[0].double().numpy()
    made = fid.Statistics(features.mean(0), __import__("numpy").cov(features, rowvar=False), 100)
    expected = fid.frechet(made, statistics.read(str(trained / "real.npz"))[0])
    assert found["result"]["fid"] == pytest.approx(expected, rel=1e-4)


def test_scores_of_different_protocols_do_not_replace_each_other(trained, tmp_path, monkeypatch):
    """Wherever the checkpoint is named: the run, its step, an export, an official file (which has no run's folder)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    step, scores = tmp_path / "run" / "checkpoints" / "step-0000060", tmp_path / "run" / "scores"
    common = ("--extractor", "digits", "--reference", trained / "real.npz", "--device", "cpu")

    def fid_of(source: Path, *more: object) -> None:
        said = command_of(evaluate.main, "fid", "--checkpoint", source, *common, "--count", 20, *more)
        assert said.returncode == 0, said.stderr

    fid_of(tmp_path / "run")
    (first,) = scores.iterdir()
    assert re.fullmatch(r"fid_step_0000060_ema_w1_euler2_[0-9a-f]{8}\.json", first.name)
    before = json.loads(first.read_text())
    for more in (("--cfg", 2), ("--solver", "exp3", "--steps", 3), ("--weights", "model"), ("--labels", "random")):
        fid_of(step, *more)
    fid_of(step, "--count", 30)
    assert len(list(scores.iterdir())) == 6
    assert json.loads(first.read_text()) == before
    fid_of(step)  # the same protocol again
    assert len(list(scores.iterdir())) == 6
    assert json.loads(first.read_text())["result"]["fid"] == before["result"]["fid"]
    assert command_of(export.main, step, "--out", tmp_path / "exported").returncode == 0
    fid_of(tmp_path / "exported")
    (file,) = (tmp_path / "exported" / "scores").iterdir()
    assert file.name.startswith("fid_step_0000060_ema_w1_euler2_")
    model, config = checkpoint.load_model(step)
    arguments = argparse.Namespace(command="fid", weights="ema", out=None)
    official = context.Context(arguments, tmp_path / "unite_b.pt", model, config, ONE, None)
    assert re.fullmatch(r"scores/fid_unite_b_ema_w2_[0-9a-f]{8}\.json", str(official.out({}, "w2")))


def test_a_score_guided_by_another_average_says_so(trained, tmp_path):
    """In its protocol and in the cache of a search; a repetition needs the same guide."""
    guided = ("--cfg", 1.5, "--autoguidance", trained / "run", "--autoguidance-weights", "model", "--count", 20)
    first = run(trained, "fid", tmp_path / "a.json", *guided)
    said = checkpoint.identity(checkpoint.locate(trained / "run"))
    assert first["protocol"]["checkpoint"]["autoguidance"] == f"guided by {said} model"
    assert (
        first["result"]["fid"] != run(trained, "fid", tmp_path / "b.json", "--cfg", 1.5, "--count", 20)["result"]["fid"]
    )
    again = ("--protocol", tmp_path / "a.json")
    refused = command_of(evaluate.main, "fid", *options(trained, tmp_path / "c.json", *again, "--count", 20))
    assert refused.returncode == 2
    assert refused.stderr == f"error: --autoguidance is none, the protocol was made with guided by {said} model\n"
    assert run(trained, "fid", tmp_path / "c.json", *again, *guided[2:])["result"]["fid"] == first["result"]["fid"]
    found = run(trained, "search", tmp_path / "s.json", *guided, "--sweep")
    assert found["best"]["checkpoint"]["autoguidance"] == f"guided by {said} model"
    assert {row["settings"]["cfg_order"] for row in found["rows"]} == {"norm_first"}


def test_two_processes_give_the_same_score(trained, tmp_path):
    one = run(trained, "fid", tmp_path / "a.json")
    result = command_on_ranks(2, evaluate.main, "fid", *options(trained, tmp_path / "two.json"))
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["result"]["fid"] == pytest.approx(one["result"]["fid"], rel=1e-9)
    assert two["result"]["is"] == pytest.approx(one["result"]["is"], rel=1e-9)


def test_interrupted_scoring_goes_on(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0.0)
    whole = run(trained, "fid", tmp_path / "whole.json")
    draw, calls = sampling.sample_tiles, []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **named)

    monkeypatch.setattr(sampling, "sample_tiles", interrupted)
    assert command_of(evaluate.main, "fid", *options(trained, tmp_path / "b.json")).returncode == 130
    left = list(tmp_path.glob("b.json.partial-*"))
    assert len(left) == 1
    other = tmp_path / left[0].name.replace("b.json", "c.json")
    shutil.copy(left[0], other)
    resumed = run(trained, "fid", tmp_path / "b.json")
    assert resumed["result"]["resumed_at"] == 2
    assert len(calls) == 3 + 2
    assert resumed["result"]["fid"] == whole["result"]["fid"]
    assert not list(tmp_path.glob("b.json.partial-*"))
    fresh = run(trained, "fid", tmp_path / "c.json", "--cfg", 3)  # sums of other settings are left alone
    assert fresh["result"]["resumed_at"] == 0


def test_table_of_the_papers_protocols(trained, tmp_path):
    said = command_of(evaluate.main, "table", *options(trained, tmp_path / "t.json", "--cfg", 1.0))
    assert said.returncode == 0, said.stderr
    rows = {row["name"]: row["result"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert rows["Heun 50, balanced"]["evaluations"] == 100
    assert rows["exp3 32, balanced (ours)"]["evaluations"] == 32
    assert [name for name in rows if "(ours)" not in name] == [
        "Heun 50, balanced", "dopri5, balanced", "dopri5, random",
    ]  # fmt: skip
    assert rows["dopri5, random"]["evaluations"] > 10
    assert "dopri5, random" in said.stdout
    assert "exp3 32, balanced (ours)  " in said.stdout
    assert abs(rows["Heun 50, balanced"]["fid"] / rows["dopri5, balanced"]["fid"] - 1) < 0.02


def test_an_interrupted_table_keeps_its_rows(trained, tmp_path, monkeypatch):
    table, compute, computed = commands.TABLE, generation.score, []
    short = [(name, changes | {"steps": 2}) for name, changes in table if "dopri5" not in name]
    monkeypatch.setattr(commands, "TABLE", [*short, ("third", {"solver": "euler", "steps": 1, "labels": "equal"})])

    def scored(model, settings, *rest):
        computed.append((settings.solver, settings.cfg_scale))
        if len(computed) in (3, 6):
            raise KeyboardInterrupt
        return compute(model, settings, *rest)

    monkeypatch.setattr(commands, "score", scored)
    out = tmp_path / "t.json"
    assert command_of(evaluate.main, "table", *options(trained, out)).returncode == 130
    gathered = out.with_suffix(".unfinished")
    assert not out.exists()
    kept = json.loads(gathered.read_text())["rows"]
    assert [row["name"] for row in kept] == [name for name, _ in short]
    finished = run(trained, "table", out)["rows"]
    assert finished[:2] == kept
    assert [solver for solver, _ in computed] == ["heun", "exp3", "euler", "euler"]
    assert not gathered.exists()
    assert command_of(evaluate.main, "table", *options(trained, out)).returncode == 130  # measured anew
    assert json.loads(out.read_text())["rows"] == finished  # what is finished stays until the new one is whole
    again = run(trained, "table", out)["rows"]
    assert len(computed) == 4 + 2 + 2
    assert [row["result"]["fid"] for row in again] == [row["result"]["fid"] for row in finished]
    gathered.write_text(json.dumps({"rows": kept}))
    run(trained, "table", out, "--cfg", 2)  # rows of another protocol are not taken up
    assert computed[8:] == [("heun", 2.0), ("exp3", 2.0), ("euler", 2.0)]


def parabola(best: float):
    asked = []

    def score(settings: Settings) -> float:
        asked.append((settings.cfg_scale, settings.cfg_interval[0], settings.cfg_order))
        bonus = 0.5 * (settings.cfg_interval[0] == 0.15) + 0.2 * (settings.cfg_order == "cfg_first")
        return (settings.cfg_scale - best) ** 2 - bonus

    return score, asked


@pytest.mark.parametrize(("start", "best", "ends"), [(3.0, 2.2, 2.2), (3.0, 3.8, 3.8), (3.0, 3.05, 3.0), (3.0, 9, 4.4)])
def test_search_walks_downhill(start, best, ends):
    score, asked = parabola(best)
    found = guidance_search.search(score, Settings(cfg_scale=start))
    assert found.cfg_scale == pytest.approx(ends)
    assert {a[0] for a in asked[:2]} == {start, start - 0.2}
    assert len({a[0] for a in asked}) <= 2 + guidance_search.MOST
    swept = guidance_search.sweep(score, found)
    assert (swept.cfg_interval, swept.cfg_order) == ((0.15, 1.0), "norm_first")
    assert swept.cfg_scale == found.cfg_scale


def test_search_goes_on_after_an_interruption(trained, tmp_path, monkeypatch):
    out = tmp_path / "s.json"
    first = run(trained, "search", out, "--cfg", 1.4)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert len(lines) == len(first["rows"]) >= 3
    out.with_suffix(".jsonl").write_text("\n".join(lines[:2]) + '\n{"cut sh')
    computed = []
    compute = generation.score
    monkeypatch.setattr(commands, "score", lambda *a: (computed.append(1), compute(*a))[1])
    provenance = commands.provenance.of
    monkeypatch.setattr(commands.provenance, "of", lambda *a: provenance(*a) | {"commit": "a later one"})
    again = run(trained, "search", out, "--cfg", 1.4)
    assert len(computed) == len(lines) - 2
    now = [row["environment"]["commit"] == "a later one" for row in again["rows"]]
    assert now == [False, False] + [True] * (len(lines) - 2)  # each score says which code computed it
    best = next(row for row in again["rows"] if row["settings"] == again["best"]["settings"])
    assert again["best"]["environment"] == best["environment"]
    strip = [{k: r["result"][k] for k in ("fid", "is")} for r in first["rows"]]
    assert [{k: r["result"][k] for k in ("fid", "is")} for r in again["rows"]] == strip
    refused = command_of(evaluate.main, "search", *options(trained, out, "--cfg", 1.4, "--weights", "model"))
    assert refused.returncode == 2
    assert "another checkpoint" in refused.stderr


def test_sfid_is_called_so_by_every_command(trained, tmp_path, monkeypatch):
    """The layers of the features alone decide; here the digits network stands in for Inception."""
    config = checkpoint.load_model(trained / "run")[1]
    spatial = dataclasses.replace(digits_network(config.data, config.model), layers=("spatial", "logits"))
    monkeypatch.setattr(statistics, "check_extractor", lambda *a: None)
    plain = run(trained, "fid", tmp_path / "a.json", "--count", 20)["result"]["fid"]
    short = (("exp3 2", {"solver": "exp3", "steps": 2, "labels": "equal"}),)
    monkeypatch.setattr(commands, "TABLE", short)
    monkeypatch.setattr(statistics, "open_extractor", lambda *a: spatial)
    for name, more in (("fid", ()), ("search", ("--grid", "1,1.5,0.5")), ("table", ())):
        out = tmp_path / f"{name}.json"
        said = command_of(evaluate.main, name, *options(trained, out, "--count", 20, *more))
        assert said.returncode == 0, said.stderr
        shown = said.stdout.replace(str(tmp_path), "")
        assert re.search(r"\bsFID\b|\bsfid\b", shown), name
        assert not re.search(r"\bFID\b|\bfid\b", shown.replace("/fid.json", "")), name
        content = json.loads(out.read_text())
        results = [row["result"] for row in content.get("rows", [content])]
        assert all("sfid" in result and "fid" not in result for result in results), name
        if name == "fid":
            assert results[0]["sfid"] == pytest.approx(plain)
    common = ("--checkpoint", trained / "run", "--extractor", "digits", "--out", tmp_path / "r.json")
    said = command_of(evaluate.main, "rfid", *common)
    assert "rsfid" in said.stdout
    assert "rfid" not in json.loads((tmp_path / "r.json").read_text())["result"]


def test_a_grid_does_not_replace_another(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    words = ("--checkpoint", tmp_path / "run", "--extractor", "digits", "--reference", trained / "real.npz",
             "--count", 20)  # fmt: skip
    for grid in ("1,1.5,0.5", "1,2,1", "1,1.5,0.5"):
        said = command_of(evaluate.main, "search", *words, "--grid", grid)
        assert said.returncode == 0, said.stderr
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "scores").glob("*.json"))]
    assert [[row["settings"]["cfg_scale"] for row in content["rows"]] for content in found] == [[1, 1.5], [1, 2]]
    assert [content["grid"] for content in found] == [[1, 1.5, 0.5], [1, 2, 1]]


def test_rfid(trained, tmp_path):
    out = tmp_path / "r.json"
    common = ("--checkpoint", trained / "run", "--extractor", "digits", "--out", out)
    said = command_of(evaluate.main, "rfid", *common)
    assert said.returncode == 0, said.stderr
    content = json.loads(out.read_text())
    result = content["result"]
    assert result["images"] == 300
    assert content["protocol"]["data"] == {
        "source": "digits", "split": "heldout", "images": 300, "size": 8, "pipeline": "digits", "augment": False,
    }  # fmt: skip
    assert "fewer" not in said.stderr
    bare = command_of(evaluate.main, "heldout", "--checkpoint", trained / "run", "--out", tmp_path / "h.json")
    assert bare.returncode == 0, bare.stderr
    found = json.loads((tmp_path / "h.json").read_text())["result"]
    assert {k: found[k] for k in ("images", "psnr", "l1")} == {k: result[k] for k in ("images", "psnr", "l1")}
    assert "rfid" not in found
    model, config = checkpoint.load_model(trained / "run")
    with torch.no_grad():
        ideal = reconstructed(Perfect(model), config, digits_network(config.data, config.model))
    assert ideal["rfid"] == pytest.approx(0, abs=1e-3)
    assert ideal["l1"] < 1e-6
    assert ideal["psnr"] > 100
    assert 0 < result["psnr"] < 40
    assert result["rfid"] > 1
    settings = {"tokenizer_t_max": 0.01, "precision": "fp32", "kernels": "eager"}
    assert content["protocol"]["settings"] == settings
    assert content["protocol"]["lpips"] is None
    said = command_of(evaluate.main, "rfid", *common, "--precision", "bf16", "--kernels", "fused")
    assert said.returncode == 0, said.stderr
    again = json.loads(out.read_text())
    assert again["protocol"]["settings"] == settings | {"precision": "bf16", "kernels": "fused"}
    assert again["result"]["psnr"] != result["psnr"]


@pytest.mark.parametrize(("precision", "t_max", "kernels"), [("fp32", 0.01, "fused"), ("bf16", 0.5, "eager")])
def test_reconstructions_are_scored_as_the_run_says(trained, precision, t_max, kernels):
    """Its precision, its kernels, the times up to which its tokenizer was trained; the protocol says so."""
    model, config = checkpoint.load_model(trained / "run")
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, precision=precision),
        efficiency=dataclasses.replace(config.efficiency, kernels=kernels),
        objective=dataclasses.replace(config.objective, tokenizer_t_max=t_max),
    )
    perfect = Perfect(model)
    with torch.no_grad():
        reconstructed(perfect, config)
    assert perfect.used[0] == kernels
    assert set(perfect.used[1::2]) == {precision == "bf16"}
    assert 0.5 * t_max < max(perfect.used[2::2]) <= t_max
    network = digits_network(config.data, config.model)
    perceptual = SimpleNamespace(trunk_sha256="abc", input_range="0_1")
    settings = reconstruction.of_run(config.objective, config.evaluation, config.efficiency)
    protocol = reconstruction.protocol(settings, network, perceptual, {})  # pyright: ignore
    assert protocol["settings"] == {"tokenizer_t_max": t_max, "precision": precision, "kernels": kernels}
    assert protocol["lpips"] == {"trunk": "abc", "range": "0_1"}


def reconstructed(model, config, extractor=None, perceptual=None) -> dict[str, float]:
    source = data.open_source(config.data, config.model, "heldout")
    return reconstruction.score(
        model,
        reconstruction.of_run(config.objective, config.evaluation, config.efficiency),
        source,
        config.data,
        extractor,
        ONE,
        perceptual,
    )


class Perfect:
    """A tokenizer that keeps the image."""

    def __init__(self, model) -> None:
        self.latent_shape, self.latent_tokens, self.modality = model.latent_shape, model.latent_tokens, model.modality
        self.used: list = []

    def use_kernels(self, kernels):
        self.used.append(kernels)

    def tokenize(self, images, noise, t, sizes=None):
        self.used += [torch.is_autocast_enabled("cpu"), float(t.max())]
        return images

    def decode(self, z, sizes=None):
        return z


def test_users_mistakes_are_one_line(trained, tmp_path):
    def error(name: str, *words: object) -> str:
        said = command_of(evaluate.main, name, *words)
        assert said.returncode == 2
        assert said.stderr.count("\n") == 1
        return said.stderr

    def fid_error(*more: object) -> str:
        return error("fid", *options(trained, tmp_path / "e.json", *more))

    assert "nearest that do: 100 or 110" in fid_error("--count", 105)
    assert "such as 0.1,1.0" in fid_error("--cfg-interval", "wide")
    assert "no such file" in fid_error("--extractor", "inception", "--inception", tmp_path / "none.pth")
    assert "--inception" in fid_error("--extractor", "inception")
    assert "KID subsets of 1000" in fid_error("--pairs")
    (tmp_path / "p.json").write_text("{}")
    assert "not a result" in fid_error("--protocol", tmp_path / "p.json")
    run(trained, "fid", tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["protocol"]["reference"]["sha256"] = "0" * 64
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert "the protocol was made with 000000000000..." in fid_error("--protocol", tmp_path / "p.json")


def test_nan_images_stop_the_score(trained):
    model, config = checkpoint.load_model(trained / "run")
    extractor = digits_network(config.data, config.model)
    with torch.no_grad():
        model.decoder.decoder_pred.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="seed 0"):
        generation.score(model, Settings(count=10, solver="euler", steps=1), extractor, None, ONE)
    with pytest.raises(UserError, match=r"sample 0 is not finite"):
        reconstructed(model, config)
    with pytest.raises(UserError, match="differ from this version's in uint8"):
        Settings.read(Settings(count=10).described() | {"uint8": "rounded"})


def test_a_grid_scores_every_scale():
    asked: list[float] = []

    def fid_of(settings: Settings) -> float:
        asked.append(settings.cfg_scale)
        return abs(settings.cfg_scale - 2.3)

    best = guidance_search.grid(fid_of, Settings(cfg_interval=(0.1, 1.0)), *commands.parse_grid("1,4,0.2"))
    assert asked == pytest.approx([1 + 0.2 * k for k in range(16)])
    assert (best.cfg_scale, best.cfg_interval) == (2.2, (0.1, 1.0))
    for wrong in ("1,4", "4,1,0.2", "1,4,0", "x,4,1", "-1,4,1", "0,1000,1"):
        with pytest.raises(UserError, match="--grid"):
            commands.parse_grid(wrong)
