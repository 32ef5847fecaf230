"""How a budget was dealt over the maps of a model: shares of the bytes and of the expected error, by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iexact_runner.report.figures.looks import panels_of, short_name
from iexact_runner.report.grouping import Row
from iexact_runner.report.inert import to_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the most that are drawn.
PANELS = 8
BYTES, ERROR = "#4c78a8", "#e45756"


def draw_plans(settings: dict[str, list[Row]]) -> Figure | None:
    """Two bars a map: its share of the bytes, and of the squared error that is expected of the gradient."""
    panels = [
        (f"{title}\n{short_name(row)}\n{plan['saved_mib']:.2f} MiB after epoch {plan['epoch']}", plan)
        for title, rows in settings.items()
        for row in rows
        if (plan := _last_plan(row)) is not None
    ][:PANELS]
    if not panels:
        return None
    longest = max(len(plan["maps"]) for _, plan in panels)
    figure, places = panels_of(len(panels), columns=2, height=1.8 + 0.28 * longest)
    for axes, (title, plan) in zip(places, panels, strict=False):
        maps = plan["maps"]
        total = sum(each["mib"] for each in maps) or 1.0
        rows = range(len(maps))
        axes.barh([row - 0.2 for row in rows], [each["mib"] / total for each in maps], 0.38, color=BYTES, label="bytes")
        shares = [each["error_share"] for each in maps]
        axes.barh([row + 0.2 for row in rows], shares, 0.38, color=ERROR, label="squared error, expected")
        axes.set_yticks([*rows], [to_figure(f"{each['layer']}: {each['kept']}") for each in maps], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _last_plan(row: Row) -> dict[str, Any] | None:
    """The last plan of the first run that was made by measurement, or the first one if none was."""
    for run in row.runs:
        plans = run.lookup("plans") or []
        measured = [plan for plan in plans if plan.get("expected_error") is not None and plan["run"] == 0]
        if plans:
            found: dict[str, Any] = (measured or plans)[-1]
            return found
    return None
