"""Fetches what losses, scores and demos need from others: python -m unite_fast fetch NAME [--out FOLDER]

    vgg16           torchvision's VGG16, the trunk of LPIPS: objective.perceptual_trunk=FILE     528 MiB
    inception       torch-fidelity's InceptionV3, which FID looks through: --inception FILE       91 MiB
    fashion-mnist   70,000 images of clothes (Zalando, MIT licence): data.source=idx data.path=FOLDER   30 MiB;
                    Debian's package of that name where apt can reach it, else the files that Zalando published

Nothing is fetched unless this command is given. A file gets its name once its sha256 is the known one; a file that is
there already is checked again. Processes that ask together fetch once. HF_HUB_OFFLINE=1 or --offline: no connection.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from unite_fast.base import files, progress
from unite_fast.base.command import run
from unite_fast.base.errors import UserError
from unite_fast.base.files import file_sha256
from unite_fast.evaluation.features import INCEPTION, INCEPTION_FILE
from unite_fast.modality.lpips import TORCHVISION_VGG16, TRUNK_FILE

BLOCK = 1 << 20
LIMIT = 1 << 30  # bytes; no known file is larger
TIMEOUT = 60.0  # seconds without a byte
PATIENCE = 3600.0  # seconds for another process that is fetching the same file


class Known(NamedTuple):
    file: str
    url: str
    sha256: str  # of what gzip unpacks where ``packed``: the same images are packed in several ways
    packed: bool = False


class Images(NamedTuple):
    """A set of images: its files, Debian's package of them, the folder that it installs, the names of the classes."""

    files: tuple[Known, ...]
    package: str
    installed: str
    classes: tuple[str, ...]


