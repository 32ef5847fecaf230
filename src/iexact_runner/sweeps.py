"""The jobs of a sweep: each has a folder, a status file in it, and one process at a time that may work there.

``status.json`` says ``queued``, ``running``, ``completed`` or ``failed``. Only a queued job begins, under the lock of
its folder: however often a job is launched, by however many sweeps, it runs once.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iexact_runner.errors import ConfigError
from iexact_runner.files import write_atomically
from iexact_runner.locks import locked
from iexact_runner.records import ATTEMPT, SUMMARY, DamagedRecord, read_run, to_json

STATUS, JOB_LOCK, SWEEP_LOCK = "status.json", "job.lock", "sweep.lock"
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "running", "completed", "failed"
# Seconds after which a folder's lock is taken to be held by a job: all others hold it for a moment only.
PATIENCE = 2.0
KILLED = "the job's process was killed, for example for want of memory"


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
        """Mends the status of a job whose process was killed between writing its last two files."""
        if self.state == RUNNING and self._has_completed_records():
            self._write(self.status() | {"state": COMPLETED})

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


class Sweep:
    """What one command launches into a folder, where others may be at work.

    Args:
        folder: of the sweep; its jobs have folders in it.
        title: of its tables.
        skip_completed: take up the jobs that are there already; otherwise all are new.
        fail_fast: begin no job after one has failed.
        keep_records: leave the records of jobs that run again where they are, to be continued.
    """

    def __init__(
        self, folder: Path, *, title: str, skip_completed: bool, fail_fast: bool, keep_records: bool = False
    ) -> None:
        self.folder = folder
        self.title = title
        self.jobs: list[Job] = []
        self._skip_completed = skip_completed
        self._fail_fast = fail_fast
        self._keep_records = keep_records
        self._launch = secrets.token_hex(8)
        self._before: list[Job] = []
        self._skipped: list[Job] = []

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Context of :meth:`place`: sweeps into one folder take their places one after another."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / SWEEP_LOCK):
            present = jobs_below(self.folder) if self._skip_completed else []
            present = [job for job in present if job.folder not in {taken.folder for taken in self.jobs}]
            self._before = sorted(present, key=lambda job: job.state != COMPLETED)
            yield

    def place(self, overrides: Sequence[str], *, config_hash: str, subfolder: Callable[[int], str]) -> tuple[Job, bool]:
        """A job in its place, and whether it is to be launched: it is not if it completed, or is going on elsewhere.

        Args:
            overrides: what tells the job from others.
            config_hash: of its configuration; a job with the same is taken up again.
            subfolder: name of the folder of job N.

        Raises:
            ConfigError: if the folder is somebody else's, whatever N.
        """
        same = next((job for job in self._before if job.status().get("config_hash") == config_hash), None)
        if same is not None:
            self._before.remove(same)
        job = Job(self._free_folder(subfolder)) if same is None else same
        self.jobs.append(job)
        queued = job.queue(
            overrides=overrides, config_hash=config_hash, launch=self._launch, keep_records=self._keep_records
        )
        if job.state == COMPLETED:
            self._skipped.append(job)
        return job, queued

    def _free_folder(self, subfolder: Callable[[int], str]) -> Path:
        number = len(self.jobs)
        while (folder := self.folder / subfolder(number)).exists() and any(folder.iterdir()):
            number += 1
            if subfolder(number) == subfolder(number - 1):
                raise ConfigError.of(
                    "hydra.sweep.subdir", folder, "holds another job; put ${hydra.job.num} into the name"
                )
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, jobs: Sequence[Job], launch: Callable[[Sequence[Job]], object]) -> None:
        """Launches jobs until each has ended.

        Under some launchers a job whose process is killed takes others with it, or ends the launcher. What had not
        begun is then launched again; what was running, once more by itself.

        Args:
            jobs: those to launch.
            launch: launches some of them and returns when they have ended; may raise if one of them was killed.
        """
        pending, suspects = list(jobs), list[Job]()
        while pending and not self._stopped():
            problem = None
            try:
                launch(pending)
            except Exception as error:
                problem = error
            for job in pending:
                job.wait()
            if len(pending) == 1:
                pending[0].bury(KILLED)
            suspects += [job for job in pending if job.state == RUNNING]
            left = [job for job in pending if job.state == QUEUED]
            if len(left) == len(pending) and not self._stopped():
                raise problem or Ended("the launcher returned without beginning a job")
            pending = left
        for job in suspects:
            status = job.status()
            again = {name: status[name] for name in ("overrides", "config_hash", "launch")}
            if self._stopped():
                job.bury(KILLED)
            elif job.queue(**again, keep_records=self._keep_records):
                self.run([job], launch)

    def _stopped(self) -> bool:
        return self._fail_fast and has_failed(self.folder, launch=self._launch)

    def wait(self, announce: Callable[[str], None]) -> None:
        """Waits for jobs that another sweep is at work on, and says so."""
        for job in self.jobs:
            with locked(job.folder / JOB_LOCK, patience=PATIENCE) as free:
                pass
            if not free:
                announce(f"waiting for job {self.name_of(job)}: another sweep is at work on it")
                job.wait()
            job.bury(KILLED)

    @property
    def completed(self) -> bool:
        """Whether all jobs are."""
        return all(job.state == COMPLETED for job in self.jobs)

    def show(self, console: Console) -> None:
        """Prints a table of the jobs, and the command that takes up those that did not complete."""
        table = Table(title=f"{self.title}: jobs", title_justify="left")
        for name in ("job", "status", "seconds", "overrides", "error"):
            table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
        statuses = [job.status() for job in self.jobs]
        shared = set[str].intersection(*(set(status["overrides"]) for status in statuses)) if statuses[1:] else set()
        for job, status in zip(self.jobs, statuses, strict=True):
            began = status["started"]
            seconds = f"{status['ended'] - began:.1f}" if began and status["ended"] else ""
            overrides = " ".join(word for word in status["overrides"] if word not in shared)
            state = status["state"] + (" before" if job in self._skipped else "")
            table.add_row(self.name_of(job), state, seconds, escape(overrides), escape(status["error"] or ""))
        console.print(table)
        if not self.completed:
            again = f"hydra.sweep.dir={self.folder} sweep.skip_completed=true"
            console.print(f"the same command with {again} runs what is missing", highlight=False, soft_wrap=True)

    def name_of(self, job: Job) -> str:
        """Where a job lies within the sweep."""
        return str(job.folder.relative_to(self.folder))
