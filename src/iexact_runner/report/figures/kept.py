"""What is kept for the backward pass, by operation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iexact_runner.report.figures.looks import COLOURS, MIB, legend_below, name_bars, panels_of
from iexact_runner.report.grouping import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Operation that keeps a map, by its autograd node.
KINDS = (
    (r"Linear|Addmm|^Mm", "inputs of linear layers"),
    (r"BatchNorm", "inputs of BatchNorm"),
    (r"Dropout", "dropout"),
    (r"ReLU|Relu", "ReLU"),
)


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
    figure, places = panels_of(len(panels), columns=1, height=0.8 + 0.26 * max(len(bars) for _, bars in panels))
    shown: dict[str, Any] = {}
    for axes, (title, bars) in zip(places, panels, strict=False):
        shown |= _stack(axes, bars)
        axes.set(title=title, xlabel="saved [MiB], less is better")
    if shown:
        legend_below(figure, list(shown.values()))
    return figure


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


def _stack(axes: Axes, bars: Sequence[tuple[Row, dict[str, float]]]) -> dict[str, Any]:
    """Draws the bars; a handle for a legend by kind of operation that is there."""
    drawn: dict[str, Any] = {}
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour in zip((*(kind for _, kind in KINDS), "other"), COLOURS, strict=False):
        widths = [kinds.get(name, 0.0) for _, kinds in bars]
        if any(widths):
            drawn[name] = axes.barh(places, widths, 0.7, left=left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(f"{total:.2f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    name_bars(axes, places, [row for row, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * (max(left) or 1.0))
    axes.grid(visible=False, axis="y")
    return drawn
