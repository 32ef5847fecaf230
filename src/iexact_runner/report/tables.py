"""Tables of results in the formats that people and programs read."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iexact_runner.errors import UserError
from iexact_runner.report import published
from iexact_runner.report.grouping import ENVIRONMENT, Results, Row
from iexact_runner.report.inert import to_cell, to_html, to_markdown
from iexact_runner.report.metrics import Cell, Metric, show_cell
from iexact_runner.runs.records import Run, value_at
from iexact_runner.untrusted.text import unmarked

# Columns that every row of a CSV or Parquet file has, whatever the table shows.
CONFIG_COLUMNS = (
    "task",
    "model.name",
    "model.num_layers",
    "model.hidden_channels",
    "dataset.name",
    "compression.scheme",
    "compression.format",
    "compression.bits",
    "compression.kept_frac",
    "compression.group_size",
    "compression.col_size",
    "compression.alpha",
    "compression.levels",
    "compression.max_block_size",
    "compression.share_maps",
    "compression.store_dropout_mask",
    "compression.map_bits",
    "compression.rounding",
    "compression.sign_threshold",
    "compression.sign_share",
    "compression.signs",
    "compression.rank",
    "compression.energy",
    "compression.refresh",
    "compression.residual",
    "compression.budget_mib",
    "compression.budget",
    "compression.interval",
    "compression.offload",
    "compression.simulate",
    "sampler.name",
    "runs",
    "seed",
    "training.epochs",
)


PAIRED = "difference to FP32: mean of the differences between repeats of the same seed, with its 95% interval"


@dataclass(frozen=True)
class Grid:
    """A table as text: a title, a header, rows of as many cells, which columns hold figures, and notes below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    figures: list[bool]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """A column of a grid: its heading, what it shows of a row, and whether that is a figure."""

    heading: str
    show: Callable[[Row], str]
    figure: bool = True


def grid_of(results: Results, *, title: str = "results") -> Grid:
    """Results as a person reads them, the published figure and the difference beside each measured one."""
    rows = results.rows
    labels = list(rows[0].labels) if rows else []
    columns = [Column(name, _label(name), figure=False) for name in labels] + [Column("runs", _repeats)]
    kinds_shown: dict[str, None] = {}
    for metric in results.metrics:
        columns.append(Column(_heading(metric, rows), partial(_measured, metric=metric)))
        cells = [row.cells[metric.name] for row in rows if metric.name in row.cells]
        for kind in published.NOTES:
            if any(kind in cell.published for cell in cells):
                columns.append(Column(f"{kind} (difference)", partial(_published, metric=metric, kind=kind)))
                kinds_shown[kind] = None
    compared = any(cell.interval is not None for row in rows for cell in row.cells.values())
    notes = [PAIRED] if compared else []
    notes += [published.NOTES[kind] for kind in kinds_shown] + [f"warning: {warning}" for warning in results.warnings]
    texts = [[column.show(row) for column in columns] for row in rows]
    return Grid(title, [column.heading for column in columns], texts, [column.figure for column in columns], notes)


def listing_of(runs: Sequence[Run]) -> Grid:
    """Runs that did not complete, and why."""
    rows = [[str(run.folder), run.status, str(run.epochs), str(run.lookup("error") or "")] for run in runs]
    return Grid("not completed", ["folder", "status", "epochs", "error"], rows, [False, False, True, False])


DISTRIBUTION = {
    "d": ("d", 1, 0),
    "JS uniform": ("js_uniform", 1, 3),
    "JS clipped normal": ("js_clipped_normal", 1, 3),
    "variance, uniform bins": ("uniform.measured", 1, 4),
    "variance, best bins": ("optimal.measured", 1, 4),
    "reduction [%]": ("optimal.reduction", 100, 1),
    "by its histogram [%]": ("empirical.reduction", 100, 1),
}


def distribution_of(results: Results) -> Grid | None:
    """How the maps of ``task=distribution`` are distributed, means over the repeats; None where there are none.

    Jensen-Shannon divergences in bits from uniform values and from the clipped normal of d elements; variance of
    rounding in units of the code squared, and by how much the bins that are best for the clipped normal reduce it.
    """
    lines = []
    for row in results.rows:
        maps: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in row.runs:
            for observed in run.lookup("distribution") or []:
                for one in observed:
                    maps.setdefault((one["layer"], one["op"]), []).append(one)
        for (layer, op), repeats in maps.items():
            figures = [
                f"{scale * statistics.fmean(value_at(one, path) for one in repeats):.{digits}f}"
                for path, scale, digits in DISTRIBUTION.values()
            ]
            lines.append([*map(str, row.labels.values()), layer, op, *figures])
    if not lines:
        return None
    header = [*results.rows[0].labels, "layer", "map of", *DISTRIBUTION]
    return Grid("distribution of activations", header, lines, [name in DISTRIBUTION for name in header])


PROCESSES = {
    "nodes": ("nodes", "{:,}"),
    "halo": ("halo", "{:,}"),
    "edges": ("edges", "{:,}"),
    "saved [MiB]": ("saved_mib", "{:.2f}"),
    "peak of a step [MiB]": ("step_peak_mib", "{:.1f}"),
    "data [MiB]": ("data_mib", "{:.1f}"),
    "sent [MiB]": ("sent_mib", "{:.1f}"),
    "waited [s]": ("waiting_seconds", "{:.1f}"),
}


