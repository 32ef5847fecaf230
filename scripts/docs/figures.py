"""Draws the figures of docs/guides/alternatives.md, time against peak, from the rows under benchmarks/.

python scripts/docs/figures.py [--folder docs/figures]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from iexact_runner.config.presets import preset
from iexact_runner.report.figures import to_svg
from iexact_runner.report.figures.looks import style
from iexact_runner.report.figures.tradeoffs import draw_cost
from iexact_runner.report.grouping import Row
from iexact_runner.runs.records import Run

REPOSITORY = Path(__file__).resolve().parents[2]
# Columns of a gradient error, with that of sampling first.
ERRORS = (
    "fidelity.after.30.both.relative_error_mean",
    "fidelity.after.30.relative_error_mean",
    "gradient_error_30_mean",
)


def main() -> None:
    """Writes a figure for each file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "docs" / "figures")
    arguments = parser.parse_args()
    for rows in sorted((REPOSITORY / "benchmarks").glob("alternatives_*.csv")):
        if "by_hand" not in rows.name:
            path = arguments.folder / f"{rows.stem.replace('alternatives', 'cost').rpartition('_')[0]}.svg"
            path.write_text(cost_figure(rows), encoding="utf-8")
            print(path)


def cost_figure(path: Path) -> str:
    """The figure of one file of rows."""
    rows = [shown(record) for record in pd.read_csv(path).to_dict("records")]
    with style():
        figure = draw_cost({f"{rows[0].labels['model']} on {rows[0].labels['dataset']}": rows})
    assert figure is not None
    return to_svg(figure)


def shown(record: dict[str, Any]) -> Row:
    """What a figure needs of a row: what it is, its peak, its time, its gradient error."""
    name, _, rest = record["option"].partition(", ")
    error = next((record[column] for column in ERRORS if not math.isnan(record.get(column, math.nan))), None)
    summary = {
        "config": {"compression": asdict(preset(name))},
        "memory": {"step_peak_mib": record["step_peak_mib"]},
        "throughput": {"epochs_per_second": {"median": record["epochs_per_second_median"]}},
        "fidelity": {"after": {} if error is None else {"30": {"relative_error": [error]}}},
    }
    labels = {"model": record["model.name"], "dataset": record["dataset.name"], "compression": name}
    labels["sampler"] = rest or "full batch"  # or a precision or a budget: no option has two of them
    return Row(labels, {}, [Run(Path(), "completed", summary, 0)])


if __name__ == "__main__":
    main()
