"""The table of best levels: its figures, its files, and what happens without matplotlib or with a failure."""

from __future__ import annotations

import importlib.util
import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from iexact_runner.cli import compose_config
from iexact_runner.compression.bins import ClippedNormal, TruncatedNormal, expected_variance, optimal_levels
from iexact_runner.config import BinsConfig
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks import bins


def run(path, *overrides):
    screen = io.StringIO()
    config = compose_config("task=bins", *overrides)
    bins.run(config, RunFolder(path), Console(file=screen, width=160), "the: config\n")
    return pd.read_csv(path / "bins.csv"), json.loads((path / "summary.json").read_text()), screen.getvalue()


@pytest.mark.parametrize(("clipped", "family"), [(True, ClippedNormal), (False, TruncatedNormal)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rows_are_those_of_the_library(bits, clipped, family):
    table = bins.best_bins(BinsConfig(clipped=clipped, bits=bits))
    assert table["d"].tolist() == list(range(4, 2049))
    for d in (4, 100, 2048):
        row = table.set_index("d").loc[d]
        distribution = family(d)
        assert row["levels"] == pytest.approx(optimal_levels(bits, distribution=distribution), abs=1e-6)
        uniform = expected_variance(range(2**bits), distribution=distribution)
        assert row["variance"] == pytest.approx(expected_variance(list(row["levels"]), distribution=distribution))
        assert row["uniform_variance"] == pytest.approx(uniform)
        assert row["reduction"] == pytest.approx(1 - row["variance"] / uniform)
    assert (table["reduction"] > 0).all() if bits > 1 else (table["reduction"].abs() < 1e-12).all()


def test_grid_of_sigma_is_that_of_the_reference_and_scales_with_the_bits():
    narrow, wide = (bins.best_bins(BinsConfig(use_d_key=False, bits=bits)) for bits in (2, 4))
    assert len(narrow) == 4991 and narrow["d"].isna().all()
    assert narrow["sigma"].iloc[[0, 1, -1]].tolist() == pytest.approx([0.01, 0.011, 5.0])
    assert wide["sigma"].to_numpy() == pytest.approx(5 * narrow["sigma"].to_numpy())
    of_blocks = bins.best_bins(BinsConfig()).set_index("d")
    nearest = narrow.loc[(narrow["sigma"] - of_blocks.loc[128, "sigma"]).abs().idxmin()]
    assert nearest["levels"][1] == pytest.approx(of_blocks.loc[128, "levels"][1], abs=1e-3)


def test_what_is_written_and_shown(tmp_path):
    table, summary, screen = run(tmp_path, "bins.bits=4")
    assert table.columns.tolist() == ["d", "sigma", "levels", "variance", "uniform_variance", "reduction"]
    levels = np.array(table["levels"].iloc[-1].split(), dtype=float)
    assert levels == pytest.approx(optimal_levels(4, distribution=ClippedNormal(2048)), abs=1e-6)
    assert summary["status"] == "completed" and summary["bins"]["rows"] == 2045
    assert summary["config"]["bins"] == {"bits": 4, "clipped": True, "use_d_key": True}
    assert {"accuracy", "memory", "throughput", "environment", "schema_version"} <= set(summary)
    assert (tmp_path / "bins.png").read_bytes()[1:4] == b"PNG" and "<svg" in (tmp_path / "bins.svg").read_text()
    assert "best levels of 4 bits, clipped normal" in screen and " 2048 " in screen


def test_without_matplotlib_there_is_one_line_and_no_figure(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    _, summary, screen = run(tmp_path, "bins.use_d_key=false")
    assert summary["status"] == "completed" and not list(tmp_path.glob("bins.[ps]*g"))
    assert [line for line in screen.splitlines() if line.startswith("bins.png")] == [
        "bins.png, bins.svg: not drawn without matplotlib: pip install 'iexact-runner[figures]'"
    ]


@pytest.mark.parametrize(
    ("failure", "status", "error"),
    [(KeyboardInterrupt(), "interrupted", "interrupted by the user"), (OSError("full"), "failed", "OSError: full")],
    ids=["interrupt", "failure"],
)
def test_failure_is_recorded(tmp_path, monkeypatch, failure, status, error):
    def fails(*_):
        raise failure

    monkeypatch.setattr(bins, "show", fails)
    with pytest.raises(type(failure)):
        run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == (status, error)
