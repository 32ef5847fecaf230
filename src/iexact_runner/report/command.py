"""``iexact-report``: from the records of runs to tables and figures."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from iexact_runner.errors import ConfigError, UserError
from iexact_runner.report import tables
from iexact_runner.report.latex import latex_tables
from iexact_runner.report.metrics import METRICS
from iexact_runner.report.reading import Report, read_report
from iexact_runner.runs.files import write_atomically
from iexact_runner.untrusted.text import visible

FORMATS = ("table", "csv", "parquet", "markdown", "latex", "html")
EXIT_DAMAGED, EXIT_USAGE = 1, 2
PLAIN_WIDTH = 160


def wide_console() -> Console:
    """Standard output; away from a terminal as wide as tables want to be."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def show(report: Report, console: Console, *, title: str) -> None:
    """Prints the tables."""
    for grid in report.grids(title=title):
        tables.print_grid(console, grid)


def main() -> None:
    """Entry point of ``iexact-report``: 1 if something could not be read, 2 if it was asked for wrongly."""
    options = make_parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the screen has no letters for ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        report = read_report(
            options.folders,
            where=options.where,
            by=_split(options.group_by),
            metrics=_split(options.metric),
            epochs=options.figures is not None or options.format == "html",
        )
        if not report.completed and not report.incomplete and not report.damaged:
            raise UserError(f"no run with a dataset at or below {', '.join(map(str, options.folders))}")
        _write(report, options)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    except (UserError, OSError) as error:
        _fail(str(error), EXIT_DAMAGED)
    for line in report.damaged:
        _say(line)
    sys.exit(EXIT_DAMAGED if report.damaged else 0)


def _write(report: Report, options: argparse.Namespace) -> None:
    if options.figures is not None:
        from iexact_runner.report import figures

        for path in figures.write(report, options.figures):
            _say(f"wrote {path}")
    if options.format == "parquet":
        if options.output is None:
            raise ConfigError.of("--output", None, "--format=parquet writes a file: name it")
        tables.write_parquet(report.results, options.output)
    elif options.format == "table" and options.output is None:
        show(report, wide_console(), title=options.title)
        return
    else:
        text = _render(report, options)
        if options.output is None:
            sys.stdout.write(text)
        else:
            write_atomically(options.output, text)
    if options.format in ("csv", "parquet"):  # what the other formats say in their text
        for run in report.incomplete:
            _say(f"{run.folder}: {run.status}")
        for warning in report.results.warnings:
            _say(f"warning: {warning}")


def _render(report: Report, options: argparse.Namespace) -> str:
    if options.format == "csv":
        return tables.to_csv(report.results)
    if options.format == "html":
        from iexact_runner.report import figures
        from iexact_runner.report.page import render_page

        if not figures.can_draw():
            _say(f"a page without figures: {figures.NEEDS_MATPLOTLIB}")
        return render_page(report, title=options.title)
    if options.format == "table":
        text = io.StringIO()
        show(report, Console(file=text, width=PLAIN_WIDTH), title=options.title)
        return text.getvalue()
    grids = report.grids(title=options.title)
    if options.format == "latex":
        return latex_tables(grids)
    return "\n".join(map(tables.markdown, grids))


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="iexact-report",
        description="Tables and figures of every run at or below some folders: repeats pooled, published figures "
        "beside the measured ones, failed and unfinished runs listed.",
        epilog=f"metrics: {', '.join(METRICS)}, or a number's dotted path in summary.json",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of runs or of sweeps")
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write every figure there as PNG and SVG")
    parser.add_argument(
        "--group-by",
        action="append",
        default=[],
        metavar="FIELD[,FIELD]",
        help="pool runs that agree in these fields: dataset, model, compression, training.lr, environment.torch, ...",
    )
    parser.add_argument("--metric", action="append", default=[], metavar="NAME[,NAME]", help="figures to show")
    parser.add_argument(
        "--where", action="append", default=[], metavar="FIELD=VALUE", help="only runs with this value; may be repeated"
    )
    parser.add_argument("--title", default="results", help="heading of the table")
    return parser


def _split(options: Sequence[str]) -> list[str]:
    return [name for option in options for name in option.split(",") if name]


def _say(message: str) -> None:
    print(f"iexact-report: {visible(message)}", file=sys.stderr)


def _fail(message: str, status: int) -> None:
    _say(message)
    sys.exit(status)
