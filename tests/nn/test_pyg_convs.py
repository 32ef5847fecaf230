"""Each layer of PyG against its twin: outputs and every gradient, with its options; what falls back, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parameter import UninitializedParameter
from torch_geometric import EdgeIndex
from torch_geometric import nn as pyg
from torch_geometric.utils import to_torch_csr_tensor

from conftest import assert_close, projected, tiny_dataset
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import compress

IN, OUT = 13, 6
INT2 = projected(bits=2, kept_frac=0.5)

WEIGHTED = {
    "GCN": lambda: pyg.GCNConv(IN, OUT),
    "GCN-improved": lambda: pyg.GCNConv(IN, OUT, improved=True, bias=False),
    "GCN-no-loops": lambda: pyg.GCNConv(IN, OUT, add_self_loops=False),
    "GCN-no-norm": lambda: pyg.GCNConv(IN, OUT, normalize=False),
    "GCN-max": lambda: pyg.GCNConv(IN, OUT, aggr="max"),
    "GCN-cached": lambda: pyg.GCNConv(IN, OUT, cached=True),
    "Graph": lambda: pyg.GraphConv(IN, OUT),
    "Graph-mean": lambda: pyg.GraphConv(IN, OUT, aggr="mean", bias=False),
    "Graph-max": lambda: pyg.GraphConv(IN, OUT, aggr="max"),
    "GCN2": lambda: pyg.GCN2Conv(IN, alpha=0.1, theta=0.5, layer=2),
    "GCN2-two-weights": lambda: pyg.GCN2Conv(IN, alpha=0.3, theta=0.5, layer=1, shared_weights=False),
    "GCN2-no-norm": lambda: pyg.GCN2Conv(IN, alpha=0.3, normalize=False, shared_weights=False),
    "GCN2-no-loops": lambda: pyg.GCN2Conv(IN, alpha=0.3, add_self_loops=False),
}
PLAIN = {
    "SAGE": lambda: pyg.SAGEConv(IN, OUT),
    "SAGE-add": lambda: pyg.SAGEConv(IN, OUT, aggr="add", root_weight=False, bias=False),
    "SAGE-max": lambda: pyg.SAGEConv(IN, OUT, aggr="max", normalize=True),
    "SAGE-min": lambda: pyg.SAGEConv(IN, OUT, aggr="min"),
    "SAGE-softmax": lambda: pyg.SAGEConv(IN, OUT, aggr="softmax"),
    "SAGE-project": lambda: pyg.SAGEConv(IN, OUT, project=True),
    "SAGE-lazy": lambda: pyg.SAGEConv(-1, OUT),
    "GAT": lambda: pyg.GATConv(IN, OUT, heads=3),
    "GAT-mean": lambda: pyg.GATConv(IN, OUT, heads=2, concat=False, residual=True, negative_slope=0.1),
    "GAT-no-loops": lambda: pyg.GATConv(IN, OUT, add_self_loops=False, bias=False),
    "GEN": lambda: pyg.GENConv(IN, OUT),
    "GEN-learned": lambda: pyg.GENConv(IN, OUT, learn_t=True, t=0.7, msg_norm=True, learn_msg_scale=True),
    "GEN-semi-gradient": lambda: pyg.GENConv(IN, IN, aggr="softmax_sg", t=2.0),
    "GEN-max": lambda: pyg.GENConv(IN, OUT, aggr="max", norm="layer"),
    "GEN-add": lambda: pyg.GENConv(IN, OUT, aggr="add", bias=True),
}
LAYERS = WEIGHTED | PLAIN
# They keep maps (N, C) that are no business of the aggregation: F.normalize, LayerNorm, MessageNorm.
KEEPS_OTHERS = ("SAGE-max", "GEN-learned", "GEN-max")


def graph(*, symmetric=True, nodes=31):
    data = tiny_dataset(symmetric=symmetric, nodes=nodes)
    return data.x.clone().requires_grad_(), data.edge_index.long()


def call(conv, x, *arguments, **options):
    if isinstance(conv, pyg.GCN2Conv):
        return conv(x, x.flip(0), *arguments, **options)
    return conv(x, *arguments, **options)


def check(make, x, *arguments, inputs=(), config=None, tolerance=1e-4, **options):
    """The twin's output and gradients equal PyG's."""
    torch.manual_seed(0)
    conv = make()
    if any(isinstance(parameter, UninitializedParameter) for parameter in conv.parameters()):
        call(conv, x, *arguments, **options)
    twin = copy.deepcopy(conv)
    report = compress(twin, config or projected())
    results = []
    for layer in (conv, twin):
        output = call(layer, x, *arguments, **options)
        grad = torch.linspace(-1, 1, output.numel()).view_as(output)
        of = [x, *inputs, *layer.parameters()]
        results.append((output, *torch.autograd.grad(output, of, grad, allow_unused=True)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours is None) == (theirs is None)
        # The gradient of a bias before BatchNorm is zero but for rounding.
        if ours is not None and theirs.abs().max() > 1e-5:
            assert_close(ours, theirs, tolerance=tolerance)
    assert not [note for note in report.left if "no twin" not in note]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_pyg(name, symmetric):
    check(LAYERS[name], *graph(symmetric=symmetric))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_edge_weights(name, learned):
    x, edge_index = graph(symmetric=False)
    weight = (0.5 + torch.rand(edge_index.size(1))).requires_grad_(learned)
    check(WEIGHTED[name], x, edge_index, weight, inputs=[weight] if learned else [])


@pytest.mark.parametrize("name", [name for name in LAYERS if "GEN" not in name and "GAT" not in name])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weighted"])
def test_sparse_adjacency(name, weighted):
    x, edge_index = graph(symmetric=False)
    values = 0.5 + torch.rand(edge_index.size(1)) if weighted else torch.ones(edge_index.size(1))
    adjacency = to_torch_csr_tensor(edge_index.flip(0), values, size=(x.size(0), x.size(0)))
    check(LAYERS[name], x, adjacency)


@pytest.mark.parametrize("name", ["GEN", "GAT-no-loops"])
def test_sparse_adjacency_of_layers_that_take_no_weights(name):
    x, edge_index = graph(symmetric=False)
    check(LAYERS[name], x, to_torch_csr_tensor(edge_index.flip(0), size=(x.size(0), x.size(0))))


@pytest.mark.parametrize("name", ["GCN", "SAGE", "GAT", "Graph"])
def test_edge_index_class(name):
    x, edge_index = graph()
    check(LAYERS[name], x, EdgeIndex(edge_index.contiguous(), sparse_size=(31, 31)))


@pytest.mark.parametrize("name", ["SAGE", "SAGE-add", "Graph", "Graph-mean"])
def test_transforming_first_shares_the_map_of_the_layers_input(name):
    x, edge_index = graph(symmetric=False)
    check(LAYERS[name], x, edge_index, config=projected(share_maps=True))
    kept = [count_maps(LAYERS[name](), x, edge_index, share_maps=share_maps) for share_maps in (False, True)]
    assert kept == [1 if name == "SAGE-add" else 2, 1]


def count_maps(conv, x, edge_index, **fields):
    compress(conv, projected(bits=2, **fields))
    with SavedTensors(conv, excluded=[]) as saved:
        return [record.dtype for record in saved.kept(conv(x, edge_index))].count("int2")


def test_gcn2_layers_share_the_one_map_of_the_first():
    layers = torch.nn.ModuleList(pyg.GCN2Conv(IN, alpha=0.1, shared_weights=False) for _ in range(3))
    model = torch.nn.Module()
    model.layers = layers

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, edge_index):
            h = x
            for layer in self.layers:
                h = layer(h, x, edge_index)
            return h

    assert count_maps(Chain(), *graph()) == 3 + 1


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in KEEPS_OTHERS])
def test_nothing_as_wide_as_the_map_and_as_long_as_the_edges_is_kept(name):
    x, edge_index = graph(nodes=101)
    weight = (torch.rand(edge_index.size(1), requires_grad=True),) if name in WEIGHTED else ()
    totals = {}
    for compressed in (False, True):
        conv = LAYERS[name]()
        call(conv, x, edge_index)
        if compressed:
            compress(conv, INT2)
        with SavedTensors(conv, excluded=[x, edge_index]) as saved:
            records = saved.kept(call(conv, x, edge_index, *weight))
        totals[compressed] = sum(record.bytes for record in records)
        # As PyG forms it: a map of each edge.
        long = [record for record in records if record.shape[0] >= edge_index.size(1) and len(record.shape) > 1]
        assert not (compressed and any(record.shape[-1] >= OUT for record in long))
        assert not compressed or all(record.dtype != "float32" or record.shape != (101, IN) for record in records)
    assert totals[True] < totals[False]


FALLBACKS = {
    "edge features": ("GEN", lambda x, e: (x, e, torch.randn(e.size(1), OUT)), "GENConv: edge features"),
    "two sets of nodes": ("SAGE", lambda x, e: ((x, x[:30]), e[:, e[1] < 30]), "SAGEConv: two sets of nodes"),
    "attention weights": ("GAT", lambda x, e: (x, e, None, None, True), "GATConv: attention weights asked for"),
    "float64": ("Graph", lambda x, e: (x.double(), e), "GraphConv: input is float64"),
    "batches of graphs": ("GCN", lambda x, e: (x.expand(2, -1, -1), e), "GCNConv: input has 3 dimensions instead of 2"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_calls_without_a_twin_run_as_pyg_does_and_are_noted(case):
    name, arguments, reason = FALLBACKS[case]
    x, edge_index = graph()
    arguments = arguments(x, edge_index)
    conv = LAYERS[name]()
    conv = conv.double() if case == "float64" else conv
    expected = conv(*arguments)
    report = compress(conv, projected())
    output = conv(*arguments)
    output, expected = (value[0] if isinstance(value, tuple) else value for value in (output, expected))
    assert_close(output, expected)
    assert reason in report.left


def test_hooks_on_messages_see_them():
    x, edge_index = graph()
    conv, seen = pyg.SAGEConv(IN, OUT), []
    report = compress(conv, INT2)
    handle = conv.register_message_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    conv(x, edge_index)
    assert seen == [(edge_index.size(1), IN)]
    assert report.left == {"SAGEConv: hooks or explanation of messages"}
    handle.remove()
    assert conv(x, edge_index).shape == (31, OUT) and len(seen) == 1


def test_wrong_edges_are_refused_in_pygs_words():
    x, edge_index = graph()
    for name in ("GCN", "SAGE", "GAT"):
        conv = LAYERS[name]()
        compress(conv, INT2)
        with pytest.raises((IndexError, RuntimeError), match="larger than 30|out of bounds"):
            conv(x, edge_index + 2)
    conv = pyg.GraphConv(IN, OUT)
    compress(conv, INT2)
    with pytest.raises(RuntimeError, match="must match"):
        conv(x, edge_index, torch.rand(3))


@pytest.mark.parametrize("name", ["GCN", "SAGE", "SAGE-max", "GAT", "GEN"])
def test_a_graph_without_edges(name):
    x, edge_index = graph()
    check(LAYERS[name], x, edge_index[:, :0])


WITHOUT_TWIN = {
    "aggr=median": lambda: pyg.SAGEConv(IN, OUT, aggr="median"),
    "aggr=lstm": lambda: pyg.SAGEConv(IN, OUT, aggr="lstm"),
    "aggr=['mean', 'max']": lambda: pyg.SAGEConv(IN, OUT, aggr=["mean", "max"]),
    "aggr=softmax": lambda: pyg.GraphConv(IN, OUT, aggr="softmax"),
    "aggr=powermean": lambda: pyg.GENConv(IN, OUT, aggr="powermean"),
    "flow=target_to_source": lambda: pyg.GCNConv(IN, OUT, flow="target_to_source"),
    "decomposed_layers=2": lambda: pyg.SAGEConv(IN, OUT, decomposed_layers=2),
    "edge_dim=4": lambda: pyg.GATConv(IN, OUT, edge_dim=4),
    "in_channels a pair": lambda: pyg.GATConv((IN, IN), OUT),
}


@pytest.mark.parametrize("option", WITHOUT_TWIN)
def test_options_without_a_twin_are_named_and_left(option):
    conv = WITHOUT_TWIN[option]()
    kind = type(conv)
    report = compress(conv, INT2)
    first = report.layers[0]
    assert not first.converted and f"no twin with {option};" in first.note
    assert type(conv).__name__ == kind.__name__


def test_fixed_weights_are_used_and_other_graphs_told_apart():
    x, edge_index = graph(symmetric=False)
    conv = pyg.GCNConv(IN, OUT)
    twin = copy.deepcopy(conv)
    compress(twin, projected())
    weight = torch.rand(edge_index.size(1))
    other = edge_index.flip(0)
    for arguments in ((edge_index, weight), (edge_index, weight + 1), (other, weight), (other,), (edge_index, weight)):
        assert_close(twin(x, *arguments), conv(x, *arguments))
    weight.mul_(torch.rand_like(weight))
    edge_index[:, 0] = 5
    assert_close(twin(x, edge_index, weight), conv(x, edge_index, weight))
