"""Figures of results: accuracy and gradient error against memory, what is kept, training curves, speed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from iexact_runner.report.figures.activations import draw_activations
from iexact_runner.report.figures.kept import draw_memory
from iexact_runner.report.figures.looks import NEEDS_MATPLOTLIB, can_draw, style
from iexact_runner.report.figures.planned import draw_plans
from iexact_runner.report.figures.points import with_titles
from iexact_runner.report.figures.tradeoffs import draw_cost, draw_pareto
from iexact_runner.report.figures.training import draw_curves, draw_throughput
from iexact_runner.report.grouping import Row
from iexact_runner.report.inert import to_figure
from iexact_runner.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from iexact_runner.report.reading import Report

__all__ = ["NEEDS_MATPLOTLIB", "TITLES", "can_draw", "draw", "to_svg", "write"]

TITLES = {
    "pareto": "Score and gradient error against memory",
    "cost": "Time, peak and gradient error",
    "memory": "Saved for the backward pass",
    "plan": "A budget, dealt over the maps",
    "curves": "Loss and score over the epochs",
    "throughput": "Epochs per second",
    "activations": "Observed activations",
}


def write(report: Report, folder: Path) -> list[Path]:
    """Writes every figure that the runs have data for as PNG and SVG; returns their paths.

    Raises:
        UserError: if matplotlib is not installed.
    """
    drawn, paths = draw(report), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.svg", to_svg(figure))
        with style():
            figure.savefig(folder / f"{name}.png", dpi=150)
        paths += [folder / f"{name}.svg", folder / f"{name}.png"]
    return paths


def draw(report: Report) -> dict[str, Figure]:
    """Every figure that the runs have data for, by name.

    Raises:
        UserError: if matplotlib is not installed.
    """
    settings: dict[str, list[Row]] = {}
    for row in report.results.rows:
        title = to_figure(f"{row.shared('config.model.name')} on {row.shared('config.dataset.name')}")
        settings.setdefault(title, []).append(row)
    draws: dict[str, Callable[[dict[str, list[Row]]], Figure | None]] = {
        "pareto": draw_pareto,
        "cost": draw_cost,
        "memory": draw_memory,
        "plan": draw_plans,
        "curves": draw_curves,
        "throughput": draw_throughput,
        "activations": draw_activations,
    }
    drawn = {}
    with style():
        for name, function in draws.items():
            if settings and (figure := function(settings)) is not None:
                drawn[name] = figure
    return drawn


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element, the same for the same data."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return with_titles(text.getvalue()[text.getvalue().index("<svg") :])
