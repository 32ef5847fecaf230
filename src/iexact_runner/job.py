"""One job: its folder, the processes that share it, and what it does there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from iexact_runner.config import Config, ParallelConfig
from iexact_runner.errors import ConfigError
from iexact_runner.parallel.launch import launched_rank, launched_size

if TYPE_CHECKING:
    from iexact_runner.parallel.team import Team


def run_job(config: Config, folder: Path, resolved_yaml: str, *, live: bool = True) -> None:
    """Runs a checked configuration with its records in ``folder``, in as many processes as it says.

    Args:
        config: what to run.
        folder: where the records go.
        resolved_yaml: the configuration as it is recorded.
        live: show progress as a bar if the screen is a terminal.
    """
    if config.processes == 1:
        _run(config, folder, resolved_yaml, live=live)
        return
    from iexact_runner.parallel.helpers import beside

    if launched_size() > 1:
        raise ConfigError.of("processes", config.processes, f"{launched_size()} were started already: use 1")
    with beside(config.processes, partial(_run, config, resolved_yaml=resolved_yaml, live=live)):
        _run(config, folder, resolved_yaml, live=live)


def _run(config: Config, folder: Path, resolved_yaml: str, *, live: bool) -> None:
    """One process of a run; the first has its records in ``folder``."""
    # rich is slow to import, and --help does not need it.
    from rich.console import Console

    from iexact_runner.display import show_messages
    from iexact_runner.runs.records import RunFolder
    from iexact_runner.runs.resume import place

    first = launched_rank() == 0
    # By name, because dataset libraries are silenced by replacing sys.stdout.
    screen = Console(file=sys.stdout, force_terminal=None if live else False, quiet=not first)
    show_messages(screen)
    chosen, resumed = place(config, folder) if first else (folder, False)
    if resumed:
        remove_if_empty(folder)
    records = RunFolder(chosen, resumed=resumed)
    with records.in_use():
        # Before anything slow, such as importing torch: a run that is killed then can be resumed.
        records.write_config(resolved_yaml)
        try:
            if config.task == "bins":
                from iexact_runner.tasks import bins

                bins.run(config, records, screen, resolved_yaml)
            else:
                from iexact_runner.experiment import Experiment

                with _processes_of(config) as team:
                    Experiment(config, records, screen, team).run_in_use(resolved_yaml)
        except ConfigError:
            records.forget_config()
            raise


@contextmanager
def _processes_of(config: Config) -> Iterator[Team]:
    """The processes that share a run; this one alone unless ``parallel=graph``.

    Raises:
        ConfigError: if several were started and none of them is told to share.
        TeamError: if one of them is lost.
    """
    from iexact_runner.parallel.team import Team, joined

    if isinstance(config.parallel, ParallelConfig):
        with joined(device=config.device, timeout=config.parallel.timeout) as team:
            yield team
    elif launched_size() > 1:
        raise ConfigError.of("parallel", config.parallel.name, f"{launched_size()} processes were started: use graph")
    else:
        yield Team()


def remove_if_empty(folder: Path) -> None:
    """Removes a folder without files, and the one that it is in."""
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:  # somebody's files are in it
            return
