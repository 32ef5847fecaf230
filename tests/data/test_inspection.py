"""Facts about a graph, counted by hand, and the task that shows them."""

from __future__ import annotations

import json

import pytest
import torch

from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.inspection import inspect_dataset
from iexact_runner.report.reading import read_report


def small(y, *, classes):
    x = torch.tensor([[1.0, 0.0, 5.0], [1.0, 2.0, 5.0], [1.0, 0.0, 5.0], [1.0, 4.0, 5.0], [1.0, 1.0, 5.0]])
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 1, 3, 3]])
    train, val, test = torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4])
    return NodeDataset(x, y, edges, train, val, test, classes)


def test_facts_of_a_small_graph():
    found = inspect_dataset(small(torch.tensor([0, 0, 1, 1, -1]), classes=2))
    assert found == {
        "nodes": 5,
        "edges": 5,
        "self_loops": 1,
        "reciprocal": 0.5,
        "isolated": 1,
        "degree": {"0": 0, "25": 0, "50": 1, "75": 2, "90": 2, "99": 2, "100": 2},
        "features": 3,
        "feature_zeros": pytest.approx(2 / 15),
        "constant_features": 2,
        "labels_a_node": "one",
        "classes": 2,
        "largest_class": 2,
        "smallest_class": 2,
        "unlabelled": 1,
        "homophily": 0.5,
        "train": 2,
        "val": 1,
        "test": 2,
    }


def test_facts_of_several_labels_a_node():
    found = inspect_dataset(small(torch.tensor([[1.0, 0], [1, 1], [0, 0], [1, 0], [0, 1]]), classes=2))
    assert (found["labels_a_node"], found["homophily"]) == ("several", None)
    assert (found["largest_class"], found["smallest_class"], found["unlabelled"]) == (3, 2, 0)


def test_homophily_and_degree_of_a_block_model_are_those_it_was_made_with():
    overrides = ("dataset=synthetic", "dataset.num_nodes=3000", "dataset.homophily=0.6", "dataset.average_degree=12")
    found = inspect_dataset(load_dataset(compose_config(*overrides).dataset))
    assert found["homophily"] == pytest.approx(0.6, abs=0.05) and found["reciprocal"] == 1.0
    assert found["edges"] / found["nodes"] == pytest.approx(12, rel=0.05)


def test_the_task_shows_the_tables_and_trains_nothing(tmp_path):
    from test_cli import iexact

    result = iexact("task=inspect", "dataset=digits", "model=gcn", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1,797" in result.stdout and "lowrank_small" in result.stdout and "fits" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    presets = summary["inspection"]["presets"]
    assert summary["status"] == "completed" and summary["memory"] is None and summary["accuracy"] is None
    assert presets["none"]["saved_mib"] > presets["int4"]["saved_mib"] > presets["lowrank"]["saved_mib"] > 0
    assert all(row["fits"] for row in presets.values())
    report = read_report([tmp_path / "run"])
    assert not report.results.rows and not report.damaged
