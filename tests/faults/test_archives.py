"""F17, F19, F20: packed shards and tars that are damaged or hostile, met by whole runs on two ranks."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest
from jobs import TINY, equal
from photographs import add, crop, jpeg, write_folder, write_tars

from unite_fast.base.errors import UserError
from unite_fast.data.index import main as index
from unite_fast.data.pack import main as packing
from unite_fast.data.pack import pack

fault = pytest.mark.fault


def job_of(jobs, source: str, path: Path, name: str = "job"):
    config = TINY.replace("num_classes: 10", "num_classes: 4").replace("channels: 1", "channels: 3")
    return jobs(name, config.replace("{source: digits,", f"{{source: {source}, path: {path},"))


@pytest.fixture
def tars(tmp_path) -> Path:
    root = write_tars(tmp_path / "tars", write_folder(tmp_path / "folder", 64))
    assert index([str(root)]) == 0
    return root


@fault("F17", "silent damage in a packed shard", "verify names the shard; training does not look (documented)")
def test_zeroed_bytes_in_a_shard(jobs, tmp_path):
    pack(write_folder(tmp_path / "folder", 64), tmp_path / "pack", 8, "uint8", per_shard=40)
    assert packing(["verify", str(tmp_path / "pack")]) == 0
    shard = tmp_path / "pack" / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[500:700] = bytes(200)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: shard-00001.bin: its sha256 is not the one in index.json"):
        packing(["verify", str(tmp_path / "pack")])
    job_of(jobs, "packed", tmp_path / "pack").train("train.max_steps=4")
    shard.write_bytes(content[:-1])  # a change of size is seen at the start
    said = job_of(jobs, "packed", tmp_path / "pack", "short").train("train.max_steps=4", code=2)
    assert "truncated" in said


@fault("F19", "truncated tar, foreign index", "one line at the start, on every rank, before the ranks meet")
def test_truncated_tar(jobs, tars):
    path = tars / "001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    job, started = job_of(jobs, "tar", tars), time.monotonic()
    said = job.train("train.max_steps=4", code=2)
    assert time.monotonic() - started < 10
    assert "001.tar has" in said
    assert "truncated" in said
    assert not job.run.exists()
    path.write_bytes(whole)
    for other in tars.glob("002.*"):
        if other.suffix != ".tar":
            other.write_bytes(b"no index")
    said = job.train("train.max_steps=4", code=2)
    assert "002.tar" in said
    assert not job.run.exists()


@fault("F20", "tar with ../ and links", "such members are skipped with a warning; nothing is written; the run goes on")
def test_members_that_leave_the_archive(jobs, tars, tmp_path, caplog):
    clean = job_of(jobs, "tar", tars, "clean")
    clean.train("train.max_steps=4")
    with tarfile.open(tars / "001.tar", "a") as archive:
        add(archive, "../../evil.jpg", jpeg(crop(2)))
        add(archive, "/evil.jpg", jpeg(crop(2)))
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "folder")
            archive.addfile(member)
    before = set(tmp_path.rglob("*"))
    assert index([str(tars)]) == 0
    said = [record.getMessage() for record in caplog.records]
    assert sum("its name leaves the archive" in line for line in said) == 2
    assert sum("it is a link" in line for line in said) == 2
    assert set(tmp_path.rglob("*")) == before
    evil = job_of(jobs, "tar", tars, "evil")
    evil.train("train.max_steps=4")
    assert not list(tmp_path.rglob("*evil.jpg"))
    assert not Path("/evil.jpg").exists()
    assert equal(evil.tensors(4), clean.tensors(4))
