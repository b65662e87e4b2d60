"""Ranks that do not hold the same code or images, and starts of a run that do not, are told apart and told."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from support import TINY, command, trained

from unite_fast import config, data
from unite_fast.base.errors import CommonError, UserError
from unite_fast.checkpoint import find
from unite_fast.config import Config, DataConfig, ModelConfig, yaml_text
from unite_fast.model.unite import build
from unite_fast.parallel import distributed
from unite_fast.run import agreement, assemble


def images(root: Path, per_class: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = np.random.default_rng(100 * k + i).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png", compress_level=0)
    return root


def opened(root: Path) -> data.Source:
    return data.open_source(DataConfig(path=str(root), workers=0), ModelConfig(image_size=8, patch_size=2, channels=1,
                                                                              num_classes=2))  # fmt: skip


def rewritten(path: Path) -> None:
    """Another picture of the same length under the same name."""
    length = path.stat().st_size
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path, compress_level=0)
    assert path.stat().st_size == length


class Two:
    """Rank 0 beside a rank that says ``other``."""

    device, rank = torch.device("cpu"), 0

    def __init__(self, other: dict) -> None:
        self.other = other

    def each(self, function: Callable[[], tuple[dict, dict]]) -> list[tuple[dict, dict]]:
        return [function(), ({}, self.other)]


def compared(here: data.Source, other: dict) -> None:
    agreement.check(yaml_text.to_dict(Config()), here, Two(other))  # type: ignore[arg-type]


def test_other_images_on_a_rank(tmp_path):
    here = opened(images(tmp_path / "a"))
    same = agreement.fingerprint(yaml_text.to_dict(Config()), opened(images(tmp_path / "elsewhere" / "b")).identity())
    compared(here, same)

    (tmp_path / "elsewhere" / "b" / "dog" / "3.png").unlink()
    missing = agreement.fingerprint(yaml_text.to_dict(Config()), opened(tmp_path / "elsewhere" / "b").identity())
    with pytest.raises(
        CommonError, match=r"data.path: images is 16 on rank 0, 15 on rank 1.*same command, code and im"
    ):
        compared(here, missing)

    renamed = images(tmp_path / "c", classes=("cat", "fox"))
    with pytest.raises(CommonError, match=r"class names is 'dog' at 1 on rank 0, 'fox' at 1 on rank 1"):
        compared(here, agreement.fingerprint(yaml_text.to_dict(Config()), opened(renamed).identity()))

    moved = images(tmp_path / "d")
    (moved / "dog" / "3.png").rename(moved / "cat" / "9.png")
    with pytest.raises(CommonError, match=r"labels is '\w+' on rank 0.* names of images"):
        compared(here, agreement.fingerprint(yaml_text.to_dict(Config()), opened(moved).identity()))


def test_other_bytes_on_a_rank(tmp_path):
    """Of equal length, under the same names; that they were written at another time makes no difference."""
    here, other = opened(images(tmp_path / "a")), images(tmp_path / "b")
    os.utime(other / "dog" / "3.png", ns=(0, 0))
    compared(here, agreement.fingerprint(yaml_text.to_dict(Config()), opened(other).identity()))
    rewritten(other / "dog" / "3.png")
    with pytest.raises(CommonError, match=r"data.path: bytes of images is '\w+' on rank 0, '\w+' on rank 1"):
        compared(here, agreement.fingerprint(yaml_text.to_dict(Config()), opened(other).identity()))


def test_other_kernels_on_a_rank(tmp_path, monkeypatch):
    here = opened(images(tmp_path / "a"))
    shutil.copytree(Path(agreement.unite_kernels.__file__).parent, tmp_path / "kernels",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(agreement.unite_kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
        same = agreement.fingerprint(yaml_text.to_dict(Config()), here.identity())
        with (tmp_path / "kernels" / "adaln.py").open("a") as file:
            file.write("# changed")
        other = agreement.fingerprint(yaml_text.to_dict(Config()), here.identity())
    compared(here, same)
    with pytest.raises(CommonError, match="the code of unite_kernels is"):
        compared(here, other)


def slow_choice(ranks: distributed.Ranks) -> int:
    distributed.SIGN_OF_LIFE = 0.1

    def choose() -> int:
        time.sleep(1.5)
        return 7

    return ranks.decide(choose)


def slow_identity(ranks: distributed.Ranks) -> list[int]:
    """Rank 1 is the slow one."""
    distributed.SIGN_OF_LIFE = 0.1

    def identify() -> int:
        time.sleep(1.5 * ranks.rank)
        return ranks.rank

    return ranks.each(identify)


def wait_briefly(ranks: distributed.Ranks, function: Callable[[distributed.Ranks], Any]) -> Any:
    """With a group that gives up after half a second: the function takes longer, and says that it is at work."""
    from datetime import timedelta

    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=0.7))
    return function(dataclasses.replace(ranks, control=group))


def slow_weights(path: Path, ranks: distributed.Ranks) -> str:
    """A file of weights on a slow disk, which rank 0 alone hashes; what the run keeps of where it began."""
    distributed.SIGN_OF_LIFE = 0.1

    def hashed(file: Path) -> str:
        assert ranks.is_main, f"hashing {file}, of which the others hear nothing"
        time.sleep(1.5)
        return "its sha256"

    find.file_sha256 = hashed
    begun = yaml_text.from_dict(yaml_text.parse_yaml(TINY, "tiny") | {"init_from": str(path)})
    return assemble.fresh_state(begun, ranks).origin["sha256"]


def refused_identity(ranks: distributed.Ranks) -> str:
    def identify() -> int:
        if ranks.rank:
            raise UserError("no such folder")
        return 0

    with pytest.raises(CommonError) as error:
        ranks.each(identify)
    return str(error.value)


def test_a_choice_may_take_longer_than_ranks_wait(tmp_path):
    assert on_ranks(2, wait_briefly, slow_choice) == [7, 7]
    assert on_ranks(2, wait_briefly, slow_identity) == [[0, 1], [0, 1]]
    weights = build(yaml_text.from_dict(yaml_text.parse_yaml(TINY, "tiny")).model, seed=3).state_dict()
    torch.save({"model": weights, "ema": weights}, tmp_path / "w.pt")
    begun = on_ranks(2, wait_briefly, functools.partial(slow_weights, tmp_path / "w.pt"))
    assert begun == ["its sha256"] * 2
    assert on_ranks(2, refused_identity) == ["no such folder"] * 2


# --- starts of a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("begun")
    source = f"source: folder, path: {images(place / 'train')}, workers: 0"
    text = TINY.replace("source: digits", source).replace("num_classes: 10", "num_classes: 2")
    (place / "tiny.yaml").write_text(text.replace("epochs: 1", "epochs: 8"))
    trained(place / "tiny.yaml", place / "run", "train.max_steps=2")
    return place


@pytest.fixture
def again(begun, tmp_path):
    """A function that goes on with a copy of the run: its output, and the lines that say what changed."""

    def start(*overrides: object):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(begun / "run", tmp_path / "run")
        said = command("train.py", "--config", begun / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "train.max_steps=3",
                       *overrides)  # fmt: skip
        return said, [line for line in said.stdout.splitlines() if line.startswith("changed since")]

    return start


def test_what_changes_the_run_is_said(again, begun, tmp_path):
    assert again("train.log_every=2", "data.timeout=9", "train.max_minutes=5")[1] == []
    assert again("train.epochs=40")[1] == ["changed since step-0000002: train.epochs 8.0 -> 40.0"]
    assert again("train.micro_batch=4")[1] == ["changed since step-0000002: train.micro_batch 8 -> 4"]
    moved = shutil.copytree(begun / "train", tmp_path / "moved")
    _, changed = again(f"data.path={moved}")
    assert changed == [f"changed since step-0000002: data.path {begun / 'train'} -> {moved}"]
    images(moved, 24)
    said, changed = again(f"data.path={moved}")
    assert said.returncode == 0, said.stderr
    assert "changed since step-0000002: images 16 -> 48" in changed


def test_images_that_were_written_anew_are_said(again, begun, tmp_path):
    moved = shutil.copytree(begun / "train", tmp_path / "moved")
    rewritten(moved / "dog" / "3.png")
    said, changed = again(f"data.path={moved}")
    assert said.returncode == 0, said.stderr
    assert len(changed) == 2
    assert changed[1].startswith("changed since step-0000002: bytes of images '")


def test_labels_with_another_meaning_are_refused_or_accepted(again, begun, tmp_path):
    for name in ("renamed", "relabelled"):
        other = shutil.copytree(begun / "train", tmp_path / name)
        if name == "renamed":
            (other / "dog").rename(other / "fox")
            says = "its class names are not those of step-0000002 ('dog' at 1 there, 'fox' at 1 here)"
        else:
            (other / "dog" / "3.png").rename(other / "cat" / "9.png")
            says = "its labels are not those of step-0000002"
        said, _ = again(f"data.path={other}")
        assert said.returncode == 2, said
        assert said.stderr.startswith(f"error: data.path {other}: {says}")
        assert "data.on_change=accept" in said.stderr
        assert len(said.stderr.splitlines()) == 1
        said, changed = again(f"data.path={other}", "data.on_change=accept")
        assert said.returncode == 0, said.stderr
        assert len(changed) > 1


def test_every_key_is_quiet_or_said():
    """A new key is said when it changes, unless ``compare.QUIET`` names it; a name there is one of a key."""
    from unite_fast.checkpoint.compare import QUIET

    keys = agreement._flat(yaml_text.to_dict(config.Config()))
    assert all(any(key.startswith(quiet) for key in keys) for quiet in QUIET)
