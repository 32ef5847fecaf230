"""Advice before training: memory that holds at full size, samples that are what they say, and the option to take."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

from iexact_runner.analysis import forecast
from iexact_runner.analysis.forecast import Forecast, forecasts, part_of, recommended, smaller
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.data.graph import edge_count
from iexact_runner.errors import ConfigError
from iexact_runner.experiment import Experiment
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.runs.records import RunFolder
from iexact_runner.training import forward

CPU = torch.device("cpu")


def posed(*overrides):
    config = compose_config(*overrides)
    return config, prepare(load_dataset(config.dataset), config.model, inductive=config.dataset.inductive, device=CPU)


def few(monkeypatch, *names):
    """These options alone, quickly."""
    monkeypatch.setattr(forecast, "OPTIONS", {name: forecast.OPTIONS[name] for name in names})
    for name, value in (("TIMED_STEPS", 1), ("EPOCHS", 1), ("DRAWS", 2)):
        monkeypatch.setattr(forecast, name, value)


def test_memory_of_a_small_graph_is_that_of_its_step(monkeypatch):
    few(monkeypatch, "none", "recompute", "lowrank")
    config, problem = posed("dataset=digits", "model=gcn", "model.hidden_channels=32")
    rows = forecasts(problem, config, device=CPU, nodes=8192, available_mib=50.0, seed=1)
    assert [row.name for row in rows] == ["none", "recompute", "lowrank"] and rows[0].time == 1.0
    assert [row.error for row in rows[:2]] == [0.0, 0.0] and 0 < rows[2].error < 2
    for row in rows:
        measured = forecast._peaks(problem, forecast._chosen(config, row.name), device=CPU, seed=1)
        assert row.step_peak_mib == pytest.approx(measured.step, rel=0.01)
        assert row.total_mib > row.step_peak_mib > row.saved_mib > 0 and row.fits is True
    assert rows[2].saved_mib < rows[1].saved_mib < rows[0].saved_mib


@pytest.mark.parametrize(("inductive", "products"), [("false", 1), ("true", 2)])
def test_the_total_has_the_product_of_graph_and_features_where_training_keeps_it(inductive, products, monkeypatch):
    few(monkeypatch, "none", "lowrank")
    config, problem = posed("dataset=digits", "model=sage", f"dataset.inductive={inductive}")
    totals = {}
    for available in (3.0, 800.0):  # a tenth of what the data leave of it holds the product, or does not
        rows = forecasts(problem, config, device=CPU, nodes=8192, available_mib=available, seed=1)
        totals[available] = [row.total_mib - max(row.step_peak_mib, row.evaluation_peak_mib) for row in rows]
    assert totals[3.0][0] == pytest.approx(totals[800.0][0])
    added = products * problem.whole.x.nbytes / 2**20
    assert added > 0.1 and totals[800.0][1] - totals[3.0][1] == pytest.approx(added)


@pytest.mark.parametrize("model", ["sage", "gcn", "gcn2"])
def test_memory_of_a_large_graph_is_right_within_a_tenth(model, monkeypatch):
    """From steps on two smaller graphs."""
    few(monkeypatch, "none", "recompute", "lowrank", "auto, 5%")
    sizes = ("dataset.num_nodes=60000", "dataset.average_degree=4", "model.num_layers=3", "model.hidden_channels=64")
    config, problem = posed("dataset=synthetic", f"model={model}", *sizes)
    assert forecast._sizes(problem, config, nodes=11000, size=60000) == [44000, 22000]
    rows = forecasts(problem, config, device=CPU, nodes=11000, available_mib=None, seed=1)
    for row in rows:
        measured = forecast._peaks(problem, forecast._chosen(config, row.name), device=CPU, seed=1)
        assert row.step_peak_mib == pytest.approx(measured.step, rel=0.1), row.name
        assert row.evaluation_peak_mib == pytest.approx(measured.evaluation, rel=0.1), row.name
        assert row.fits is None
        if measured.kept_share is not None:
            assert row.saved_mib == pytest.approx(measured.kept_share * rows[0].saved_mib, rel=0.1)
            assert 0.03 < row.saved_mib / rows[0].saved_mib < 0.05
            assert row.overrides == "compression=auto compression.budget=0.05" and 0 < row.error < rows[2].error


def test_graphs_that_peaks_are_measured_on_are_no_larger_than_memory_allows(monkeypatch):
    config, problem = posed("dataset=digits", "model=gat", "model.hidden_channels=64")
    assert forecast._sizes(problem, config, nodes=300, size=1797) == [1200, 600]
    assert forecast._sizes(problem, config, nodes=500, size=1797) == [1797]
    monkeypatch.setattr(forecast, "SAMPLED_MIB", 1)
    assert forecast._sizes(problem, config, nodes=300, size=1797) == [300, 150]


def test_a_smaller_graph_has_as_many_edges_a_node():
    config, problem = posed("dataset=synthetic", "model=gcn")
    whole = problem.training
    sample = smaller(problem, config, 500, seed=3).training
    assert sample.x.shape == (500, whole.x.size(1)) and sample.train.numel() == pytest.approx(
        500 * whole.train.numel() / whole.x.size(0), abs=1
    )
    density = edge_count(whole.graph) / whole.x.size(0)
    assert edge_count(sample.graph) / 500 == pytest.approx(density, rel=0.15)


def test_a_part_has_all_edges_between_its_nodes():
    config, problem = posed("dataset=digits", "model=graphconv")
    part = part_of(problem, config, 300, seed=3).training
    assert part.x.size(0) == 300
    place = {tuple(row.tolist()): number for number, row in enumerate(problem.training.x)}
    chosen = torch.tensor([place[tuple(row.tolist())] for row in part.x])
    sources, targets = forecast._edges(problem.training.graph)
    inside = torch.isin(sources, chosen) & torch.isin(targets, chosen) & (sources != targets)
    found = torch.stack([chosen[each] for each in forecast._edges(part.graph)])
    expected = torch.stack([sources[inside], targets[inside]])
    assert set(map(tuple, found.T.tolist())) == set(map(tuple, expected.T.tolist()))
    assert torch.equal(part.y, problem.training.y[chosen])


@pytest.mark.parametrize("model", ["sage", "gcn2", "gat"])
def test_samples_are_graphs_of_the_model(model):
    config, problem = posed("dataset=digits", f"model={model}", "model.hidden_channels=16")
    net = build_model(
        config.model, in_channels=problem.in_channels, out_channels=10, compression=config.compression
    ).train()
    for sample in (smaller(problem, config, 200, seed=1), part_of(problem, config, 200, seed=1)):
        assert forward(net, sample.training.x, sample.training.graph).shape == (200, 10)


def row(name, *, time, error, fits):
    return Forecast(name, f"compression={name}", 1.0, 0.0, 1.0, 1.0, 1.0, time, 1.0, error, fits)


def test_fp32_is_recommended_where_it_fits_and_else_the_least_time_with_its_error():
    options = [("recompute", 1.4, 0.0), ("lowrank", 1.1, 0.2), ("iexact", 0.9, 3.0)]
    rest = [row(name, time=time, error=error, fits=True) for name, time, error in options]
    assert recommended([row("none", time=1.0, error=0.0, fits=True), *rest]).name == "none"
    assert recommended([row("none", time=1.0, error=0.0, fits=False), *rest]).name == "lowrank"
    assert recommended([each._replace(fits=False) for each in rest]) is None
    assert recommended([row("none", time=1.0, error=0.0, fits=None)]).name == "none"


def test_the_task_ends_with_a_command_and_leaves_its_table(tmp_path, monkeypatch):
    few(monkeypatch, "none", "recompute", "int4", "lowrank")
    fields = ("dataset=digits", "model.hidden_channels=32", "task=advise")

    def told(*overrides):
        screen, folder = io.StringIO(), Path(tmp_path / str(len(list(tmp_path.iterdir()))))
        experiment = Experiment(compose_config(*fields, *overrides), RunFolder(folder), Console(file=screen, width=200))
        summary = experiment.run("the: config\n")
        assert summary["status"] == "completed" and summary["memory"] is None and summary["accuracy"] is None
        assert json.loads((folder / "summary.json").read_text())["advice"] == summary["advice"]
        return summary["advice"], screen.getvalue()

    advice, text = told("advise.memory=1GiB")
    assert advice["recommended"] == "none" and advice["available_mib"] == 1024.0 and not advice["sampled"]
    assert "recommended: iexact model=sage dataset=digits compression=none" in text
    need = {option["name"]: option["total_mib"] for option in advice["options"]}
    advice, text = told(f"advise.memory={(need['none'] + max(need['recompute'], need['lowrank'])) / 2:.2f}MiB")
    assert advice["recommended"] not in (None, "none") and f"compression={advice['recommended']}" in text
    root = f"dataset.root={tmp_path / 'some where'}"
    advice, text = told("advise.memory=1GiB", root, "sampler=cluster")
    line = next(line for line in text.splitlines() if line.startswith("recommended: "))
    words = ["iexact", "model=sage", "dataset=digits", root, "sampler=cluster", f"compression={advice['recommended']}"]
    assert shlex.split(line)[1:] == words
    advice, text = told("advise.memory=0.1MiB")
    assert advice["recommended"] is None and "no option fits; mini-batches need less: iexact" in text


def test_a_module_of_the_user_is_advised_without_what_it_cannot(monkeypatch):
    few(monkeypatch, "none", "recompute", "int8")
    config, problem = posed("dataset=digits", "model=module", "model.target=torch_geometric.nn:GraphSAGE")
    rows = forecasts(problem, config, device=CPU, nodes=8192, available_mib=None, seed=1)
    assert [each.name for each in rows] == ["none", "int8"]


@pytest.mark.parametrize("memory", ["24", "24GB", "much", "-1GiB"])
def test_memory_has_a_unit(memory):
    with pytest.raises(ConfigError, match="advise.memory=.*must be a number with MiB or GiB"):
        compose_config("task=advise", f"advise.memory={memory}")
