"""What a machine refuses: disks, terminals, memory. One line or one warning, nothing lost."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from faults.forked import end_with
from ranks import SERVER
from support import command, command_of, tiny_run

import train
from unite_fast import analyse, checkpoint, evaluate, export, report
from unite_fast.base import command as base_command
from unite_fast.base import files, locks, streams
from unite_fast.checkpoint import find
from unite_fast.evaluation import statistics
from unite_fast.report import gallery


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of three steps, a checkpoint of each of the last two."""
    words = ("train.max_steps=3", "train.checkpoint_every=1", "train.keep_last=2")
    place = tiny_run(tmp_path_factory.mktemp("machine"), *words)
    words = ("--config", place / "tiny.yaml", "--extractor", "digits", "--out", place / "real.npz")
    assert command_of(statistics.main, *words).returncode == 0
    return place


@pytest.fixture
def run(place, tmp_path) -> Path:
    return shutil.copytree(place / "run", tmp_path / "run")


def go_on(place: Path, run: Path, *words: object):
    return command("train.py", "--config", place / "tiny.yaml", f"run_dir={run}", "train.max_steps=3", *words)


# --- what is no regular file ---------------------------------------------------------------------------------------

PIPES = (
    "metrics.jsonl", "status.json", "logs/rank_000.log", "began_from.txt", "checkpoints/step-0000003/manifest.json",
)  # fmt: skip


def meet_pipes(place: str, run: str) -> None:
    """Ends with 0 where training, the report and an export make their way."""
    trained = go_on(Path(place), Path(run), f"resume={run}_other")
    assert (trained.returncode, "did not begin from there" in trained.stderr) == (2, True), trained
    trained = go_on(Path(place), Path(run))
    assert trained.returncode == 0, trained
    (Path(run) / "provenance.json").unlink()
    os.mkfifo(Path(run) / "provenance.json")
    for said in (command_of(report.main, run), command_of(export.main, run, "--out", f"{run}_exported")):
        assert said.returncode == 0, said


def test_a_pipe_in_a_run_folder_is_not_waited_for(place, run):
    """Whoever may write there could stop a run for good: of a pipe that nobody writes to, a read never ends."""
    shutil.copytree(run, f"{run}_other")
    for name in PIPES:
        (run / name).unlink(missing_ok=True)
        (run / name).parent.mkdir(exist_ok=True)
        os.mkfifo(run / name)
    process = SERVER.Process(target=meet_pipes, args=(str(place), str(run)))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_planted_links_are_not_followed(place, run, tmp_path):
    """Nor do they keep a run from saving: a log, an unfinished save, an unfinished removal."""
    (tmp_path / "elsewhere").mkdir()
    planted = (
        "logs/rank_000.log",
        "checkpoints/step-0000004.incomplete",
        "checkpoints/step-0000002.removed.incomplete",
    )
    for name in planted:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "elsewhere" / Path(name).name)
    said = command("train.py", "--config", place / "tiny.yaml", f"run_dir={run}", "train.max_steps=4")
    assert said.returncode == 0, said
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (run / "checkpoints" / "step-0000004" / "manifest.json").is_file()
    assert "pid" in (run / "logs" / "rank_000.log").read_text()


# --- an unreadable checkpoint --------------------------------------------------------------------------------------


def refuse(patch: pytest.MonkeyPatch, where: str, code: int, at: str) -> None:
    """Lets the system refuse the folder ``where`` and its JSON, when they are looked at, or its files' content."""
    stat, digest = Path.stat, find.file_sha256

    def refusing_stat(self: Path, **options: bool) -> os.stat_result:
        if where in str(self) and "." not in self.name.removesuffix(".json") and os.path.lexists(self):
            raise OSError(code, os.strerror(code), str(self))
        return stat(self, **options)

    def refusing_digest(path: Path) -> str:
        if where in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return digest(path)

    if at == "stat":
        patch.setattr(Path, "stat", refusing_stat)
    else:
        patch.setattr(find, "file_sha256", refusing_digest)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("at", ["stat", "hash"])
