"""Figures of results: accuracy and gradient error against memory, what is kept, training curves, speed."""

from __future__ import annotations

import importlib.util
import io
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iexact_runner.errors import UserError
from iexact_runner.report.grouping import ALIASES, METRICS, Metric, Row
from iexact_runner.report.inert import to_figure
from iexact_runner.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from iexact_runner.report.reading import Report

TITLES = {
    "pareto": "Score and gradient error against memory",
    "memory": "What is kept for the backward pass",
    "curves": "Loss and score over the epochs",
    "throughput": "Epochs per second",
    "activations": "Observed activations",
}
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
# Operation that keeps a map, by its autograd node.
KINDS = (
    (r"Linear|Addmm|^Mm", "inputs of linear layers"),
    (r"BatchNorm", "inputs of BatchNorm"),
    (r"Dropout", "dropout"),
    (r"ReLU|Relu", "ReLU"),
)
MOST_CURVES = 8
MOST_PANELS = 60
MIB = 1024**2
NEEDS_MATPLOTLIB = "figures need matplotlib; pip install 'iexact-runner[figures]'"


def write(report: Report, folder: Path) -> list[Path]:
    """Writes every figure that the runs have data for as PNG and SVG; returns their paths.

    Raises:
        UserError: if matplotlib is not installed.
    """
    drawn, paths = draw(report), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.svg", to_svg(figure))
        with _style():
            figure.savefig(folder / f"{name}.png", dpi=150)
        paths += [folder / f"{name}.svg", folder / f"{name}.png"]
    return paths


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


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
        "memory": draw_memory,
        "curves": draw_curves,
        "throughput": draw_throughput,
        "activations": draw_activations,
    }
    drawn = {}
    with _style():
        for name, function in draws.items():
            if settings and (figure := function(settings)) is not None:
                drawn[name] = figure
    return drawn


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element, the same for the same data."""
    text = io.StringIO()
    with _style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def draw_pareto(settings: dict[str, list[Row]]) -> Figure | None:
    """Score, and the last gradient error that was taken, against saved MiB; rows that no other beats are joined."""
    saved = METRICS["saved_mib"]
    errors = dict.fromkeys(name for rows in settings.values() for row in rows for name in row.cells if "error" in name)
    measures = [(METRICS["test"], 1)]
    measures += [(Metric(name, "", name.replace("_error_", " error, epoch ")), -1) for name in list(errors)[-1:]]
    panels = [
        (title, metric, sign, points)
        for title, rows in settings.items()
        for metric, sign in measures
        if len(points := _points(rows, saved, metric)) > 1
    ]
    if not panels:
        return None
    figure, places = _panels(len(panels), columns=2, height=3.2)
    looks = _Looks()
    for axes, (title, metric, sign, points) in zip(places, panels, strict=False):
        front = _front([(x, sign * y) for _, x, y in points])
        axes.plot([x for x, _ in front], [sign * y for _, y in front], color="#999999", linewidth=1.2, zorder=2)
        for row, x, y in points:
            colour, marker = looks.of(_short(row))
            spread = (row.cells[metric.name].std or 0.0) * metric.scale
            axes.errorbar([x], [y], [spread], fmt=marker, color=colour, capsize=3, markersize=7, zorder=3)
        axes.set(title=title, xscale="log", xlabel=saved.title, ylabel=_named(metric, [row for row, _, _ in points]))
        if sign < 0:
            axes.set_yscale("log")  # where FP32, whose error is 0, has no place
            _plain_numbers(axes.yaxis, [y for _, _, y in points])
        _plain_numbers(axes.xaxis, [x for _, x, _ in points])
    looks.legend(figure)
    return figure


def draw_memory(settings: dict[str, list[Row]]) -> Figure | None:
    """Kept MiB by operation as stacked bars; where FP32 dwarfs the others, a second panel without it."""
    kept = {title: [(row, kinds) for row in rows if (kinds := _kept_by_kind(row))] for title, rows in settings.items()}
    panels = []
    for title, bars in kept.items():
        widest = max((sum(kinds.values()) for _, kinds in bars), default=0.0)
        small = [(row, kinds) for row, kinds in bars if sum(kinds.values()) < widest / 3]
        panels += [(title, bars)] * bool(bars) + [(f"{title}, without the largest", small)] * bool(small)
    if not panels:
        return None
    figure, places = _panels(len(panels), columns=1, height=0.8 + 0.26 * max(len(bars) for _, bars in panels))
    looks = _Looks()
    for axes, (title, bars) in zip(places, panels, strict=False):
        _stack(axes, bars, looks)
        axes.set(title=title, xlabel="saved [MiB]")
    looks.legend(figure)
    return figure


def draw_curves(settings: dict[str, list[Row]]) -> Figure | None:
    """Mean training loss and test score by epoch, with a band of one standard deviation over the repeats."""
    found = {title: [(row, curves) for row in rows if (curves := _curves(row))] for title, rows in settings.items()}
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        return None
    figure, places = _panels(2 * len(found), columns=2, height=3.0)
    looks = _Looks()
    for index, (title, rows) in enumerate(list(found.items())[: len(places) // 2]):
        losses, scores = places[2 * index : 2 * index + 2]
        for row, curves in rows[:MOST_CURVES]:
            colour, _ = looks.of(_short(row))
            _draw_band(losses, [_by_epoch(curve, "loss") for curve in curves], colour)
            _draw_band(scores, [_by_epoch(curve, "test", factor=100) for curve in curves], colour)
        left_out = f" (first {MOST_CURVES} of {len(rows)})" if len(rows) > MOST_CURVES else ""
        losses.set(title=title + left_out, xlabel="epoch", ylabel="training loss", yscale="log")
        scores.set(title=title + left_out, xlabel="epoch", ylabel=_named(METRICS["test"], [row for row, _ in rows]))
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
    figure, places = _panels(len(rated), columns=1, height=0.8 + 0.26 * max(map(len, rated.values())))
    for axes, (title, rows) in zip(places, rated.items(), strict=False):
        values = [cell.value for _, cell in rows]
        whiskers = [
            [cell.value - (cell.p20 or cell.value) for _, cell in rows],
            [(cell.p80 or cell.value) - cell.value for _, cell in rows],
        ]
        axes.barh(range(len(rows)), values, 0.7, xerr=whiskers, color=COLOURS[0], ecolor="#444444", capsize=3)
        _name_bars(axes, range(len(rows)), [row for row, _ in rows])
        axes.invert_yaxis()
        axes.set(title=title, xlabel="epochs/s (20th to 80th percentile)")
        axes.grid(visible=False, axis="y")
    return figure


def draw_activations(settings: dict[str, list[Row]]) -> Figure | None:
    """Histogram of every map's values normalised by their block, with the uniform and the clipped normal laid over."""
    panels = [
        (f"{title}, {_short(row)}", one)
        for title, rows in settings.items()
        for row in rows
        for one in _first_observed(row)
    ]
    if not panels:
        return None
    figure, places = _panels(len(panels), columns=3, height=2.2)
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


