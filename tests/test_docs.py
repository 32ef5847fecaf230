"""The figures of ``docs/`` are those of the library and of the committed rows."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest

from conftest import REPOSITORY
from iexact_runner.config import BinsConfig
from iexact_runner.tasks.bins import best_bins

BINS = (REPOSITORY / "docs" / "bins.md").read_text()


def test_table_of_block_sizes_is_that_of_the_search():
    two, four, eight = (best_bins(BinsConfig(bits=bits)).set_index("d") for bits in (2, 4, 8))
    for d in (16, 64, 128, 256, 1024, 2048):
        row = two.loc[d]
        reductions = " | ".join(f"{100 * table.loc[d, 'reduction']:.1f} %" for table in (two, four, eight))
        figures = f"{row['levels'][1]:.4f} | {row['variance']:.5f} | {row['uniform_variance']:.5f}"
        assert f"| {d} | {figures} | {reductions} |" in BINS


@pytest.mark.parametrize("dataset", ["amazon_computers", "coauthor_physics"])
def test_measured_variances_stand_in_the_committed_rows(dataset):
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    rows = rows[(rows["dataset"] == dataset) & (rows["bits"] == 2) & (rows["setting"] != "exact")].copy()
    rows.loc[rows["layer"].str.startswith("blocks.0.conv"), "map"] += ", layer 1"
    for (setting, kind), group in rows.groupby(["setting", "map"]):
        mean = group.mean(numeric_only=True)
        figures = " | ".join(
            (
                f"{mean.js_uniform:.3f} | {mean.js_clipped_normal:.3f}",
                f"{mean.uniform_predicted:.3f} / {mean.uniform_measured:.3f}",
                f"{mean.optimal_predicted:.3f} / {mean.optimal_measured:.3f}",
                f"{100 * mean.optimal_reduction:.1f} % | {100 * mean.empirical_reduction:.1f} %",
            )
        )
        assert f"| {setting} | {kind} | {figures} |" in BINS


def test_reductions_at_more_bits_stand_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    for setting, bits in itertools.product(("iexact", "exact", "not projected"), (2, 4, 8)):
        hidden = rows[(rows["setting"] == setting) & (rows["bits"] == bits) & (rows["dataset"] != "digits")]
        low, high = (100 * figure for figure in hidden["optimal_reduction"].agg(["min", "max"]))
        assert f"| {setting} | {bits} | {low:.1f} % to {high:.1f} % |" in BINS


def test_readme_states_the_reduction_of_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "activation_distribution.csv")
    chosen = rows[(rows["setting"] == "iexact") & (rows["bits"] == 2) & (rows["dataset"] == "amazon_computers")]
    low, high = (100 * figure for figure in chosen["optimal_reduction"].agg(["min", "max"]))
    assert f"by {low:.0f} to {high:.0f} %" in (REPOSITORY / "README.md").read_text()
