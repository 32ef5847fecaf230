"""Evaluation: the same scores as plain modules, within the peak of a training step, and FP32 measured beside it."""

from __future__ import annotations

import pytest
import torch

from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.measure import step
from iexact_runner.measure.step import fp32_figures, step_memory
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare

CPU = torch.device("cpu")
MODELS = ("sage", "gcn", "gcn2", "gat", "deepergcn")
GRAPH = ("dataset=synthetic", "dataset.num_nodes=4000", "dataset.average_degree=60", "model.num_layers=3")


def built(*overrides):
    config = compose_config(*GRAPH, *overrides)
    problem = prepare(load_dataset(config.dataset), config.model, inductive=config.dataset.inductive, device=CPU)
    torch.manual_seed(0)
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    )
    return config, problem, model


@pytest.mark.parametrize("compression", ["none", "plain", "int2", "iexact", "lowrank", "lowrank_small"])
@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_stays_within_the_peak_of_a_step(model, compression):
    config, problem, net = built(f"model={model}", f"compression={compression}")
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    assert 0 < memory["evaluation_peak_mib"] <= memory["step_peak_mib"]
    assert net.training


def test_an_evaluation_on_the_whole_graph_counts():
    config, problem, net = built("model=gcn", "compression=lowrank", "dataset.inductive=true")
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    hidden_mib = 4 * 4000 * config.model.hidden_channels / 2**20
    assert memory["evaluation_peak_mib"] > 2 * hidden_mib


def test_activations_as_the_reference_counts_them_leave_scores_and_loss_out(monkeypatch):
    counts = iter([100 * 2**20, 150 * 2**20])  # of a GPU before and after a forward pass
    monkeypatch.setattr(step, "allocated", lambda device: next(counts))
    config, problem, net = built("dataset.num_nodes=300", "dataset.average_degree=10")
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    assert memory["reference_activation_mib"] == pytest.approx(50 - (4 * 300 * problem.num_classes + 4) / 2**20)


@pytest.mark.parametrize("overrides", [(), ("model.batch_norm=false",), ("model.residual=true",)], ids=str)
@pytest.mark.parametrize("share_maps", ["true", "false"])
@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_gives_the_scores_of_plain_modules(model, share_maps, overrides):
    _, problem, net = built(
        f"model={model}",
        "compression=plain",
        f"compression.share_maps={share_maps}",
        "dataset.num_nodes=300",
        "dataset.average_degree=10",
        *overrides,
    )
    features = torch.randn(300, problem.in_channels)
    for _ in range(2):  # running statistics that are not those of the start
        net.train()(features, problem.whole.graph, seed=0)
    net.eval()
    plain = net(features, problem.whole.graph)
    before = features.clone()
    with torch.no_grad():
        scores = net(features, problem.whole.graph)
    assert plain.requires_grad and torch.equal(features, before)
    if model in ("gat", "deepergcn"):  # whose sums over neighbours have another order
        torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(scores, plain)


@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_in_less_precision_is_near(model):
    _, problem, net = built(
        f"model={model}",
        "compression=plain",
        "dataset.num_nodes=300",
        "dataset.average_degree=10",
        "model.residual=true",
    )
    features = torch.randn(300, problem.in_channels)
    with torch.no_grad():
        exact = net.eval()(features, problem.whole.graph)
        with torch.autocast("cpu", torch.bfloat16):
            scores = net(features, problem.whole.graph)
    assert ((scores.float() - exact).norm() / exact.norm()).item() < 0.02


def test_attention_on_a_dense_graph_forms_no_map_of_edges():
    config, problem, net = built(
        "model=gat", "compression=lowrank", "dataset.num_nodes=1000", "dataset.average_degree=120"
    )
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    edges = problem.whole.graph.columns.numel()
    heads, channels = config.model.heads, config.model.hidden_channels
    assert memory["evaluation_peak_mib"] < 4 * edges * heads * channels / 2**20 / 5


def test_fp32_of_a_model_that_keeps_nothing_is_measured_too():
    config, problem, _ = built("model=gcn", "compression=int4", "model.num_layers=1")
    figures = fp32_figures(problem, config, device=CPU, seed=0, available=2**34)
    assert figures["step_peak_mib"] > 0


def test_fp32_is_measured_where_it_fits(monkeypatch):
    config, problem, net = built("model=gcn", "compression=lowrank")
    memory = step_memory(net, problem, config, device=CPU, seed=0)
    figures = fp32_figures(problem, config, device=CPU, seed=0, available=2**34)
    assert figures["step_peak_mib"] > memory["saved_mib_fp32"] > 0
    assert figures["evaluation_peak_mib"] == pytest.approx(memory["evaluation_peak_mib"], rel=0.05)
    assert figures["timed_epochs"] >= 1 and figures["epochs_per_second"]["median"] > 0
    least = memory["saved_mib_fp32"] * 2**20
    assert fp32_figures(problem, config, device=CPU, seed=0, available=int(least)) is None
    assert fp32_figures(problem, config, device=CPU, seed=0, available=None) is None

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(step, "training_loss", fails)
    assert fp32_figures(problem, config, device=CPU, seed=0, available=2**34) is None
