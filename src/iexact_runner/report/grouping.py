"""Runs to rows: repeats of one configuration pooled, figures with their spread, and what does not belong together."""

from __future__ import annotations

import difflib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iexact_runner.errors import ConfigError
from iexact_runner.report import published
from iexact_runner.runs.labels import compression_label, sampler_label
from iexact_runner.runs.records import Run, flatten, mean_std

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
class Metric:
    """A figure of a run.

    Args:
        name: as ``--metric`` and the columns of a CSV file call it.
        path: where it stands in ``summary.json``: a number, a list of scores, or median, p20 and p80.
        title: heading for people.
        scale: factor of the values that people see.
        digits: decimal places that people see.
    """

    name: str
    path: str
    title: str
    scale: float = 1.0
    digits: int = 2


METRICS = {
    metric.name: metric
    for metric in (
        Metric("test", "accuracy.test.values", "test score [%]", 100.0),
        Metric("val", "accuracy.val.values", "validation score [%]", 100.0),
        Metric("train", "accuracy.train.values", "training score [%]", 100.0),
        Metric("highest_val", "accuracy.highest_val.values", "highest validation score [%]", 100.0),
        Metric("highest_train", "accuracy.highest_train.values", "highest training score [%]", 100.0),
        Metric("seconds_to_best", "throughput.seconds_to_best.values", "training to the best epoch [s]", digits=1),
        Metric("epochs_per_second", "throughput.epochs_per_second", "epochs/s"),
        Metric("saved_mib", "memory.saved_mib", "saved [MiB]"),
        Metric("offloaded_mib", "memory.offloaded_mib", "on the host [MiB]"),
        Metric("saved_mib_fp32", "memory.saved_mib_fp32", "saved by FP32 [MiB]"),
        Metric("loss_mib", "memory.loss_mib", "loss [MiB]"),
        Metric("step_peak_mib", "memory.step_peak_mib", "peak of a step [MiB]"),
        Metric("evaluation_peak_mib", "memory.evaluation_peak_mib", "peak of an evaluation [MiB]"),
        Metric("step_peak_mib_fp32", "fp32.step_peak_mib", "peak of a step in FP32 [MiB]"),
        Metric("evaluation_peak_mib_fp32", "fp32.evaluation_peak_mib", "peak of an evaluation in FP32 [MiB]"),
        Metric("epochs_per_second_fp32", "fp32.epochs_per_second", "epochs/s of FP32"),
        Metric("data_mib", "memory.data_mib", "data [MiB]"),
        Metric("model_mib", "memory.model_mib", "model [MiB]", digits=4),
        Metric("peak_allocated_mib", "memory.peak_allocated_mib", "peak allocated [MiB]"),
        Metric("peak_reserved_mib", "memory.peak_reserved_mib", "peak reserved [MiB]"),
        Metric("peak_resident_mib", "memory.peak_resident_mib", "peak resident [MiB]"),
        Metric("reference_activation_mib", "memory.reference_activation_mib", "activations, as the reference [MiB]"),
        Metric("nodes_per_second", "batches.nodes_per_second", "nodes/s", digits=0),
        Metric("sampling_share", "batches.sampling_share", "sampling [% of the time]", 100.0, digits=1),
        Metric("waiting_share", "batches.waiting_share", "waiting for batches [% of the time]", 100.0, digits=1),
        Metric("edge_cut", "batches.partition.edge_cut", "edges cut [%]", 100.0, digits=1),
        Metric("kwh", "energy.kwh", "energy [kWh]", digits=6),
        Metric("gco2e", "energy.gco2e", "emissions [gCO2e]", digits=4),
        # Of two rows, not of a run: iexact_runner.report.paired.
        Metric("test_difference", "", "difference to FP32 [points]", 100.0),
    )
}
DEFAULT_METRICS = ("test", "epochs_per_second", "saved_mib", "kwh", "gco2e")


