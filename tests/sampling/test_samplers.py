"""Samplers: what a batch holds, that it depends on (seed, epoch, batch) alone, and GraphSAINT's expectations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.data.graph import Adjacency, edge_count
from iexact_runner.errors import ConfigError, TrainingError
from iexact_runner.layerwise import layerwise_scores
from iexact_runner.loss import loss_per_node
from iexact_runner.measure import total_bytes
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.sampling import with_batches
from iexact_runner.sampling.prefetch import one_ahead
from iexact_runner.training import Optimization, evaluate, train_epochs, train_on_batches, training_loss

CPU = torch.device("cpu")
SAMPLERS = {
    "cluster": ["sampler.parts=20", "sampler.batch_parts=3", "sampler.partition=label_propagation"],
    "saint_rw": ["sampler.roots=100", "sampler.walk_length=2"],
    "saint_node": ["sampler.nodes=300"],
    "saint_edge": ["sampler.edges=200"],
    "neighbor": ["sampler.num_neighbors=[5,3]", "sampler.batch_size=100"],
}


def made(sampler, *overrides, tmp=None):
    root = [] if tmp is None else [f"dataset.root={tmp}"]
    small = ["dataset=digits", "model.num_layers=2", "model.hidden_channels=16", "training.epochs=3"]
    config = compose_config(*small, f"sampler={sampler}", *SAMPLERS.get(sampler, []), *root, *overrides)
    dataset = load_dataset(config.dataset)
    problem = prepare(dataset, config.model, inductive=config.dataset.inductive, device=CPU)
    return config, with_batches(problem, config, dataset, device=CPU)


def model_of(config, problem):
    torch.manual_seed(0)
    sizes = {"in_channels": problem.in_channels, "out_channels": problem.num_classes}
    return build_model(config.model, **sizes, compression=config.compression)


def equal(first, second):
    return all(torch.equal(*pair) for pair in zip(first.tensors(), second.tensors(), strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_depends_on_its_seed_epoch_and_number_alone(sampler, tmp_path):
    _, problem = made(sampler, tmp=tmp_path)
    _, again = made(sampler, tmp=tmp_path)
    places = [(1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0)]
    views = [problem.batches.view(batch, seed=seed, epoch=epoch) for seed, epoch, batch in places]
    others = [again.batches.view(batch, seed=seed, epoch=epoch) for seed, epoch, batch in reversed(places)]
    for view, other in zip(views, reversed(others), strict=True):
        assert equal(view, other)
    for other in views[1:]:
        assert views[0].x.shape != other.x.shape or not torch.equal(views[0].x, other.x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nodes_of_a_batch_have_their_features_labels_and_part_in_the_loss(sampler, tmp_path):
    _, problem = made(sampler, tmp=tmp_path)
    whole, view = problem.whole, problem.batches.view(0, seed=1, epoch=1)
    rows = {tuple(row): node for node, row in enumerate(whole.x.tolist())}
    nodes = torch.tensor([rows[tuple(row)] for row in view.x.tolist()])
    assert torch.equal(whole.y[nodes], view.y)
    trained = set(whole.train.tolist())
    chosen = nodes[view.train].tolist()
    assert set(chosen) <= trained
    if sampler != "neighbor":
        assert set(chosen) == trained & set(nodes.tolist())
    targets, sources = view.graph.matrix.rows(), view.graph.matrix.columns.long()
    own = set(zip(nodes[targets].tolist(), nodes[sources].tolist(), strict=True))
    there = whole.graph.matrix
    assert own <= set(zip(there.rows().tolist(), there.columns.tolist(), strict=True))


@pytest.mark.parametrize("sampler", ["cluster", "neighbor"])
def test_an_epoch_trains_on_every_node_once(sampler, tmp_path):
    _, problem = made(sampler, tmp=tmp_path)
    views = [problem.batches.view(batch, seed=3, epoch=2) for batch in range(len(problem.batches))]
    seen = torch.cat([view.x[view.train] for view in views])
    expected = problem.whole.x[problem.whole.train]
    assert torch.equal(torch.unique(seen, dim=0), torch.unique(expected, dim=0))
    assert len(seen) == len(expected)


@pytest.mark.parametrize("model", ["sage", "gcn", "gat", "gcn2", "graphconv", "deepergcn"])
@pytest.mark.parametrize("dropout", [0.0])
def test_all_neighbors_of_all_training_nodes_have_the_gradient_of_the_whole_graph(model, dropout):
    layers = 2
    config, problem = made(
        "neighbor", f"model={model}", f"model.num_layers={layers}", "model.dropout=0", "model.batch_norm=false",
        "sampler.num_neighbors=[-1,-1,-1]", "sampler.batch_size=5000", "compression=none",
    )  # fmt: skip
    assert len(problem.batches) == 1
    net = model_of(config, problem)
    parameters = list(net.parameters())
    wanted = dict(kind="cross_entropy", precision="float32", seed=1)
    full = torch.autograd.grad(training_loss(net, dataclasses.replace(problem, batches=None), **wanted), parameters)
    batch = problem.of_batch(problem.batches.view(0, seed=1, epoch=1))
    drawn = torch.autograd.grad(training_loss(net, batch, **wanted), parameters)
    for exact, found in zip(full, drawn, strict=True):
        assert torch.allclose(exact, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["sage", "gcn"])
@pytest.mark.parametrize("sampler", ["saint_rw", "saint_node", "saint_edge"])
def test_saint_estimates_a_layer_and_its_loss_without_bias(sampler, model):
    """Of one linear layer, aggregates and losses average to those of the whole graph; plain means need not."""
    sizes = ["model.num_layers=1", "compression=none", f"model={model}", "sampler.sample_coverage=400"]
    drawn = {"saint_rw": "sampler.roots=40", "saint_node": "sampler.nodes=120", "saint_edge": "sampler.edges=60"}
    errors, deviations = {}, {}
    for normalization in ("true", "false"):
        config, problem = made(sampler, *sizes, drawn[sampler], f"sampler.normalization={normalization}")
        net = model_of(config, problem)
        whole, weight = problem.whole, torch.randn(problem.num_classes, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = (net(whole.x, whole.graph)[whole.train] @ weight).mean()
            found = []
            for batch in range(1500):
                view = problem.batches.view(batch, seed=5, epoch=1)
                each = net(view.x, view.graph)[view.train] @ weight
                found.append(each.mean() if view.loss_weights is None else each @ view.loss_weights[view.train])
        found = torch.stack(found)
        errors[normalization] = ((found.mean() - exact).abs() / exact.abs()).item()
        deviations[normalization] = deviation = (found.std() / len(found) ** 0.5 / exact.abs()).item()
        if normalization == "true":
            # Beside chance, the weights are estimates themselves.
            assert errors["true"] < 3 * deviation + 0.01
    # Of these, only the draw by degree prefers some nodes by far on a graph of almost equal degrees.
    assert sampler != "saint_node" or errors["false"] > 5 * deviations["false"]


def test_saint_gradients_of_a_layer_average_to_that_of_the_whole_graph():
    config, problem = made(
        "saint_rw", "model.num_layers=1", "compression=none", "sampler.sample_coverage=400", "sampler.roots=60"
    )
    net = model_of(config, problem)
    parameters = list(net.parameters())
    for parameter in parameters:  # scores near zero, where the loss is almost linear in them
        parameter.data.mul_(1e-3)
    wanted = dict(kind="cross_entropy", precision="float32", seed=1)

    def gradient(on):
        return torch.cat([part.flatten() for part in torch.autograd.grad(training_loss(net, on, **wanted), parameters)])

    exact = gradient(dataclasses.replace(problem, batches=None))
    draws = torch.stack([
        gradient(problem.of_batch(problem.batches.view(batch, seed=5, epoch=1))) for batch in range(1500)
    ])  # fmt: skip
    off = (draws.mean(0) - exact).norm() / exact.norm()
    chance = (draws.var(0).sum() / len(draws)).sqrt() / exact.norm()
    assert off < 2 * chance + 0.02
    assert (draws[0] - exact).norm() / exact.norm() > 5 * off


def test_saint_weights_of_self_loops_and_edges_are_their_shares():
    _, problem = made("saint_rw", "model=gcn")
    view = problem.batches.view(0, seed=1, epoch=1)
    graph = view.graph
    assert isinstance(graph, Adjacency)
    loops = graph.matrix.rows() == graph.matrix.columns
    assert loops.sum() == view.x.size(0)
    assert (graph.matrix.values[loops] == 1).all()
    assert (graph.matrix.values >= 1).all() and (graph.matrix.values[~loops] > 1).any()
    dense, transposed = graph.matrix.tensor().to_dense(), graph.adjoint.tensor().to_dense()
    assert torch.equal(dense.T, transposed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("compression", ["none", "iexact", "lowrank", "lowrank_v1", "int2"])
def test_training_on_batches_learns_under_every_scheme(sampler, compression, tmp_path):
    config, problem = made(sampler, f"compression={compression}", "training.epochs=8", tmp=tmp_path)
    net = model_of(config, problem)
    epochs = list(train_epochs(net, problem, Optimization(net, config.training), seed=7))
    assert epochs[-1].scores.val > 0.8
    work = epochs[0].work
    assert work.batches == len(problem.batches)
    assert 0 <= work.waiting_seconds <= epochs[0].seconds


def test_the_same_numbers_again_and_after_a_restart_at_an_epoch(tmp_path):
    config, problem = made("neighbor", "compression=lowrank")
    runs = []
    for _ in range(2):
        net = model_of(config, problem)
        runs.append([epoch.loss for epoch in train_epochs(net, problem, Optimization(net, config.training), seed=7)])
    assert runs[0] == runs[1]


def test_batches_without_training_nodes_are_passed_over(tmp_path):
    config, problem = made("cluster", "sampler.parts=600", "sampler.batch_parts=1", tmp=tmp_path)
    few = problem.whole.train[:5]
    views = {"whole": dataclasses.replace(problem.whole, train=few)}
    batches = problem.batches
    batches._trained[:] = False
    batches._trained[few] = True
    net = model_of(config, dataclasses.replace(problem, **views))
    loss, work = train_on_batches(net, Optimization(net, config.training), problem, 1, seed=1)
    assert 1 <= work.batches <= 5 < len(batches)
    batches._trained[:] = False
    with pytest.raises(TrainingError, match="no batch of epoch 1 has two nodes, one of them to train on"):
        train_on_batches(net, Optimization(net, config.training), problem, 1, seed=1)


@pytest.mark.parametrize(("model", "shared"), [("sage", True), ("gcn", False)])
def test_data_hold_the_graph_once_where_the_model_takes_it_as_it_is(model, shared, tmp_path):
    """The pattern that batches are drawn from is the model's own matrix, unless that has self-loops."""
    _, problem = made("cluster", f"model={model}", tmp=tmp_path)
    alone = total_bytes(dataclasses.replace(problem, batches=None).tensors())
    drawn_from = total_bytes(problem.tensors()) - alone
    mask, pattern = problem.whole.x.size(0), total_bytes(problem.batches._pattern.csr.tensors())
    assert drawn_from == mask + (0 if shared else pattern)


