"""What all figures share: colours, panels, names, numbers on axes."""

from __future__ import annotations

import importlib.util
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from iexact_runner.errors import UserError
from iexact_runner.report.grouping import ALIASES, Row
from iexact_runner.report.inert import to_figure
from iexact_runner.report.metrics import Metric
from iexact_runner.runs.labels import preset_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with a colour vision deficiency tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))
# Presets that are of one kind share a colour.
FAMILIES = (
    (COLOURS[6], ("none", "plain", "recompute", "offload")),
    (COLOURS[1], ("exact", "iexact", "iexact_2", "iexact_4", "iexact_8", "iexact_16", "iexact_32", "iexact_vm")),
    (COLOURS[0], ("int8", "int4", "int2", "int1")),
    (COLOURS[2], ("lowrank", "lowrank_small", "lowrank_fine", "lowrank_v1")),
    (COLOURS[3], ("actnn", "dropit", "velora", "hadamard", "prac")),
    (COLOURS[4], ("auto",)),
)
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


class Look(NamedTuple):
    """How what belongs together is drawn."""

    colour: str
    marker: str
    line: Any


class Looks:
    """Looks of the rows of a figure: those of their compression in every figure, unless another row has them here."""

    def __init__(self) -> None:
        self._looks: dict[str, Look] = {}

    def of(self, row: Row) -> Look:
        """The look of a row, the same for the same name."""
        name = short_name(row)
        if name not in self._looks:
            usual, taken = _usual_look(row), set(self._looks.values())
            others = (_look(colour, turn) for colour in (usual.colour, *COLOURS) for turn in range(len(MARKERS)))
            self._looks[name] = next((look for look in (usual, *others) if look not in taken), usual)
        return self._looks[name]

    def legend(self, figure: Figure) -> None:
        """Names the lines below the panels."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=look.colour, linestyle=look.line, label=name) for name, look in self._looks.items()
        ]
        legend_below(figure, handles)


def _look(colour: str, turn: int) -> Look:
    return Look(colour, MARKERS[turn % len(MARKERS)], LINES[turn % len(LINES)])


def _usual_look(row: Row) -> Look:
    """The colour of its family of compressions, and the marker of its preset in it."""
    config = row.runs[0].summary["config"]["compression"]
    name = preset_of(config)
    for colour, names in FAMILIES:
        if name in names:
            return _look(colour, names.index(name))
    scheme, form = config.get("scheme"), config.get("format", "blocks")
    family = {"lowrank": "lowrank", "auto": "auto", "projected": form if form != "blocks" else "iexact"}
    alike = family.get(str(scheme), "none")
    if alike == "iexact" and config.get("kept_frac", 1.0) == 1.0:
        alike = "int4"
    colour = next((colour for colour, names in FAMILIES if alike in names), COLOURS[-1])
    return _look(colour, zlib.crc32(short_name(row).encode()))


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend of all panels in as many columns as the figure has room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.065 * longest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)


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
    """Labels a logarithmic axis without powers of ten: at each digit, at 1, 2 and 5, or at 1 alone, as it is long."""
    from matplotlib.ticker import FuncFormatter

    ratio = max(values) / min(values)
    shown = "123456789" if ratio < 2 else "125" if ratio < 2000 else "1"
    formatter = FuncFormatter(lambda value, _: f"{round(value, 9):g}" if f"{value:.0e}"[0] in shown else "")
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(formatter)