@dataclass(frozen=True)
class Cell:
    """A figure of a group: mean and sample standard deviation over repeats, or a median with its percentiles.

    ``interval`` is half the width of the mean's 95% interval, where that is what people see in place of ``std``.
    """

    value: float
    std: float | None = None
    p20: float | None = None
    p80: float | None = None
    repeats: int = 1
    interval: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)


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
    """What two repeats agree in: the flat configuration without the fields that they may differ in."""
    return {
        name: value
        for name, value in flatten(run.summary["config"])
        if name not in REPEAT_FIELDS and not name.startswith(REPEAT_GROUPS)
    }


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
    """Whether a field has a value as typed on a command line: 0.5 is .5, null is none, true is true."""
    value = field_of(run, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return _text(value) == wanted


def metrics_named(names: Sequence[str], runs: Sequence[Run]) -> list[Metric]:
    """The metrics asked for; without a name, the usual ones that some run has.

    Raises:
        ConfigError: if a name is neither that of a metric nor a number's dotted path in ``summary.json``.
    """
    if not names:
        usual = [METRICS[name] for name in DEFAULT_METRICS] + _gradient_errors(runs)
        return [metric for metric in usual if any(_samples(run, metric) for run in runs)]
    known = METRICS | {metric.name: metric for metric in _gradient_errors(runs)}
    metrics = [known.get(name) or Metric(name, name, name, digits=4) for name in names]
    for metric in metrics:
        if metric.name not in known and not any(_samples(run, metric) for run in runs):
            valid = f"one of {', '.join(METRICS)}, or a number's dotted path in summary.json"
            raise ConfigError.of("--metric", metric.name, f"must be {valid}")
    return metrics


def group(runs: Sequence[Run], metrics: list[Metric], *, by: Sequence[str]) -> Results:
    """Pools runs that agree in the fields ``by``, or, without any, in all but those that repeats differ in."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = [field_of(run, name) for name in by] if by else experiment_of(run)
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    members = list(groups.values())
    labels = [{name: field_of(pooled[0], name) for name in by} for pooled in members] if by else _labels(members)
    rows = [
        Row(label, {metric.name: cell for metric in metrics if (cell := _cell(pooled, metric))}, pooled)
        for label, pooled in zip(labels, members, strict=True)
    ]
    return Results(rows, metrics, [*_mixed_environment(runs), *_mixed_rows(rows), *_timed_beside_others(rows)])


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
            if len(_distinct(experiment.get(name) for experiment in experiments)) > 1:
                needed[name] = None
    return [{name: field_of(pooled[0], name) for name in (*names, *needed)} for pooled in members]


def _samples(run: Run, metric: Metric) -> Any:
    """The figure as the run recorded it: a number, a list of numbers, a mapping of percentiles; None for none."""
    value = run.lookup(metric.path)
    if isinstance(value, Mapping):
        return value if all(_is_figure(value.get(name)) for name in ("median", "p20", "p80")) else None
    if isinstance(value, list):
        return value if value and all(map(_is_figure, value)) else None
    return value if _is_figure(value) else None


def _is_figure(value: Any) -> bool:
    """Whether a value can be averaged with others of its size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _cell(runs: Sequence[Run], metric: Metric) -> Cell | None:
    samples = [(run, sample) for run in runs if (sample := _samples(run, metric)) is not None]
    if not samples:
        return None
    first = samples[0][1]
    # A path that somebody names may lead to a number in one run and to a list in another.
    samples = [(run, sample) for run, sample in samples if _shape(sample) is _shape(first)]
    if isinstance(first, Mapping):
        middle, low, high = (statistics.median(s[key] for _, s in samples) for key in ("median", "p20", "p80"))
        return Cell(middle, p20=low, p80=high, repeats=len(samples))
    if isinstance(first, list):
        pooled = mean_std([value for _, sample in samples for value in sample])
        return Cell(pooled["mean"], std=pooled["std"], repeats=len(pooled["values"]))
    pooled = mean_std([float(sample) for _, sample in samples])
    # Kept bytes of repeats are the same to the last bit, and then have no spread to show.
    spread = pooled["std"] or None
    return Cell(pooled["mean"], std=spread, repeats=len(samples), published=_published(samples[0][0], metric))


def _shape(sample: Any) -> type:
    return float if isinstance(sample, int) else type(sample)


def _published(run: Run, metric: Metric) -> dict[str, float]:
    config = dict(flatten(run.summary["config"]))
    return published.figures_for(metric.name, config, str(run.lookup("environment.device")))


def _gradient_errors(runs: Sequence[Run]) -> list[Metric]:
    """Relative gradient error at every epoch at which some run took it."""
    epochs = {epoch for run in runs for epoch in (run.lookup("fidelity.after") or {})}
    return [
        Metric(
            f"gradient_error_{epoch}",
            f"fidelity.after.{epoch}.relative_error",
            f"gradient error, epoch {epoch}",
            digits=3,
        )
        for epoch in sorted(epochs, key=int)
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
            values = _distinct(experiment.get(path) for experiment in experiments)
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
