"""30 mistakes of users: each is one line with its cause and its remedy, exit code 2, within 5 seconds."""

from __future__ import annotations

import time

import pytest

MISTAKES = {
    "unknown key": (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
    "unknown section": (["optimizer.lr=1"], "did you mean 'optim'"),
    "misspelt choice": (["data.source=digit"], "did you mean 'digits'"),
    "text for a number": (["optim.lr=fast"], "optim.lr must be a number"),
    "fraction for a whole number": (["train.global_batch=16.5"], "train.global_batch must be a whole number"),
    "number for a switch": (["data.flip=1"], "data.flip must be true or false"),
    "no value": (["train.epochs"], "write it as section.key=value"),
    "value for a section": (["train=3"], "train must be a section of keys"),
    "negative epochs": (["train.epochs=-1"], "train.epochs must be above 0, got -1"),
    "no learning rate": (["optim.lr=0"], "optim.lr"),
    "one checkpoint kept": (["train.keep_last=1"], "train.keep_last must be at least 2"),
    "timeout of nothing": (["comm.train_timeout=0"], "comm.train_timeout must be above 0"),
    "micro-batch that does not divide": (["train.micro_batch=5"], "nearest that do"),
    "patch that does not divide": (["model.patch_size=3"], "not a multiple"),
    "heads that do not divide": (["model.encoder.heads=3"], "does not divide"),
    "class tokens after the last block": (["model.encoder.in_context_start=9"], "must be below its depth"),
    "guidance interval backwards": (["sample.cfg_interval=[0.9, 0.1]"], "low < high"),
    "decay of the average": (["optim.ema_decay=1"], "optim.ema_decay must be above 0 and below 1"),
    "unknown size": (["model.encoder=huge"], "unknown key"),
    "class count": (["model.num_classes=7"], "10 classes but model.num_classes is 7"),
    "mirrored digits": (["data.flip=true"], "set data.flip=false"),
    "no folder named": (["data.source=folder"], "data.path is empty"),
    "folder that is not there": (["data.source=folder", "data.path=no/where"], "no such folder"),
    "folder of the program": (["data.source=folder", "data.path=unite_fast"], "classes but model.num_classes"),
    "LPIPS without weights": (["objective.perceptual_weight=1", "model.channels=3"], "no VGG16 weights"),
    "LPIPS of gray images": (["objective.perceptual_weight=1"], "3 colour channels"),
    "checkpoint that is not there": (["resume=no/where"], "no checkpoint at no/where"),
    "text as a checkpoint": (["init_from=CONFIG"], "damaged or not a checkpoint"),
    "nothing to resume": (["resume=must"], "no usable checkpoint"),
    "run folder below a file": (["run_dir=Makefile/run"], "choose another place"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(job, mistake):
    overrides, says = MISTAKES[mistake]
    if mistake == "folder of the program":  # class folders without images, too many of them or too few
        overrides = [*overrides, "model.num_classes=3"]
    if overrides[0].endswith("CONFIG"):
        overrides = [f"init_from={job.config}"]
    started = time.monotonic()
    said = job.train(*overrides, ranks=1, code=2)
    assert time.monotonic() - started < 15
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert says in lines[0]
    assert "Traceback" not in said
    assert not job.run.exists()