def test_an_unreadable_newest_checkpoint_is_skipped(place, run, tmp_path, monkeypatch, code, at):
    newest = run / "checkpoints" / "step-0000003"
    with monkeypatch.context() as patch:
        refuse(patch, "step-0000003", code, at)
        found = [
            command_of(export.main, run, "--out", tmp_path / "exported"),
            command("sample.py", "--checkpoint", run, "--seeds", "0-3", "--out", tmp_path / "s"),
            go_on(place, run),
        ]
    for said in found:
        assert said.returncode == 0, said
        assert f"skipping {newest}: " in said.stdout + said.stderr
        assert f"cannot be read: {os.strerror(code)}" in said.stdout + said.stderr
    assert "at step 2: the newest that verifies" in found[2].stdout
    assert "Traceback" not in str(found)


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(place, run, monkeypatch):
    listed = os.listdir

    def refusing(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refusing)
    said = go_on(place, run)
    assert said.returncode == 2
    assert f"error: {run / 'checkpoints'}: Permission denied; make it readable" in said.stderr
    monkeypatch.undo()
    assert checkpoint.step_of(checkpoint.newest_first(run / "checkpoints")[0]) == 3


# --- output that is refused ----------------------------------------------------------------------------------------


class Full(io.StringIO):
    """A stream on a full disk, for as long as ``room`` is false."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code, self.room = code, False

    def write(self, text: str) -> int:
        if not self.room:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)

    def flush(self) -> None:
        if not self.room:
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE, errno.EIO], ids=errno.errorcode.get)
def test_a_refused_print_costs_training_one_warning(place, tmp_path, monkeypatch, code):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Full(code))
    monkeypatch.setattr(sys, "stderr", err)
    words = ["--config", str(place / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", "train.max_steps=3"]
    assert base_command.run(train.main, words) == 0
    monkeypatch.undo()
    assert err.getvalue() == f"warning: standard output cannot be written ({os.strerror(code)}); the work goes on\n"
    assert checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0].name == "step-0000003"


def test_lost_output_of_a_command_that_has_no_other_is_a_failure(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Full(errno.ENOSPC))
    monkeypatch.setattr(sys, "stderr", err)
    assert base_command.run(train.main, ["--print-config"]) == 1
    monkeypatch.setattr(sys, "stdout", Full(errno.EPIPE))
    assert base_command.run(train.main, ["--print-config"]) == 0  # | head
    monkeypatch.undo()
    assert err.getvalue() == (
        "warning: standard output cannot be written (No space left on device); the work goes on\n"
    )


def test_a_full_disk_may_have_room_again(monkeypatch):
    full = Full(errno.ENOSPC)
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with streams.forgiving():
        print("lost")
        full.room = True
        print("kept")
    monkeypatch.undo()
    assert full.getvalue() == "\nkept\n" or full.getvalue() == "kept\n"


def test_a_name_that_no_text_can_show_is_escaped(monkeypatch):
    content = io.BytesIO()
    out = io.TextIOWrapper(content, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    with streams.forgiving():
        print("a\udcffb")
    monkeypatch.undo()
    assert content.getvalue() == b"a\\udcffb\n"
    out.detach()


def test_a_pipe_that_nobody_reads(place, tmp_path):
    """As a process: nothing more is said when Python itself writes out what is left."""
    read, write = os.pipe()
    os.close(read)
    pid = os.fork()
    if pid == 0:

        def call() -> int:
            os.dup2(write, 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            code = base_command.run(report.main, [str(place / "run"), "--out", str(tmp_path / "page.html")])
            try:
                sys.stdout.flush()
            except OSError:
                code = 99
            return code

        end_with(call, failed=98)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "page.html").is_file()


def test_logs_that_cannot_be_made_cost_a_warning(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("in the way")
    said = go_on(place, tmp_path / "run")
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("training goes on without its logs") == 1
    assert "Traceback" not in said.stderr


def test_a_log_on_a_full_disk_costs_a_warning(place, tmp_path, monkeypatch):
    from unite_fast.run import rank_log

    def full(self, record):
        self.stream = Full(errno.ENOSPC)
        self.stream.name = "rank_000.log"
        super(rank_log._File, self).emit(record)

    monkeypatch.setattr(rank_log._File, "emit", full)
    said = go_on(place, tmp_path / "run")
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("rank_000.log cannot be written") == 1
    assert "Logging error" not in said.stderr


# --- refusals outside training -------------------------------------------------------------------------------------


def raising(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x: Permission denied; give this user"),
        (OSError(errno.EIO, "Input/output error", "x"), "x: Input/output error; check that storage"),
        (OSError("odd"), "odd; mend that"),
        (MemoryError("Unable to allocate 3 TiB"), "out of memory (Unable to allocate 3 TiB)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory (CUDA out of memory"),
        (RuntimeError("could not create a primitive"), "out of memory (could not create a primitive)"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_command_says_it_in_one_line(error, says):
    said = command_of(raising(error))
    assert said.returncode == 1
    assert said.stderr.startswith(f"error: {says}")
    assert said.stderr.count("\n") == 1
    with pytest.raises(type(error)):
        command_of(raising(error), "--debug")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        command_of(raising(KeyError("x")))


SCORING = ("--checkpoint", "RUN", "--extractor", "digits", "--reference", "REAL.npz", "--count", "10", "--solver",
           "euler", "--steps", "2")  # fmt: skip
COMMANDS = {
    "sample": ("sample.py", "--checkpoint", "RUN", "--seeds", "0-3", "--out", "OUT"),
    "npz": ("sample.py", "--checkpoint", "RUN", "--seeds", "0-3", "--out", "OUT.npz"),
    "rfid": (evaluate.main, "rfid", "--checkpoint", "RUN", "--extractor", "digits", "--out", "OUT.json"),
    "export": (export.main, "RUN", "--out", "OUT"),
    "report": (report.main, "RUN", "--out", "OUT.html"),
    "heldout": (evaluate.main, "heldout", "--checkpoint", "RUN", "--out", "OUT.json"),
    "fid": (evaluate.main, "fid", *SCORING, "--out", "OUT.json"),
    "search": (evaluate.main, "search", *SCORING, "--grid", "1,2,1", "--out", "OUT.json"),
    "analyse": (analyse.main, "RUN", "--only", "entropy", "--out", "OUT"),
    "gallery": (gallery.main, "between-seeds", "RUN", "--seeds", "3,8", "--labels", "1", "--out", "OUT.png"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_no_obstacle_later(place, run, tmp_path, monkeypatch, name):
    """Every file that the command writes is refused in turn, then the same command goes through."""
    program, *words = COMMANDS[name]
    places = {"RUN": run, "REAL": place / "real", "OUT": tmp_path / "out"}
    words = [re.sub("RUN|REAL|OUT", lambda found: str(places[found[0]]), word) for word in words]
    start = command if isinstance(program, str) else command_of
    count, create = 0, files.create

    def refusing(path: Path):
        nonlocal count
        count += 1
        if count == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return create(path)

    monkeypatch.setattr(files, "create", refusing)
    for refused in range(1, 4):
        count = 0
        said = start(program, *words)
        if count < refused:
            assert refused > 1, "nothing was refused"
            break
        assert said.returncode in (1, 2), said
        assert said.stderr.count("error: ") == 1, said.stderr
        assert "No space left on device" in said.stderr
    monkeypatch.undo()
    again = ["--overwrite"] if name == "export" and (tmp_path / "out").exists() else []
    said = start(program, *words, *again)
    assert said.returncode == 0, said.stderr


def test_two_jobs_do_not_make_one_file(place, run, tmp_path):
    words = ("--checkpoint", run, "--seeds", "0-3", "--out", tmp_path / "s.npz")
    (tmp_path / "s.npz.parts").mkdir()
    pid = os.fork()
    if pid == 0:  # POSIX locks are those of a process

        def hold() -> int:
            locks.take(tmp_path / "s.npz.parts" / ".lock", "s.npz", "")
            time.sleep(60)
            return 0

        end_with(hold, failed=1)
    try:
        while not (tmp_path / "s.npz.parts" / ".lock").exists() or not (tmp_path / "s.npz.parts" / ".lock").read_text():
            time.sleep(0.01)
        said = command("sample.py", *words)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert said.returncode == 2
    assert f"s.npz is in use by pid {pid} on " in said.stderr
    assert command("sample.py", *words).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "s.npz"]


def test_an_empty_image_is_made_again(place, run, tmp_path):
    words = ("--checkpoint", run, "--seeds", "0-3", "--out", tmp_path / "s")
    assert command("sample.py", *words).returncode == 0
    image = next((tmp_path / "s").glob("0000002*.png"))
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert "made 1 of 4" in command("sample.py", *words).stdout
    assert image.read_bytes() == whole
