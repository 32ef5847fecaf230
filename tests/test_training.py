from __future__ import annotations

import math

import pytest
import torch

from conftest import FP32, assert_close, projected, tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.config import (
    CompressionConfig,
    DeeperGCNConfig,
    GATConfig,
    GCN2Config,
    GCNConfig,
    GraphConvConfig,
    SAGEConfig,
    TrainingConfig,
)
from iexact_runner.config.presets import preset
from iexact_runner.data.graph import Adjacency
from iexact_runner.errors import ConfigError, TrainingError
from iexact_runner.measure import total_bytes
from iexact_runner.nn import build_model
from iexact_runner.problem import caches_first_aggregate, prepare, training_input, with_labels
from iexact_runner.training import Optimization, evaluate, score, step, train_epochs, training_loss

CPU = torch.device("cpu")
SAGE = SAGEConfig(name="sage", num_layers=2, hidden_channels=16, dropout=0.2)


def make_problem(dataset, model=SAGE, *, inductive=False):
    return prepare(dataset, model, inductive=inductive, device=CPU)


def make_model(problem, model=SAGE, compression=FP32):
    torch.manual_seed(0)
    return build_model(
        model, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=compression
    )


def train(model, problem, config, *, seed):
    return train_epochs(model, problem, Optimization(model, config), seed=seed)


@pytest.mark.parametrize("compression", [FP32, projected(bits=2, kept_frac=0.5)], ids=["fp32", "int2"])
def test_training_learns_the_tiny_graph(dataset, compression):
    problem = make_problem(dataset)
    model = make_model(problem, compression=compression)
    epochs = list(train(model, problem, TrainingConfig(epochs=40), seed=0))
    assert [epoch.number for epoch in epochs] == list(range(1, 41))
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert epochs[-1].scores.test > 0.8


def test_same_seed_same_course(dataset):
    courses = []
    for seed in (1, 1, 2):
        problem = make_problem(dataset)
        model = make_model(problem, compression=projected(bits=2, kept_frac=0.5))
        courses.append([epoch.loss for epoch in train(model, problem, TrainingConfig(epochs=5), seed=seed)])
    assert courses[0] == courses[1] != courses[2]


