"""FLOPs against torch's counter and a count made on the official code, peaks, projections, --dry-run's plan."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from stepping import backward
from support import ROOT, command, command_of

import unite_fast.doctor
from unite_fast import data, modality
from unite_fast.config import DECODER_SIZES, ENCODER_SIZES, Config, DataConfig, ModelConfig, ObjectiveConfig, yaml_text
from unite_fast.data.folder import Folder
from unite_fast.modality.lpips import Perceptual, perceptual_flops
from unite_fast.model.flops import decoder_forward, encoder_forward, peak_flops, peak_of, training_flops
from unite_fast.model.unite import UNITE
from unite_fast.objective import Draws
from unite_fast.plan import throughput

CONFIGS = sorted(p for p in (ROOT / "configs").glob("imagenet_*.yaml") if "adversarial" not in p.stem)
# GFLOP per image, counted on the official code.
BUDGET = {"tokenize": 304.2, "decode": 140.1, "perceptual": 120.3}


def counted(encoder: str, decoder: str, flow_steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """FLOPs of one image by torch's counter on the real model and LPIPS, on the meta device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    config = ModelConfig(encoder=ENCODER_SIZES[encoder], decoder=DECODER_SIZES[decoder])
    with torch.device("meta"):
        model, lpips, o = UNITE(config), Perceptual(None).to("meta"), ObjectiveConfig()
        latents, times = torch.empty(flow_steps, 1, *model.latent_shape), torch.empty(flow_steps, 1)
        draws = Draws(
            latents[0], times[0], times[0].bool(), times[0], latents[0], times, latents, times.bool()
        )  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as all_passes:
            backward(model, torch.empty(1, 3, 256, 256), torch.empty(1).long(), draws, o, lpips)
    return {"total": all_passes.get_total_flops(), "parameters": model.trainable_parameters()}


@pytest.mark.parametrize(
    ("encoder", "decoder", "flow_steps", "parameters"),
    [
        ("base", "base", 3, 217_643_616),
        ("large", "base", 1, 545_528_384),  # more steps add equal passes: test_flow_passes_are_equal
        ("xl", "large", 1, 980_425_504),
    ],
)
def test_count_agrees_with_torch(encoder, decoder, flow_steps, parameters, monkeypatch):
    found = counted(encoder, decoder, flow_steps, monkeypatch)
    config = ModelConfig(encoder=ENCODER_SIZES[encoder], decoder=DECODER_SIZES[decoder])
    executed = training_flops(config, flow_steps, True, pruned=True)["total"]
    assert executed == pytest.approx(found["total"], rel=1e-3)
    assert executed == pytest.approx(training_flops(config, flow_steps, True)["total"], rel=0.02)  # the definition
    assert found["parameters"] == parameters


def test_flow_passes_are_equal(monkeypatch):
    """The counter's totals grow by the same amount with each flow step, so N = 14 follows from N = 3."""
    totals = [counted("small", "small", n, monkeypatch)["total"] for n in (1, 2)]
    config = ModelConfig(encoder=ENCODER_SIZES["small"], decoder=DECODER_SIZES["small"])
    step = training_flops(config, 1, True, pruned=True)["flow"]
    for a, b in itertools.pairwise(totals):
        assert b - a == pytest.approx(step, rel=0.01)


def test_count_agrees_with_the_budget():
    for steps, flow, total in ((3, 450.6, 1015.2), (14, 2102.9, 2667.5)):
        parts = training_flops(ModelConfig(), steps, True)
        for name, expected in (BUDGET | {"flow": flow, "total": total}).items():
            assert parts[name] / 1e9 == pytest.approx(expected, rel=0.01), (steps, name)
    assert training_flops(ModelConfig(), 3, True, pruned=True)["total"] / 1e9 == pytest.approx(999.9, rel=1e-4)


def test_peaks():
    for name, peak in {
        "NVIDIA H200": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H20": 148e12,
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "NVIDIA GB200": 2500e12, "NVIDIA B200": 2250e12,
    }.items():  # fmt: skip
        assert peak_of(name) == peak, name
    assert peak_of("AMD EPYC") is None
    assert peak_flops(torch.device("cpu")) is None


