"""A sweep: its jobs find their places, are launched until each has ended, and are listed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iexact_runner.errors import ConfigError
from iexact_runner.runs.jobs import (
    COMPLETED,
    JOB_LOCK,
    LOST,
    PATIENCE,
    QUEUED,
    RUNNING,
    Ended,
    Job,
    has_failed,
    jobs_below,
)
from iexact_runner.runs.locks import locked

SWEEP_LOCK = "sweep.lock"
KILLED = "the job's process was killed, for example for want of memory"


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
        self._before: dict[str, list[Job]] = {}
        self._nameless: dict[Path, Job] = {}
        self._skipped: list[Job] = []

    @contextmanager
    def placing(self, *, announce: Callable[[str], None] = print) -> Iterator[None]:
        """Context of :meth:`place`: sweeps into one folder take their places one after another.

        Args:
            announce: is told, in a line each, of jobs that are lost because their status file is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / SWEEP_LOCK):
            taken = {job.folder for job in self.jobs}
            self._before, self._nameless = {}, {}
            for job in jobs_below(self.folder) if self._skip_completed else []:
                if job.folder not in taken:
                    status, digest = job.status(), job.config_hash()
                    if status["state"] == LOST:
                        announce(f"{status['error']}; set aside, and the job runs again")
                    if digest is None:
                        self._nameless[job.folder] = job
                        continue
                    same = self._before.setdefault(digest, [])
                    same.insert(0 if status["state"] == COMPLETED else len(same), job)
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
        same = self._before.get(config_hash)
        # A job that left nothing but a damaged status is known by its number alone.
        lost = None if same else self._nameless.pop(self.folder / subfolder(len(self.jobs)), None)
        job = same.pop(0) if same else lost or Job(self._free_folder(subfolder))
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
            overrides = _printable(" ".join(word for word in status["overrides"] if word not in shared))
            state = status["state"] + (" before" if job in self._skipped else "")
            error = _printable(status["error"] or "")
            table.add_row(self.name_of(job), state, seconds, escape(overrides), escape(error))
        console.print(table)
        if not self.completed:
            console.print(f"the same command with {self.again} runs what is missing", highlight=False, soft_wrap=True)

    @property
    def again(self) -> str:
        """What the same command needs to take the sweep up."""
        return f"hydra.sweep.dir={self.folder} sweep.skip_completed=true"

    def name_of(self, job: Job) -> str:
        """Where a job lies within the sweep."""
        return str(job.folder.relative_to(self.folder))


def _printable(text: str) -> str:
    """A text of a status file with what would act on a terminal spelt out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
