"""Tables of results for papers, in LaTeX with booktabs and siunitx."""

from __future__ import annotations

import re
from collections.abc import Sequence

from iexact_runner.report.inert import to_tex
from iexact_runner.report.tables import Grid
from iexact_runner.untrusted.text import visible

_PACKAGES = r"% \usepackage{booktabs} \usepackage[separate-uncertainty=true]{siunitx}"
# A figure as cells show it, and the deviation or interval after it.
_NUMBER = re.compile(r"(?P<sign>[+-]?)(?P<whole>[\d,]+)(?:\.(?P<decimals>\d+))?(?: ± (?P<spread>[\d,]+(?:\.\d+)?))?")


def latex_tables(grids: Sequence[Grid]) -> str:
    """Table environments for the packages booktabs and siunitx, which aligns figures by their decimal points.

    Columns of other cells than numbers, alone or with a ±, are aligned as text.
    """
    return "\n".join([f"{_PACKAGES}\n", *map(_table, grids)])


def _table(grid: Grid) -> str:
    columns = [list(cells) for cells in zip(*grid.rows, strict=True)] or [[] for _ in grid.header]
    formats = [_number_format(cells) if figure else "l" for figure, cells in zip(grid.figures, columns, strict=True)]
    # Braces keep a name from being read as a number.
    names = [
        f"{{{name}}}" if form[0] == "S" else name for name, form in zip(map(to_tex, grid.header), formats, strict=True)
    ]
    rows = [[_tex_cell(cell, form) for cell, form in zip(row, formats, strict=True)] for row in grid.rows]
    lines = [
        r"\begin{table}",
        rf"  \caption{{{to_tex(grid.title)}}}",
        rf"  \begin{{tabular}}{{{''.join(formats)}}}",
        r"    \toprule",
        f"    {' & '.join(names)} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
        *(f"% {visible(note)}" for note in grid.notes),
    ]
    return "\n".join(lines) + "\n"


def _number_format(cells: Sequence[str]) -> str:
    """The column of siunitx that figures fit into, or one of text, to the right."""
    found = [_NUMBER.fullmatch(cell) for cell in cells if cell]
    numbers = [number.groupdict() for number in found if number]
    if not numbers or len(numbers) < len(found):
        return "r"
    sign = "-" if any(number["sign"] for number in numbers) else ""
    whole = max(len(number["whole"].replace(",", "")) for number in numbers)
    decimals = max(len(number["decimals"] or "") for number in numbers)
    spread = max(len(re.sub(r"\D", "", number["spread"] or "").lstrip("0")) for number in numbers)
    form = f"{sign}{whole}" + (f".{decimals}" if decimals else "") + (f"({spread})" if spread else "")
    return f"S[table-format={form}]"


def _tex_cell(cell: str, form: str) -> str:
    return cell.replace(",", "").replace("±", r"\pm") if form[0] == "S" else to_tex(cell)
