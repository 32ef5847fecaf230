"""The README's blocks work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conftest import REPOSITORY
from iexact_runner.cli import compose_config
from iexact_runner.report.command import make_parser

TEXT = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("iexact ") and "--help" not in line
]


def test_python_blocks_run(capsys):
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


REPORTS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if "iexact-report" in line]


@pytest.mark.parametrize("command", REPORTS)
def test_reports_are_asked_for_as_they_can_be(command):
    assert make_parser().parse_args(shlex.split(command, comments=True)[1:]).folders == [Path("outputs")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    words = shlex.split(command, comments=True)[1:]
    # A sweep's jobs take one choice each: the last will do.
    overrides = [re.sub(r"=.*,", "=", word) for word in words if word != "-m"]
    assert compose_config(*overrides).dataset.name


def test_every_field_that_is_named_exists():
    config = compose_config("model=gat", "compression=none")
    for group, field in set(re.findall(r"`(compression|training|model|dataset|measure|fidelity)\.(\w+)", TEXT)):
        assert hasattr(getattr(config, group), field), f"{group}.{field}"


def test_figures_stand_in_the_committed_rows():
    import pandas as pd

    rows = pd.read_csv(REPOSITORY / "benchmarks" / "amazon_computers_cpu.csv")
    for _, row in rows.iterrows():
        shown = f"{100 * row.test_mean:.2f} +- {100 * row.test_std:.2f} | {row.saved_mib:.2f} |"
        assert shown in TEXT
    for _, row in pd.read_csv(REPOSITORY / "benchmarks" / "coauthor_physics_cpu.csv").iterrows():
        assert f"| {100 * row.test_mean:.2f} | {row.saved_mib:.2f} | {row.epochs_per_second_median:.2f} (" in TEXT
    for _, row in pd.read_csv(REPOSITORY / "benchmarks" / "fidelity_amazon_computers_cpu.csv").iterrows():
        errors = [row[f"fidelity.after.{epoch}.relative_error_mean"] for epoch in (5, 30, 100)]
        last = {name: row[f"fidelity.after.100.{name}_mean"] for name in ("cosine", "bias", "bias_standard_error")}
        figures = [row.saved_mib, *errors, last["cosine"]]
        shown = " | ".join(f"{figure:.2f}" for figure in figures)
        assert f"| {shown} | {last['bias']:.2f} ({last['bias_standard_error']:.2f}) |" in TEXT
    kept = pd.read_csv(REPOSITORY / "benchmarks" / "synthetic_arxiv_memory_cpu.csv")
    assert all(f" {value:.2f} " in TEXT for value in kept["saved_mib"])
    epochs = pd.read_csv(REPOSITORY / "benchmarks" / "epoch_cpu.csv")
    for _, row in epochs[epochs["preset"] != "baseline"].iterrows():
        figures = (row.ratio_median, row.ratio_p20, row.ratio_p80)
        shown = "{} ({} - {})".format(*(f"{figure:.2f}".removeprefix("0") for figure in figures))
        assert shown in TEXT, shown