class _Looks:
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


def _panels(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
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


@contextmanager
def _style() -> Iterator[None]:
    if not can_draw():
        raise UserError(NEEDS_MATPLOTLIB)
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks, a label too long for its panel
        yield


def _points(rows: Sequence[Row], across: Metric, upwards: Metric) -> list[tuple[Row, float, float]]:
    return [
        (row, row.cells[across.name].value * across.scale, row.cells[upwards.name].value * upwards.scale)
        for row in rows
        if across.name in row.cells and upwards.name in row.cells
    ]


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats: none keeps less and reaches as much."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _kept_by_kind(row: Row) -> dict[str, float]:
    """MiB by kind of operation, from what one run of the row kept."""
    kinds: dict[str, float] = {}
    tensors: list[dict[str, Any]] = next((kept for run in row.runs if (kept := run.lookup("memory.tensors"))), [])
    for tensor in tensors:
        named = next((kind for pattern, kind in KINDS if re.search(pattern, tensor["op"])), "other")
        if tensor["op"].startswith("Mul") and not tensor["layer"].endswith(("conv", "head")):
            named = "dropout"  # PyTorch's on a CPU is a product with its mask
        kinds[named] = kinds.get(named, 0.0) + tensor["bytes"] / MIB
    return kinds


def _stack(axes: Axes, bars: Sequence[tuple[Row, dict[str, float]]], looks: _Looks) -> None:
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name in (*(kind for _, kind in KINDS), "other"):
        widths = [kinds.get(name, 0.0) for _, kinds in bars]
        if any(widths):
            axes.barh(places, widths, 0.7, left=left, color=looks.of(name)[0])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(f"{total:.2f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    _name_bars(axes, places, [row for row, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * (max(left) or 1.0))
    axes.grid(visible=False, axis="y")


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


def _draw_band(axes: Axes, curves: Sequence[Mapping[int, float]], colour: str) -> None:
    """Mean over the curves with a band of one sample standard deviation, at the epochs that all have."""
    epochs = sorted(set(curves[0]).intersection(*curves[1:]))
    columns = [[curve[epoch] for curve in curves] for epoch in epochs]
    middle = [statistics.fmean(column) for column in columns]
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axes.plot(epochs, middle, color=colour, linewidth=1.2)
    axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)


def _name_bars(axes: Axes, places: Sequence[float], rows: Sequence[Row]) -> None:
    """Names of rows beside their bars; the figure grows with the names, or they would take the bars' place."""
    names = [_short(row) for row in rows]
    axes.set_yticks(places, names)
    figure: Any = axes.figure
    figure.set_figwidth(max(figure.get_figwidth(), min(16.0, 4.0 + 0.08 * max(map(len, names)))))


def _short(row: Row) -> str:
    """What tells a row apart from the others of its panel."""
    words = {name: value for name, value in row.labels.items() if name not in ("model", "dataset")}
    # An alias says what it is of; a field needs its name.
    named = [str(value) if name in ALIASES else f"{name.split('.')[-1]} {value}" for name, value in words.items()]
    return to_figure(", ".join(named) or ", ".join(map(str, row.labels.values())))


def _named(metric: Metric, rows: Sequence[Row]) -> str:
    names = {run.lookup("accuracy.metric") for row in rows for run in row.runs} - {None}
    return to_figure(metric.title.replace("score", names.pop().replace("_", "-") if len(names) == 1 else "score"))


def _plain_numbers(axis: Any, values: Sequence[float]) -> None:
    """Labels a logarithmic axis without powers of ten, and only at 1, 2 and 5 where it is long."""
    from matplotlib.ticker import FuncFormatter

    shown = "123456789" if max(values) < 2 * min(values) else "125"
    formatter = FuncFormatter(lambda value, _: f"{round(value, 9):g}" if f"{value:.0e}"[0] in shown else "")
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(formatter)
