"""Checks around the dataset libraries, so that a problem with files or the network is one line, not a traceback.

Used by the loaders of :mod:`~iexact_runner.data.ogb` and :mod:`~iexact_runner.data.pyg`.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import http.client
import io
import json
import os
import pickle
import socket
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from iexact_runner.errors import DatasetError, first_line
from iexact_runner.untrusted import archives, pickles
from iexact_runner.untrusted.pickles import RefusedPickle

CONNECT_SECONDS = 4.0
STALL_SECONDS = 60.0

# What numpy, pandas, scipy, json, gzip, zipfile, pickle and torch.load raise on bytes they cannot make sense of.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)
DOWNLOAD_ERRORS = (OSError, ValueError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile)


def missing_files(paths: Sequence[Path]) -> list[Path]:
    """Those of ``paths`` that are not files."""
    # os.path says False where a folder cannot even be searched; pathlib raises there.
    return [path for path in paths if not os.path.isfile(path)]


def require_network(missing: Sequence[Path], urls: Sequence[str]) -> None:
    """Raises unless the host of every URL answers: a library left alone would hang or show a traceback.

    Args:
        missing: the files to download, for the message.
        urls: where they come from.
    """
    one_per_host = {urlsplit(url).netloc: url for url in urls}
    for url in one_per_host.values():
        try:
            connect(url)
        except OSError as error:
            raise download_error(missing, urls, error) from error


def connect(url: str) -> None:
    """Opens and closes a TCP connection to the URL's host, or to the proxy that the environment sets for it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not urllib.request.proxy_bypass(host):
        parts = urlsplit(urllib.request.getproxies().get(parts.scheme, url))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or host, port), timeout=CONNECT_SECONDS).close()


def download_error(missing: Sequence[Path], urls: Sequence[str], error: BaseException) -> DatasetError:
    """The line for files that are missing and could not be downloaded."""
    names = ", ".join(path.name for path in missing)
    folders = " and ".join(dict.fromkeys(str(path.parent) for path in missing))
    shared = urls[0].rpartition("/")[0] + "/"
    one_folder = len(urls) > 1 and [shared + path.name for path in missing] == list(urls)
    return DatasetError(
        f"missing {names}, and the download failed ({first_line(error)}): "
        f"get {shared if one_folder else ' and '.join(urls)} by hand and put the files into {folders}, "
        "or set dataset.root to where they are"
    )


def damaged_error(paths: Sequence[Path], error: BaseException) -> DatasetError:
    """The line for a file that exists but cannot be read; looks for the culprit among ``paths``.

    Args:
        paths: the files that were being read, all raw or all processed.
        error: what the library raised.
    """
    processed = all(path.suffix == ".pt" for path in paths)
    remedy = "delete it" + (", and it is made again from raw" if processed else " and copy or download it again")
    paths = [path for path in paths if path.exists()] or paths
    bad = [(path, reason) for path in paths if (reason := _defect(path))]
    if not bad:
        where = ", ".join(path.name for path in paths)
        return DatasetError(f"cannot read {where} in {paths[0].parent} ({first_line(error)}): {remedy}")
    path, reason = bad[0]
    return DatasetError(f"{path} is damaged or unreadable ({reason}): {remedy}")


def check_files(paths: Sequence[Path]) -> None:
    """Raises unless every file is what its suffix says, without objects that could run and of a size that is meant."""
    for path in paths:
        check = _CHECKS.get(path.suffix)
        if check is not None:
            with reading(path):
                check(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a damaged or hostile file makes its reader raise into one line."""
    try:
        _check_regular(path)
        yield
    except RefusedPickle as error:
        raise DatasetError(
            f"{path} is {error}: get it from a source you trust, or set dataset.trust_pickle=true to run what it says"
        ) from error
    except READ_ERRORS as error:
        raise damaged_error([path], error) from error


def check_torch_file(path: Path) -> None:
    """Raises ``ValueError`` unless a file of ``torch.save`` holds tensors in what torch_geometric and ogb wrap them."""
    pickles.check_torch_file(path, _DATA_CLASSES)


_DATA_CLASSES = (
    "torch_geometric.data.data.Data",
    "torch_geometric.data.data.DataEdgeAttr",
    "torch_geometric.data.data.DataTensorAttr",
    "torch_geometric.data.storage.GlobalStorage",
)
_CHECKS = {
    ".npz": archives.check_npz,
    ".npy": archives.check_npy,
    ".gz": archives.check_gzip,
    ".zip": archives.check_zip,
    ".pt": check_torch_file,
}


def require_writable(folder: Path) -> None:
    """Raises unless ``folder`` can be written into, or made: better now than after minutes of processing."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise unwritable_error(folder, f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unwritable_error(folder, "read-only")


def unwritable_error(folder: Path, reason: str) -> DatasetError:
    """The line for a folder that the library cannot write its processed files into."""
    return DatasetError(
        f"cannot write into {folder} ({reason}): "
        "copy the dataset folder to a writable place with enough space and set dataset.root to it"
    )


def cannot_write(error: BaseException, inputs: Sequence[Path]) -> bool:
    """Whether ``error`` is the file system refusing a write, and not an unreadable one of ``inputs``."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.filename is None or Path(error.filename) not in inputs


@contextlib.contextmanager
def removed_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    """Deletes those of ``paths`` that a failed or interrupted block has made: they may be half-written."""
    before = {path for path in paths if path.exists()}
    try:
        yield
    except BaseException:
        for path in set(paths) - before:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lets one process at a time process a dataset; the others wait, then find it processed."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    # Not in the dataset's folder, which may be read-only; a user's own file, for others may not open it.
    with FileLock(Path(tempfile.gettempdir(), f"iexact-{user}-{name}.lock")):
        yield


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a downloaded archive whose sizes are meant; no member of it can leave ``folder``."""
    archives.check_zip(archive)
    with zipfile.ZipFile(archive) as members:
        members.extractall(folder)


@contextlib.contextmanager
def stall_limit() -> Iterator[None]:
    """Makes a download whose server falls silent fail: the libraries set no timeout of their own."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


@contextlib.contextmanager
def unpickling(trusted: bool) -> Iterator[None]:
    """Lets ``torch.load`` unpickle anything where a library does not say what it wants."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    previous = os.environ.pop(name, None)
    if trusted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if previous is not None:
            os.environ[name] = previous


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what the dataset libraries print; they have no switch for it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _defect(path: Path) -> str | None:
    """Reads one file to the end; why it is damaged, or None if it looks whole."""
    try:
        _check_regular(path)
        if path.stat().st_size == 0:
            return "empty file"
        if path.suffix in _CHECKS:
            _CHECKS[path.suffix](path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            path.read_bytes()
    except READ_ERRORS as error:
        return first_line(error)
    return None


def _check_regular(path: Path) -> None:
    """Refuses what only looks like a file: a device has no end, and a pipe may never begin."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
