"""Runs to rows: repeats of one configuration pooled, figures with their spread, and what does not belong together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from iexact_runner.errors import ConfigError
from iexact_runner.report.metrics import Cell, Metric, cell_of
from iexact_runner.runs.labels import compression_label, preset_of, sampler_label
from iexact_runner.runs.records import Run, flatten

# Fields that two repeats of one experiment may differ in.
REPEAT_FIELDS = (
    "task",
    "runs",
    "seed",
    "device",
    "debug",
    "output_dir",
    "logger",
    "dataset.root",
    "compression.backend",
)
REPEAT_GROUPS = ("measure.", "fidelity.", "advise.", "bins.", "sweep.", "checkpoint.")
# Tasks that have a number of epochs of their own, and leave that of training unused, unless a planner plans by it.
OWN_EPOCHS = ("fidelity", "measure")
# Fields of the environment that the figures of one table should share.
ENVIRONMENT = (
    "device_name",
    "device",
    "cpu_count",
    "torch_threads",
    "python",
    "torch",
    "torch_geometric",
    "compression_backend",
    "iexact_runner",
    "git_commit",
)

ALIASES: dict[str, Callable[[Run], Any]] = {
    "model": lambda run: run.lookup("config.model.name"),
    "dataset": lambda run: run.lookup("config.dataset.name"),
    "compression": lambda run: compression_label(run.summary["config"]["compression"]),
    "sampler": lambda run: sampler_label(run.summary["config"].get("sampler")),
    "status": lambda run: run.status,
}


@dataclass(frozen=True)
class Row:
    """The pooled runs of one group: labels that tell it apart, and its figures by metric."""

    labels: dict[str, Any]
    cells: dict[str, Cell]
    runs: list[Run]

    @property
    def name(self) -> str:
        """What a warning calls it: its labels in one line."""
        return ", ".join(map(_text, self.labels.values()))

    def shared(self, path: str) -> Any:
        """Value of a field of the summary in all runs of the row; the values joined by a bar where they differ."""
        values = _distinct(run.lookup(path) for run in self.runs)
        return values[0] if len(values) == 1 else " | ".join(map(_text, values))


@dataclass(frozen=True)
class Results:
    """Rows with a figure each for some metrics, and warnings about what was put side by side."""

    rows: list[Row]
    metrics: list[Metric]
    warnings: list[str]


def experiment_of(run: Run) -> dict[str, Any]:
    """What two repeats agree in: the flat configuration without the fields that they may differ in or do not use."""
    left_out = {*REPEAT_FIELDS, *_unused(run)}
    return {
        name: value
        for name, value in flatten(run.summary["config"])
        if name not in left_out and not name.startswith(REPEAT_GROUPS)
    }


def _unused(run: Run) -> tuple[str, ...]:
    """Fields that the run's task leaves unused."""
    planned = run.lookup("config.compression.scheme") == "auto"
    return ("training.epochs",) if run.lookup("config.task") in OWN_EPOCHS and not planned else ()


def field_of(run: Run, name: str) -> Any:
    """A field of a run as it is typed: ``model``, ``compression.bits``, ``environment.torch``."""
    if name in ALIASES:
        return ALIASES[name](run)
    return run.lookup(name if name.startswith("environment.") else f"config.{name}")


def check_fields(runs: Sequence[Run], names: Iterable[str], *, option: str) -> None:
    """Refuses fields that no run has.

    Raises:
        ConfigError: naming the field and those there are.
    """
    known = dict.fromkeys(ALIASES)
    for run in runs:
        known.update(dict.fromkeys(path.removeprefix("config.") for path, _ in flatten(_described(run))))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            valid = f"did you mean {close[0]}?" if close else f"valid: {', '.join(known)}"
            raise ConfigError.of(option, name, f"no such field; {valid}")


