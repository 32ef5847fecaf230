from __future__ import annotations

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from conftest import assert_close, tiny_dataset
from iexact_runner.data.graph import (
    Adjacency,
    edge_list,
    gcn_adjacency,
    mean_adjacency,
    training_subgraph,
    with_self_loops,
)


def dense_mean(edge_index, nodes):
    dense = torch.zeros(nodes, nodes)
    dense[edge_index[1].long(), edge_index[0].long()] = 1.0
    return dense / dense.sum(1, keepdim=True).clamp(min=1)


def dense_gcn(edge_index, nodes):
    index, weight = gcn_norm(edge_index.long(), num_nodes=nodes)
    dense = torch.zeros(nodes, nodes)
    dense[index[1], index[0]] = weight
    return dense


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize(
    ("build", "dense"), [(mean_adjacency, dense_mean), (gcn_adjacency, dense_gcn)], ids=["mean", "gcn"]
)
def test_operator_and_adjoint_equal_the_dense_matrix(build, dense, symmetric):
    data = tiny_dataset(symmetric=symmetric)
    nodes = data.num_nodes
    adjacency, matrix = build(data.edge_index, nodes), dense(data.edge_index, nodes)
    assert_close(adjacency.matmul(data.x), matrix @ data.x)
    assert_close(adjacency.adjoint_matmul(data.x), matrix.T @ data.x)
    assert (adjacency.adjoint is adjacency.matrix) == symmetric
    assert adjacency.matrix.columns.dtype == torch.int32


def test_symmetric_operator_stays_held_once_when_it_moves(dataset):
    moved = mean_adjacency(dataset.edge_index, dataset.num_nodes).map(torch.clone)
    assert isinstance(moved, Adjacency) and moved.adjoint is moved.matrix


def test_isolated_node_gathers_nothing(dataset):
    last = dataset.num_nodes - 1
    adjacency = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    assert adjacency.matmul(dataset.x)[last].abs().sum() == 0


def test_every_node_gets_exactly_one_self_loop(dataset):
    loops = with_self_loops(dataset.edge_index, dataset.num_nodes)
    marked = loops[0][loops[0] == loops[1]]
    assert torch.equal(marked.sort().values, torch.arange(dataset.num_nodes, dtype=torch.int32))


def test_dropped_edges_leave_the_self_loops(dataset):
    edges = edge_list(dataset.edge_index, dataset.num_nodes)
    mask = torch.zeros(edges.target.numel(), dtype=torch.bool)
    mask[3] = True
    kept = edges.keep(mask)
    assert kept.target.numel() == dataset.num_nodes + 1
    assert torch.equal(kept.target[1:], torch.arange(dataset.num_nodes))
    assert not mask[-1]  # the caller's mask is left alone


def test_training_subgraph_is_the_induced_one(dataset):
    nodes = dataset.train
    edges = training_subgraph(dataset.edge_index, nodes, dataset.num_nodes)
    expected = {
        (int(s), int(t)) for s, t in dataset.edge_index.T.tolist() if s in nodes.tolist() and t in nodes.tolist()
    }
    assert {(int(nodes[s]), int(nodes[t])) for s, t in edges.T.tolist()} == expected
