"""Trade-offs: what is reached against the memory that it takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from iexact_runner.report.figures.looks import Looks, axis_name, panels_of, plain_numbers, short_name
from iexact_runner.report.figures.points import name_points, point_names, under_pointer
from iexact_runner.report.grouping import Row
from iexact_runner.report.metrics import METRICS, Metric, show_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Errors below are those of rounding in FP32.
EXACT = 1e-5
# Ends of the scale of colours for gradient errors.
LEAST_ERROR, LARGEST_ERROR = 1e-3, 10.0


def draw_pareto(settings: dict[str, list[Row]]) -> Figure | None:
    """Score, and the last gradient error that was taken, against saved MiB; rows that no other beats are joined.

    Exact gradients, and rows that keep nothing here, are left out, for a logarithmic axis has no place for them.
    """
    saved = METRICS["saved_mib"]
    errors = dict.fromkeys(name for rows in settings.values() for row in rows for name in row.cells if "error" in name)
    measures = [(METRICS["test"], 1)]
    measures += [(Metric(name, "", name.replace("_error_", " error, epoch ")), -1) for name in list(errors)[-1:]]
    panels = [
        (title, metric, sign, points)
        for title, rows in settings.items()
        for metric, sign in measures
        if len(points := [each for each in _points(rows, saved, metric) if sign > 0 or each[2] > EXACT]) > 1
    ]
    if not panels:
        return None
    figure, places = panels_of(len(panels), columns=2, height=3.6)
    looks = Looks()
    for axes, (title, metric, sign, points) in zip(places, panels, strict=False):
        front = _front([(x, sign * y) for _, x, y in points])
        axes.plot([x for x, _ in front], [sign * y for _, y in front], color="#999999", linewidth=1.2, zorder=2)
        name = axis_name(metric, [row for row, _, _ in points])
        for row, x, y in points:
            look = looks.of(row)
            spread = (row.cells[metric.name].std or 0.0) * metric.scale
            drawn = axes.errorbar(
                [x], [y], [spread], fmt=look.marker, color=look.colour, capsize=3, markersize=7, zorder=3
            )
            shown = show_cell(row.cells[metric.name], metric)
            under_pointer(drawn.lines[0], f"{short_name(row)}: {name} {shown}, {saved.title} {x:.2f}")
        axes.set(title=title, xscale="log", xlabel=f"{saved.title}, less is better")
        axes.set_ylabel(f"{name}, {'more' if sign > 0 else 'less'} is better")
        if sign < 0:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis, [y for _, _, y in points])
        plain_numbers(axes.xaxis, [x for _, x, _ in points])
        axes.margins(0.12, 0.12)
    figure.draw_without_rendering()
    for axes, (_, _, _, points) in zip(places, panels, strict=False):
        name_points(axes, point_names([row for row, _, _ in points]), [(x, y) for _, x, y in points], radius=4)
    return figure


def draw_cost(settings: dict[str, list[Row]]) -> Figure | None:
    """Seconds an epoch against the peak of a step, both as small as can be; the gradient error as colour.

    On mini-batches the error is that of sampling and compression together. Rows that no other beats in time and peak
    are joined.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    peak = METRICS["step_peak_mib"]
    panels = {}
    for title, rows in settings.items():
        found = [(row, _value(row, peak.path), _value(row, "throughput.epochs_per_second.median")) for row in rows]
        points = [(row, x, 1 / rate) for row, x, rate in found if x is not None and rate]
        if len(points) > 1 and any(_error(row) is not None for row, _, _ in points):
            panels[title] = points
    if not panels:
        return None
    figure, places = panels_of(len(panels), columns=1, height=4.4)
    norm, scale = LogNorm(LEAST_ERROR, LARGEST_ERROR), colormaps["viridis_r"]
    for axes, (title, points) in zip(places, panels.items(), strict=False):
        front = _front([(x, -y) for _, x, y in points])
        axes.plot([x for x, _ in front], [-y for _, y in front], color="#999999", linewidth=1.2, zorder=2)
        for row, x, y in points:
            error = _error(row)
            colour = "#ffffff" if error is None else scale(norm(max(error, LEAST_ERROR)))
            (drawn,) = axes.plot(
                [x], [y], "o", markersize=9, markerfacecolor=colour, markeredgecolor="#444444", zorder=3
            )
            taken = "" if error is None else f", gradient error {error:.3f}"
            under_pointer(drawn, f"{short_name(row)}: peak {x:.1f} MiB, {y:.3g} s an epoch{taken}")
        axes.set(title=title, xscale="log", yscale="log", xlabel="peak of a step [MiB], less is better")
        axes.set_ylabel("seconds an epoch, less is better")
        plain_numbers(axes.xaxis, [x for _, x, _ in points])
        plain_numbers(axes.yaxis, [y for _, _, y in points])
        axes.margins(0.1, 0.1)
    bar = figure.colorbar(ScalarMappable(norm, scale), ax=places, location="bottom", aspect=40, extend="both")
    bar.set_label(f"relative error of the gradient (below {LEAST_ERROR:g}: exact; white: not taken)")
    figure.draw_without_rendering()
    for axes, points in zip(places, panels.values(), strict=False):
        name_points(axes, point_names([row for row, _, _ in points]), [(x, y) for _, x, y in points], radius=5)
    return figure


def _value(row: Row, path: str) -> float | None:
    """Mean of a figure over the runs of a row that have it."""
    found = [value for run in row.runs if isinstance(value := run.lookup(path), (int, float))]
    return statistics.fmean(found) if found else None


def _error(row: Row) -> float | None:
    """Gradient error at the last epoch at which it was taken, with that of sampling where there is any."""
    for run in row.runs:
        after = run.lookup("fidelity.after") or {}
        for epoch in sorted(after, key=int, reverse=True):
            errors = (after[epoch].get("both") or after[epoch]).get("relative_error")
            if errors and None not in errors:
                return statistics.fmean(errors)
    return None


def _points(rows: Sequence[Row], across: Metric, upwards: Metric) -> list[tuple[Row, float, float]]:
    return [
        (row, row.cells[across.name].value * across.scale, row.cells[upwards.name].value * upwards.scale)
        for row in rows
        if across.name in row.cells and upwards.name in row.cells and row.cells[across.name].value > 0
    ]


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats: none keeps less and reaches as much."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
