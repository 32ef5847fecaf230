"""How runs went: curves over the epochs, and speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iexact_runner.report.figures.looks import COLOURS, Look, Looks, axis_name, name_bars, panels_of
from iexact_runner.report.grouping import Row
from iexact_runner.report.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CURVES = 8


def draw_curves(settings: dict[str, list[Row]]) -> Figure | None:
    """Mean training loss and test score by epoch, with a band of one standard deviation over the repeats."""
    found = {title: [(row, curves) for row in rows if (curves := _curves(row))] for title, rows in settings.items()}
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        return None
    figure, places = panels_of(2 * len(found), columns=2, height=3.0)
    looks = Looks()
    for index, (title, rows) in enumerate(list(found.items())[: len(places) // 2]):
        losses, scores = places[2 * index : 2 * index + 2]
        for row, curves in rows[:MOST_CURVES]:
            look = looks.of(row)
            _draw_band(losses, [_by_epoch(curve, "loss") for curve in curves], look)
            _draw_band(scores, [_by_epoch(curve, "test", factor=100) for curve in curves], look)
        left_out = f" (first {MOST_CURVES} of {len(rows)})" if len(rows) > MOST_CURVES else ""
        losses.set(title=title + left_out, xlabel="epoch", ylabel="training loss", yscale="log")
        scores.set(title=title + left_out, xlabel="epoch", ylabel=axis_name(METRICS["test"], [row for row, _ in rows]))
    looks.legend(figure)
    return figure


def draw_throughput(settings: dict[str, list[Row]]) -> Figure | None:
    """Median epochs per second as bars, with whiskers from the 20th to the 80th percentile."""
    rated = {
        title: [(row, row.cells["epochs_per_second"]) for row in rows if "epochs_per_second" in row.cells]
        for title, rows in settings.items()
    }
    rated = {title: rows for title, rows in rated.items() if rows}
    if not rated:
        return None
    figure, places = panels_of(len(rated), columns=1, height=0.8 + 0.26 * max(map(len, rated.values())))
    for axes, (title, rows) in zip(places, rated.items(), strict=False):
        values = [cell.value for _, cell in rows]
        whiskers = [
            [cell.value - (cell.p20 or cell.value) for _, cell in rows],
            [(cell.p80 or cell.value) - cell.value for _, cell in rows],
        ]
        axes.barh(range(len(rows)), values, 0.7, xerr=whiskers, color=COLOURS[0], ecolor="#444444", capsize=3)
        name_bars(axes, range(len(rows)), [row for row, _ in rows])
        axes.invert_yaxis()
        axes.set(title=title, xlabel="epochs/s (20th to 80th percentile), more is better")
        axes.grid(visible=False, axis="y")
    return figure


def _curves(row: Row) -> list[list[dict[str, Any]]]:
    """The epochs of each repeat of a row; of repeats that have a loss and a score."""
    repeats: dict[tuple[Path, int], list[dict[str, Any]]] = {}
    for run in row.runs:
        for line in run.metrics():
            repeats.setdefault((run.folder, line["run"]), []).append(line)
    return [curve for curve in repeats.values() if _by_epoch(curve, "loss") and _by_epoch(curve, "test")]


def _by_epoch(curve: Sequence[Mapping[str, Any]], name: str, *, factor: float = 1.0) -> dict[int, float]:
    """A figure of the epochs that have it: a score is there after an evaluation."""
    return {line["epoch"]: factor * line[name] for line in curve if line[name] is not None}


def _draw_band(axes: Axes, curves: Sequence[Mapping[int, float]], look: Look) -> None:
    """Mean over the curves with a band of one sample standard deviation, at the epochs that all have."""
    epochs = sorted(set(curves[0]).intersection(*curves[1:]))
    columns = [[curve[epoch] for curve in curves] for epoch in epochs]
    middle = [statistics.fmean(column) for column in columns]
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axes.plot(epochs, middle, color=look.colour, linestyle=look.line, linewidth=1.2)
    axes.fill_between(epochs, low, high, color=look.colour, alpha=0.18, linewidth=0)