def test_batches_of_a_single_node_are_passed_over(tmp_path):
    _, problem = made("cluster", "sampler.parts=1797", "sampler.batch_parts=1", tmp=tmp_path)
    views = [problem.batches.view(batch, seed=1, epoch=1) for batch in range(50)]
    assert all(view.x.size(0) == 1 and view.train.numel() == 0 for view in views)


def test_more_parts_than_nodes_is_told_in_one_line():
    with pytest.raises(ConfigError, match="sampler.parts=1798: must be at most the 1797 nodes trained on"):
        made("cluster", "sampler.parts=1798")


def test_inductive_batches_are_of_the_training_subgraph(tmp_path):
    _, problem = made("cluster", "dataset.inductive=true", tmp=tmp_path)
    views = [problem.batches.view(batch, seed=3, epoch=2) for batch in range(len(problem.batches))]
    assert sum(view.x.size(0) for view in views) == problem.whole.train.numel()
    assert all(view.train.numel() == view.x.size(0) for view in views)
    assert sum(edge_count(view.graph) for view in views) < edge_count(problem.training.graph)


@pytest.mark.parametrize("model", ["sage", "gcn", "gat", "gcn2", "graphconv"])
@pytest.mark.parametrize("options", [[], ["model.residual=true", "model.dropout2=true", "model.input_dropout=0.2"]])
def test_layerwise_scores_are_those_of_one_pass(model, options, tmp_path):
    config, problem = made("cluster", f"model={model}", "model.num_layers=3", *options, tmp=tmp_path)
    net = model_of(config, problem)
    for _ in train_epochs(net, problem, Optimization(net, config.training), seed=1):
        pass
    assert problem.layerwise
    assert evaluate(net, problem) == evaluate(net, dataclasses.replace(problem, layerwise=False))


