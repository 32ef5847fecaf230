"""The jobs of a sweep: each has a folder, a status file in it, and one process at a time that may work there.

``status.json`` says ``queued``, ``running``, ``completed`` or ``failed``. Only a queued job begins, under the lock of
its folder: however often a job is launched, by however many sweeps, it runs once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iexact_runner.runs.files import write_atomically
from iexact_runner.runs.locks import locked
from iexact_runner.runs.records import ATTEMPT, SUMMARY, DamagedRecord, read_run, to_json

STATUS, JOB_LOCK = "status.json", "job.lock"
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "running", "completed", "failed"
# Seconds after which a folder's lock is taken to be held by a job: all others hold it for a moment only.
PATIENCE = 2.0


class Ended(RuntimeError):
    """A process ended without a word."""


class Job:
    """One job, by its folder.

    Args:
        folder: where its records go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def status(self) -> dict[str, Any]:
        """What its status file says; nothing before it is queued.

        Raises:
            DamagedRecord: if the file is not whole.
        """
        path = self.folder / STATUS
        try:
            status = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DamagedRecord(f"{path}: cannot be read ({error})") from error
        if not isinstance(status, dict):
            raise DamagedRecord(f"{path}: is not the status of a job")
        return status

    @property
    def state(self) -> str:
        """What its status file says in a word."""
        return str(self.status().get("state", QUEUED))

    def queue(self, *, overrides: Sequence[str], config_hash: str, launch: str, keep_records: bool) -> bool:
        """Makes it ready to begin; False if it completed after all or another process is at work on it.

        What an earlier attempt left is moved to a folder ``attempt_N``.

        Args:
            overrides: what tells the job from others.
            config_hash: of its configuration.
            launch: tells the command that launches it from others.
            keep_records: leave the records where they are, to be continued.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / JOB_LOCK, patience=PATIENCE) as mine:
            if not mine:
                return False
            self._complete_if_recorded()
            state = self.state
            if state == COMPLETED and self._has_completed_records():
                return False
            if state != QUEUED:
                self._set_aside(keep_records=keep_records)
            status = {"state": QUEUED, "error": None, "traceback": None, "overrides": list(overrides)}
            times = {"queued": time.time(), "started": None, "ended": None}
            self._write(status | {"config_hash": config_hash, "launch": launch} | times)
            return True

    @contextmanager
    def attempt(self, sweep_folder: Path, *, fail_fast: bool) -> Iterator[bool]:
        """The work on it, recorded from its beginning to its end.

        Args:
            sweep_folder: where the other jobs are.
            fail_fast: do not begin if another job of the same command failed.

        Yields:
            Whether to work; false if another process does or did.
        """
        with locked(self.folder / JOB_LOCK, patience=PATIENCE) as mine:
            status = self.status()
            if not mine or status.get("state", QUEUED) != QUEUED:
                yield False
                return
            if fail_fast and has_failed(sweep_folder, launch=status.get("launch")):
                yield False
                return
            self._write(
                status | {"state": RUNNING, "started": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
            )
            try:
                yield True
            except BaseException as error:
                self.fail(error)
                raise
            self._write(self.status() | {"state": COMPLETED, "ended": time.time()})

    def fail(self, error: BaseException) -> None:
        """Records what it failed with."""
        lines = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0]
        self._write(self.status() | {"state": FAILED, "error": message, "traceback": lines, "ended": time.time()})

    def bury(self, reason: str) -> None:
        """Records a failure in place of a process that ended without a word."""
        with locked(self.folder / JOB_LOCK, patience=PATIENCE) as mine:
            if mine:
                self._complete_if_recorded()
                if self.state == RUNNING:
                    self.fail(Ended(reason))

    def wait(self) -> None:
        """Waits until no process is at work on it."""
        with locked(self.folder / JOB_LOCK):
            pass

    def _has_completed_records(self) -> bool:
        try:
            return (self.folder / SUMMARY).exists() and read_run(self.folder).status == COMPLETED
        except DamagedRecord:
            return False

    def _complete_if_recorded(self) -> None:
        """Mends the status of a job that came to grief between writing its last two files."""
        if self.state in (RUNNING, FAILED) and self._has_completed_records():
            self._write(self.status() | {"state": COMPLETED, "error": None, "traceback": None})

    def _set_aside(self, *, keep_records: bool) -> None:
        stays = (STATUS, JOB_LOCK)
        names = [name for name in os.listdir(self.folder) if name not in stays and not name.startswith(ATTEMPT)]
        number = 1
        while (self.folder / f"{ATTEMPT}{number}").exists():
            number += 1
        aside = self.folder / f"{ATTEMPT}{number}"
        aside.mkdir()
        if not keep_records:
            for name in names:
                os.rename(self.folder / name, aside / name)
        # Its place is taken by the next status at one blow.
        shutil.copy(self.folder / STATUS, aside / STATUS)

    def _write(self, status: dict[str, Any]) -> None:
        write_atomically(self.folder / STATUS, to_json(status, indent=2) + "\n")


def jobs_below(folder: Path) -> list[Job]:
    """Every job that has a status file below a folder."""
    paths = sorted(folder.rglob(STATUS))
    return [Job(path.parent) for path in paths if not path.parent.name.startswith(ATTEMPT)]


def has_failed(folder: Path, *, launch: str | None) -> bool:
    """Whether a job of a command failed."""
    statuses = (job.status() for job in jobs_below(folder))
    return any(status.get("state") == FAILED and status.get("launch") == launch for status in statuses)
