"""F39, F40: pretrained weights from a server of this machine that is slow, altered, cut short or not there."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import multiprocessing
import shutil
import socket
import threading
import time
from typing import ClassVar

import pytest
from support import command_of

from unite_fast import fetch as program
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.fetch import IMAGES, WEIGHTS, Images, Known, fetch, fetch_images

fault = pytest.mark.fault
CONTENT = bytes(range(256)) * 4000
HTTP = ("http",)


class Handler(http.server.BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_GET(self):
        type(self).requests.append(self.path)
        if self.path in ("/file", "/ftp", "/moved"):
            where = {"/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1:1/", "/moved": "/good"}[self.path]
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()
            return
        pages = {"/altered": CONTENT[:-1] + b"x", "/large": CONTENT * 2, "/packed": gzip.compress(CONTENT)}
        content = pages.get(self.path, CONTENT)
        if self.path == "/none":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path == "/slow":
            time.sleep(1)
        self.wfile.write(content[: len(content) // 2] if self.path == "/short" else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Handler.requests = []
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield functools.partial("http://127.0.0.1:{}/{}".format, made.server_port)
    made.shutdown()
    made.server_close()


def known(url: str) -> Known:
    return Known("w.pth", url, hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize("page", ["good", "moved"])
def test_fetched_checked_and_kept(server, tmp_path, page):
    path = fetch(known(server(page)), tmp_path / "new", schemes=HTTP)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["w.pth"]
    count = len(Handler.requests)
    assert fetch(known(server(page)), tmp_path / "new", schemes=HTTP) == path
    assert len(Handler.requests) == count


def refused(weight: Known, folder, words: str, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        fetch(weight, folder, **options)
    assert "\n" not in str(caught.value)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("altered", "refused and removed"),
        ("short", "refused and removed|broke off"),
        ("large", "more than"),
        ("none", "answers 404"),
        ("file", "file:///etc/passwd' is not allowed"),
        ("ftp", "ftp://127.0.0.1:1/ is not http; refused"),
    ],
)
@fault("F40", "weights that a server altered or cut", "refused with both hashes, the temporary file removed")
def test_altered(server, tmp_path, monkeypatch, page, words):
    monkeypatch.setattr(program, "LIMIT", len(CONTENT) + 10)
    refused(known(server(page)), tmp_path / "new", words, schemes=HTTP)


@fault("F40", "weights that a server altered or cut", "a file that is there is checked again, and not overwritten")
def test_altered_on_disk(server, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"has sha256 .* expected .* remove it"):
        fetch(known(server("good")), tmp_path, schemes=HTTP)
    assert (tmp_path / "w.pth").read_bytes() == b"other"
    assert Handler.requests == []


def test_https_alone(server, tmp_path):
    refused(known(server("good")), tmp_path / "new", "is not https; refused")
    assert Handler.requests == []
    with pytest.raises(UserError, match="is not https"):
        program._Redirects(("https",)).redirect_request(None, None, 302, "", {}, server("good"))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["variable", "option", "no network"])
@fault("F39", "no network, no weights", "offline: no connection is tried; else one line; no half file")
def test_offline(tmp_path, monkeypatch, how):
    tried = []

    def connect(*arguments, **options):
        tried.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", connect)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["vgg16", "--out", tmp_path / "new", *(["--offline"] if how == "option" else [])]
    outcome = command_of(program.main, *words)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in outcome.stderr
    assert bool(tried) == (how == "no network")
    assert not list(tmp_path.rglob("*.*"))


@fault("F39", "no network, no weights", "processes that ask together fetch once")
def test_together(server, tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=fetch, args=(known(server("slow")), tmp_path, False, HTTP)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert Handler.requests == ["/slow"]
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_the_table():
    for entry in WEIGHTS.values():
        assert entry.url.startswith("https://")
        assert entry.url.endswith(entry.file)
        digits = entry.file.removesuffix(".pth").rpartition("-")[2]
        assert entry.sha256.startswith(digits)  # as their publishers put it into the name
        assert len(entry.sha256) == 64


def test_as_a_command(tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    file.write_bytes(CONTENT)
    monkeypatch.setitem(WEIGHTS, "vgg16", known("https://127.0.0.1:1/w.pth"))
    outcome = command_of(program.main, "vgg16", "--out", tmp_path)
    assert outcome.returncode == 0
    assert outcome.stdout == f"{file}: sha256 {file_sha256(file)}\n"


def images(server, tmp_path) -> Images:
    """A set whose one file Debian's package holds packed in another way."""
    one = Known("a-ubyte.gz", server("packed"), hashlib.sha256(CONTENT).hexdigest(), packed=True)
    return Images((one,), "no-such-package", str(tmp_path / "debian"), ("cat", "dog"))


@pytest.mark.parametrize("there", ["installed", "installed, another", "not installed"])
def test_images(server, tmp_path, monkeypatch, there):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no apt
    known = images(server, tmp_path)
    if there != "not installed":
        (tmp_path / "debian").mkdir()
        content = CONTENT if there == "installed" else CONTENT[1:]
        (tmp_path / "debian" / "a-ubyte.gz").write_bytes(gzip.compress(content, 1))
    folder = fetch_images(known, tmp_path / "new", schemes=HTTP)
    assert gzip.decompress((folder / "a-ubyte.gz").read_bytes()) == CONTENT
    assert Handler.requests == ([] if there == "installed" else ["/packed"])
    assert sorted(p.name for p in folder.iterdir()) == ["a-ubyte.gz", "classes.txt"]
    assert (folder / "classes.txt").read_text() == "cat\ndog\n"
    (folder / "classes.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"classes.txt holds other names .*choose another folder"):
        fetch_images(known, folder, schemes=HTTP)
    assert (folder / "classes.txt").read_text() == "mine\n"
    (folder / "classes.txt").unlink()
    count = len(Handler.requests)
    assert fetch_images(known, folder, offline=True) == folder
    assert len(Handler.requests) == count
    (folder / "a-ubyte.gz").write_bytes(gzip.compress(CONTENT)[:-9])
    with pytest.raises(UserError, match=r"of no whole gzip file.*expected .*remove it"):
        fetch_images(known, folder, schemes=HTTP)


@pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="needs Debian's tools")
def test_images_of_a_package_that_apt_does_not_have(server, tmp_path):
    folder = fetch_images(images(server, tmp_path), tmp_path / "new", schemes=HTTP)
    assert Handler.requests == ["/packed"]
    assert (folder / "a-ubyte.gz").is_file()


def test_the_table_of_images():
    for name, entry in IMAGES.items():
        assert entry.package == f"dataset-{name}"
        assert all(one.url.endswith(one.file) and one.packed and len(one.sha256) == 64 for one in entry.files)
        assert len(set(entry.classes)) == 10
