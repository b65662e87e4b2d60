"""Whole runs of train.py: resume, world size, accumulation, official checkpoints, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from ranks import command_on_ranks
from support import command
from test_checkpoint import rewrite

import train as program
from unite_fast.base.errors import UserError
from unite_fast.checkpoint import load_model, load_weights, read
from unite_fast.config import Config
from unite_fast.run import start, stats
from unite_fast.run.stats import CollapseAlarm, read_metrics

COMPARED = ("step", "images_seen", "total", "l2", "flow", "latent_std", "grad_norm", "lr")


def train(config: Path, run: Path, *arguments: str, processes: int = 1) -> str:
    options = ("--config", config, f"run_dir={run}", *arguments)
    if processes > 1:
        result = command_on_ranks(processes, program.main, *options)
    else:
        result = command("train.py", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read(run / "checkpoints" / f"step-{step:07d}")


def rows(run: Path) -> list[list[float]]:
    return [[row[k] for k in COMPARED] for row in read_metrics(run / "metrics.jsonl")]


def test_resume_is_bit_exact(tiny, tmp_path):
    """20 steps equal 11 + resume + 9: parameters, EMA, both optimizers, log; also when log lines span the stop."""
    for log_every in (1, 4):
        straight, resumed = tmp_path / f"a{log_every}", tmp_path / f"b{log_every}"
        every = f"train.log_every={log_every}"
        train(tiny, straight, "train.max_steps=20", every)
        train(tiny, resumed, "train.max_steps=20", "train.checkpoint_every=11", every)
        for path in (resumed / "checkpoints" / "step-0000020").iterdir():
            path.unlink()  # as if the run had died after step 11
        said = train(tiny, resumed, "train.max_steps=20", every)
        assert "resuming from" in said
        assert "step 11" in said
        one, two = tensors(straight, 20), tensors(resumed, 20)
        assert set(one) == set(two)
        for name, value in one.items():
            assert torch.equal(value, two[name]), name
        assert rows(straight) == rows(resumed)
        assert len(rows(straight)) == 20 // log_every
        assert len((resumed / "metrics.csv").read_text().splitlines()) == 20 // log_every + 1


def test_sums_under_the_names_of_an_earlier_version(tiny, tmp_path):
    """A log line that spans the stop is whole, also when the checkpoint calls the squared error "l1" and LPIPS 0."""
    straight, resumed, every = tmp_path / "a", tmp_path / "b", "train.log_every=4"
    train(tiny, straight, "train.max_steps=8", every)
    train(tiny, resumed, "train.max_steps=8", "train.checkpoint_every=6", every)
    shutil.rmtree(resumed / "checkpoints" / "step-0000008")
    checkpoint = resumed / "checkpoints" / "step-0000006"
    state = json.loads((checkpoint / "state.json").read_text())
    assert set(state["means"]) == {"total", "l2", "flow", "latent_std", "grad_norm", "lr", "skipped", "count"}
    renamed = {"l1" if name == "l2" else name: value for name, value in state["means"].items()} | {"lpips": 0.0}
    rewrite(checkpoint, means=renamed)
    train(tiny, resumed, "train.max_steps=8", every)
    assert rows(resumed)[-1] == rows(straight)[-1]


def test_the_checkpoint_that_a_run_began_from_has_many_names(tmp_path, monkeypatch):
    """Through a link, over "..", relative; it may be gone by now, and its name need not be UTF-8."""
    odd = os.fsdecode(b"r\xe9sum")
    for name in ("step-0000002", odd):
        place = tmp_path / "first" / "checkpoints" / name
        (tmp_path / "next").mkdir(exist_ok=True)
        start.tidy(tmp_path / "next", str(place), start.Choice(place, "", [], []), 0)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "first")
        monkeypatch.chdir(tmp_path)
        for asked in (place, f"link/checkpoints/{name}", f"first/../first/checkpoints/{name}"):
            assert start._began_there(tmp_path / "next", str(asked)), asked
        assert not start._began_there(tmp_path / "next", f"{place}0")


def test_a_run_that_began_from_a_named_checkpoint_goes_on_from_its_own(tiny, tmp_path):
    """The same command started again makes progress, whatever checkpoint it names; nothing is deleted on the way."""
    other, path, often = tmp_path / "other", tmp_path / "run", "train.checkpoint_every=2"
    train(tiny, other, "train.max_steps=4", often)
    named = f"resume={other / 'checkpoints' / 'step-0000002'}"
    assert "at step 2: it was named" in train(tiny, path, named, "train.max_steps=4", often)
    for stop in (6, 8):  # as a queue would start it again
        said = train(tiny, path, named, f"train.max_steps={stop}", often)
        assert f"at step {stop - 2}: the newest that verifies of the run that began from" in said
    assert not list((path / "checkpoints").glob("*.abandoned*"))
    shutil.rmtree(other)  # it is not needed any more
    assert "at step 8" in train(tiny, path, named, "train.max_steps=8", often)
    assert "at step 8: the newest that verifies\n" in train(tiny, path, "train.max_steps=8", often)


def test_going_back_within_a_run_puts_newer_checkpoints_aside(tiny, tmp_path):
    path, often = tmp_path / "run", ("train.checkpoint_every=2", "train.keep_last=9")
    checkpoints = path / "checkpoints"
    train(tiny, path, "train.max_steps=6", *often)
    for step, aside in ((2, ""), (4, "-2")):  # the second start finds what the first has put aside
        said = train(tiny, path, f"resume={checkpoints / f'step-000000{step}'}", "train.max_steps=8", *often)
        assert f"at step {step}: it was named" in said
        assert (checkpoints / f"step-0000006.abandoned{aside}" / "manifest.json").is_file()
    assert "at step 8: the newest" in train(tiny, path, f"resume={checkpoints / 'step-0000004'}", "train.max_steps=8")


def test_another_named_checkpoint_is_refused(tiny, tmp_path):
    """Neither of the two runs is thrown away; an empty folder, or one without a usable checkpoint, takes any."""
    other, path = tmp_path / "other", tmp_path / "run"
    for folder in (other, path):
        train(tiny, folder, "train.max_steps=2")
    words = ("train.py", "--config", tiny, f"run_dir={path}", f"resume={other}", "train.max_steps=3")
    refused = command(*words)
    assert refused.returncode == 2
    assert "did not begin from there" in refused.stderr
    (path / "checkpoints" / "step-0000002" / "manifest.json").unlink()
    taken = command(*words)
    assert taken.returncode == 0, taken.stderr
    assert "skipping" in taken.stdout
    assert "at step 2: it was named" in taken.stdout


def test_world_size_and_accumulation_do_not_change_the_run(tiny, tmp_path):
    """One process, two, and one without accumulation: the same losses and weights but for rounding."""
    variants = {"one": 1, "two": 2, "whole": 1}
    for name, processes in variants.items():
        extra = ["train.micro_batch=16"] if name == "whole" else []
        train(tiny, tmp_path / name, "train.max_steps=6", *extra, processes=processes)
    expected, weights = rows(tmp_path / "one"), tensors(tmp_path / "one", 6)
    for name in ("two", "whole"):
        actual = rows(tmp_path / name)
        for a, e in zip(actual, expected, strict=True):
            assert a == pytest.approx(e, rel=1e-3), name
        other = tensors(tmp_path / name, 6)
        for key, value in weights.items():
            if key.startswith("model."):
                torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_continues_an_official_checkpoint(reference, tmp_path):
    """resume=PATH of an official .pt takes weights, EMA and both optimizers; the next step moves on from them."""
    config = tmp_path / "official.yaml"
    config.write_text(
        "model:\n  num_classes: 10\n"
        "  encoder: {depth: 6, width: 64, heads: 4, in_context_start: 2, in_context_len: 8}\n"
        "  decoder: {depth: 2, width: 48, heads: 3, mlp_hidden: 96}\n"
        "objective: {perceptual_weight: 0, flow_steps: 1}\n"
        "optim: {warmup_epochs: 0}\n"
        "data: {source: synthetic, flip: false}\n"
        "sample: {solver: euler, steps: 1}\n"
        "train: {global_batch: 1, micro_batch: 1, max_steps: 2, log_every: 1, image_every: 0}\n"
        "efficiency: {precision: fp32}\n"
    )
    said = train(config, tmp_path / "run", f"resume={reference / 'tiny.pt'}")
    assert "at step 1" in said
    content = torch.load(reference / "tiny.pt", weights_only=True)
    after = tensors(tmp_path / "run", 2)
    for name in ("latent_tokens", "encoder.blocks.3.attn.qkv.weight"):
        moved = (after[f"model.{name}"] - content["model"][name]).abs().max()
        assert 0 < moved < 1e-2, name
    momentum = content["optimizer_muon"]["state"][4]["momentum_buffer"]  # encoder.blocks.0.attn.qkv.weight
    name = "momentum.encoder.blocks.0.attn.qkv.weight"
    cosine = torch.nn.functional.cosine_similarity(after[name].flatten(), momentum.flatten(), dim=0)
    assert cosine > 0.5
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "state.json").read_text())
    assert state["optimizer_steps"] == 2


def test_run_folder(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny, run, "train.max_steps=4", "train.image_every=4", "train.checkpoint_every=1", "train.keep_last=2")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(provenance)
    assert (run / "samples" / "step_0000004.png").stat().st_size > 100
    model, config = load_model(run)
    assert config.model.encoder.width == 32
    raw, _ = load_model(run, "model")
    assert not torch.equal(model.latent_tokens, raw.latent_tokens)


def test_averages_are_saved_and_chosen_by_name(tiny, tmp_path):
    """An average that a run gains on resuming starts from the weights; one that it loses is left out; both are said."""
    run, kept = tmp_path / "run", "optim.ema_extra=[0.5, 0.7, std0.1]"
    train(tiny, run, kept, "train.max_steps=4", "optim.warmup_epochs=0")
    sets = {
        name: load_weights(run, name)[0]["latent_tokens"]
        for name in ("model", "ema", "ema_0.5", "ema_0.7", "ema_std0.1")
    }
    for a, b in itertools.combinations(sets, 2):
        assert not torch.equal(sets[a], sets[b]), (a, b)
    with pytest.raises(UserError, match=r"no '?.*'?ema_0.9.*ema_0\.5.*ema_std0\.1"):
        load_weights(run, "ema_0.9")
    said = train(tiny, run, "optim.ema_extra=[std0.1, 0.7, 0.9]", "train.max_steps=5", "optim.warmup_epochs=0")
    assert "optim.ema_extra [0.5, 0.7, 'std0.1'] -> ['std0.1', 0.7, 0.9]" in said
    after = tensors(run, 5)
    name = "encoder.blocks.0.attn.proj.weight"
    before = tensors(run, 4)
    moved = before[f"model.{name}"].lerp(after[f"model.{name}"], 0.1)
    torch.testing.assert_close(after[f"ema_0.9.{name}"], moved)
    assert f"ema_0.5.{name}" not in after
    assert not torch.equal(after[f"ema_std0.1.{name}"], before[f"ema_std0.1.{name}"])


def test_dry_run_writes_nothing(tiny, tmp_path):
    said = train(tiny, tmp_path / "run", "--dry-run")
    assert "parameters" in said
    assert "16 = 1 ranks x 2 accumulation x 8" in said
    assert not (tmp_path / "run").exists()


def test_the_run_is_locked_before_a_checkpoint_is_chosen(tiny, tmp_path, monkeypatch):
    """Else an earlier start, which still saves, would have its last checkpoint put aside."""
    path, choose = tmp_path / "run", start.choose

    def locked(config, images):
        assert (path / "run.lock").read_text().startswith(f"pid {os.getpid()} on ")
        return choose(config, images)

    monkeypatch.setattr(start, "choose", locked)
    train(tiny, path, "train.max_steps=1")
    refused = command("train.py", "--config", tiny, f"run_dir={path}", "resume=never")
    assert refused.returncode == 2
    assert "already holds checkpoints" in refused.stderr
    assert json.loads((path / "status.json").read_text())["state"] == "finished"  # the refusal is no part of the run


def test_fast_dev_run(tiny, tmp_path):
    for _ in range(2):  # the second run clears away the first
        said = train(tiny, tmp_path / "run", "--fast-dev-run", "2")
        assert "checkpoint round trip" in said
    assert (tmp_path / "run-dev" / "samples" / "step_0000002.png").is_file()


def test_printed_config_reads_back(tiny, tmp_path):
    printed = command("train.py", "--config", tiny, "--print-config", "optim.lr=3e-3").stdout
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert command("train.py", "--config", again, "--print-config").stdout == printed
    assert "lr: 0.003" in printed


def keys_of(section: object, path: str = "") -> list[str]:
    """Every whole key of a configuration."""
    found = []
    for f in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, f.name)
        found += keys_of(value, f"{path}{f.name}.") if dataclasses.is_dataclass(value) else [path + f.name]
    return found


def test_help_says_what_every_key_means():
    """A line each: key, default, meaning, type."""
    lines = command("train.py", "--help").stdout.splitlines()
    for key in keys_of(Config()):
        found = [line for line in lines if line.startswith(f"  {key}=")]
        assert len(found) == 1, key
        assert re.fullmatch(rf"  {re.escape(key)}=.*  ?\S.{{9,}} \[.+\]", found[0]), found[0]
    assert any("up to 0.1 % of them" in line for line in lines)


def test_init_from_takes_weights_only(tiny, tmp_path):
    train(tiny, tmp_path / "a", "train.max_steps=3")
    train(tiny, tmp_path / "b", "train.max_steps=1", "optim.warmup_epochs=0.5", f"init_from={tmp_path / 'a'}")
    a, b = tensors(tmp_path / "a", 3), tensors(tmp_path / "b", 1)
    name = "encoder.blocks.0.attn.proj.weight"
    assert torch.equal(b[f"model.{name}"], a[f"ema.{name}"])  # the first step of a warm-up has rate 0
    assert not torch.equal(b[f"momentum.{name}"], a[f"momentum.{name}"])


def test_a_gpu_s_peak_memory_is_logged(tiny, tmp_path, monkeypatch):
    """From counters on the host; a CPU has none."""
    assert "GiB  left" not in train(tiny, tmp_path / "cpu", "train.max_steps=2")
    assert "memory_gib" not in read_metrics(tmp_path / "cpu" / "metrics.jsonl")[0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    peak = stats.peak_memory(torch.device("cuda"))
    monkeypatch.setattr(stats, "peak_memory", lambda device: peak)
    assert train(tiny, tmp_path / "gpu", "train.max_steps=2").count("  1.5 GiB  left") == 2
    assert [row["memory_gib"] for row in read_metrics(tmp_path / "gpu" / "metrics.jsonl")] == [1.5, 1.5]
    assert "memory_gib" in (tmp_path / "gpu" / "metrics.csv").read_text()


def test_collapse_alarm():
    alarm = CollapseAlarm(0.1, patience=200)
    assert not alarm.check({"step": 10, "latent_std": 0.05})  # latents start small
    assert not alarm.check({"step": 20, "latent_std": 0.3})
    assert "collapse" in alarm.check({"step": 30, "latent_std": 0.09})
    assert not alarm.check({"step": 40, "latent_std": 0.05})  # once
    assert "collapse" in CollapseAlarm(0.1).check({"step": 200, "latent_std": 0.05})
