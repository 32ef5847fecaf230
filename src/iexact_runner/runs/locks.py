"""Locks between processes, on files: the system releases what a process holds when it ends, however it ends.

They hold between processes of one machine and, on a file system that locks for its network, of several.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from iexact_runner.errors import UserError


@contextmanager
def locked(path: Path, *, patience: float | None = None) -> Iterator[bool]:
    """Holds the lock of a file, which is created if need be; yields whether it does.

    Args:
        path: the file; what it contains does not matter.
        patience: seconds to wait at most; without it until the lock is free.
    """
    handle = _open(path)
    try:
        if patience is None:
            yield _try(handle, fcntl.LOCK_EX, wait=True)
            return
        deadline = time.monotonic() + patience
        while not (mine := _try(handle, fcntl.LOCK_EX, wait=False)) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield mine
    finally:
        os.close(handle)


def lock_folder() -> Path:
    """The folder of this user's device locks on this machine, made if need be.

    Raises:
        UserError: if somebody else made it.
    """
    folder = Path(tempfile.gettempdir(), f"iexact-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


class DeviceLock:
    """Keeps what is timed on a device apart from all other work there.

    Work shares the lock with other work; a measurement has it alone. Everyone passes a gate on the way in, and who
    waits for the device holds the gate meanwhile: those who come later wait behind, so that no measurement starves.
    Nobody holds the device while waiting at the gate, so that no two wait for each other.

    Args:
        name: of the device, the same in every process.
        folder: where the lock's files lie.
        announce: is told, in a line, that this process has to wait.
    """

    def __init__(self, name: str, *, folder: Path, announce: Callable[[str], None]) -> None:
        self._name = name
        self._gate = folder / f"{name}.gate"
        self._path = folder / f"{name}.lock"
        self._announce = announce
        self._handle: int | None = None
        self._entry = 0
        self._alone = False

    def __enter__(self) -> DeviceLock:
        self._acquire(fcntl.LOCK_SH)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def exclude_others(self) -> None:
        """Waits until the device is this process's alone, and keeps it so to the end of the context."""
        self._release()
        self._acquire(fcntl.LOCK_EX)

    @property
    def alone(self) -> bool:
        """Whether no other process held the lock while this one did."""
        if self._handle is not None and _entries(self._handle) != self._entry:
            self._alone = False
        return self._alone

    def _acquire(self, kind: int) -> None:
        gate = _open(self._gate)
        self._handle = handle = _open(self._path)
        try:
            if not _try(gate, fcntl.LOCK_EX, wait=False):
                self._announce(f"waiting for {self._name}: a measurement is going on there, or about to begin")
                _try(gate, fcntl.LOCK_EX, wait=True)
            self._alone = _try(handle, fcntl.LOCK_EX, wait=False)
            if not self._alone and not _try(handle, kind, wait=False):
                self._announce(f"waiting for {self._name}: other work is going on there")
                _try(handle, kind, wait=True)
                self._alone = _try(handle, fcntl.LOCK_EX, wait=False)
            self._entry = _entries(handle) + 1
            os.pwrite(handle, b"%020d" % self._entry, 0)
            _try(handle, kind, wait=True)  # what was tried is given back; nobody came between, for the gate is held
        except BaseException:
            self._release()
            raise
        finally:
            os.close(gate)

    def _release(self) -> None:
        if self._handle is not None:
            _ = self.alone  # the last moment to see who came
            os.close(self._handle)
            self._handle = None


def _entries(handle: int) -> int:
    """How often the lock was acquired, by anybody."""
    return int(os.pread(handle, 20, 0) or 0)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try(handle: int, kind: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
