"""Points of a figure with their names beside them, and with their numbers under the pointer."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iexact_runner.report.grouping import Row
from iexact_runner.report.inert import to_figure
from iexact_runner.runs.labels import preset_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Where a name may stand beside its point: to the right and up, in sizes of the name and of the point.
_SIDES = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.7, 1.0), (-0.7, 1.0), (0.7, -1.0), (-0.7, -1.0))
_PLACES = _SIDES + tuple((right, up * far) for far in (2.2, 3.4) for right, up in _SIDES if up)
_HOVER = "hover: "


def point_names(rows: Sequence[Row]) -> list[str]:
    """Short names of rows: the preset, and of other labels those that are not the usual ones of these rows."""
    usual = {name: Counter(str(row.labels[name]) for row in rows).most_common(1)[0][0] for name in rows[0].labels}
    names = []
    for row in rows:
        found = preset_of(row.runs[0].summary["config"]["compression"])
        words = [str(row.labels.get("compression", "")) if found is None else found]
        words += [
            str(value)
            for name, value in row.labels.items()
            if name not in ("model", "dataset", "compression") and str(value) != usual[name]
        ]
        names.append(to_figure(", ".join(words)))
    return names


def name_points(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]], *, radius: float) -> None:
    """Writes names beside points, each where it covers least of what is there.

    Args:
        axes: of a figure whose layout is done (``draw_without_rendering``).
        names: of the points.
        points: in data coordinates.
        radius: of a point's marker, in typographic points.
    """
    pixels = axes.figure.dpi / 72
    reach = radius * pixels
    marks = [axes.transData.transform(point) for point in points]
    covered = [_box(x, y, reach, reach) for x, y in marks]
    panel = axes.get_window_extent()
    for name, (x, y), point in zip(names, marks, points, strict=True):
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=7)
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3})
        text.set_in_layout(False)
        extent = text.get_window_extent()
        half = extent.width / 2, extent.height / 2
        costs = {}
        for right, up in _PLACES:
            away = right * (half[0] + 1.8 * reach), up * (half[1] + 1.2 * reach)
            box = _box(x + away[0], y + away[1], *half)
            outside = 4 * half[0] * half[1] - _overlap(box, (panel.x0, panel.y0, panel.x1, panel.y1))
            costs[away] = 4 * outside + sum(_overlap(box, other) for other in covered) + 0.05 * abs(away[1])
        right, up = min(costs, key=costs.__getitem__)
        covered.append(_box(x + right, y + up, *half))
        text.set_position((right / pixels, up / pixels))


def under_pointer(artist: Artist, text: str) -> None:
    """Text that a page shows where the pointer is over a part of a figure; a label's dollars are plain ones there."""
    artist.set_gid(_HOVER + text.replace(r"\$", "$"))


def with_titles(svg: str) -> str:
    """An SVG in which such texts are titles of their parts."""
    return re.sub(
        rf'<g id="{_HOVER}([^"]*)">', lambda found: f"<g><title>{html.escape(html.unescape(found[1]))}</title>", svg
    )


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(one: Sequence[float], other: Sequence[Any]) -> float:
    """Area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return float(max(0.0, width) * max(0.0, height))
