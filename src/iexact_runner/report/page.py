"""One HTML page with tables and figures, which needs no other file."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from iexact_runner import __version__
from iexact_runner.report import figures, tables
from iexact_runner.report.inert import to_html

if TYPE_CHECKING:
    from iexact_runner.report.reading import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 14px; }
th { border-bottom: 2px solid #222; text-align: left; padding: .3em .8em; vertical-align: bottom; }
td { border-bottom: 1px solid #ddd; padding: .3em .8em; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
td.figure { white-space: nowrap; }
p { color: #555; font-size: 13px; margin: .4em 0; }
svg { max-width: 100%; height: auto; }
"""


def render_page(report: Report, *, title: str) -> str:
    """The page as text, its figures inlined as SVG; without matplotlib a line says what they need."""
    sections = [tables.html_table(grid) for grid in report.grids(title=title)]
    if report.damaged:
        lines = "".join(f"<p>{to_html(line)}</p>" for line in report.damaged)
        sections.append(f"<h2>cannot be read</h2>\n{lines}\n")
    if figures.can_draw():
        for name, figure in figures.draw(report).items():
            sections.append(f"<h2>{html.escape(figures.TITLES[name])}</h2>\n{figures.to_svg(figure)}\n")
    else:
        sections.append(f"<p>{html.escape(figures.NEEDS_MATPLOTLIB)}</p>\n")
    where = ", ".join(sorted({str(run.folder.parent) for run in report.completed}))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{to_html(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{to_html(title)}</h1>\n{''.join(sections)}"
        f"<p>iexact-report {__version__}, from {to_html(where)}</p>\n</body>\n</html>\n"
    )