TORCHVISION = "https://download.pytorch.org/models"
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
ZALANDO = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
WEIGHTS = {
    "vgg16": Known(TRUNK_FILE, f"{TORCHVISION}/{TRUNK_FILE}", TORCHVISION_VGG16),
    "inception": Known(INCEPTION_FILE, f"{FIDELITY}/{INCEPTION_FILE}", INCEPTION),
}
IMAGES = {
    "fashion-mnist": Images(
        tuple(
            Known(f"{name}-ubyte.gz", f"{ZALANDO}/{name}-ubyte.gz", sha256, packed=True)
            for name, sha256 in {
                "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            }.items()
        ),
        "dataset-fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
}


def is_offline() -> bool:
    """As huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def digest_of(path: Path, known: Known) -> str:
    """Hexadecimal sha256 of a file, unpacked where the known one is of that."""
    if not known.packed:
        return file_sha256(path)
    digest, size = hashlib.sha256(), 0
    try:
        with gzip.open(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if (size := size + len(block)) > LIMIT:
                    raise UserError(f"{path} unpacks to more than {LIMIT >> 20} MiB; refused")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return "of no whole gzip file"
    return digest.hexdigest()


def fetch_images(images: Images, folder: Path, offline: bool = False, schemes: tuple[str, ...] = ("https",)) -> Path:
    """``folder`` with the files of a set of images and classes.txt, their names. Raises UserError."""
    names = folder / "classes.txt"
    text = "".join(f"{name}\n" for name in images.classes)
    with files.refusals(str(names), "; choose another folder with --out"):
        if os.path.lexists(names) and files.read_text(names, "replace") != text:
            raise UserError(f"{names} holds other names than those of this set; choose another folder with --out")
    if not all(_is_there(folder / known.file, known) for known in images.files):
        if not offline and not is_offline():
            with files.refusals(f"--out {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                _from_debian(images, folder)
        for known in images.files:
            fetch(known, folder, offline, schemes)
    with files.refusals(f"--out {folder}"):
        files.write(names, text)
    return folder


def _from_debian(images: Images, folder: Path) -> None:
    """What of the files Debian's package has: of this machine, or fetched with apt, as any user may. Else nothing."""
    with tempfile.TemporaryDirectory() as place:
        found = Path("/", images.installed)
        if not found.is_dir() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
            print(f"fetching Debian's package {images.package}", flush=True)
            found = Path(place, images.installed)
            get = ["apt-get", "-q", "download", images.package]
            if subprocess.run(get, cwd=place, capture_output=True, check=False).returncode == 0:
                for package in Path(place).glob("*.deb"):
                    subprocess.run(["dpkg-deb", "-x", package, place], capture_output=True, check=False)
        for known in images.files:
            source, path = found / known.file, folder / known.file
            if not path.exists() and source.is_file() and digest_of(source, known) == known.sha256:
                with files.replacing(path) as file:
                    shutil.copyfile(source, file.name)


def fetch(known: Known, folder: Path, offline: bool = False, schemes: tuple[str, ...] = ("https",)) -> Path:
    """folder/file with the known content, fetched if it is not there. Raises UserError.

    schemes: of the address and of every address that it leads on to.
    """
    path = folder / known.file
    if _is_there(path, known):
        return path
    if offline or is_offline():
        raise UserError(
            f"{path} is not there, and this process is offline; fetch it elsewhere from {known.url}, or copy it here"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _is_there(path, known):  # another process may have fetched it meanwhile
                _download(known, path, schemes)
    except urllib.error.HTTPError as error:
        raise UserError(f"{known.url}: the server answers {error.code} {error.reason}; try again later") from None
    except urllib.error.URLError as error:
        raise UserError(f"{known.url} cannot be reached ({error.reason}); fetch it elsewhere to {path}") from None
    except (TimeoutError, HTTPException, ConnectionError) as error:
        raise UserError(f"{known.url}: the connection broke off ({error}); try again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; choose another folder with --out") from None
    return path


def _is_there(path: Path, known: Known) -> bool:
    if not path.is_file():
        return False
    if (digest := digest_of(path, known)) != known.sha256:
        raise UserError(f"{path} has sha256 {digest}, expected {known.sha256}; remove it, then fetch it again")
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process has been fetching into {folder} for an hour; end it") from None
                time.sleep(0.2)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers, newurl: str):
        _check_scheme(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str, schemes: tuple[str, ...]) -> None:
    if urlsplit(url).scheme not in schemes:
        raise UserError(f"{url} is not {' or '.join(schemes)}; refused")


def _download(known: Known, path: Path, schemes: tuple[str, ...]) -> None:
    _check_scheme(known.url, schemes)
    opener, received = urllib.request.build_opener(_Redirects(schemes)), 0
    with files.replacing(path, writer=str(os.getpid()), sync=True) as file:
        with opener.open(known.url, timeout=TIMEOUT) as answer:
            expected = int(answer.headers.get("Content-Length") or 0)
            with progress.bar(total=expected or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := answer.read(BLOCK):
                    received += len(block)
                    if received > LIMIT:
                        raise UserError(f"{known.url} sends more than {LIMIT >> 20} MiB; refused")
                    file.write(block)
                    bar.update(len(block))
        file.flush()
        if (digest := digest_of(Path(file.name), known)) != known.sha256:
            cut = f" ({received} of {expected} bytes came)" if received != expected else ""
            raise UserError(f"{known.url} has sha256 {digest}{cut}, expected {known.sha256}; refused and removed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*WEIGHTS, *IMAGES])
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: weights/, of images a folder of their name"
    )
    parser.add_argument("--offline", action="store_true", help="only check what is there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.name in IMAGES:
        images = IMAGES[arguments.name]
        folder = fetch_images(images, arguments.out or Path(arguments.name), arguments.offline)
        print(
            f"{folder}: {len(images.files)} files, their sha256 as known; {len(images.classes)} classes in classes.txt"
        )
    else:
        known = WEIGHTS[arguments.name]
        print(f"{fetch(known, arguments.out or Path('weights'), arguments.offline)}: sha256 {known.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
