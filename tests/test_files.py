"""Files come whole under their name or not at all, and no link leads a write elsewhere."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from unite_fast.base import files, provenance
from unite_fast.base.errors import UserError
from unite_fast.modality import pictures


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_earlier_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def half():
        with files.replacing(path) as file:
            file.write(b"half")
            assert names(tmp_path) == [".a.json.incomplete", "a.json"]
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert path.read_text() == '{\n "a": 1\n}'
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_earlier_folder(tmp_path):
    path = tmp_path / "a"
    with files.replacing_folder(path) as folder:
        files.write(folder / "kept", "é")

    def half():
        with files.replacing_folder(path) as folder:
            files.write(folder / "new", "x")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert names(tmp_path) == ["a"]
    assert (path / "kept").read_bytes() == b"\xc3\xa9"
    assert names(path) == ["kept"]


@pytest.mark.parametrize("link", ["a.png", ".a.png.incomplete"])
def test_links_are_replaced_not_followed(tmp_path, link):
    outside = tmp_path / "outside"
    outside.write_text("keep me")
    (tmp_path / link).symlink_to(outside)
    pictures.save_png(tmp_path / "a.png", torch.zeros(1, 4, 4))
    assert outside.read_text() == "keep me"
    assert not (tmp_path / "a.png").is_symlink()
    assert names(tmp_path) == ["a.png", "outside"]


def test_what_is_left_of_a_killed_writer_goes(tmp_path):
    (tmp_path / ".a.incomplete").write_text("of a process that died")
    files.write(tmp_path / "a", b"new", sync=True)
    assert names(tmp_path) == ["a"]


def test_a_refusal_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"^--out x: Not a directory; choose another$"),
        files.refusals("--out x", "; choose another"),
    ):
        files.write(tmp_path / "file" / "a", "")


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "status.json"
    with files.replacing(path, writer="0") as first:
        files.write(path, "1", writer="1")
        first.write(b"0")
    assert path.read_text() == "0"
    assert names(tmp_path) == ["status.json"]


def test_what_another_process_writes_meanwhile_is_not_given_the_name(tmp_path):
    """It may be half a file."""
    path = tmp_path / "x.json"

    def both() -> None:
        with files.replacing(path) as first:
            first.write(b"first")
            files.write(path, b"second")

    with pytest.raises(OSError, match="another process writes it at the same time"):
        both()
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_provenance_says_the_code_and_no_path():
    found = provenance.of(torch.device("cpu"), 2)
    assert found["world_size"] == 2
    assert found["torch"] == torch.__version__
    assert not any("/" in str(value) for value in found.values())


def test_provenance_is_of_this_code_alone(tmp_path, monkeypatch):
    """Copied into somebody's repository, the commit around it is not that of the code; new code makes it dirty."""

    def git(*words: str) -> str:
        environment = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "PATH": os.environ["PATH"]}
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@example.org"}
        done = subprocess.run(
            ["git", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "unite_fast").mkdir()
    (tmp_path / "unite_fast" / "a.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    git("add", ".")
    git("commit", "-qm", "theirs")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    found = provenance.of(torch.device("cpu"), 1)
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "notes.txt").write_text("no code")
    assert not provenance.of(torch.device("cpu"), 1)["dirty"]
    (tmp_path / "unite_fast" / "new.py").write_text("")
    assert provenance.of(torch.device("cpu"), 1)["dirty"]
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "unite_fast")
    assert provenance.of(torch.device("cpu"), 1)["commit"] == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_provenance_of_another_users_clone(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "train.py").write_text("")
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 65534, 65534)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("SUDO_UID", raising=False)
    assert provenance.of(torch.device("cpu"), 1)["dirty"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device, a pipe or a socket"):
        files.write(tmp_path / "pipe", "x")
    assert names(tmp_path) == ["pipe"]


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="it is no regular file"):
            files.read(path)
    (tmp_path / "a").write_bytes(b"x\xff")
    assert files.read_text(tmp_path / "a", "replace") == "x\ufffd"
