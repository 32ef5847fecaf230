"""``task=distribution``: maps of trained models, and what is recorded of them."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from conftest import tiny_dataset
from iexact_runner.analysis import observed
from iexact_runner.cli import compose_config
from iexact_runner.compression.bins import ClippedNormal, cell_masses
from iexact_runner.errors import ConfigError
from iexact_runner.experiment import Experiment
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.runs.records import RunFolder

QUICK = ("task=distribution", "training.epochs=3", "model.hidden_channels=64", "model.num_layers=2")


def test_histogram_is_that_of_the_map_in_units_of_its_blocks():
    blocks = torch.randn(4000, 16).clamp(-1, 1)
    masses = observed._histogram(3 + 5 * blocks, 16, bits=2)
    assert sum(masses) == pytest.approx(1.0) and len(masses) == observed.CELLS
    assert masses[0] > 5 * masses[1] and masses[-1] > 5 * masses[-2]  # clipped at both ends
    normal = observed._histogram(torch.randn(40_000, 32), 32, bits=2)
    expected = cell_masses(ClippedNormal(32), cells=observed.CELLS)
    assert sum(abs(a - b) for a, b in zip(normal, expected, strict=True)) < 0.2
    even = observed._histogram(torch.rand(2000, 256), 256, bits=2)
    assert max(even[1:-1]) < 1.3 / observed.CELLS


def test_every_quantized_map_is_observed_and_the_model_left_alone():
    config = compose_config(*QUICK, "compression=exact")
    problem = prepare(tiny_dataset(), config.model, inductive=False, device=torch.device("cpu"))
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = observed.observe(model, problem, bits=2, seed=1)
    assert [(one["layer"], one["op"]) for one in found] == [
        ("blocks.0.conv.lin_l", "Linear"),
        ("blocks.0.conv.lin_r", "Linear"),
        ("blocks.0.norm", "BatchNorm"),
        ("head.lin_l", "Linear"),
        ("head.lin_r", "Linear"),
    ]
    assert [one["projected"] for one in found] == [True, True, False, True, True]
    for one in found:
        assert 0 <= one["js_clipped_normal"] <= 1 and sum(one["observed"]) == pytest.approx(1.0)
        assert len(one["observed"]) == len(one["clipped_normal"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_record_of_the_task(tmp_path):
    config = compose_config(*QUICK, "compression=iexact", "runs=2")
    Experiment(config, RunFolder(tmp_path), Console(file=io.StringIO())).run("a: b\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed" and len(summary["accuracy"]["test"]["values"]) == 2
    first, second = summary["distribution"]
    assert [one["layer"] for one in first] == [one["layer"] for one in second] and first != second


@pytest.mark.parametrize("overrides", [("compression=none",), ("compression.bits=null",)])
def test_maps_that_are_not_quantized_are_refused(overrides):
    with pytest.raises(ConfigError, match="compression.bits=null: task=distribution needs maps that are quantized"):
        compose_config("task=distribution", *overrides)
