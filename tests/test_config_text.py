"""What a user writes, in YAML and on the command line, and what the program reads in it."""

from __future__ import annotations

import pytest
from support import TINY, command

from unite_fast.base.errors import UserError
from unite_fast.config import Config, yaml_text


def read(*overrides: str) -> Config:
    return yaml_text.load(None, overrides)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=run #3", "name", "run #3"),
        ("name=20240501", "name", "20240501"),
        ("name=on", "name", "on"),
        ("name='a b'", "name", "a b"),
        ('name="1"', "name", "1"),
        ("data.path=/data/set #1/train", "data.path", "/data/set #1/train"),
        ("data.path=a: b", "data.path", "a: b"),
        ("objective.perceptual_range=0_1", "objective.perceptual_range", "0_1"),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=.5", "optim.lr", 0.5),
        ("optim.flow", None, None),
        ("train.epochs=1_000", "train.epochs", 1000.0),
        ("train.max_minutes=90", "train.max_minutes", 90.0),
    ],
)
def test_values_on_the_command_line(override, key, value):
    if key is None:
        with pytest.raises(UserError, match=r"write it as section\.key=value"):
            read(override)
        return
    found = read(override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_minutes=1:30:00", "max_minutes must be a number, got '1:30:00'"),
        ("model.num_classes=010", "num_classes must be a whole number, got '010'"),
        ("model.num_classes=0x10", "num_classes must be a whole number"),
        ("optim.lr=.inf", "optim.lr must be a number"),
        ("optim.lr=.nan", "optim.lr must be a number"),
        ("train.max_steps=!!int ''", "not valid YAML"),
        ("name=", "is not the name of a folder"),
        ("name=../../x", "is not the name of a folder"),
        ("name='\\ud800'".replace("'", '"'), "name must be text"),
        ("name=..", "is not the name of a folder"),
        ("data.path=$NO_SUCH_VARIABLE/x", "the environment has no NO_SUCH_VARIABLE"),
        ("data.path=~nobody-of-this-name/x", "no such home folder"),
    ],
)
def test_what_is_refused_on_the_command_line(override, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        read(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: 20240501", "got 20240501; put it in quotes"),
        ("name: on", "got True; put it in quotes"),
        ("name: 2024-05-01", "put it in quotes"),
        ("a: &a {x: 1}\nb: *a", r"line 2: references \(\*name\) are not read"),
        ("a: &a [1]\nb: {<<: {c: 1}}", "line 2: '<<' is not read"),
    ],
)
def test_what_is_refused_in_a_file(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        yaml_text.load(tmp_path / "a.yaml")


def test_a_file_of_references_ends_at_once(tmp_path):
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 2"):
        yaml_text.load(tmp_path / "bomb.yaml")


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    found = read("data.path=~/images", "run_dir=${SCRATCH}/runs/x", "resume=$SCRATCH/y")
    assert found.data.path == str(tmp_path / "home" / "images")
    assert found.run_dir == str(tmp_path / "scratch" / "runs" / "x")
    assert found.resume == str(tmp_path / "scratch" / "y")


def test_home_in_options_of_programs(tmp_path, monkeypatch):
    """The shell leaves --out=~/x as it stands."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = command("train.py", "--config=~/tiny.yaml", "--print-config")
    assert shown.returncode == 0
    assert "name: tiny" in shown.stdout
    (tmp_path / "based.yaml").write_text("base: ~/tiny.yaml\nseed: 5")
    found = yaml_text.load(tmp_path / "based.yaml")
    assert (found.name, found.seed) == ("tiny", 5)
    monkeypatch.delenv("SCRATCH", raising=False)
    (tmp_path / "based.yaml").write_text("base: $SCRATCH/tiny.yaml")
    with pytest.raises(UserError, match=r"based\.yaml: base \$SCRATCH/tiny\.yaml: the environment has no SCRATCH"):
        yaml_text.load(tmp_path / "based.yaml")


def test_a_schedule_of_an_earlier_file_that_has_one_meaning_is_read(tmp_path):
    for schedule, flat in (("cosine", 0.0), ("constant", 1e9)):
        (tmp_path / "old.yaml").write_text(f"optim: {{schedule: {schedule}, warmup_epochs: 1, decay_epochs: 0}}")
        found = yaml_text.load(tmp_path / "old.yaml").optim
        assert (found.warmup_epochs, found.flat_epochs, found.decay_epochs) == (1, flat, 0)
    (tmp_path / "old.yaml").write_text("optim: {schedule: cosine}")
    o = yaml_text.load(tmp_path / "old.yaml").optim  # with the defaults of then
    assert (o.warmup_epochs, o.flat_epochs, o.decay_epochs, o.final_lr) == (20, 0, 50, 1e-5)
    (tmp_path / "old.yaml").write_text("optim: {schedule: [two_stage]}")
    with pytest.raises(UserError, match="no key any more"):
        yaml_text.load(tmp_path / "old.yaml")


# --- base ---


def test_a_file_begins_with_its_base(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "first.yaml").write_text("optim: {lr: 0.5, clip: 2}\nmodel: {encoder: small}")
    (tmp_path / "below" / "second.yaml").write_text("base: ../first.yaml\nname: second\noptim: {lr: 0.25}")
    (tmp_path / "below" / "third.yaml").write_text("base: second.yaml\nmodel: {encoder: {depth: 5}}")
    found = yaml_text.load(tmp_path / "below" / "third.yaml", ["optim.eps=1e-5"])
    assert (found.name, found.optim.lr, found.optim.clip, found.optim.eps) == ("second", 0.25, 2, 1e-5)
    assert (found.model.encoder.depth, found.model.encoder.width) == (5, 384)
    shown = command("train.py", "--config", tmp_path / "below" / "third.yaml", "--print-config").stdout
    assert "base:" not in shown.splitlines()
    (tmp_path / "resolved.yaml").write_text(shown)
    assert yaml_text.load(tmp_path / "resolved.yaml") == yaml_text.load(tmp_path / "below" / "third.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a.yaml", "this file is its own base"),
        ("base: b.yaml", "this file is its own base"),
        ("base: nowhere.yaml", r"a\.yaml: base .*nowhere\.yaml: No such file"),
        ("base: [x]", "base must be the path"),
        ("base:", "base must be the path"),
    ],
)
def test_bases_that_are_none(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match=words):
        yaml_text.load(tmp_path / "a.yaml")


def test_a_link_in_a_circle_is_one_line(tmp_path):
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    said = command("train.py", "--config", tmp_path / "a.yaml", "--print-config")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "give the path of a YAML file" in said.stderr


def test_an_override_has_no_base():
    with pytest.raises(UserError, match="unknown key 'base'"):
        yaml_text.load(None, ["base=x.yaml"])
