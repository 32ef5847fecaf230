"""``hydra/sweeper=iexact``: Hydra's basic sweeper with a record of every job.

Hydra loads this in every application of the environment, hence the late imports.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

if TYPE_CHECKING:
    from iexact_runner.runs.jobs import Job
    from iexact_runner.runs.sweeps import Sweep


class IexactSweeper(BasicSweeper):
    """Composes each job by itself, gives it a folder and a status file, and launches those that are not done.

    A job that cannot be composed, or whose configuration is not valid, is recorded as failed; Hydra's own sweeper would
    launch none of them.

    Args:
        max_batch_size: jobs that are launched at once; None for all.
        params: what is swept, by field.
        also: lines of overrides, each of which adds the combinations of its own choices with those of all other fields.
    """

    def __init__(
        self, max_batch_size: int | None, params: dict[str, str] | None = None, also: Sequence[str] | None = None
    ) -> None:
        super().__init__(max_batch_size, params)
        self.also = list(also or ())

    def sweep(self, arguments: list[str]) -> None:
        """Runs all jobs; what became of them is in their status files.

        Args:
            arguments: overrides of the command line.
        """
        from iexact_runner import cli

        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        launcher, sweep = self.launcher, _begin(self.config)
        cli.begin_sweep(sweep)
        _end_idle_workers(launcher)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        products = [
            parser.parse_overrides([*self._parse_config(), *arguments, *line.split()]) for line in ("", *self.also)
        ]
        jobs = [job for overrides in products for (whole,) in [self.split_arguments(overrides, None)] for job in whole]
        launched = 0
        for batch in self.split_overrides_to_chunks(jobs, self.max_batch_size or len(jobs)):
            with sweep.placing():
                ready = dict(job for job in (self._place(sweep, job) for job in batch) if job is not None)
            first = launched

            def launch(jobs: Sequence[Job], ready: dict[Job, list[str]] = ready, first: int = first) -> None:
                launcher.launch([ready[job] for job in jobs], initial_job_idx=first)

            sweep.run(list(ready), launch)
            launched += len(ready)
        sweep.wait(announce=print)

    def _place(self, sweep: Sweep, overrides: list[str]) -> tuple[Job, list[str]] | None:
        """A job with the overrides it is launched with; None if there is nothing to launch."""
        from iexact_runner import cli
        from iexact_runner.runs.records import config_hash

        assert self.config is not None and self.hydra_context is not None
        problem: Exception | None = None
        composed = self.config
        digest = config_hash({"overrides": sorted(overrides)})
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            digest = config_hash(_checked(composed))
        except Exception as error:
            problem = error
        subfolder = _subfolders(composed)
        job, new = sweep.place(overrides, config_hash=digest, subfolder=subfolder)
        if problem is not None:
            job.fail(problem)
            cli.report_job(sweep.name_of(job), overrides, problem)
            return None
        name = sweep.name_of(job).replace("\\", "\\\\").replace("'", "\\'")
        return (job, [*overrides, f"hydra.sweep.subdir='{name}'"]) if new else None


def _end_idle_workers(launcher: object) -> None:
    """Makes joblib's workers end with this process also while they wait for a job; one at a job does so anyway."""
    from iexact_runner.runs.parents import end_with_parent

    options = getattr(launcher, "joblib", None)
    if isinstance(options, dict):
        from joblib import Parallel

        if "backend_kwargs" in inspect.signature(Parallel.__init__).parameters:  # not before joblib 1.5
            options["initializer"] = end_with_parent


def _begin(composed: DictConfig) -> Sweep:
    """The sweep that a command asks for.

    Raises:
        ConfigError: if it is to be taken up but has a new folder, or if all jobs are to resume one run.
    """
    from iexact_runner.errors import ConfigError
    from iexact_runner.runs.sweeps import Sweep

    fields, place = composed.sweep, OmegaConf.to_container(composed.hydra.sweep, resolve=False)
    if fields.skip_completed and isinstance(place, dict) and "${now:" in place["dir"]:
        raise ConfigError.of("sweep.skip_completed", "true", "name the sweep's folder with hydra.sweep.dir=FOLDER")
    if composed.resume not in (None, "auto"):
        raise ConfigError.of("resume", composed.resume, "is for one run; the jobs of a sweep take resume=auto")
    return Sweep(
        Path(composed.hydra.sweep.dir),
        title=composed.hydra.runtime.choices.get("experiment") or "sweep",
        skip_completed=fields.skip_completed,
        fail_fast=fields.fail_fast,
        keep_records=composed.resume == "auto",
    )


def _checked(composed: DictConfig) -> Mapping[str, Any]:
    """The resolved configuration of a job, once it is known to be valid."""
    from iexact_runner import cli

    task = copy.deepcopy(composed)
    with read_write(task), open_dict(task):
        del task["hydra"]
    cli.to_config(task)
    return cast("Mapping[str, Any]", OmegaConf.to_container(task, resolve=True))


def _subfolders(composed: DictConfig) -> Callable[[int], str]:
    """What ``hydra.sweep.subdir`` is for a job of a number."""
    config = copy.deepcopy(composed)

    def subfolder(number: int) -> str:
        with read_write(config), open_dict(config):
            config.hydra.job.num = number
        return str(config.hydra.sweep.subdir)

    return subfolder
