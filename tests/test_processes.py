"""Processes beside each other: one at a time in a folder, signals, and none that outlives the one that started it."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.forked import end_with
from PIL import Image
from ranks import SERVER

from unite_fast import sweep
from unite_fast.base import locks, parent
from unite_fast.base.errors import UserError
from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data import open_source, pack, stream
from unite_fast.data.atoms import parallel
from unite_fast.data.folder import Folder
from unite_fast.parallel import distributed
from unite_fast.parallel.distributed import Ranks
from unite_fast.run.stop import Stop
from unite_fast.sampling import generate


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def no_locks(monkeypatch, request):
    """As the file systems of several clusters say it."""

    def refusing(*arguments):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(locks.fcntl, "lockf", refusing)
    monkeypatch.setattr(locks, "BEAT", 0.05)


def test_without_locks_two_jobs_are_told_apart_all_the_same(tmp_path, no_locks, caplog):
    path = tmp_path / "run.lock"
    first = locks.take(path, tmp_path, "end it")
    assert "this file system has no locks" in caplog.text
    with pytest.raises(UserError, match=rf"in use by pid {os.getpid()} on .*; end it"):
        locks.take(path, tmp_path, "end it")
    first.release()
    locks.take(path, tmp_path, "end it").release()
    assert not path.with_name("run.lock.owner").exists()


def test_without_locks_a_file_of_images_is_made_all_the_same(tmp_path, no_locks):
    parts = tmp_path / "s.npz.parts"
    with generate.alone(str(tmp_path / "s.npz"), parts, Ranks(0, 1, torch.device("cpu"))):
        assert sorted(os.listdir(parts)) == [".lock", ".lock.owner"]
    assert not parts.exists()


def test_without_locks_a_dead_owner_is_followed(tmp_path, no_locks):
    owner = tmp_path / "run.lock.owner"
    owner.write_text(f"pid 4194304 on {locks.socket.gethostname()}")
    locks.take(tmp_path / "run.lock", tmp_path, "").release()
    owner.write_text("pid 7 on another-host")  # not renewed any more
    locks.take(tmp_path / "run.lock", tmp_path, "").release()

    owner.write_text("pid 7 on another-host")
    beating = locks.Lock(os.open(owner, os.O_RDONLY), owner)
    try:
        with pytest.raises(UserError, match="in use by pid 7 on another-host"):
            locks.take(tmp_path / "run.lock", tmp_path, "")
    finally:
        beating.release()


def test_a_planted_link_is_no_lock(tmp_path):
    (tmp_path / "theirs").write_text("keep me")
    (tmp_path / "run.lock").symlink_to(tmp_path / "theirs")
    locks.take(tmp_path / "run.lock", tmp_path, "").release()
    assert (tmp_path / "theirs").read_text() == "keep me"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_terminal_stops_a_run_as_other_signals_do(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    stop = Stop(Ranks(0, 1, torch.device("cpu")), 0, time.monotonic())
    try:
        stop.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() == (("running", "") if ignored else ("preempted", "SIGHUP on rank 0"))
        stop.remove()
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def ends(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


def pid_in(note: Path) -> int:
    deadline = time.monotonic() + 60  # where cores are shared, a server that imports torch takes its time
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(note.read_text())


def started(note: Path, gone: Path) -> int:
    """Of a process that asks to end with its parent: at once, or once ``gone`` says that the parent has ended."""

    def child() -> int:
        note.with_suffix(".new").write_text(str(os.getpid()))
        note.with_suffix(".new").rename(note)
        while gone.name and not gone.exists():
            time.sleep(0.01)
        parent.end_with_parent()
        time.sleep(60)
        return 0

    def middle() -> int:
        if os.fork() == 0:
            end_with(child, failed=1)
        time.sleep(60)
        return 0

    pid = os.fork()
    if pid == 0:
        end_with(middle, failed=1)
    found = pid_in(note)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return found


def test_a_process_ends_with_its_parent(tmp_path):
    assert ends(started(tmp_path / "pid", Path()))


def test_a_process_ends_with_a_parent_that_had_gone_before_it_asked(tmp_path):
    child = started(tmp_path / "pid", tmp_path / "gone")
    (tmp_path / "gone").touch()
    assert ends(child)


def hang(note: str, *arguments: object) -> Any:
    """Tells its process in the file ``note`` and never returns."""
    Path(note).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def training(images: str, note: str) -> None:
    """Whose one data worker hangs in its first read."""
    Folder.encoded = lambda self, index: hang(note)
    multiprocessing.set_start_method("fork", force=True)  # as in a program; the server's children would use the server
    model = ModelConfig(image_size=8, patch_size=2, channels=1, num_classes=2)
    next(iter(stream(open_source(DataConfig(path=images), model), 0, global_batch=2, workers=1)))


def packing(images: str, note: str) -> None:
    pack.pack_shard = functools.partial(hang, note)
    pack.main([images, f"{images}_packed", "--size", "8", "--workers", "2"])


def scoring_of_atoms(images: str, note: str) -> None:
    list(parallel.mapped(functools.partial(hang, note), [1, 2], workers=2, chunk=1))


def torchrun(images: str, note: str) -> None:
    """As far as a rank sees it: a process in whose environment it stands, and that started it."""

    def rank() -> int:
        os.environ |= {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"}
        distributed.start("cpu")
        return hang(note)

    if os.fork() == 0:
        end_with(rank, failed=1)
    time.sleep(60)


def sweeping(images: str, note: str) -> None:
    words = [sys.executable, "-c", f"import os, time; open({note!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
    sweep._call(words, Path(f"{note}.log"))


@pytest.mark.parametrize("start", [training, packing, scoring_of_atoms, torchrun, sweeping])
def test_what_a_killed_process_had_started_ends_with_it(start, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / name / "0.png")
    note = tmp_path / "pid"
    program = SERVER.Process(target=start, args=(str(tmp_path / "images"), str(note)))
    program.start()
    worker = pid_in(note)
    program.kill()
    program.join()
    assert ends(worker)
