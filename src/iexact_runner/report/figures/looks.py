"""What all figures share: colours, panels, names, numbers on axes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from iexact_runner.errors import UserError
from iexact_runner.report.grouping import ALIASES, Metric, Row
from iexact_runner.report.inert import to_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with a colour vision deficiency tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*"
STYLE: Any = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "iexact",
}
MOST_PANELS = 60
MIB = 1024**2
NEEDS_MATPLOTLIB = "figures need matplotlib; pip install 'iexact-runner[figures]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def style() -> Iterator[None]:
    """Context in which figures are made.

    Raises:
        UserError: if matplotlib is not installed.
    """
    if not can_draw():
        raise UserError(NEEDS_MATPLOTLIB)
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks, a label too long for its panel
        yield


def panels_of(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, but no more than can be looked at, read in lines; ``height`` of one in inches."""
    from matplotlib.figure import Figure

    shown = min(count, MOST_PANELS)
    columns = min(columns, shown)
    lines = -(-shown // columns)
    figure = Figure(figsize=({1: 7.5, 2: 9.5}.get(columns, 12.0), height * lines + 0.5), layout="constrained")
    places = [figure.add_subplot(lines, columns, place + 1) for place in range(shown)]
    if shown < count:
        figure.suptitle(f"the first {shown} of {count} panels")
    return figure, places


class Looks:
    """Colour and marker of every label, the same in all panels of a figure."""

    def __init__(self) -> None:
        self._looks: dict[str, tuple[str, str]] = {}

    def of(self, label: str) -> tuple[str, str]:
        """Colour and marker; a new label gets the next ones."""
        turn, colour = divmod(len(self._looks), len(COLOURS))
        return self._looks.setdefault(label, (COLOURS[colour], MARKERS[turn % len(MARKERS)]))

    def legend(self, figure: Figure) -> None:
        """Names them below the panels."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
            for label, (colour, marker) in self._looks.items()
        ]
        longest = max(map(len, self._looks))
        columns = max(1, int(figure.get_figwidth() / (0.5 + 0.065 * longest)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handletextpad=0.2)


def short_name(row: Row) -> str:
    """What tells a row apart from the others of its panel."""
    words = {name: value for name, value in row.labels.items() if name not in ("model", "dataset")}
    # An alias says what it is of; a field needs its name.
    named = [str(value) if name in ALIASES else f"{name.split('.')[-1]} {value}" for name, value in words.items()]
    return to_figure(", ".join(named) or ", ".join(map(str, row.labels.values())))


def axis_name(metric: Metric, rows: Sequence[Row]) -> str:
    """A metric as an axis names it, with the score that all rows have."""
    names = {run.lookup("accuracy.metric") for row in rows for run in row.runs} - {None}
    return to_figure(metric.title.replace("score", names.pop().replace("_", "-") if len(names) == 1 else "score"))


def name_bars(axes: Axes, places: Sequence[float], rows: Sequence[Row]) -> None:
    """Names of rows beside their bars; the figure grows with the names, or they would take the bars' place."""
    names = [short_name(row) for row in rows]
    axes.set_yticks(places, names)
    figure: Any = axes.figure
    figure.set_figwidth(max(figure.get_figwidth(), min(16.0, 4.0 + 0.08 * max(map(len, names)))))


def plain_numbers(axis: Any, values: Sequence[float]) -> None:
    """Labels a logarithmic axis without powers of ten, and only at 1, 2 and 5 where it is long."""
    from matplotlib.ticker import FuncFormatter

    shown = "123456789" if max(values) < 2 * min(values) else "125"
    formatter = FuncFormatter(lambda value, _: f"{round(value, 9):g}" if f"{value:.0e}"[0] in shown else "")
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(formatter)