@pytest.mark.parametrize("model", ["sage", "gcn", "gat", "gcn2"])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_layerwise_scores_of_few_rows_at_a_time(model, gathers, folder, tmp_path, monkeypatch):
    options = ["model.num_layers=3", "model.residual=true", "model.dropout2=true", "model.input_dropout=0.2"]
    config, problem = made("cluster", f"model={model}", *options, tmp=tmp_path)
    net = model_of(config, problem).eval()
    view = problem.whole
    monkeypatch.setattr("iexact_runner.layerwise.TOUCHED_BYTES", 1 << 18)
    scores = layerwise_scores(
        net, view.x, view.graph, device=CPU, entries=500, gathers=gathers, maps_folder=str(tmp_path) if folder else None
    )
    with torch.no_grad():
        expected = net(view.x, view.graph)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["partitions"]


def test_a_folder_that_cannot_hold_maps_is_told_in_one_line(tmp_path):
    config, problem = made("cluster", f"sampler.maps_folder={tmp_path / 'none'}", tmp=tmp_path)
    with pytest.raises(ConfigError, match=r"sampler.maps_folder=.*none: cannot hold a file of 0 MiB: No such file"):
        evaluate(model_of(config, problem), problem)
    with pytest.raises(ConfigError, match="sampler.maps_folder=.: is for sampler.evaluation=layerwise"):
        compose_config("sampler=cluster", "sampler.evaluation=full", "sampler.maps_folder=.")


