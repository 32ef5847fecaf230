"""Compares rows that were measured again with the committed ones.

python scripts/bench/compare_rows.py benchmarks/epoch_cpu.csv again.csv

Rows belong together if all that was chosen is the same. Of each figure it is known how far it may be off: bytes kept
not at all, a median by the width between its percentiles but a tenth at least, a mean by three standard deviations of
one repeat, a paired difference by its interval, anything else by a twentieth. Times, which are those of a machine, are
not compared. Exits with 1 if a figure is off, or a row has no counterpart.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

ENVIRONMENT = {"status", "device_name", "device", "cpu_count", "torch_threads", "git_commit", "iexact_runner"}
ENVIRONMENT |= {"python", "numpy", "scipy", "torch", "torch_geometric", "triton", "cuda", "numba", "rounds", "repeats"}
# What depends on the machine alone, and what says how far another figure may be off.
NOT_COMPARED = re.compile(r"seconds|epochs_per_second|resident_mib|_(p20|p80|std|interval|repeats|standard_error)")
CHOSEN = re.compile(r"^(compression|model|dataset|training)\.|^(preset|setting|kernel|what|job)$")


def main() -> None:
    """Prints the figures that are off, and how many were compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("committed", type=Path)
    parser.add_argument("again", type=Path)
    arguments = parser.parse_args()
    committed, again = pd.read_csv(arguments.committed), pd.read_csv(arguments.again)
    figures = [name for name in committed.columns if is_figure(name, committed[name]) and name in again.columns]
    chosen = [
        name
        for name in committed.columns
        if name in again.columns
        and name not in {*figures, *ENVIRONMENT}
        and not NOT_COMPARED.search(name)
        and (CHOSEN.search(name) or not pd.api.types.is_float_dtype(committed[name]))
    ]
    known = {tuple(map(str, row)): index for index, row in enumerate(committed[chosen].itertuples(index=False))}
    off: list[tuple[str, str, str]] = []
    compared = 0
    for index, row in enumerate(again[chosen].itertuples(index=False)):
        name = ", ".join(str(value) for value in row if str(value) != "nan")
        if (old := known.get(tuple(map(str, row)))) is None:
            off.append((name, "the row", "is not committed"))
            continue
        for figure in figures:
            before, after = committed.iloc[old], again.iloc[index]
            allowed = tolerance(figure, before)
            if pd.isna(before[figure]) and pd.isna(after[figure]):
                continue
            compared += 1
            if not abs(after[figure] - before[figure]) <= allowed:
                off.append((name, figure, f"{before[figure]:.6g} ± {allowed:.3g}, now {after[figure]:.6g}"))
    show(off, Console())
    print(f"{compared} figures of {len(again)} rows compared, {len(off)} off")
    sys.exit(1 if off or not compared else 0)


def is_figure(name: str, values: pd.Series[Any]) -> bool:
    """Whether a column was measured, in a unit that another machine shares."""
    measured = pd.api.types.is_float_dtype(values) and not CHOSEN.search(name)
    return measured and name not in ENVIRONMENT and not NOT_COMPARED.search(name)


def tolerance(figure: str, row: pd.Series[Any]) -> float:
    """How far ``figure`` of a committed row may be off."""
    value, stem = abs(row[figure]), figure.rpartition("_")[0]
    if figure.endswith("_median") and f"{stem}_p20" in row:
        return max(row[f"{stem}_p80"] - row[f"{stem}_p20"], value / 10)
    if figure.endswith("_mean") and f"{stem}_interval" in row:
        return float(row[f"{stem}_interval"])
    if figure.endswith("_mean") and row.get(f"{stem}_repeats", 1) > 1:
        return float(3 * row[f"{stem}_std"])
    return value * 1e-9 if figure.endswith("_mib") else value / 20


def show(off: list[tuple[str, str, str]], console: Console) -> None:
    """Prints a line a figure that is off."""
    if off:
        table = Table("row", "figure", "committed, and now")
        for line in off:
            table.add_row(*line)
        console.print(table)


if __name__ == "__main__":
    main()
