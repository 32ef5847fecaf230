"""The jobs of a sweep: each has a folder, a status file in it, and one process at a time that may work there.

``status.json`` says ``queued``, ``running``, ``completed`` or ``failed``. Only a queued job begins, under the lock of
its folder: however often a job is launched, by however many sweeps, it runs once. A job whose status file is damaged is
lost: the next sweep sets its file and its records aside and runs it again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iexact_runner.runs.files import write_atomically
from iexact_runner.runs.locks import locked
from iexact_runner.runs.records import (
    ATTEMPT,
    CONFIG,
    SUMMARY,
    DamagedRecord,
    config_hash,
    read_config,
    read_run,
    to_json,
)

STATUS, JOB_LOCK = "status.json", "job.lock"
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "running", "completed", "failed"
# What a job is whose status file is damaged; no file says so.
LOST = "lost"
# What the file of a job says before it is queued.
_BLANK: dict[str, Any] = {
    "state": QUEUED,
    "error": None,
    "traceback": None,
    "overrides": [],
    "config_hash": None,
    "launch": None,
    "queued": None,
    "started": None,
    "ended": None,
}
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
        """What its status file says; that it is lost, and why, if the file is damaged."""
        path = self.folder / STATUS
        try:
            if not path.is_file() and path.exists():  # a pipe may never begin, a device never end
                raise ValueError("is not a regular file")
            status = json.loads(path.read_bytes())
        except FileNotFoundError:
            return dict(_BLANK)
        except (OSError, ValueError, RecursionError) as error:
            return _BLANK | {"state": LOST, "error": f"{path}: cannot be read ({error})"}
        problem = _problem(status)
        return status if problem is None else _BLANK | {"state": LOST, "error": f"{path}: {problem}"}

    @property
    def state(self) -> str:
        """What its status file says in a word."""
        return str(self.status()["state"])

    def config_hash(self) -> str | None:
        """The hash of its configuration on which most of its files agree, its records first; None if none has it."""
        found: list[str] = []
        if (self.folder / CONFIG).exists():
            for read in (lambda: read_config(self.folder / CONFIG), lambda: read_run(self.folder).summary["config"]):
                with suppress(DamagedRecord):
                    found.append(config_hash(read()))
        found += [hashed] if (hashed := self.status()["config_hash"]) else []
        return Counter(found).most_common(1)[0][0] if found else None

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
                # Of records that are complete nothing can go on.
                self._set_aside(keep_records=keep_records and not self._has_completed_records())
            known = {"overrides": list(overrides), "config_hash": config_hash, "launch": launch}
            self._write(_BLANK | known | {"queued": time.time()})
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
            if not mine or status["state"] != QUEUED:
                yield False
                return
            if fail_fast and has_failed(sweep_folder, launch=status["launch"]):
                yield False
                return
            status |= {"state": RUNNING, "started": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
            self._write(status)
            try:
                yield True
            except BaseException as error:
                self._fail(status, error)
                raise
            self._write(status | {"state": COMPLETED, "ended": time.time()})

    def fail(self, error: BaseException) -> None:
        """Records what it failed with."""
        self._fail(self.status(), error)

    def _fail(self, status: dict[str, Any], error: BaseException) -> None:
        lines = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0]
        self._write(status | {"state": FAILED, "error": message, "traceback": lines, "ended": time.time()})

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
        status = self.folder / STATUS
        if status.is_file() and os.access(status, os.R_OK):  # its place is taken by the next status at one blow
            shutil.copy(status, aside / STATUS)
        else:
            os.rename(status, aside / STATUS)

    def _write(self, status: dict[str, Any]) -> None:
        write_atomically(self.folder / STATUS, to_json(status, indent=2) + "\n")


def jobs_below(folder: Path) -> list[Job]:
    """Every job that has a status file below a folder, or something else in its place."""
    found = []
    for place, inner, names in os.walk(folder):
        if STATUS in (*inner, *names):
            found.append(Path(place))
        inner[:] = [name for name in inner if not name.startswith(ATTEMPT)]
    return [Job(path) for path in sorted(found)]


def has_failed(folder: Path, *, launch: str | None) -> bool:
    """Whether a job of a command failed."""
    statuses = (job.status() for job in jobs_below(folder))
    return any(status["state"] == FAILED and status["launch"] == launch for status in statuses)


def _problem(status: Any) -> str | None:
    """What keeps a value from being the status of a job; None if nothing does."""
    if not isinstance(status, dict):
        return "is not the status of a job"
    missing = [name for name in _BLANK if name not in status]
    if missing:
        return f"lacks {', '.join(missing)}"
    if status["state"] not in (QUEUED, RUNNING, COMPLETED, FAILED):
        return f"state={status['state']!r:.40}: must be queued, running, completed or failed"
    overrides = status["overrides"]
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        return "overrides: must be a list of words"
    for name in ("error", "traceback", "config_hash", "launch"):
        if not isinstance(status[name], str | None):
            return f"{name}: must be text or null"
    for name in ("queued", "started", "ended"):
        seconds = status[name]
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < 1e12):
            return f"{name}: must be seconds since 1970 or null"
    return None