def test_results_come_in_order_and_an_error_where_its_result_would_be():
    def fail():
        raise ValueError("third")

    tasks = [lambda: 1, lambda: 2, fail, lambda: 4]
    results = one_ahead(tasks)
    assert [next(results)[0], next(results)[0]] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(results)
    assert list(one_ahead([])) == []


def test_the_next_result_is_made_while_one_is_used():
    made_so_far = []
    results = one_ahead([lambda number=number: made_so_far.append(number) for number in range(5)])
    next(results)
    results.close()  # waits for what is at work
    assert made_so_far == [0, 1]


def test_loss_weights_are_a_sum_in_place_of_the_mean():
    from iexact_runner.loss import node_loss

    scores = torch.randn(20, 4, requires_grad=True)
    labels, nodes = torch.randint(4, (20,)), torch.tensor([3, 1, 18])
    weights = torch.tensor([0.5, 2.0, 0.1])
    wanted = (loss_per_node(scores[nodes], labels[nodes], kind="cross_entropy") * weights).sum()
    (exact,) = torch.autograd.grad(wanted, scores)
    (found,) = torch.autograd.grad(node_loss(scores * 1, labels, nodes, kind="cross_entropy", weights=weights), scores)
    assert torch.allclose(exact, found, atol=1e-7)
    assert np.isclose(wanted.item(), node_loss(scores * 1, labels, nodes, kind="cross_entropy", weights=weights).item())
