"""Every run below some folders, read, checked and pooled into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iexact_runner.errors import ConfigError, UserError
from iexact_runner.report import tables
from iexact_runner.report.grouping import Results, check_fields, group, matches
from iexact_runner.report.metrics import metrics_named
from iexact_runner.report.paired import with_differences
from iexact_runner.runs.records import DamagedRecord, Run, read_run, run_folders


@dataclass(frozen=True)
class Report:
    """What was found below some folders.

    Args:
        results: figures of the completed runs.
        incomplete: runs that failed, were interrupted or have no summary yet.
        damaged: one line for each run with a file that cannot be read.
    """

    results: Results
    incomplete: list[Run]
    damaged: list[str]

    @property
    def completed(self) -> list[Run]:
        """The runs behind the rows, in their order."""
        return [run for row in self.results.rows for run in row.runs]

    def grids(self, *, title: str) -> list[tables.Grid]:
        """The tables that people are shown."""
        grids = [tables.grid_of(self.results, title=title)] if self.results.rows else []
        further = (tables.processes_of(self.results), tables.distribution_of(self.results))
        grids += [grid for grid in further if grid is not None]
        return grids + ([tables.listing_of(self.incomplete)] if self.incomplete else [])


def read_report(
    folders: Sequence[Path],
    *,
    where: Sequence[str] = (),
    by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    epochs: bool = False,
) -> Report:
    """Reads every run at or below some folders.

    Args:
        folders: where to look.
        where: conditions ``field=value`` that a run must meet.
        by: fields that the runs of one row agree in; by default all but those that repeats differ in.
        metrics: names of the figures, or dotted paths in ``summary.json``; by default the usual ones.
        epochs: also check every line of ``metrics.jsonl``, which figures are drawn of.

    Raises:
        ConfigError: if a field or a metric does not exist.
        UserError: if there is no run.
    """
    runs, damaged = [], []
    for folder in run_folders(folders):
        try:
            run = read_run(folder)
            if epochs:
                run.metrics()
            runs.append(run)
        except DamagedRecord as error:
            damaged.append(str(error))
    if not runs and not damaged:
        raise UserError(f"no run at or below {', '.join(map(str, folders))}")
    conditions = [_condition(text) for text in where]
    check_fields(runs, [name for name, _ in conditions], option="--where")
    check_fields(runs, by, option="--group-by")
    runs = [run for run in runs if all(matches(run, name, value) for name, value in conditions)]
    if where and not runs:
        raise UserError(f"no run with {' and '.join(where)} at or below {', '.join(map(str, folders))}")
    # Of these nothing was trained: their tables are their own.
    apart = ("bins", "inspect", "advise", "partition")
    completed = [run for run in runs if run.status == "completed" and run.lookup("config.task") not in apart]
    incomplete = [run for run in runs if run.status != "completed"]
    results = group(completed, metrics_named(metrics, completed), by=by)
    return Report(with_differences(results, usual=not metrics), incomplete, damaged)


def _condition(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError.of("--where", text, "must be FIELD=VALUE")
    return name, value
