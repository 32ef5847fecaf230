"""Operators are made once for each graph, and anew once it changes."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import to_torch_coo_tensor, to_torch_csc_tensor, to_torch_csr_tensor

from conftest import assert_close, tiny_dataset
from iexact_runner.nn.graph_cache import GraphCache

NODES = 31


def edges(*, symmetric=False):
    return tiny_dataset(symmetric=symmetric, nodes=NODES).edge_index.long()


def dense(edge_index, weight):
    matrix = torch.zeros(NODES, NODES)
    return matrix.index_put_((edge_index[1], edge_index[0]), weight, accumulate=True)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
def test_weighted_adjacency_equals_a_dense_matrix(symmetric, mean):
    edge_index, x = edges(symmetric=symmetric), torch.randn(NODES, 5)
    edge_index = torch.cat([edge_index, edge_index[:, :7]], dim=1)  # some edges twice
    weight = torch.rand(edge_index.size(1))
    adjacency = GraphCache().adjacency(edge_index, NODES, weight, mean=mean)
    matrix = dense(edge_index, weight)
    if mean:
        matrix /= dense(edge_index, torch.ones_like(weight)).sum(1, keepdim=True).clamp(min=1)
    assert_close(adjacency.matmul(x), matrix @ x)
    assert_close(adjacency.adjoint_matmul(x), matrix.T @ x)


def test_a_symmetric_weighted_matrix_is_held_once():
    edge_index = edges(symmetric=True)
    for weight, once in ((edge_index.sum(0).float(), True), (edge_index[0].float() + 1, False)):
        adjacency = GraphCache().adjacency(edge_index, NODES, weight, mean=False)
        assert (adjacency.adjoint is adjacency.matrix) == once


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("improved", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_normalisation_is_pygs(self_loops, improved, weighted):
    edge_index, x = edges(), torch.randn(NODES, 5)
    weight = torch.rand(edge_index.size(1)) if weighted else None
    expected = dense(*gcn_norm(edge_index, weight, NODES, improved, self_loops))
    options = dict(self_loops=self_loops, improved=improved)
    adjacency = GraphCache().normalised(edge_index, NODES, weight, **options)
    assert_close(adjacency.matmul(x), expected @ x)
    assert_close(adjacency.adjoint_matmul(x), expected.T @ x)


@pytest.mark.parametrize("convert", [to_torch_csr_tensor, to_torch_csc_tensor, to_torch_coo_tensor])
def test_sparse_layouts_are_read_as_target_by_source(convert):
    edge_index, x = edges(), torch.randn(NODES, 5)
    weight = torch.rand(edge_index.size(1))
    sparse, cache = convert(edge_index.flip(0), weight, size=(NODES, NODES)), GraphCache()
    adjacency = cache.adjacency(sparse, NODES, cache.values(sparse), mean=False)
    assert_close(adjacency.matmul(x), dense(edge_index, weight) @ x)
    assert cache.fits(sparse, NODES) and not cache.fits(sparse, NODES + 1)
    assert cache.values(convert(edge_index.flip(0), size=(NODES, NODES))) is None


def test_an_operator_is_made_once_and_anew_after_a_write():
    edge_index, cache = edges(), GraphCache()
    weight = torch.rand(edge_index.size(1))

    def adjacency():
        return cache.adjacency(edge_index, NODES, weight, mean=False)

    first = adjacency()
    assert adjacency() is first
    assert cache.adjacency(edge_index, NODES, weight.clone(), mean=False) is not first
    assert cache.adjacency(edge_index.clone(), NODES, weight, mean=False) is not first
    for tensor in (weight, edge_index):
        known = adjacency()
        tensor[..., 0] = 1
        assert adjacency() is not known
    assert_close(adjacency().matmul(torch.eye(NODES)), dense(edge_index, weight))


def test_a_graph_that_is_gone_leaves_nothing_behind():
    cache, kept = GraphCache(), edges()
    for _ in range(3):
        edge_index = kept.clone()
        cache.edges(edge_index, NODES)
        cache.adjacency(kept, NODES, torch.rand(kept.size(1)), mean=False)
        del edge_index
    gc.collect()
    assert len(cache._made) == 1 and len(cache._made[kept].with_second) == 0


def test_copies_start_empty():
    cache, edge_index = GraphCache(), edges()
    cache.edges(edge_index, NODES)
    assert len(cache._made) == 1
    assert len(copy.deepcopy(cache)._made) == len(pickle.loads(pickle.dumps(cache))._made) == 0


def test_graphs_made_under_inference_mode_are_read_too():
    with torch.inference_mode():
        edge_index = edges()
    cache = GraphCache()
    assert cache.edges(edge_index, NODES) is cache.edges(edge_index, NODES)
