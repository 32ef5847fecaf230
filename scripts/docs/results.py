"""Writes the tables of results in README.md and docs/results.md from the rows under benchmarks/.

python scripts/docs/results.py            # writes them
python scripts/docs/results.py --check    # says which are not those of the rows, and then ends with 1

In a page, a table stands below a comment with its name, ``<!-- rows: amazon -->``, and ends at an empty line.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from iexact_runner.runs.labels import preset_of

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "results.md")
# Of the options that the guide to alternatives lists in full.
README_OPTIONS = ("none", "recompute", "iexact", "int4", "actnn", "lowrank", "lowrank_fine")
STEPS = {
    "none": "`none`",
    "exact": "`exact`",
    "iexact": "`iexact`",
    "iexact, one map, no dropout mask": "`iexact`, `share_maps`, no stored dropout masks",
    "lowrank_v1": "`lowrank_v1`",
    "lowrank": "`lowrank`",
    "lowrank_small": "`lowrank_small`",
    "lowrank_fine": "`lowrank_fine`",
}
MODELS = {"sage": "SAGE", "gcn": "GCN", "gat": "GAT", "gcn2": "GCN2"}
EPOCHS = (5, 30, 100)


def main() -> None:
    """Writes or checks every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    other = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            other += 1
            print(f"{page.relative_to(REPOSITORY)}: {'not the rows' if arguments.check else 'written'}")
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    sys.exit(1 if arguments.check and other else 0)


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return re.sub(
        r"(<!-- rows: (\w+) -->\n)((?:\|.*\n)*)", lambda found: f"{found[1]}{TABLES[found[2]]()}", text, flags=re.M
    )


def rows_of(name: str) -> pd.DataFrame:
    """The committed rows of a file."""
    return pd.read_csv(REPOSITORY / "benchmarks" / f"{name}.csv")


def preset_name(row: dict[str, Any]) -> str:
    """The preset of a row of a run, as code."""
    plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
    fields = {
        name.removeprefix("compression."): value for name, value in plain.items() if name.startswith("compression.")
    }
    return f"`{preset_of(fields)}`"


def accuracy(name: str) -> str:
    """Score, kept memory and speed by preset."""
    lines = []
    for row in rows_of(name).to_dict("records"):
        score = f"{100 * row['test_mean']:.2f}"
        spread = f" ± {100 * row['test_std']:.2f}" if row["test_repeats"] > 1 else ""
        speed = "{:.2f} ({:.2f} - {:.2f})".format(
            *(row[f"epochs_per_second_{part}"] for part in ("median", "p20", "p80"))
        )
        lines.append([preset_name(row), score + spread, f"{row['saved_mib']:.2f}", speed])
    return table(["`compression=`", "test accuracy [%]", "saved [MiB]", "epochs/s (p20 - p80)"], lines)


def gradients() -> str:
    """Errors of gradients by preset."""
    lines = []
    for row in rows_of("fidelity_amazon_computers_cpu").to_dict("records"):
        last = {name: row[f"fidelity.after.100.{name}_mean"] for name in ("cosine", "bias", "bias_standard_error")}
        errors = [f"{row[f'fidelity.after.{epoch}.relative_error_mean']:.2f}" for epoch in EPOCHS]
        bias = f"{last['bias']:.2f} ({last['bias_standard_error']:.2f})"
        lines.append([preset_name(row), f"{row['saved_mib']:.2f}", *errors, f"{last['cosine']:.2f}", bias])
    header = ["error after 5", "after 30", "after 100 epochs", "cosine after 100", "bias (standard error) after 100"]
    return table(["`compression=`", "saved [MiB]", *header], lines)


def block_sizes() -> str:
    """Kept memory by ``col_size`` against the formula."""
    rows = rows_of("synthetic_arxiv_memory_cpu")
    fp32 = rows[rows["compression.scheme"] == "none"].iloc[0]
    rest = rows[rows["compression.scheme"] != "none"].sort_values("compression.col_size")
    names = [f"{size} (EXACT)" if size == 0 else f"{size}" for size in rest["compression.col_size"]]
    formula, kept = (rest[name].map("{:.2f}".format) for name in ("saved_mib_formula", "saved_mib"))
    return table(
        ["`col_size`", "FP32", *names], [["formula", "", *formula], ["`saved_mib`", f"{fp32.saved_mib:.2f}", *kept]]
    )


def steps(name: str, cell: Callable[[Any], str], *, plain: bool = False) -> str:
    """A cell by model and preset of rows of ``bench_epoch.py``; ``plain``: with the peak of plain PyG before."""
    rows = rows_of(name)
    shown = [preset for preset in STEPS if preset in set(rows["preset"])]
    lines = []
    for (dataset, model), found in rows.groupby(["dataset", "model"], sort=False):
        by_preset = {row.preset: row for row in found.itertuples()}
        first = [f"{MODELS[model]}, `{dataset}`"] + ([f"{peak(by_preset['baseline']):.2f}"] if plain else [])
        lines.append([*first, *(cell(by_preset[preset]) for preset in shown)])
    return table(["model", *(["PyG FP32 [MiB]"] if plain else []), *(STEPS[preset] for preset in shown)], lines)


def ratio(row: Any) -> str:
    """Time of a step as a share of plain PyG's."""
    return "{} ({} - {})".format(*map(short, (row.ratio_median, row.ratio_p20, row.ratio_p80)))


def peak(row: Any) -> float:
    """The larger of the peaks of a step and of an evaluation."""
    return max(row.peak_mib, row.evaluation_peak_mib)


def size(row: Any) -> str:
    """The larger peak, and its share of plain PyG's."""
    return f"{peak(row):.2f} ({short(row.peak_ratio)})"


def alternatives() -> str:
    """Some of the options of the guide to alternatives."""
    rows = rows_of("alternatives_amazon_computers_cpu").set_index("option")
    lines = []
    for name in README_OPTIONS:
        row = rows.loc[name]
        figures = [f"{row[f'{part}_mib']:.1f}" for part in ("step_peak", "evaluation_peak")]
        score = f"{100 * row['test_mean']:.2f} ± {100 * row['test_std']:.2f}"
        error = f"{row['fidelity.after.30.relative_error_mean']:.3f}"
        seconds = f"{1 / row['epochs_per_second_median']:.2f}"
        lines.append([f"`{name}`", score, error, f"{row['saved_mib']:.2f}", *figures, seconds])
    peaks = ["saved [MiB]", "peak of a step [MiB]", "peak of an evaluation [MiB]", "seconds an epoch"]
    return table(["option", "test accuracy [%]", "gradient error", *peaks], lines)


def short(figure: float) -> str:
    """A ratio of two decimals, without the zero before them."""
    return f"{figure:.2f}".removeprefix("0")


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, its figures to the right."""
    head = list(header)
    ruled = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line).replace("|  |", "| |") + " |\n" for line in (head, ruled, *lines))


TABLES: dict[str, Callable[[], str]] = {
    "alternatives": alternatives,
    "amazon": lambda: accuracy("amazon_computers_cpu"),
    "physics": lambda: accuracy("coauthor_physics_cpu"),
    "gradients": gradients,
    "block_sizes": block_sizes,
    "step_time": lambda: steps("epoch_cpu", ratio),
    "step_peak": lambda: steps("epoch_cpu", size, plain=True),
    "cached": lambda: steps("epoch_cached_cpu", lambda row: f"{ratio(row)}, {size(row)}"),
}

if __name__ == "__main__":
    main()
