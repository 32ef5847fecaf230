"""The fields and figures that README and results name are those of the schema and of the committed rows."""

from __future__ import annotations

import re

import pandas as pd

from conftest import REPOSITORY
from iexact_runner.cli import compose_config

TEXT = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "docs" / "results.md").read_text()


def test_every_field_that_is_named_exists():
    config = compose_config("model=gat", "compression=none")
    for group, field in set(
        re.findall(r"`(compression|training|model|dataset|measure|fidelity)\.(\w+)", TEXT + RESULTS)
    ):
        assert hasattr(getattr(config, group), field), f"{group}.{field}"


def test_it_is_short_and_its_table_is_that_of_the_guide():
    assert len(TEXT.splitlines()) <= 150
    guide = (REPOSITORY / "docs" / "guides" / "alternatives.md").read_text().splitlines()
    table = [line for line in TEXT.partition("## Results")[2].splitlines() if line.startswith("| ")]
    assert len(table) > 5 and set(table) <= set(guide)


def test_figures_stand_in_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "amazon_computers_cpu.csv")
    for _, row in rows.iterrows():
        shown = f"{100 * row.test_mean:.2f} ± {100 * row.test_std:.2f} | {row.saved_mib:.2f} |"
        assert shown in RESULTS
    for _, row in pd.read_csv(REPOSITORY / "benchmarks" / "coauthor_physics_cpu.csv").iterrows():
        assert f"| {100 * row.test_mean:.2f} | {row.saved_mib:.2f} | {row.epochs_per_second_median:.2f} (" in RESULTS
    for _, row in pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_amazon_computers_cpu.csv").iterrows():
        errors = [row[f"fidelity.after.{epoch}.relative_error_mean"] for epoch in (5, 30, 100)]
        last = {name: row[f"fidelity.after.100.{name}_mean"] for name in ("cosine", "bias", "bias_standard_error")}
        figures = [row.saved_mib, *errors, last["cosine"]]
        shown = " | ".join(f"{figure:.2f}" for figure in figures)
        assert f"| {shown} | {last['bias']:.2f} ({last['bias_standard_error']:.2f}) |" in RESULTS
    paired = pd.read_csv(REPOSITORY / "benchmarks" / "paired_accuracy_cpu.csv").set_index("dataset.name")
    paired = paired.loc["amazon_computers"].dropna(subset=["test_difference_mean"]).sort_values("compression.map_bits")
    new, old = (
        "{:.2f} ± {:.2f}".format(*(100 * row[f"test_difference_{figure}"] for figure in ("mean", "interval")))
        for row in paired.to_dict("records")
    )
    assert f"`lowrank` and FP32 differ by {new} points" in RESULTS
    assert f"`lowrank_v1` and FP32 by {old};" in " ".join(RESULTS.split())
    kept = pd.read_csv(REPOSITORY / "benchmarks" / "synthetic_arxiv_memory_cpu.csv")
    assert all(f" {value:.2f} " in RESULTS for value in kept["saved_mib"])
    epochs = pd.read_csv(REPOSITORY / "benchmarks" / "epoch_cpu.csv")
    for _, row in epochs[epochs["preset"] != "baseline"].iterrows():
        shown = "{} ({} - {})".format(*map(_short, (row.ratio_median, row.ratio_p20, row.ratio_p80)))
        assert shown in RESULTS, shown
        peak = max(row.peak_mib, row.evaluation_peak_mib)
        assert f" {peak:.2f} ({_short(row.peak_ratio)}) |" in RESULTS
    cached = pd.read_csv(REPOSITORY / "benchmarks" / "epoch_cached_cpu.csv")
    for _, row in cached[cached["preset"] != "baseline"].iterrows():
        shown = "{} ({} - {})".format(*map(_short, (row.ratio_median, row.ratio_p20, row.ratio_p80)))
        assert f"{shown}, {max(row.peak_mib, row.evaluation_peak_mib):.2f} ({_short(row.peak_ratio)})" in RESULTS
    kernels = pd.read_csv(REPOSITORY / "benchmarks" / "kernels_cpu.csv").set_index("kernel")["milliseconds_median"]
    there_and_back = kernels["quantize int2/1024"] + kernels["dequantize int2/1024"]
    for target in ("existing", "fresh"):
        assert f" {there_and_back / 2 / kernels[f'copy to {target}']:.2f} times as long" in RESULTS


def test_first_minutes_are_those_of_the_committed_rows():
    rows = pd.read_csv(REPOSITORY / "benchmarks" / "first_minutes_cpu.csv").set_index("journey")
    assert (rows["exit_status"] == rows["expected"]).all()
    seconds = rows["seconds"]
    shown = f"{seconds['clone to first result']:.0f} seconds and {seconds['to green tests'] / 60:.0f} minutes"
    assert f"On two cores they take {shown}" in " ".join(TEXT.split())
    assert seconds["iexact --help again"] < 3


def _short(ratio):
    return f"{ratio:.2f}".removeprefix("0")