def processes_of(results: Results) -> Grid | None:
    """What each process that shared a graph had and did, of the first run of each row; None where there are none."""
    lines = []
    for row in results.rows:
        ranks: list[dict[str, Any]] = next((found for run in row.runs if (found := run.lookup("parallel.ranks"))), [])
        for number, rank in enumerate(ranks):
            figures = ["" if rank[name] is None else form.format(rank[name]) for name, form in PROCESSES.values()]
            lines.append([*map(str, row.labels.values()), f"{number}", *figures])
    if not lines:
        return None
    header = [*results.rows[0].labels, "process", *PROCESSES]
    return Grid("processes", header, lines, [name in ("process", *PROCESSES) for name in header])


def _label(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.labels[name] is None else str(row.labels[name])


def _repeats(row: Row) -> str:
    return str(max((cell.repeats for cell in row.cells.values()), default=len(row.runs)))


def _measured(row: Row, *, metric: Metric) -> str:
    return show_cell(row.cells.get(metric.name), metric)


def _published(row: Row, *, metric: Metric, kind: str) -> str:
    cell = row.cells.get(metric.name)
    if cell is None or kind not in cell.published:
        return ""
    figure = cell.published[kind]
    return f"{figure:.{metric.digits}f} ({cell.value - figure:+.{metric.digits}f})"


def _heading(metric: Metric, rows: Sequence[Row]) -> str:
    names = {run.lookup("accuracy.metric") for row in rows for run in row.runs} - {None}
    score = names.pop().replace("_", "-") if len(names) == 1 else "score"
    return metric.title.replace("score", score)


def print_grid(console: Console, grid: Grid) -> None:
    """Prints a table on a terminal, or as plain text where there is none."""
    table = Table(title=unmarked(grid.title, style="table.title"), title_justify="left")
    for name, figure in zip(grid.header, grid.figures, strict=True):
        table.add_column(unmarked(name), justify="right" if figure else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*map(unmarked, row))
    console.print(table)
    for note in grid.notes:
        console.print(unmarked(note), soft_wrap=True)


def markdown(grid: Grid) -> str:
    """A table of GitHub-flavoured Markdown."""
    lines = [f"### {to_markdown(grid.title)}", "", _pipes(grid.header)]
    lines.append("|" + "|".join("---:" if figure else "---" for figure in grid.figures) + "|")
    lines += [_pipes(row) for row in grid.rows]
    return "\n".join(lines + [line for note in grid.notes for line in ("", to_markdown(note))]) + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(to_markdown, cells)) + " |"


def html_table(grid: Grid) -> str:
    """A section of an HTML page."""

    def line(cells: Sequence[str], tag: str) -> str:
        parts = [
            f'<{tag} class="figure">{to_html(cell)}</{tag}>' if figure else f"<{tag}>{to_html(cell)}</{tag}>"
            for cell, figure in zip(cells, grid.figures, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line(row, "td") for row in grid.rows)
    notes = "\n".join(f"<p>{to_html(note)}</p>" for note in grid.notes)
    head = f"<thead>{line(grid.header, 'th')}</thead>"
    table = f'<div class="wide">\n<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    return f"<h2>{to_html(grid.title)}</h2>\n{table}\n{notes}\n"


def flat_rows(results: Results) -> list[dict[str, Any]]:
    """Tidy rows for programs: configuration, figures unrounded, environment; all rows with the same columns."""
    rows = [_flat_row(row, results.metrics) for row in results.rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    # The environment goes last, whatever columns later rows brought.
    ordered = [name for name in columns if name not in ENVIRONMENT] + list(ENVIRONMENT)
    return [{name: row.get(name) for name in ordered} for row in rows]


def _flat_row(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    flat: dict[str, Any] = {"status": row.shared("status")}
    flat |= {name: row.shared(f"config.{name}") for name in CONFIG_COLUMNS}
    flat |= {name: value for name, value in row.labels.items() if name not in ("model", "dataset", "compression")}
    if row.shared("accuracy.metric") is not None:
        flat["metric"] = row.shared("accuracy.metric")
    for metric in metrics:
        flat |= _flat_cell(metric.name, row.cells.get(metric.name))
    return flat | {name: row.shared(f"environment.{name}") for name in ENVIRONMENT}


def _flat_cell(name: str, cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {}
    if cell.p20 is not None:
        return {f"{name}_median": cell.value, f"{name}_p20": cell.p20, f"{name}_p80": cell.p80}
    if cell.interval is not None:
        return {f"{name}_mean": cell.value, f"{name}_interval": cell.interval, f"{name}_repeats": cell.repeats}
    if cell.std is not None:
        return {f"{name}_mean": cell.value, f"{name}_std": cell.std, f"{name}_repeats": cell.repeats}
    flat: dict[str, Any] = {name: cell.value}
    for kind, figure in cell.published.items():
        flat |= {f"{name}_{kind}": figure, f"{name}_{kind}_difference": cell.value - figure}
    return flat


def to_csv(results: Results) -> str:
    """Comma-separated values, nulls empty; no text of a run is a formula of a spreadsheet."""
    rows = flat_rows(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(to_cell, rows[0] if rows else ()))
    writer.writerows(map(to_cell, row.values()) for row in rows)
    return text.getvalue()


def write_parquet(results: Results, path: Path) -> None:
    """Writes the rows of :func:`to_csv` as a Parquet file.

    Raises:
        UserError: if pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError("--format=parquet: needs pyarrow; pip install 'iexact-runner[parquet]'") from error
    rows = flat_rows(results)
    for name in rows[0] if rows else ():
        # A column has one type: where one row joins values that differ, all rows hold text.
        types = {type(row[name]) for row in rows} - {type(None)}
        if types == {int, float}:
            rows = [row | {name: None if row[name] is None else float(row[name])} for row in rows]
        elif len(types) > 1 or types & {dict, list}:
            rows = [row | {name: None if row[name] is None else str(row[name])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
