"""One HTML page with tables that sort and filter, and with figures; it needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files
from typing import TYPE_CHECKING

from iexact_runner import __version__
from iexact_runner.report import figures, tables
from iexact_runner.report.inert import to_html

if TYPE_CHECKING:
    from iexact_runner.report.reading import Report


def render_page(report: Report, *, title: str) -> str:
    """The page as text, its figures inlined as SVG; without matplotlib a line says what they need."""
    sections = [tables.html_table(grid) for grid in report.grids(title="Runs")]
    if report.damaged:
        lines = "".join(f"<p>{to_html(line)}</p>" for line in report.damaged)
        sections.append(f"<h2>cannot be read</h2>\n{lines}\n")
    if figures.can_draw():
        for name, figure in figures.draw(report).items():
            drawn = f'<div class="wide plot">\n{figures.to_svg(figure)}\n</div>'
            sections.append(f"<h2>{html.escape(figures.TITLES[name])}</h2>\n{drawn}\n")
    else:
        sections.append(f"<p>{html.escape(figures.NEEDS_MATPLOTLIB)}</p>\n")
    where = ", ".join(sorted({str(run.folder.parent) for run in report.completed}))
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    # Whatever a record may hold: nothing else runs, and nothing is loaded.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{to_html(title)}</title>\n<style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<h1>{to_html(title)}</h1>\n'
        f"{''.join(sections)}<p>iexact-report {__version__}, from {to_html(where)}</p>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