def test_projection_is_the_official_speed():
    """10.5 % of an H200's peak is about 26 minutes per epoch on 8 GPUs, as the official README says."""
    if torch.cuda.is_available() and "H200" not in torch.cuda.get_device_name():
        pytest.skip("projects for the GPU that is here")
    config = yaml_text.load(ROOT / "configs" / "imagenet_b.yaml")
    official, _, goal = throughput.project(config.model, config.objective)
    assert official.images_per_second == pytest.approx(103, abs=1.5)
    assert official.minutes(8) == pytest.approx(26, abs=0.5)
    assert "26.1 on 8 GPUs (the official code)" in official.line()
    assert "official" not in goal.line()
    assert goal.images_per_second == pytest.approx(103 * 0.4 / 0.105, rel=0.02)


def test_the_official_speed_is_of_one_model_on_one_gpu(monkeypatch):
    base = yaml_text.load(ROOT / "configs" / "imagenet_b.yaml")

    def known(config: Config, gpu: str = "NVIDIA H200") -> bool:
        monkeypatch.setattr(throughput, "device_name", lambda: gpu)
        return any("official" in projection.line() for projection in throughput.project(config.model, config.objective))

    assert known(base)
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", "NVIDIA GH200 480GB"):
        assert not known(base, gpu)
    for override in ("model.encoder=large", "model.decoder=small", "objective.flow_steps=14",
                     "objective.perceptual_weight=0"):  # fmt: skip
        assert not known(yaml_text.load(ROOT / "configs" / "imagenet_b.yaml", [override]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_plan_without_a_gpu_data_or_weights(path, monkeypatch):
    """What the header states is what the plan says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = command("train.py", "--config", path, "--dry-run", "--ranks", "8")
    assert said.returncode == 0, said.stderr
    config, header = yaml_text.load(path), path.read_text()
    parts = "1 accumulation x 128" if path.stem == "imagenet_b" else "2 accumulation x 64"
    assert f"1024 = 8 ranks x {parts}" in said.stdout
    assert "data.path is not given: 1,281,167 images" in said.stdout
    assert said.stdout.count("projection ") == (3 if path.stem == "imagenet_b" else 2)
    flops = training_flops(config.model, 3, True)["total"]
    assert f"N = 3: {flops / 1e9:,.0f} GFLOP per image" in header
    assert f"N = 14: {training_flops(config.model, 14, True)['total'] / 1e9:,.0f} GFLOP per image" in header
    speed = re.search(r"MFU 40.0%: ([\d,]+) images/s", said.stdout)
    assert speed is not None
    assert f"{speed[1]} images/s per GPU" in header
    planned = [float(x) for x in re.findall(r"^(?:memory|activations) +([\d.]+) GiB", said.stdout, re.M)]
    stated = re.search(r"([\d.]+) GiB of state and ([\d.]+) GiB of activations", header)
    assert stated is not None
    assert [float(x) for x in stated.groups()] == pytest.approx(planned, rel=0.1)
    other = yaml_text.load(path, ["objective.flow_steps=14"])
    assert other.objective.flow_steps == 14


def test_fine_tuning_against_a_discriminator_plans_and_costs_what_it_needs(monkeypatch):
    """The header is the plan; beyond the encoder, the decoder, LPIPS and one pass of the discriminator (a real image, a
    reconstruction, and the gradient of that) a step has less than a tenth."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = ROOT / "configs" / "imagenet_b_adversarial.yaml"
    said = command("train.py", "--config", path, "--dry-run", "--ranks", "8")
    assert said.returncode == 0, said.stderr
    config, header = yaml_text.load(path), path.read_text()
    flops, speed, minutes = (
        re.search(pattern, said.stdout)
        for pattern in (r"total ([\d.]+) GFLOP", r"MFU 40.0%: ([\d,]+) images/s", r"MFU 40.0%.*, ([\d.]+) on 8 GPUs")
    )
    assert flops is not None
    assert speed is not None
    assert minutes is not None
    assert f"{float(flops[1]):,.0f} GFLOP per image; {speed[1]} images/s per GPU and" in header
    hours = float(minutes[1]) * config.train.epochs / 60
    assert f"{float(minutes[1]):.0f} minutes per epoch at an MFU of 40 %: 16 epochs in {hours:.1f} hours" in header
    planned = [float(x) for x in re.findall(r"^(?:memory|activations) +([\d.]+) GiB", said.stdout, re.M)]
    stated = re.search(r"([\d.]+) GiB of state and ([\d.]+) GiB of activations", header)
    assert stated is not None
    assert [float(x) for x in stated.groups()] == pytest.approx(planned, rel=0.05)
    m = config.model
    tokens = m.num_latents + modality.of(m).context_tokens(m)
    trunk = dataclasses.replace(m, encoder=dataclasses.replace(m.encoder, depth=9))
    needed = encoder_forward(m, tokens, pruned=True) + 3 * encoder_forward(trunk, tokens)
    needed += 3 * decoder_forward(m) + perceptual_flops(m.image_size)
    assert needed < float(flops[1]) * 1e9 < 1.1 * needed
    assert "heads after blocks 3, 6, 9 of the model's own encoder, frozen" in said.stdout


def test_dry_run_projects_one_utilisation_and_refuses_others(tiny):
    said = command("train.py", "--config", tiny, "--dry-run", "--mfu", "0.4")
    assert said.returncode == 0
    assert "projection" not in said.stdout  # 8 x 8 images: no GPU would be kept busy
    assert "measured" in said.stdout
    big = command("train.py", "--dry-run", "--mfu", "0.5", "model.encoder=small", "model.decoder=small",
                  "model.image_size=64", "model.num_latents=16", "objective.perceptual_weight=0",
                  "data.source=synthetic")  # fmt: skip
    assert big.returncode == 0, big.stderr
    assert big.stdout.count("projection ") == 1
    assert "MFU 50.0%" in big.stdout
    assert "at MFU 50% on one" in big.stdout  # the source's rate against the demand
    for arguments in (["--dry-run", "--mfu", "0"], ["--dry-run", "--mfu", "2"], ["--mfu", "0.4"]):
        result = command("train.py", "--config", tiny, *arguments)
        assert result.returncode == 2
        assert "--mfu" in result.stderr
    missing = command("train.py", "--config", tiny, "--dry-run", "data.source=folder", "data.path=nowhere")
    assert missing.returncode == 2
    assert "nowhere" in missing.stderr


def test_dry_run_plans_for_other_numbers_of_processes(tiny):
    def said(*arguments: object, code: int = 0) -> str:
        result = command("train.py", "--config", tiny, *arguments)
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    two = said("--dry-run", "--ranks", "2", "train.strategy=hsdp", "efficiency.precision=bf16")
    assert "16 = 2 ranks x 1 accumulation x 8" in two
    assert "hsdp, 1 x 2 shards" in two  # one node
    assert "does not divide over 3 ranks" in said("--dry-run", "--ranks", "3", code=2)
    for arguments in (["--dry-run", "--ranks", "0"], ["--ranks", "2"]):
        assert "--ranks" in said(*arguments, code=2)


def test_dry_run_refuses_what_training_would(tiny, monkeypatch):
    def error(*overrides: str) -> str:
        result = command("train.py", "--config", tiny, "--dry-run", *overrides)
        assert result.returncode == 2, result.stdout
        return result.stderr

    assert "evaluation.reference names no statistics" in error("evaluation.fid_epoch=1", "evaluation.count=40")
    no_inception = error("evaluation.rfid_epoch=1", "evaluation.extractor=inception")
    assert "name it with --inception, or evaluation.inception" in no_inception
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no flow to capture" in error("device=cuda", "efficiency.cuda_graph=flow", "objective.flow_steps=0")


def test_doctor_times_the_configured_source(tiny, tmp_path):
    said = command_of(unite_fast.doctor.main, "--config", tiny)
    assert re.search(r"^OK +data digits +.*measured [\d,]+ images/s", said.stdout, re.M), said.stdout
    missing = f"data.path={tmp_path / 'none'}"
    said = command_of(unite_fast.doctor.main, "--config", tiny, "data.source=folder", missing)
    assert said.returncode == 1
    assert re.search(r"^FAIL +data folder +", said.stdout, re.M)
    assert "measured" not in said.stdout


def test_expected_rate_of_a_source():
    exact, fast = (Folder(Path(), [], [], [], DataConfig(crop=crop), ModelConfig()) for crop in ("adm", "fast"))
    assert throughput.expected_rate(exact, 1, 256) == 358
    assert throughput.expected_rate(fast, 0, 256) == 892
    assert throughput.expected_rate(exact, 1, 64) is None  # they are of 256 x 256
    digits = data.open_source(DataConfig(source="digits", flip=False), ModelConfig(channels=1, num_classes=10))
    assert throughput.expected_rate(digits, 1, 256) is None
