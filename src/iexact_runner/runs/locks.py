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

FOLDER_VARIABLE = "IEXACT_LOCKS"
POLL_SECONDS = 0.02


@contextmanager
def locked(path: Path, *, patience: float | None = None) -> Iterator[bool]:
    """Holds the lock of a file, which is created if need be; yields whether it does.

    Args:
        path: the file; what it contains does not matter.
        patience: seconds to wait at most; without it until the lock is free.
    """
    handle = _open(path)
    try:
        yield _try(handle, fcntl.LOCK_EX, patience=patience)
    finally:
        os.close(handle)


def lock_folder() -> Path:
    """The folder of this user's device locks on this machine, made if need be: ``IEXACT_LOCKS``, or a temporary one.

    Raises:
        UserError: if somebody else made it.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen or Path(tempfile.gettempdir(), f"iexact-{os.getuid()}"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not chosen and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise UserError(f"{folder}: belongs to another user; set {FOLDER_VARIABLE} to a folder of your own")
    return folder


class DeviceLock:
    """Keeps what is timed on a device apart from all other work there.

    Work shares the lock with other work; a measurement has it alone. Everyone passes a gate on the way in, and who
    waits for the device holds the gate meanwhile: those who come later wait behind, so that no measurement starves.
    Nobody holds the device while waiting at the gate, so that no two wait for each other; and a measurement gives up
    after some time, so that endless work makes nobody else wait without end.

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
        self._acquire(fcntl.LOCK_SH, patience=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def exclude_others(self, *, patience: float) -> None:
        """Waits until the device is this process's alone, and keeps it so to the end of the context.

        Args:
            patience: seconds after which the device is shared after all.
        """
        self._release()
        if not self._acquire(fcntl.LOCK_EX, patience=patience):
            self._announce(f"{self._name} was not free for {patience:g} s: epochs are timed beside other work")
            self._acquire(fcntl.LOCK_SH, patience=None)

    @property
    def alone(self) -> bool:
        """Whether no other process held the lock while this one did."""
        if self._handle is not None and _entries(self._handle) != self._entry:
            self._alone = False
        return self._alone

    def _acquire(self, kind: int, *, patience: float | None) -> bool:
        deadline = time.monotonic() + (patience or 0)
        gate = _open(self._gate)
        self._handle = handle = _open(self._path)
        try:
            if not _try(gate, fcntl.LOCK_EX, patience=0):
                self._announce(f"waiting for {self._name}: a measurement is going on there, or about to begin")
                if not _try(gate, fcntl.LOCK_EX, patience=patience):
                    self._release()
                    return False
            self._alone = _try(handle, fcntl.LOCK_EX, patience=0)
            if not self._alone and not _try(handle, kind, patience=0):
                self._announce(f"waiting for {self._name}: other work is going on there")
                if not _try(handle, kind, patience=None if patience is None else deadline - time.monotonic()):
                    self._release()
                    return False
                self._alone = _try(handle, fcntl.LOCK_EX, patience=0)
            self._entry = _entries(handle) + 1
            os.pwrite(handle, b"%020d" % self._entry, 0)
            # What was tried is given back; nobody came between, for the gate is held.
            return _try(handle, kind, patience=None)
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


def _try(handle: int, kind: int, *, patience: float | None) -> bool:
    if patience is None:
        fcntl.flock(handle, kind)
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
