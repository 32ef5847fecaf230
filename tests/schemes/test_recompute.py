"""Activation checkpointing: gradients of FP32 to the last bit, and nothing kept but the inputs of blocks."""

from __future__ import annotations

import pytest
import torch

from conftest import FP32, assert_close, projected
from iexact_runner.config import MODEL_CONFIGS
from iexact_runner.config.presets import preset
from iexact_runner.measure import PeakMemory, SavedTensors
from iexact_runner.nn import MODELS, build_model
from iexact_runner.training import forward

NAMES = ("sage", "gcn", "gcn2", "gat", "graphconv", "deepergcn")
RECOMPUTE, TWIN = preset("recompute"), projected(share_maps=True)


def trained(name, compression, dataset, *, again=False, precision="float32", **fields):
    """Scores, gradients and running statistics of one step."""
    sizes = {"num_layers": 4, "hidden_channels": 16, "dropout": 0.5, "input_dropout": 0.2, "residual": True}
    config = MODEL_CONFIGS[name](name=name, **(sizes | fields))
    torch.manual_seed(0)
    model = build_model(config, in_channels=13, out_channels=3, compression=compression).train()
    graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
    scores = forward(model, dataset.x, graph, precision=precision, seed=5)
    loss = torch.nn.functional.cross_entropy(scores.float(), dataset.y)
    if again:
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return scores.detach(), torch.cat([each.flatten() for each in gradients]), list(model.buffers())


@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", ""])
@pytest.mark.parametrize("name", NAMES)
def test_scores_gradients_and_statistics_are_those_of_fp32_maps(name, batch_norm, dataset):
    """With the same masks, which are drawn twice; the running statistics move once."""
    twin, again, twice = (
        trained(name, compression, dataset, batch_norm=batch_norm, again=again)
        for compression, again in ((TWIN, False), (RECOMPUTE, False), (RECOMPUTE, True))
    )
    for found in (again, twice):
        assert torch.equal(found[0], twin[0]) and torch.equal(found[1], twin[1])
        assert len(found[2]) == len(twin[2])
        assert all(torch.equal(*buffers) for buffers in zip(found[2], twin[2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_dropout_the_gradient_is_that_of_plain_modules(name, dataset):
    fields = {"dropout": 0.0, "input_dropout": 0.0}
    (scores, plain, _), (found, gradient, _) = (
        trained(name, compression, dataset, **fields) for compression in (FP32, RECOMPUTE)
    )
    assert_close(found, scores)
    assert_close(gradient, plain, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_computation_has_the_precision_of_the_first(name, dataset):
    (_, twin, _), (_, found, _) = (trained(name, each, dataset, precision="bfloat16") for each in (TWIN, RECOMPUTE))
    assert torch.equal(found, twin)


def test_edges_dropped_on_the_graph_are_the_same_ones(dataset):
    fields = {"edge_dropout": 0.5, "attention_dropout": 0.3}
    (_, twin, _), (_, found, _) = (trained("gat", each, dataset, **fields) for each in (TWIN, RECOMPUTE))
    assert torch.equal(found, twin)


def test_the_inputs_of_blocks_are_all_that_is_kept(dataset):
    config = MODEL_CONFIGS["sage"](name="sage", num_layers=5, hidden_channels=16)
    model = build_model(config, in_channels=13, out_channels=3, compression=RECOMPUTE).train()
    graph = MODELS["sage"].build_graph(dataset.edge_index, dataset.num_nodes)
    with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved:
        kept = saved.kept(model(dataset.x, graph, seed=1))
    # The features are no map: of four blocks the last three, and the head.
    assert [record.bytes for record in kept] == [4 * dataset.num_nodes * 16] * 4


def test_the_peak_falls_with_every_layer_more(dataset):
    graph = MODELS["gcn"].build_graph(dataset.edge_index, dataset.num_nodes)

    def peak(compression, layers):
        config = MODEL_CONFIGS["gcn"](name="gcn", num_layers=layers, hidden_channels=64)
        model = build_model(config, in_channels=13, out_channels=3, compression=compression).train()
        with PeakMemory(torch.device("cpu")) as memory:
            model(dataset.x, graph, seed=1).sum().backward()
        return memory.bytes

    shares = [peak(RECOMPUTE, layers) / peak(FP32, layers) for layers in (4, 16)]
    assert shares[1] < shares[0] < 1 and shares[1] < 0.5


def test_a_pass_without_gradients_computes_once(dataset):
    config = MODEL_CONFIGS["sage"](name="sage", num_layers=3, hidden_channels=16)
    model = build_model(config, in_channels=13, out_channels=3, compression=RECOMPUTE).train()
    graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
    with torch.no_grad():
        assert model(dataset.x, graph, seed=1).isfinite().all()
