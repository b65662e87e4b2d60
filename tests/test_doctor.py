"""The doctor's checks, each with a machine that is well and one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import runpy
import shutil
import sys
import types
from collections import namedtuple
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import setuptools
import torch
from support import ROOT, TINY, command_of

from unite_fast import doctor
from unite_fast.config import Config
from unite_fast.config.yaml_text import from_dict, parse_yaml
from unite_fast.doctor import machine
from unite_fast.fetch import Known
from unite_fast.model.unite import build
from unite_fast.optim.optimizer import Optimizer
from unite_kernels import extension, probe

CONFIG = from_dict(parse_yaml(TINY, "tiny"))


def test_torchvision_of_another_torch(monkeypatch):
    assert machine.torchvision_build().state == "OK"
    with monkeypatch.context() as patch:
        patch.setattr(machine, "version", lambda package: "0.20.1")
        found = machine.torchvision_build()
        assert found.state == "FAIL"
        assert f"0.20.1 does not belong to torch {torch.__version__}; pip install 'torchvision" in found.detail
        for torch_version, version, said in (
            ("2.11.0", "0.26.0", ""), ("2.11.0", "0.29.1", "'torchvision==0.26.*'"), ("2.14.1", "0.29.2", ""),
            ("2.15.0", "0.29.2", ""), ("2.15.0", "0.28.0", "'torchvision>=0.29'"),
        ):  # fmt: skip
            patch.setattr(torch, "__version__", torch_version)
            patch.setattr(machine, "version", lambda package, version=version: version)
            found = machine.torchvision_build()
            assert ("does not belong" in found.detail) == bool(said)
            assert said in found.detail
    import torchvision

    monkeypatch.setattr(torchvision.version, "cuda", "11.8")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert machine.torchvision_build().detail.startswith("for CUDA 11.8, torch is for 13.0; ")
    monkeypatch.setattr(torchvision.version, "cuda", 13000)
    assert machine.torchvision_build().state == "OK"


@pytest.mark.parametrize(
    ("driver", "runtime", "state", "says"),
    [
        (0, "13.0", "WARN", "no NVIDIA driver"),
        (12080, "13.0", "FAIL", "for CUDA 12.8, torch needs 13.0; update the driver"),
        (13000, "13.2", "OK", "for CUDA 13.0; torch has 13.2"),
        (13010, "12.8", "OK", "for CUDA 13.1"),
        (13000, None, "WARN", "has no CUDA; install its build"),
    ],
)
def test_driver(monkeypatch, driver, runtime, state, says):
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", runtime)
    found = machine.driver()
    assert found.state == state
    assert says in found.detail


def test_collectives(monkeypatch):
    found = machine.collectives()
    assert found.state == "OK"
    assert "gives 1" in found.detail
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert machine.collectives().state == "FAIL"


def test_triton(monkeypatch):
    pytest.importorskip("triton")
    assert doctor._triton().state == "OK"

    def broken():
        raise RuntimeError("ptxas is missing\nlong story")

    monkeypatch.setattr(probe, "triton_works", broken)
    found = doctor._guarded(doctor._triton, "triton", "WARN")
    assert found == ("WARN", "triton", "RuntimeError: ptxas is missing; reinstall it")


def test_stale_library(monkeypatch, tmp_path):
    package = tmp_path / "kernels" / "unite_kernels"
    package.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(extension, "__file__", str(package / "extension.py"))
    monkeypatch.setattr(extension, "CHECKOUT", tmp_path)
    assert extension.stale("cpu") == ""  # not built: another finding says so
    library, source = package / "_C_cpu.so", tmp_path / "csrc" / "checks.h"
    library.write_bytes(b"")
    for path in (tmp_path / "csrc").rglob("*"):
        os.utime(path, (1, 1))
    assert extension.stale("cpu") == ""
    os.utime(source, (2e10, 2e10))
    assert extension.stale("cpu") == "its sources are newer"
    library.with_suffix(".sources").write_text(extension.sources_digest(tmp_path))
    assert extension.stale("cpu") == ""
    source.write_text(source.read_text() + " ")
    assert extension.stale("cpu") == "it was built from other sources"
    shutil.rmtree(tmp_path / "csrc")
    assert extension.stale("cpu") == ""  # an installation without sources


def test_setup_records_the_same_hash(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["sources_digest"]() == extension.sources_digest() != ""


def test_cores_and_workers(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    busy = replace(CONFIG, data=replace(CONFIG.data, source="folder", workers=3))
    assert machine.workers(busy.data) == ("WARN", "data workers", "3 workers x 2 ranks on 4 cores; set data.workers=2")
    assert machine.workers(replace(busy.data, workers=2)).state == "OK"
    assert machine.workers(CONFIG.data).state == "OK"  # digits decode nothing


def test_cores_of_a_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(Path, "read_text", lambda self: "150000 100000\n")
    assert machine.cores() == 1.5
    monkeypatch.setattr(Path, "read_text", lambda self: "max 100000\n")
    assert machine.cores() == 16


@pytest.mark.parametrize(("soft", "state"), [(1024, "WARN"), (4096, "OK"), (resource.RLIM_INFINITY, "OK")])
def test_open_files(monkeypatch, soft, state):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, 1 << 20))
    found = machine.open_files()
    assert found.state == state
    assert state == "OK" or "ulimit -n 4096" in found.detail


@pytest.mark.parametrize("extra", [(), (0.9, "std0.1")])
def test_disk_and_shared_memory(monkeypatch, tmp_path, extra):
    Usage = namedtuple("Usage", "total used free")
    config = replace(CONFIG, run_dir=str(tmp_path / "not" / "yet"), optim=replace(CONFIG.optim, ema_extra=extra))
    model = build(config.model)
    optimizer = Optimizer(model, config.optim)
    tensors = [*model.state_dict().values(), *optimizer.state_dict().values()]
    tensors += [tensor for average in optimizer.averages.values() for tensor in average.values()]
    assert len(optimizer.averages) == 1 + len(extra)
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert machine.checkpoint_bytes(config.model, config.optim) == size
    for factor, state in ((5.01, "OK"), (4.9, "WARN")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=factor: Usage(0, 0, f * size))
        found = machine.disk(config.folder, size, config.train.keep_last)
        assert found.state == state
        assert state == "OK" or "set run_dir=PATH" in found.detail
    assert machine.disk().state == "WARN"
    assert machine.shared_memory().state == "WARN"


def test_pretrained(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256(b"content").hexdigest()
    monkeypatch.setattr(machine, "WEIGHTS", {"w": Known("w.pth", "https://127.0.0.1:1/w.pth", digest)})
    assert machine.pretrained() == [("WARN", "weights w", "not in weights/: python -m unite_fast fetch w")]
    Path("w.pth").write_bytes(b"content")
    assert machine.pretrained()[0].state == "OK"
    Path("w.pth").write_bytes(b"altered")
    assert machine.pretrained()[0].state == "FAIL"


def found_in(config: Config, what: str) -> machine.Finding:
    return next(finding for finding in doctor.examine_run(config) if finding.what == what)


def test_options_that_do_not_go_together():
    """As training would refuse them, for whoever asks the doctor, or for the configuration alone."""
    sharded = replace(CONFIG, train=replace(CONFIG.train, strategy="fsdp2", on_oom="halve"))
    found = found_in(sharded, "options")
    assert (found.state, found_in(CONFIG, "options").state) == ("FAIL", "OK")
    assert "train.strategy=fsdp2 does not work with train.on_oom=halve" in found.detail


def test_configuration(tmp_path, tiny):
    state, what, detail = found_in(CONFIG, "data digits")
    assert (state, what) == ("OK", "data digits")
    assert detail.startswith("1,497 images in 10 classes; ")
    missing = replace(CONFIG, data=replace(CONFIG.data, source="folder", path=str(tmp_path / "none")))
    assert found_in(missing, "data folder").state == "FAIL"
    assert machine.perceptual(CONFIG.model, CONFIG.objective).state == "OK"
    path = tmp_path / "trunk.pth"
    path.write_bytes(b"other")
    color = replace(CONFIG, model=replace(CONFIG.model, channels=3))
    asked = replace(color, objective=replace(color.objective, perceptual_weight=1.0, perceptual_trunk=str(path)))
    found = machine.perceptual(asked.model, asked.objective)
    assert found.state == "FAIL"
    assert "has sha256" in found.detail
    outcome = command_of(doctor.main, "--json", "--config", tiny, "data.source=folder", "data.path=no/where")
    found = {f["what"]: f for f in json.loads(outcome.stdout)}
    assert found["data folder"]["state"] == "FAIL"
    assert "no such folder" in found["data folder"]["detail"]
    assert {"driver", "collectives", "open files", "disk", "data workers", "LPIPS trunk"} <= set(found)
    assert outcome.returncode == 1
    assert found["scores while training"]["detail"] == "none are asked for"
    assert command_of(doctor.main, "data.source=folder").returncode == 2


def test_files_of_scores_while_training(tmp_path):
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, rfid_epoch=1.0, extractor="digits"))
    assert found_in(config, "scores while training").state == "OK"
    config = replace(CONFIG, evaluation=replace(config.evaluation, fid_epoch=1.0, count=40))
    found = found_in(config, "scores while training")
    assert found.state == "FAIL"
    assert "evaluation.reference names no statistics" in found.detail


class StandIn(types.ModuleType):
    pass


def package(monkeypatch, name: str, **content) -> None:
    """A stand-in for an optional package."""
    for depth in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:depth])
        if part in sys.modules and isinstance(sys.modules[part], StandIn):
            continue
        module = StandIn(part)
        module.__spec__ = ModuleSpec(part, None, is_package=True)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, part, module)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def test_optional_packages_that_are_broken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    package(monkeypatch, "transformer_engine.pytorch")
    assert doctor._optional("transformer_engine") == (
        "OK", "transformer_engine", "installed; imports; no GPU to try it on",
    )  # fmt: skip

    class Pipeline:
        def __init__(self, **options):
            raise OSError("libnvjpeg.so: cannot open")

    package(monkeypatch, "nvidia.dali.pipeline", Pipeline=Pipeline)
    package(monkeypatch, "nvidia.dali.fn")
    found = doctor._guarded(lambda: doctor._optional("nvidia.dali"), "nvidia.dali", "WARN")
    assert found == ("WARN", "nvidia.dali", "OSError: libnvjpeg.so: cannot open; reinstall it")
