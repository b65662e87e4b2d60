"""Fetches the pretrained weights that losses and scores need: python -m unite_fast.weights NAME [--out FOLDER]

    vgg16       torchvision's VGG16, the trunk of LPIPS: objective.perceptual_trunk=FILE         528 MiB
    inception   torch-fidelity's InceptionV3, which FID looks through: --inception FILE           91 MiB

Nothing is fetched unless this command is given. A file gets its name once its sha256 is the known one; a file that is
there already is checked again. Processes that ask together fetch once. HF_HUB_OFFLINE=1 or --offline: no connection.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request
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
from unite_fast.modality.lpips import TORCHVISION_VGG16

BLOCK = 1 << 20
LIMIT = 1 << 30  # bytes; no known file is larger
TIMEOUT = 60.0  # seconds without a byte
PATIENCE = 3600.0  # seconds for another process that is fetching the same file


class Weights(NamedTuple):
    file: str
    url: str
    sha256: str


KNOWN = {
    "vgg16": Weights("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", TORCHVISION_VGG16),
    "inception": Weights(
        INCEPTION_FILE, f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}", INCEPTION
    ),
}


def is_offline() -> bool:
    """As huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch(weights: Weights, folder: Path, offline: bool = False, schemes: tuple[str, ...] = ("https",)) -> Path:
    """folder/file with the known content, fetched if it is not there. Raises UserError.

    schemes: of the address and of every address that it leads on to.
    """
    path = folder / weights.file
    if _is_there(path, weights):
        return path
    if offline or is_offline():
        raise UserError(
            f"{path} is not there, and this process is offline; fetch it elsewhere from {weights.url}, or copy it here"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _is_there(path, weights):  # another process may have fetched it meanwhile
                _download(weights, path, schemes)
    except urllib.error.HTTPError as error:
        raise UserError(f"{weights.url}: the server answers {error.code} {error.reason}; try again later") from None
    except urllib.error.URLError as error:
        raise UserError(f"{weights.url} cannot be reached ({error.reason}); fetch it elsewhere to {path}") from None
    except (TimeoutError, HTTPException, ConnectionError) as error:
        raise UserError(f"{weights.url}: the connection broke off ({error}); try again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; choose another folder with --out") from None
    return path


def _is_there(path: Path, weights: Weights) -> bool:
    if not path.is_file():
        return False
    if (digest := file_sha256(path)) != weights.sha256:
        raise UserError(f"{path} has sha256 {digest}, expected {weights.sha256}; remove it, then fetch it again")
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


def _download(weights: Weights, path: Path, schemes: tuple[str, ...]) -> None:
    _check_scheme(weights.url, schemes)
    opener = urllib.request.build_opener(_Redirects(schemes))
    digest, received = hashlib.sha256(), 0
    with files.replacing(path, writer=str(os.getpid()), sync=True) as file:
        with opener.open(weights.url, timeout=TIMEOUT) as answer:
            expected = int(answer.headers.get("Content-Length") or 0)
            with progress.bar(total=expected or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := answer.read(BLOCK):
                    received += len(block)
                    if received > LIMIT:
                        raise UserError(f"{weights.url} sends more than {LIMIT >> 20} MiB; refused")
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != weights.sha256:
            cut = f" ({received} of {expected} bytes came)" if received != expected else ""
            raise UserError(
                f"{weights.url} has sha256 {digest.hexdigest()}{cut}, expected {weights.sha256}; refused and removed"
            )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unite_fast.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(KNOWN))
    parser.add_argument("--out", type=Path, default=Path("weights"), metavar="FOLDER", help="default: weights/")
    parser.add_argument("--offline", action="store_true", help="only check the file that is there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    path = fetch(KNOWN[arguments.name], arguments.out, arguments.offline)
    print(f"{path}: sha256 {KNOWN[arguments.name].sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
