"""Parts of a graph against definitions of them that look at every edge."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from iexact_runner.data.graph import edges_of
from iexact_runner.sampling.subgraph import Pattern, generator


def random_graph(nodes=60, edges=400, seed=0):
    random = np.random.default_rng(seed)
    pairs = np.unique(random.integers(nodes, size=(edges, 2)), axis=0)
    pairs = pairs[(pairs[:, 1] != 7)]  # no edge ends in node 7
    return torch.from_numpy(pairs.T.copy()), nodes


def pattern_and_edges(**sizes):
    edge_index, nodes = random_graph(**sizes)
    return Pattern(edges_of(edge_index, nodes)), set(map(tuple, edge_index.T.tolist()))


def global_edges(part):
    return list(map(tuple, part.nodes[part.edge_index].T.tolist()))


def test_induced_subgraph_holds_every_edge_between_its_nodes_once():
    pattern, edges = pattern_and_edges()
    nodes = np.array([0, 3, 7, 8, 20, 21, 22, 40, 59])
    part = pattern.induced(nodes)
    expected = {(source, target) for source, target in edges if {source, target} <= set(nodes.tolist())}
    assert sorted(global_edges(part)) == sorted(expected)
    assert expected
    for entry, (source, target) in zip(part.entries, global_edges(part), strict=True):
        assert pattern.columns[entry] == source
        assert pattern.offsets[target] <= entry < pattern.offsets[target + 1]


def test_whole_graph_is_the_subgraph_of_all_nodes():
    pattern, edges = pattern_and_edges()
    part = pattern.induced(np.arange(60))
    assert sorted(global_edges(part)) == sorted(edges)
    assert part.entries.tolist() == list(range(len(edges)))


def test_walks_go_against_edges_and_rest_where_none_ends():
    pattern, edges = pattern_and_edges()
    assert pattern.walked(np.array([7]), 5, generator(1)).tolist() == [7]
    for root in range(60):
        visited = set(pattern.walked(np.array([root]), 1, generator(root)).tolist()) - {root}
        assert all((source, root) in edges for source in visited)


def test_a_random_neighbor_is_uniform():
    pattern, edges = pattern_and_edges()
    neighbors = sorted(source for source, target in edges if target == 5)
    drawn = Counter(pattern.random_neighbors(np.full(20_000, 5), generator(3)).tolist())
    assert sorted(drawn) == neighbors
    assert stats.chisquare([drawn[node] for node in neighbors]).pvalue > 1e-3


def test_neighbors_are_drawn_without_replacement_and_uniformly():
    pattern, edges = pattern_and_edges()
    neighbors = sorted(source for source, target in edges if target == 5)
    assert len(neighbors) > 4
    drawn = Counter()
    draws = 6000
    for seed in range(draws):
        part = pattern.sampled(np.array([5]), [3], generator(seed))
        sources = [source for source, _ in global_edges(part)]
        assert len(sources) == len(set(sources)) == 3
        drawn.update(sources)
    expected = 3 * draws / len(neighbors)
    # Draws of three without replacement vary less than independent ones.
    assert stats.chisquare([drawn[node] for node in neighbors], [expected] * len(neighbors)).pvalue > 1e-3


def test_hops_reach_as_many_neighbors_as_they_say():
    pattern, edges = pattern_and_edges()
    seeds = np.array([30, 2, 7, 11])
    part = pattern.sampled(seeds, [2, 4], generator(5))
    assert part.nodes[part.seeds].tolist() == sorted(seeds.tolist())
    assert np.array_equal(part.nodes, np.unique(part.nodes))
    assert set(global_edges(part)) <= edges
    into = Counter(target for _, target in global_edges(part))
    degree = Counter(target for _, target in edges)
    first = set(seeds.tolist())
    second = {source for source, target in global_edges(part) if target in first} - first
    for node, count in into.items():
        assert node in first | second
        assert count == min(degree[node], 2 if node in first else 4)
    assert len(set(global_edges(part))) == len(global_edges(part))


def test_all_neighbors_of_enough_hops_are_the_whole_way_to_the_seeds():
    pattern, edges = pattern_and_edges()
    part = pattern.sampled(np.array([5, 9]), [-1, -1], generator(0))
    first = {source for source, target in edges if target in (5, 9)} | {5, 9}
    assert set(global_edges(part)) == {(source, target) for source, target in edges if target in first}


@pytest.mark.parametrize("method", ["induced", "sampled"])
def test_a_graph_without_edges_has_parts(method):
    pattern = Pattern(edges_of(torch.zeros(2, 0, dtype=torch.int64), 4))
    part = (
        pattern.induced(np.array([1, 2]))
        if method == "induced"
        else pattern.sampled(np.array([1, 2]), [3], generator(0))
    )
    assert part.nodes.tolist() == [1, 2]
    assert part.edge_index.shape == (2, 0)
    assert pattern.random_neighbors(np.array([0, 3]), generator(0)).tolist() == [0, 3]
