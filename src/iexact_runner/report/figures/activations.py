"""How the values of maps are distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iexact_runner.report.figures.looks import COLOURS, panels_of, short_name
from iexact_runner.report.grouping import Row
from iexact_runner.report.inert import to_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_activations(settings: dict[str, list[Row]]) -> Figure | None:
    """Histogram of every map's values normalised by their block, with the uniform and the clipped normal laid over."""
    panels = [
        (f"{title}, {short_name(row)}", one)
        for title, rows in settings.items()
        for row in rows
        for one in _first_observed(row)
    ]
    if not panels:
        return None
    figure, places = panels_of(len(panels), columns=3, height=2.2)
    for axes, (title, one) in zip(places, panels, strict=False):
        cells = len(one["observed"])
        edges = [cell / cells for cell in range(cells + 1)]
        axes.stairs([cells * mass for mass in one["observed"]], edges, fill=True, color="#b9c9d8", label="observed")
        normal = [cells * mass for mass in one["clipped_normal"]]
        axes.stairs(normal, edges, color=COLOURS[1], linewidth=1.3, label=f"clipped normal, JS {_js(one, 'normal')}")
        axes.axhline(1.0, color=COLOURS[0], linewidth=1.3, label=f"uniform, JS {_js(one, 'uniform')}")
        axes.set_title(f"{title}\n{to_figure(one['layer'])}, {to_figure(one['op'])}, d = {one['d']}", fontsize=8)
        # A mass at either end, where a block's extremes lie, would hide the rest.
        inner = [cells * mass for mass in one["observed"][1:-1]] + normal[1:-1]
        axes.set_ylim(0, 1.6 * (max(inner) or 1.0))
        axes.legend(fontsize=7, loc="upper right", frameon=True, framealpha=0.8, edgecolor="none")
    for axes in places[-3:]:
        axes.set_xlabel("h / B")
    return figure


def _first_observed(row: Row) -> list[dict[str, Any]]:
    """The maps of the first repeat that looked at them."""
    repeats: list[list[dict[str, Any]]] = next((found for run in row.runs if (found := run.lookup("distribution"))), [])
    return repeats[0] if repeats else []


def _js(one: dict[str, Any], name: str) -> str:
    return f"{one['js_clipped_normal' if name == 'normal' else 'js_uniform']:.3f}"