def matches(run: Run, name: str, wanted: str) -> bool:
    """Whether a field has a value as typed on a command line: 0.5 is .5, null is none, a compression is its preset."""
    if name == "compression" and preset_of(run.summary["config"]["compression"]) == wanted:
        return True
    value = field_of(run, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return _text(value) == wanted


def group(runs: Sequence[Run], metrics: list[Metric], *, by: Sequence[str]) -> Results:
    """Pools runs that agree in the fields ``by``, or, without any, in all but those that repeats differ in."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = [field_of(run, name) for name in by] if by else experiment_of(run)
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    members = list((groups if by else _joined(groups)).values())
    members.sort(key=_together(runs))
    labels = [{name: field_of(pooled[0], name) for name in by} for pooled in members] if by else _labels(members)
    rows = [
        Row(label, {metric.name: cell for metric in metrics if (cell := cell_of(pooled, metric))}, pooled)
        for label, pooled in zip(labels, members, strict=True)
    ]
    return Results(rows, metrics, [*_mixed_environment(runs), *_mixed_rows(rows), *_timed_beside_others(rows)])


def _joined(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Groups of which those that leave the epochs unused are part of the one that trained the same, if it is one."""
    trained: dict[str, list[str]] = {}
    for key, runs in groups.items():
        experiment = experiment_of(runs[0])
        if experiment.pop("training.epochs", None) is not None:
            trained.setdefault(json.dumps(experiment, sort_keys=True, default=str), []).append(key)
    for key in list(groups):
        if len(found := trained.get(key, [])) == 1:
            groups[found[0]] += groups.pop(key)
    return groups


def _together(runs: Sequence[Run]) -> Callable[[Sequence[Run]], tuple[int, int]]:
    """Order in which datasets, and models on each, stand together, as they were met first."""
    order = {name: list(dict.fromkeys(_text(field_of(run, name)) for run in runs)) for name in ("dataset", "model")}

    def place(pooled: Sequence[Run]) -> tuple[int, int]:
        dataset, model = (names.index(_text(field_of(pooled[0], name))) for name, names in order.items())
        return dataset, model

    return place


def _labels(members: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Model, dataset, compression and, with mini-batches, sampler; and what two groups would look the same without."""
    names = ["dataset", "model", "compression"]
    if any(field_of(pooled[0], "sampler") != sampler_label(None) for pooled in members):
        names.append("sampler")
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for pooled in members:
        key = tuple(field_of(pooled[0], name) for name in names)
        alike.setdefault(key, []).append(experiment_of(pooled[0]))
    needed: dict[str, None] = {}
    for experiments in alike.values():
        for name in experiments[0]:
            if len(_distinct(experiment[name] for experiment in experiments if name in experiment)) > 1:
                needed[name] = None
    shown = (*names, *needed)
    return [
        {name: None if name in _unused(pooled[0]) else field_of(pooled[0], name) for name in shown}
        for pooled in members
    ]


def _mixed_environment(runs: Sequence[Run]) -> list[str]:
    warnings = []
    for name in ENVIRONMENT:
        texts = [_text(run.lookup(f"environment.{name}")) for run in runs]
        values = list(dict.fromkeys(texts))
        if len(values) > 1:
            counted = ", ".join(f"{value} ({texts.count(value)} of {len(texts)} runs)" for value in values)
            warnings.append(f"mixed {name}: {counted}")
    return warnings


def _mixed_rows(rows: Sequence[Row]) -> list[str]:
    """Fields that differ within a row, and repeats that are no repeats because their seed is the same."""
    warnings = []
    for row in rows:
        experiments = [experiment_of(run) for run in row.runs]
        for path in experiments[0]:
            values = _distinct(experiment[path] for experiment in experiments if path in experiment)
            if len(values) > 1:
                warnings.append(f"one row ({row.name}) mixes {path}: {', '.join(map(_text, values))}")
        seen: dict[str, Run] = {}
        for run, experiment in zip(row.runs, experiments, strict=True):
            key = json.dumps([experiment, run.lookup("config.task"), run.lookup("config.seed")], default=str)
            if key in seen:
                warnings.append(f"one row ({row.name}) holds the same seed twice: {seen[key].folder} and {run.folder}")
            seen[key] = run
    return warnings


def _timed_beside_others(rows: Sequence[Row]) -> list[str]:
    """Rows whose epochs per second are those of a shared device."""
    warnings = []
    for row in rows:
        beside = sum(run.lookup("throughput.alone") is False for run in row.runs)
        if beside and "epochs_per_second" in row.cells:
            warnings.append(f"one row ({row.name}) was timed beside other jobs, in {beside} of {len(row.runs)} runs")
    return warnings


def _described(run: Run) -> dict[str, Any]:
    return {name: run.summary.get(name) or {} for name in ("config", "environment")}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({_text(value): value for value in values}.values())


def _text(value: Any) -> str:
    """A value as it is typed on the command line."""
    return json.dumps(value) if value is None or isinstance(value, (bool, list)) else str(value)
