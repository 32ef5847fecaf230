"""Figures of runs: where each stands in a record, what people see of it, and how repeats of it are pooled."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iexact_runner.errors import ConfigError
from iexact_runner.report import published
from iexact_runner.runs.records import Run, flatten, mean_std


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


def cell_of(runs: Sequence[Run], metric: Metric) -> Cell | None:
    """The figure of a group of runs; None where none of them has it."""
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


def show_cell(cell: Cell | None, metric: Metric) -> str:
    """A figure with its spread, for people."""
    if cell is None:
        return ""
    value, std, low, high, interval = (
        None if figure is None else f"{figure * metric.scale:.{metric.digits}f}"
        for figure in (cell.value, cell.std, cell.p20, cell.p80, cell.interval)
    )
    if interval is not None:
        return f"{value} ± {interval}"
    if low is not None:
        return f"{value} ({low} - {high})"
    return f"{value} ± {std}" if std is not None and cell.repeats > 1 else str(value)
