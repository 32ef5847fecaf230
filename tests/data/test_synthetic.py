"""Synthetic graphs: exact counts, and the statistics that the parameters promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from iexact_runner.config import DatasetConfig, DigitsConfig, SyntheticConfig
from iexact_runner.data import load_dataset
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.errors import ConfigError

KNOWN_LABELS = [1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
KNOWN_EDGES = [[0, 2, 2, 3, 4, 4, 5, 6, 6, 7], [4, 3, 7, 2, 0, 6, 6, 4, 5, 2]]
PRESETS = Path(__file__).resolve().parents[2] / "conf" / "dataset"


def generate(**fields: object) -> NodeDataset:
    return load_dataset(SyntheticConfig(name="synthetic", source="synthetic", **fields))  # type: ignore[arg-type]


def pairs(dataset: NodeDataset) -> set[tuple[int, int]]:
    return set(map(tuple, dataset.edge_index.T.tolist()))


@pytest.mark.parametrize("nodes", [10, 63, 100, 997])
@pytest.mark.parametrize("degree", [0.5, 2.0, 2.25])
def test_simple_symmetric_graph_of_exact_size(nodes: int, degree: float) -> None:
    dataset = generate(num_nodes=nodes, average_degree=degree, num_classes=2, homophily=0.5)
    edges = pairs(dataset)
    assert len(edges) == dataset.edge_index.size(1) == 2 * round(nodes * degree / 2)
    assert edges == {(target, source) for source, target in edges}
    assert all(source != target for source, target in edges)
    assert sorted(edges) == list(map(tuple, dataset.edge_index.T.tolist()))
    assert all(0 <= node < nodes for edge in edges for node in edge)
    assert dataset.edge_index.dtype == torch.int32
    assert set(dataset.y.tolist()) == {0, 1}


@pytest.mark.parametrize("homophily", [0.0, 0.3, 0.7, 1.0])
def test_homophily_is_the_share_of_edges_within_a_class(homophily: float) -> None:
    dataset = generate(homophily=homophily)
    source, target = dataset.edge_index.long()
    same = (dataset.y[source] == dataset.y[target]).float().mean()
    assert same == pytest.approx(homophily, abs=1e-4)


def test_classes_are_even_and_shuffled() -> None:
    labels = generate(num_classes=5).y
    counts = torch.bincount(labels).float()
    expected = len(labels) / 5
    # Four standard deviations of a binomial count.
    assert (counts - expected).abs().max() < 4 * math.sqrt(expected * 0.8)
    assert (labels[1:] == labels[:-1]).float().mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("exponent", [2.2, 3.0])
def test_degrees_follow_the_power_law(exponent: float) -> None:
    dataset = generate(num_nodes=50_000, average_degree=20.0, degree_exponent=exponent)
    degrees = torch.bincount(dataset.edge_index[0]).double()
    # Hill's estimator of the tail, between the bulk and the cut-off at the largest degrees.
    low, high = 40.0, 400.0
    tail = degrees[(degrees >= low) & (degrees < high)]
    share = len(tail) / int((degrees >= low).sum())
    assert share > 0.9
    estimate = 1 + 1 / torch.log(tail / (low - 0.5)).mean()
    assert float(estimate) == pytest.approx(exponent, abs=0.5)
    assert degrees.max() > 10 * degrees.mean()


def test_degrees_are_heavier_with_a_smaller_exponent() -> None:
    heavy, light = (
        torch.bincount(generate(degree_exponent=exponent).edge_index[0]).double() for exponent in (2.2, 4.0)
    )
    assert heavy.var() > 2 * light.var()


def test_features_are_informative_and_neighbours_add_to_them() -> None:
    dataset = generate(num_classes=10)
    source, target = dataset.edge_index.long()
    degree = torch.bincount(target, minlength=dataset.num_nodes).clamp(min=1)
    mean = torch.zeros_like(dataset.x).index_add_(0, target, dataset.x[source]) / degree.unsqueeze(1)

    def accuracy(x: torch.Tensor) -> float:
        """Of the nearest class mean of the training nodes."""
        centers = torch.stack([x[dataset.train][dataset.y[dataset.train] == c].mean(dim=0) for c in range(10)])
        guess = torch.cdist(x[dataset.test], centers).argmin(dim=1)
        return float((guess == dataset.y[dataset.test]).float().mean())

    own, both = accuracy(dataset.x), accuracy(torch.cat([dataset.x, mean], dim=1))
    assert 0.3 < own < 0.85
    assert own + 0.05 < both < 0.99


def test_same_seed_same_graph_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (generate(num_nodes=500, graph_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("x", "y", "edge_index", "train", "val", "test"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.edge_index, other.edge_index)
    assert not torch.equal(first.x, other.x)
    wider = generate(num_nodes=500, num_features=3)
    assert torch.equal(first.edge_index, wider.edge_index)


def test_known_values() -> None:
    """Guards against a silent change of the stream: published numbers would no longer be reproduced."""
    dataset = generate(num_nodes=10, average_degree=1.0, num_classes=2, num_features=2)
    assert dataset.y.tolist() == KNOWN_LABELS
    assert dataset.edge_index.tolist() == KNOWN_EDGES


def test_standardized_over_the_training_nodes() -> None:
    dataset = generate(num_nodes=200, standardize=True, standardize_over="train")
    rows = dataset.x[dataset.train]
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(dim=0), torch.ones(64))


def test_standardized_over_all_nodes_as_published() -> None:
    plain, dataset = generate(num_nodes=200), generate(num_nodes=200, standardize=True)
    torch.testing.assert_close(dataset.x, (plain.x - plain.x.mean(0)) / plain.x.std(0), atol=1e-5, rtol=1e-5)


def test_given_split_sizes() -> None:
    dataset = generate(num_nodes=100, average_degree=2.0, num_train=50, num_val=20, num_test=25)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [50, 20, 25]
    assert len(set(torch.cat([dataset.train, dataset.val, dataset.test]).tolist())) == 95


def test_more_edges_within_classes_than_pairs() -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.homophily=1\.0: asks for 250 edges within classes"):
        generate(num_nodes=100, average_degree=5.0, num_classes=50, homophily=1.0)


def test_edges_that_cannot_be_found_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iexact_runner.data.synthetic._MAX_ROUNDS", 1)
    with pytest.raises(ConfigError, match=r"^dataset\.average_degree=20\.0: found only"):
        generate(num_nodes=100, average_degree=20.0, num_classes=3)


@pytest.mark.parametrize(("name", "directed_edges"), [("arxiv", 2_315_598), ("flickr", 899_756)])
def test_presets_reach_the_published_sizes(name: str, directed_edges: int) -> None:
    yaml = pytest.importorskip("yaml")
    fields = yaml.safe_load((PRESETS / f"synthetic_{name}.yaml").read_text())
    del fields["defaults"]
    fields["num_features"] = 1
    dataset = load_dataset(SyntheticConfig(**fields))
    assert dataset.edge_index.size(1) == directed_edges
    sizes = [len(dataset.train), len(dataset.val), len(dataset.test)]
    assert sizes == [fields["num_train"], fields["num_val"], fields["num_test"]]
    assert sum(sizes) == dataset.num_nodes


def test_products_preset_asks_for_the_published_sizes() -> None:
    yaml = pytest.importorskip("yaml")
    fields = yaml.safe_load((PRESETS / "synthetic_products.yaml").read_text())
    assert 2 * round(fields["num_nodes"] * fields["average_degree"] / 2) == 123_718_280


def test_digits() -> None:
    config = DigitsConfig(name="digits", source="digits")
    dataset, again = load_dataset(config), load_dataset(config)
    edges = pairs(dataset)
    assert dataset.x.shape == (1_797, 64) and dataset.x.dtype == torch.float32
    assert 0 <= dataset.x.min() and dataset.x.max() == 1
    assert dataset.num_classes == 10
    assert edges == {(target, source) for source, target in edges}
    assert all(source != target for source, target in edges)
    assert torch.bincount(dataset.edge_index[0]).min() >= 10
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [1_078, 359, 360]
    assert torch.equal(dataset.edge_index, again.edge_index) and torch.equal(dataset.train, again.train)


def test_digits_as_near_as_each_other_are_chosen_by_their_number() -> None:
    """What is nearest may not depend on the number of threads, which differs between the processes of a graph."""
    dataset = load_dataset(DigitsConfig(name="digits", source="digits"))
    pixels = (16 * dataset.x).round().long()
    chosen, ties = [], 0
    for node, own in enumerate(pixels):
        distances = (pixels - own).square().sum(1)
        distances[node] = distances.max() + 1
        nearest, order = distances.sort(stable=True)
        chosen += [(node, other) for other in order[:10].tolist()]
        ties += int(nearest[9] == nearest[10])
    assert ties > 30 and pairs(dataset) == {*chosen, *((other, node) for node, other in chosen)}


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_source_without_its_fields(source: str) -> None:
    with pytest.raises(ConfigError, match=f"start from dataset={source}"):
        load_dataset(DatasetConfig(name="mine", source=source))
