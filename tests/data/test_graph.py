from __future__ import annotations

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from conftest import assert_close, tiny_dataset
from iexact_runner.data.graph import (
    Adjacency,
    attention_edges,
    edges_of,
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


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
def test_weighted_products_equal_the_dense_matrix(symmetric):
    data = tiny_dataset(symmetric=symmetric)
    edges = edges_of(data.edge_index, data.num_nodes)
    weight = torch.randn(edges.columns.numel())
    dense = torch.zeros(data.num_nodes, data.num_nodes)
    dense[edges.rows(), edges.columns.long()] = weight
    assert_close(edges.with_values(weight).matmul(data.x), dense @ data.x)
    transpose, order = edges.with_values(weight).transposed()
    assert torch.equal(transpose.values, weight[order])
    assert_close(transpose.matmul(data.x), dense.T @ data.x)
    assert_close(transpose.reduce_rows(weight[order, None], "sum"), dense.sum(0)[:, None])
    assert_close(edges.reduce_rows(weight[:, None], "sum"), dense.sum(1)[:, None])
    products = (data.x @ data.x.flip(1).T)[edges.rows(), edges.columns.long()]
    assert_close(edges.sampled_matmul(data.x, data.x.flip(1)), products)
    assert edges.columns.dtype == transpose.columns.dtype == transpose.offsets.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_types_are_computed_in_float32_on_a_cpu(dataset, dtype):
    adjacency, x = gcn_adjacency(dataset.edge_index, dataset.num_nodes), dataset.x.to(dtype)
    product = adjacency.matrix.matmul(x, column_scale=adjacency.column_scale)
    expected = adjacency.matrix.matmul(x.float(), column_scale=adjacency.column_scale)
    assert product.dtype == dtype and torch.equal(product, expected.to(dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
def test_a_mask_chooses_entries(symmetric):
    data = tiny_dataset(symmetric=symmetric)
    edges = attention_edges(data.edge_index, data.num_nodes)
    mask = torch.rand(edges.columns.numel()) < 0.4
    before = mask.clone()
    kept = edges.masked(mask)
    rows, columns = edges.rows(), edges.columns
    assert torch.equal(kept.rows(), rows[mask]) and torch.equal(kept.columns, columns[mask])
    assert torch.equal(mask, before)  # the caller's mask is left alone


@pytest.mark.parametrize("entries", [1, 7, 10**6])
def test_chunks_of_rows_cover_the_matrix(dataset, entries):
    matrix = edges_of(dataset.edge_index, dataset.num_nodes)
    rows, columns = [], []
    for nodes, part, local in matrix.row_chunks(entries):
        assert torch.equal(local.columns, matrix.columns[part])
        assert part.stop - part.start <= entries or nodes.stop - nodes.start == 1
        rows.append(local.rows() + nodes.start)
        columns.append(local.columns)
    assert torch.equal(torch.cat(rows), matrix.rows()) and torch.equal(torch.cat(columns), matrix.columns)


def test_training_subgraph_is_the_induced_one(dataset):
    nodes = dataset.train
    edges = training_subgraph(dataset.edge_index, nodes, dataset.num_nodes)
    expected = {
        (int(s), int(t)) for s, t in dataset.edge_index.T.tolist() if s in nodes.tolist() and t in nodes.tolist()
    }
    assert {(int(nodes[s]), int(nodes[t])) for s, t in edges.T.tolist()} == expected
