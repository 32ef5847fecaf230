"""Maps that are given up: the same numbers to the last bit, in as few maps as promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.config import (
    CompressionConfig,
    DeeperGCNConfig,
    GATConfig,
    GCN2Config,
    GCNConfig,
    GraphConvConfig,
    SAGEConfig,
)
from iexact_runner.data import load_dataset
from iexact_runner.data.graph import gcn_adjacency, mean_adjacency
from iexact_runner.measure.step import step_memory
from iexact_runner.nn import MODELS, build_model
from iexact_runner.problem import prepare
from iexact_runner.schemes import graph_linear as module
from iexact_runner.schemes.graph_linear import GraphWeights, Mix, graph_linear

CPU = torch.device("cpu")
FIELDS = dict(num_layers=3, hidden_channels=16, dropout=0.4)
CONFIGS = {
    "sage": SAGEConfig(name="sage", **FIELDS),
    "sage-residual": SAGEConfig(name="sage", residual=True, input_dropout=0.2, **FIELDS),
    "sage-linear": SAGEConfig(name="sage", use_linear=True, **FIELDS),
    "gcn": GCNConfig(name="gcn", input_dropout=0.2, **FIELDS),
    "gcn-linear": GCNConfig(name="gcn", use_linear=True, batch_norm=False, **FIELDS),
    "gcn2": GCN2Config(name="gcn2", input_dropout=0.1, **FIELDS),
    "gcn2-shared": GCN2Config(name="gcn2", shared_weights=True, residual=True, dropout2=True, **FIELDS),
    "gcn2-no-dropout": GCN2Config(name="gcn2", **(FIELDS | {"dropout": 0.0})),
    "gat": GATConfig(name="gat", heads=3, residual=True, **FIELDS),
    "gat-attention": GATConfig(name="gat", heads=2, attention_dropout=0.3, **FIELDS),
    "graphconv": GraphConvConfig(name="graphconv", **FIELDS),
    "deepergcn": DeeperGCNConfig(name="deepergcn", **FIELDS),
}


def low_rank(**fields):
    return CompressionConfig(**(dict(scheme="lowrank", bits=4, rank=4, share_maps=True) | fields))


def make(config, compression):
    torch.manual_seed(0)
    return build_model(config, in_channels=13, out_channels=3, compression=compression).train()


@pytest.mark.parametrize("elements", [1, 700, 1 << 20], ids=["two-rows", "chunks", "whole"])
@pytest.mark.parametrize("nodes", [41, 101])
@pytest.mark.parametrize("width", [8, 19, 30])
def test_a_map_that_is_given_up_gives_the_same_product(width, nodes, elements, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    data = tiny_dataset(nodes=nodes)
    adjacency = gcn_adjacency(data.edge_index, nodes)
    x, other = torch.randn(nodes, 19), torch.randn(nodes, 19)
    weight, own_weight, bias = torch.randn(width, 19), torch.randn(width, 19), torch.randn(width)
    mixes = (Mix(0.3, 0.7), Mix(0.2, -0.4)) if width == 19 else (None, None)
    for own, second, mixed in (
        (None, None, (None, None)),
        (None, own_weight, (None, None)),
        (other, own_weight, mixes),
    ):
        weights = GraphWeights(weight, bias, second, mixed)
        kept = graph_linear(x.clone(), adjacency, weights, own=own)
        given = x.clone()
        out = graph_linear(given, adjacency, weights, own=own, overwrite=True)
        assert (out.data_ptr() == given.data_ptr()) == (width == 19)
        if elements > 1:  # a product of two rows takes another path through the BLAS
            assert torch.equal(out, kept)
        dense = adjacency.matmul(torch.eye(nodes))
        first, last = mixed
        left, right = F.linear(x, weight), None if second is None else F.linear(x if own is None else own, second)
        if first is not None and last is not None:
            left = first.factor * left + first.identity * x
            right = last.factor * right + last.identity * other
        expected = dense @ left + bias + (0 if right is None else right)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_overwrites_has_the_gradients_of_one_that_does_not(name, monkeypatch):
    """In every model, to the last bit; and the features stay what they were."""
    dataset, config = tiny_dataset(nodes=151), CONFIGS[name]
    gradients = []
    for overwrites in (True, False):
        if not overwrites:
            for place in ("functions", "graph_linear", "attention"):
                monkeypatch.setattr(f"iexact_runner.schemes.{place}.sole_owner", lambda grad: False)
            monkeypatch.setattr("iexact_runner.schemes.projected._is_free", lambda kept: False)
        model = make(config, low_rank(sign_threshold=1.0))
        graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
        x = dataset.x.clone()
        for seed in (1, 2):
            model.zero_grad()
            F.cross_entropy(model(x, graph, seed=seed), dataset.y).backward()
        assert torch.equal(x, dataset.x)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


MAPS = {"sage": 2.0, "gcn": 1.0, "gcn2": 3.0, "gat": 2.0}


@pytest.mark.parametrize("model", MAPS)
def test_a_step_and_an_evaluation_hold_as_many_maps_as_promised(model):
    """Maps of hidden width; what is kept, columns of a product and what belongs to edges come on top."""
    nodes = 60000
    overrides = (
        "dataset=synthetic",
        f"dataset.num_nodes={nodes}",
        "dataset.average_degree=4",
        "dataset.num_features=64",
    )
    widths = ("model.heads=4", "model.hidden_channels=32") if model == "gat" else ("model.hidden_channels=128",)
    config = compose_config(*overrides, f"model={model}", "model.num_layers=4", *widths, "compression=lowrank")
    problem = prepare(load_dataset(config.dataset), config.model, inductive=False, device=CPU)
    net = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    )
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    one = nodes * 128 * 4 / 2**20
    limit = (MAPS[model] + 0.6) * one
    if model == "gat":
        limit += 8 * 4 * problem.training.graph.columns.numel() * config.model.heads / 2**20
    assert one < memory["step_peak_mib"] < limit
    assert one < memory["evaluation_peak_mib"] < limit


def test_a_hook_on_a_block_sees_gradients_that_stay():
    dataset = tiny_dataset(nodes=151)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    seen = {}
    for holds in (True, False):
        model = make(CONFIGS["sage"], low_rank())
        outputs = []
        model.blocks[0].register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out.value))
        held = []
        scores = model(dataset.x, graph, seed=1)
        if holds:
            outputs[0].register_hook(lambda grad, held=held: held.append(grad))
        else:
            outputs[0].register_hook(lambda grad, held=held: held.append(grad.clone()))
        F.cross_entropy(scores, dataset.y).backward()
        seen[holds] = held[0]
    assert torch.equal(seen[True], seen[False])
