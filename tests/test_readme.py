"""The fields and figures that README and results name are those of the schema and of the committed rows."""

from __future__ import annotations

import re
import runpy

import pandas as pd
import pytest

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
    table = [line for line in TEXT.partition("## Results")[2].splitlines() if line.startswith("| `")]
    assert len(table) > 5 and set(table) <= set(guide)


@pytest.fixture
def results():
    """The script that writes the tables."""
    return runpy.run_path(str(REPOSITORY / "scripts" / "docs" / "results.py"))


def test_tables_are_those_of_the_committed_rows(results):
    text = TEXT + RESULTS
    assert results["filled"](TEXT) == TEXT and results["filled"](RESULTS) == RESULTS
    assert set(re.findall(r"<!-- rows: (\w+) -->\n\| ", text)) == set(results["TABLES"]) and "`None`" not in text


def test_a_table_that_is_not_of_the_rows_is_made_anew(results):
    changed = RESULTS.replace("| `iexact` | ", "| `iexact` | 9", 1)
    assert changed != RESULTS and results["filled"](changed) == RESULTS


def test_figures_in_words_stand_in_the_committed_rows():
    paired = pd.read_csv(REPOSITORY / "benchmarks" / "paired_accuracy_cpu.csv").set_index("dataset.name")
    paired = paired.loc["amazon_computers"].dropna(subset=["test_difference_mean"]).sort_values("compression.map_bits")
    new, old = (
        "{:.2f} ± {:.2f}".format(*(100 * row[f"test_difference_{figure}"] for figure in ("mean", "interval")))
        for row in paired.to_dict("records")
    )
    assert f"`lowrank` and FP32 differ by {new} points" in RESULTS
    assert f"`lowrank_v1` and FP32 by {old};" in " ".join(RESULTS.split())
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