def test_micro_f1():
    scores = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-1.0, -1.0]])
    labels = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    # Two hits, one false alarm, one miss: F1 = 2 * 2 / (3 + 3).
    assert score(scores, labels) == pytest.approx(4 / 6)
    assert score(-torch.ones(3, 2), torch.zeros(3, 2)) == 0.0
    assert score(scores, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_multilabel_training_reports_micro_f1():
    problem = make_problem(tiny_dataset(multilabel=True))
    assert problem.metric == "micro_f1"
    epochs = list(train(make_model(problem), problem, TrainingConfig(epochs=40), seed=0))
    assert epochs[-1].scores.train > 0.9


def test_inductive_training_sees_only_training_nodes(dataset):
    problem = make_problem(dataset, inductive=True)
    view, nodes = problem.training, dataset.train
    assert torch.equal(view.x, dataset.x[nodes]) and torch.equal(view.y, dataset.y[nodes])
    assert torch.equal(view.train, torch.arange(nodes.numel()))
    assert view.graph.matrix.offsets.numel() == nodes.numel() + 1
    assert problem.whole.graph.matrix.offsets.numel() == dataset.num_nodes + 1
    epochs = list(train(make_model(problem), problem, TrainingConfig(epochs=30), seed=0))
    assert epochs[-1].scores.test > 0.7


def test_labels_as_input_feed_some_and_score_the_others(dataset):
    config = GATConfig(
        name="gat", num_layers=2, hidden_channels=8, heads=2, dropout=0.0, label_input=True, label_mask_rate=0.5
    )
    problem = make_problem(dataset, config)
    assert problem.in_channels == 13 + 3
    features, nodes = training_input(problem, seed=1)
    fed = features[:, 13:].sum(1).nonzero().squeeze(1)
    assert set(fed.tolist()) | set(nodes.tolist()) == set(dataset.train.tolist())
    assert not set(fed.tolist()) & set(nodes.tolist())
    assert torch.equal(features[fed, 13:].argmax(1), dataset.y[fed])
    assert 15 < fed.numel() < 45
    assert not torch.equal(training_input(problem, seed=2)[1], nodes)
    everything = with_labels(problem.whole, dataset.train, 3)
    assert everything[:, 13:].sum() == dataset.train.numel()
    epochs = list(train(make_model(problem, config), problem, TrainingConfig(epochs=60), seed=0))
    assert epochs[-1].loss < 0.7 * epochs[0].loss


def test_one_training_node_is_left_to_learn_from():
    dataset = tiny_dataset()
    dataset.train = dataset.train[:1]
    config = GATConfig(name="gat", hidden_channels=4, label_input=True, label_mask_rate=0.99)
    for seed in range(5):
        assert training_input(make_problem(dataset, config), seed=seed)[1].numel() == 1


def test_learning_rate_warms_up_linearly(dataset):
    problem = make_problem(dataset)
    model = make_model(problem)
    config = TrainingConfig(lr=0.1, warmup_epochs=4, optimizer="rmsprop")
    optimization = Optimization(model, config)
    assert isinstance(optimization.optimizer, torch.optim.RMSprop)
    rates = []
    for epoch in range(1, 7):
        step(model, optimization, problem, seed=epoch, epoch=epoch)
        rates.append(optimization.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("grad_norm", [None, 1e-3])
def test_gradients_are_clipped(dataset, grad_norm, precision):
    problem = make_problem(dataset)
    model = make_model(problem)
    config = TrainingConfig(grad_norm=grad_norm)
    loss = model(problem.whole.x, problem.whole.graph).square().sum()
    optimization = Optimization(model, config, precision=precision)
    optimization.backward(loss)
    optimization.update(model, epoch=1)
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=0.01) if grad_norm else norm > 1


@pytest.mark.parametrize("compression", ["none", "iexact", "lowrank"])
def test_loss_that_is_not_finite_stops_with_the_epoch(compression, dataset):
    dataset.x[3] = math.inf
    problem = make_problem(dataset)
    model = make_model(problem, compression=preset(compression))
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(TrainingError, match=r"the training loss is nan at epoch 1"):
        list(train(model, problem, TrainingConfig(epochs=3), seed=0))
    assert all(map(torch.equal, weights, model.parameters()))


def test_evaluation_is_the_same_twice_and_leaves_no_gradient(dataset):
    problem = make_problem(dataset)
    model = make_model(problem, compression=projected(bits=2, kept_frac=0.5))
    assert evaluate(model, problem) == evaluate(model, problem)
    assert all(parameter.grad is None for parameter in model.parameters())


MODELS = [
    SAGE,
    GCNConfig(name="gcn", num_layers=2, hidden_channels=16, dropout=0.2),
    GCN2Config(name="gcn2", num_layers=2, hidden_channels=16, dropout=0.2),
    GATConfig(name="gat", num_layers=2, hidden_channels=8, dropout=0.2, residual=True, edge_dropout=0.2),
    DeeperGCNConfig(name="deepergcn", num_layers=3, hidden_channels=16, dropout=0.2),
]
SCHEMES = {
    "none": FP32,
    "exact": projected(bits=2, kept_frac=0.5, store_dropout_mask=True),
    "shared": projected(bits=2, kept_frac=0.5, col_size=8, share_maps=True),
    "lowrank": CompressionConfig(scheme="lowrank", bits=4, rank=4, col_size=8, share_maps=True),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_trains_under_every_scheme_and_precision(dataset, model, scheme, precision):
    problem = make_problem(dataset, model)
    net = make_model(problem, model, SCHEMES[scheme])
    optimization = Optimization(net, TrainingConfig(epochs=15), precision=precision)
    epochs = list(train_epochs(net, problem, optimization, seed=0))
    assert epochs[-1].loss < 0.9 * epochs[0].loss
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert optimization.scaler.is_enabled() == (precision == "float16")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_in_half_precision_are_those_of_the_exact_twin(dataset, model, precision):
    """8 bits against FP32 maps in the same precision, and both against float32, as close as the type allows."""
    problem = make_problem(dataset, model)

    def gradient(compression, kind):
        net = make_model(problem, model, compression).train()
        training_loss(net, problem, kind="cross_entropy", precision=kind, seed=3).backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    half, full = gradient(projected(), precision), gradient(projected(), "float32")
    assert_close(gradient(projected(bits=8), precision), half, tolerance=0.03)
    assert_close(half, full, tolerance=0.15)
    assert not torch.equal(half, full)


def test_an_overflowing_scale_skips_the_step_and_is_lowered(dataset):
    problem = make_problem(dataset)
    model = make_model(problem, compression=projected(bits=2, kept_frac=0.5))
    optimization = Optimization(model, TrainingConfig(), precision="float16")
    optimization.scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    before = [parameter.clone() for parameter in model.parameters()]
    step(model, optimization, problem, seed=0, epoch=1)
    assert optimization.scaler.get_scale() < 1e30
    assert all(map(torch.equal, before, model.parameters()))


CACHING_MODELS = {
    "sage": SAGE,
    "sage-linear": SAGEConfig(name="sage", num_layers=2, hidden_channels=16, use_linear=True),
    "gcn": GCNConfig(name="gcn", num_layers=2, hidden_channels=16, dropout=0.2),
    "gcn-linear": GCNConfig(name="gcn", num_layers=1, use_linear=True),
    "graphconv": GraphConvConfig(name="graphconv", num_layers=2, hidden_channels=16),
}


@pytest.mark.parametrize("inductive", [False, True], ids=["transductive", "inductive"])
@pytest.mark.parametrize("scheme", ["none", "plain", "lowrank", "iexact"])
@pytest.mark.parametrize("name", CACHING_MODELS)
def test_a_product_that_is_kept_as_data_changes_time_alone(dataset, name, scheme, inductive):
    config, seen = CACHING_MODELS[name], []
    for cached in (False, True):
        problem = prepare(dataset, config, inductive=inductive, device=CPU, cache_first_aggregate=cached)
        assert problem.first_aggregate_cached == cached
        model = make_model(problem, config, preset(scheme))
        torch.manual_seed(7)  # the plain schemes' dropout
        training_loss(model, problem, kind="cross_entropy", precision="float32", seed=3).backward()
        model.eval()
        with torch.no_grad():
            scores = model(problem.whole.x, problem.whole.graph)
        seen.append([scores, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_product_that_is_kept_saves_two_products_a_step_and_counts_as_data(dataset, monkeypatch):
    products = []
    for name in ("matmul", "adjoint_matmul", "adjoint_matmul_", "matmul_"):
        found = getattr(Adjacency, name)
        monkeypatch.setattr(
            Adjacency,
            name,
            lambda self, *args, found=found, name=name, **options: (
                products.append(name) or found(self, *args, **options)
            ),
        )
    counts, sizes = [], []
    for cached in (False, True):
        problem = prepare(dataset, SAGE, inductive=False, device=CPU, cache_first_aggregate=cached)
        model = make_model(problem, SAGE, preset("lowrank"))
        products.clear()
        training_loss(model, problem, kind="cross_entropy", precision="float32", seed=3).backward()
        counts.append(len(products))
        sizes.append(total_bytes(problem.tensors()))
    assert counts == [4, 2]
    assert sizes[1] - sizes[0] == dataset.x.nbytes
    assert total_bytes(problem.without_cache().tensors()) == sizes[0]
    plain = problem.without_cache()
    assert plain.training is plain.whole and not plain.first_aggregate_cached


@pytest.mark.parametrize(
    ("overrides", "free", "expected"),
    [
        ((), 1 << 40, True),
        (("model=gcn",), 1 << 40, True),
        (("model=gcn2",), 1 << 40, False),
        (("model.input_dropout=0.1",), 1 << 40, False),
        (("compression=iexact",), 1 << 40, False),
        (("compression=none",), 1 << 40, False),
        (("compression=none", "training.cache_first_aggregate=true"), None, True),
        (("training.cache_first_aggregate=false",), 1 << 40, False),
        ((), None, False),
        ((), 10 * 4 * 101 * 13, True),
        ((), 10 * 4 * 101 * 13 - 1, False),
        (("dataset.inductive=true",), 10 * 4 * 101 * 13, False),
    ],
    ids=str,
)
def test_the_product_is_kept_where_it_is_of_use_and_a_tenth_of_the_memory_holds_it(overrides, free, expected, dataset):
    config = compose_config("compression=lowrank", *overrides)
    assert caches_first_aggregate(config, dataset.x.nbytes, available=free) == expected


@pytest.mark.parametrize("overrides", [("model=gat",), ("compression=iexact",), ("model.input_dropout=0.5",)], ids=str)
def test_a_product_that_no_pass_could_use_is_refused(overrides, dataset):
    config = compose_config("compression=lowrank", "training.cache_first_aggregate=true", *overrides)
    with pytest.raises(ConfigError, match="training.cache_first_aggregate=true: needs sage, gcn or graphconv"):
        caches_first_aggregate(config, dataset.x.nbytes, available=None)
