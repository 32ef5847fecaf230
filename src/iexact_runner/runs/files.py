"""Files that a process may be killed over: whole or not at all, and one process at a time."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

# What a file is called until it is whole, and the file that a process holds while it runs in a folder.
TEMPORARY, LOCK = ".unfinished.", ".lock"


def write_atomically(path: Path, content: str | bytes, *, keep_as: Path | None = None) -> None:
    """Writes a file beside its place and renames it there, so that a reader never sees half of it.

    Args:
        path: its place.
        content: what it holds.
        keep_as: what the file that it takes the place of is renamed to; None replaces it.
    """
    with replacing(path, keep_as=keep_as) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, keep_as: Path | None = None) -> Iterator[IO[bytes]]:
    """Context that yields a file to write, which takes its place at the end, as :func:`write_atomically` does it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; results are as readable as anything else the user writes.
        os.chmod(name, 0o666 & ~current_umask())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def current_umask() -> int:
    """What the user takes away from the permissions of new files."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, where others see it when this returns; a failure leaves the file as it was."""
    data = line.encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):  # the disk took a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.truncate(file.fileno(), before)
            raise


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cut_after(path: Path, lines: int) -> None:
    """Cuts a file after so many lines, which it has."""
    if path.exists():
        kept = path.read_bytes().split(b"\n")[:lines]
        os.truncate(path, sum(len(line) + 1 for line in kept))


def sync(path: Path) -> None:
    """Waits until a file, if it is there, would outlive a power failure."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Context that has a folder for this process alone, and yields whether it does; a killed process has let go."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
