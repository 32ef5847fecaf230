"""LaTeX whose figures siunitx can read, and whose other cells it is not asked to."""

from __future__ import annotations

import pytest

from iexact_runner.report.latex import latex_tables
from iexact_runner.report.tables import Grid


def column(*cells):
    """The format and the cells of one column of figures."""
    lines = latex_tables([Grid("title", ["x"], [[cell] for cell in cells], [True])]).splitlines()
    [form] = [line.removeprefix(r"  \begin{tabular}{")[:-1] for line in lines if r"\begin{tabular}" in line]
    rows = [
        line.strip().removesuffix(r"\\").strip() for line in lines if line.startswith("    ") and line.endswith(r"\\")
    ]
    return form, rows


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        (("1", "12"), "S[table-format=2]"),
        (("5,521.25", "3.5"), "S[table-format=4.2]"),
        (("-0.50", "+10.25"), "S[table-format=-2.2]"),
        (("91.74 ± 0.57", "", "9.00 ± 1.41"), "S[table-format=2.2(3)]"),
        (("0.057 ± 0.003",), "S[table-format=1.3(1)]"),
    ],
)
def test_figures_are_aligned_by_their_points(cells, form):
    found, (head, *rows) = column(*cells)
    assert found == form and head == "{x}"
    assert rows == [cell.replace(",", "").replace("±", r"\pm") for cell in cells]


@pytest.mark.parametrize("cells", [("4.00 (3.50 - 4.50)", "1.00"), ("nan",), ("-",), ("", ""), ()])
def test_other_cells_are_text(cells):
    form, (head, *rows) = column(*cells)
    assert form == "r" and head == "x" and len(rows) == len(cells)
