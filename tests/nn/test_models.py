"""FP32 training equals plain PyG modules: outputs, gradients, running statistics."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import FP32, assert_close, tiny_dataset
from iexact_runner.config import (
    CompressionConfig,
    DeeperGCNConfig,
    GATConfig,
    GCN2Config,
    GCNConfig,
    GraphConvConfig,
    ModelConfig,
    SAGEConfig,
)
from iexact_runner.data.graph import attention_edges
from iexact_runner.errors import ConfigError
from iexact_runner.nn import MODELS, build_model
from iexact_runner.nn.baseline import baseline_graph, build_baseline
from iexact_runner.schemes import Plain

SMALL = dict(num_layers=3, hidden_channels=8, dropout=0.0)
CONFIGS = [
    SAGEConfig(name="sage", **SMALL),
    SAGEConfig(name="sage", residual=True, **SMALL),
    SAGEConfig(name="sage", batch_norm=False, **SMALL),
    SAGEConfig(name="sage", **(SMALL | {"num_layers": 1})),
    GCNConfig(name="gcn", **SMALL),
    GCNConfig(name="gcn", residual=True, **SMALL),
    GCN2Config(name="gcn2", alpha=0.1, theta=0.5, **SMALL),
    GCN2Config(name="gcn2", alpha=0.5, theta=None, residual=True, **SMALL),
    GCN2Config(name="gcn2", shared_weights=True, **SMALL),
    GATConfig(name="gat", heads=3, **SMALL),
    GATConfig(name="gat", heads=2, residual=True, **SMALL),
    GraphConvConfig(name="graphconv", **SMALL),
    DeeperGCNConfig(name="deepergcn", **SMALL),
    DeeperGCNConfig(name="deepergcn", residual=False, t=1.0, semi_grad=False, **SMALL),
    DeeperGCNConfig(name="deepergcn", batch_norm=False, **(SMALL | {"num_layers": 1})),
]


def name(config: ModelConfig) -> str:
    changed = [field for field in ("residual",) if getattr(config, field)]
    extra = [] if config.batch_norm else ["no-norm"]
    if isinstance(config, DeeperGCNConfig):
        extra += ["semi-gradient"] if config.semi_grad else ["full"]
    if isinstance(config, GCN2Config):
        extra += [f"theta={config.theta}", "shared"] if config.shared_weights else [f"theta={config.theta}"]
    return "-".join([config.name, str(config.num_layers), *changed, *extra])


def pair(config, dataset, *, share_maps=False):
    """Our model and PyG's with the same parameters, and what each takes for a graph."""
    torch.manual_seed(0)
    compression = CompressionConfig(scheme="none", share_maps=share_maps)
    model = build_model(config, in_channels=13, out_channels=3, compression=compression)
    baseline = build_baseline(config, in_channels=13, out_channels=3)
    ours, theirs = list(model.parameters()), list(baseline.parameters())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    with torch.no_grad():
        for key, value in baseline.named_parameters():
            value.copy_(model.get_parameter(translated(key, config)))
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    return model, baseline, graph, baseline_graph(graph, config)


def translated(key: str, config: ModelConfig) -> str:
    """Where a parameter of PyG's chain lives in ours."""
    kind, _, rest = key.partition(".")
    if kind in ("lin_in", "lin_out"):
        return key
    index, _, rest = rest.partition(".")
    if config.name == "deepergcn":
        return key.replace("mlp.0", "lin")
    blocks = config.num_layers if config.name == "gcn2" else config.num_layers - 1
    if kind == "norms":
        return f"blocks.{index}.norm.{rest}"
    return f"blocks.{index}.conv.{rest}" if int(index) < blocks else f"head.{rest}"


@pytest.mark.parametrize("share_maps", [False, True], ids=["plain", "one map"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_fp32_equals_plain_pyg_modules(config, symmetric, share_maps):
    dataset = tiny_dataset(symmetric=symmetric)
    model, baseline, graph, adjacency = pair(config, dataset, share_maps=share_maps)
    for training in (True, False):
        model.train(training)
        baseline.train(training)
        scores, expected = model(dataset.x, graph), baseline(dataset.x, adjacency)
        assert_close(scores, expected, tolerance=1e-5)
    F.cross_entropy(scores, dataset.y).backward()
    F.cross_entropy(expected, dataset.y).backward()
    for key, parameter in baseline.named_parameters():
        assert_close(model.get_parameter(translated(key, config)).grad, parameter.grad, tolerance=1e-4)
    for key, statistic in baseline.named_buffers():
        assert_close(model.get_buffer(translated(key, config)).float(), statistic.float())


def test_gradients_in_training_mode_equal_too(dataset):
    """Batch statistics take part in the gradient: evaluation mode would not show it."""
    for config in (CONFIGS[0], CONFIGS[4], CONFIGS[6], CONFIGS[9]):
        model, baseline, graph, adjacency = pair(config, dataset)
        for net, operator in ((model, graph), (baseline, adjacency)):
            F.cross_entropy(net.train()(dataset.x, operator), dataset.y).backward()
        for key, parameter in baseline.named_parameters():
            ours = model.get_parameter(translated(key, config)).grad
            # A bias before BatchNorm has gradient zero: only rounding is left to compare.
            assert (ours - parameter.grad).abs().max() < 1e-6 or relative(ours, parameter.grad) < 1e-4


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_shared_attention_scores_both_ends_with_one_vector(dataset):
    shared = GATConfig(name="gat", shared_attention=True, **SMALL)
    separate = GATConfig(name="gat", **SMALL)
    torch.manual_seed(0)
    first = build_model(shared, in_channels=13, out_channels=3, compression=FP32).eval()
    second = build_model(separate, in_channels=13, out_channels=3, compression=FP32).eval()
    state = first.state_dict()
    state |= {key.replace("att_src", "att_dst"): value for key, value in state.items() if "att_src" in key}
    second.load_state_dict(state)
    graph = attention_edges(dataset.edge_index, dataset.num_nodes)
    assert_close(first(dataset.x, graph), second(dataset.x, graph))


def test_edge_dropout_depends_on_the_seed_and_only_in_training(dataset):
    config = GATConfig(name="gat", edge_dropout=0.7, **SMALL)
    model = build_model(config, in_channels=13, out_channels=3, compression=FP32)
    graph = attention_edges(dataset.edge_index, dataset.num_nodes)
    first, again, other = (model(dataset.x, graph, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    model.eval()
    assert torch.equal(model(dataset.x, graph, seed=1), model(dataset.x, graph, seed=2))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7])
def test_exactly_as_many_edges_are_dropped_as_published(dataset, p):
    edges = attention_edges(dataset.edge_index, dataset.num_nodes)
    count, rows, columns = edges.columns.numel(), edges.rows(), edges.columns.long()
    keys = rows * dataset.num_nodes + columns
    kept = torch.zeros(count)
    draws = 300
    for seed in range(draws):
        left = Plain(training=True, seed=seed).drop_edges(edges, p, exactly=True)
        assert left.columns.numel() == count - int(p * count)
        kept += torch.isin(keys, left.rows() * dataset.num_nodes + left.columns.long())
    deviation = max((p * (1 - p) / draws) ** 0.5, 1e-12)
    assert ((kept / draws - (1 - p)).abs() / deviation).max() < 5  # self-loops like all others
    again = Plain(training=True, seed=draws - 1).drop_edges(edges, p, exactly=True)
    assert torch.equal(again.columns, left.columns)
    spared = Plain(training=True, seed=0).drop_edges(edges, p)
    assert (spared.rows() == spared.columns).sum() == (rows == columns).sum()


def test_published_initial_weights_are_normal_with_a_gain_of_relu():
    config = GATConfig(name="gat", heads=3, num_layers=2, hidden_channels=200, initial_weights="xavier_normal")
    torch.manual_seed(0)
    conv = build_model(config, in_channels=300, out_channels=3, compression=FP32).blocks[0].conv
    weight, vector = conv.lin.weight, conv.att_src
    assert weight.std().item() == pytest.approx((2 * 2 / (300 + 600)) ** 0.5, rel=0.02)
    assert vector.std().item() == pytest.approx((2 * 2 / (3 * 200 + 200)) ** 0.5, rel=0.1)
    assert (weight.abs() > 3 * weight.std()).float().mean().item() == pytest.approx(0.0027, abs=0.001)


@pytest.mark.parametrize("config_class", [GCNConfig, SAGEConfig], ids=["gcn", "sage"])
def test_a_linear_map_is_added_to_a_convolution(config_class, dataset):
    name = config_class.__name__.removesuffix("Config").lower()
    config = config_class(name=name, use_linear=True, **(SMALL | {"num_layers": 1}))
    model = build_model(config, in_channels=13, out_channels=3, compression=FP32)
    graph = MODELS[name].build_graph(dataset.edge_index, dataset.num_nodes)
    scores, conv = model(dataset.x, graph), model.head
    conv.res.weight, linear = nn.Parameter(torch.zeros_like(conv.res.weight)), conv.res.weight
    assert_close(scores, model(dataset.x, graph) + dataset.x @ linear.T)


TWICE = [
    (SAGEConfig(name="sage", batch_norm=False, **(SMALL | {"num_layers": 2, "dropout": 0.5})), 1),
    (GCNConfig(name="gcn", batch_norm=False, **(SMALL | {"num_layers": 2, "dropout": 0.5})), 1),
    (DeeperGCNConfig(name="deepergcn", batch_norm=False, **(SMALL | {"num_layers": 1, "dropout": 0.5})), 1),
    (GCN2Config(name="gcn2", alpha=0.0, batch_norm=False, **(SMALL | {"num_layers": 1, "dropout": 0.5})), 2),
]


@pytest.mark.parametrize(("config", "times"), TWICE, ids=[config.name for config, _ in TWICE])
def test_dropout2_scales_what_is_kept_in_training_and_in_evaluation(config, times, dataset):
    """All that follows is linear, or a ReLU, so that the scores less the last bias scale too."""
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    for training in (True, False):
        outputs = []
        for dropout2 in (False, True):
            torch.manual_seed(0)
            same = dataclasses.replace(config, dropout2=dropout2)
            model = build_model(same, in_channels=13, out_channels=3, compression=FP32).train(training)
            torch.manual_seed(1)
            last = model.head if hasattr(model, "head") else model.lin_out
            bias = last.lin_l.bias if hasattr(last, "lin_l") else last.bias
            outputs.append(model(dataset.x, graph) - bias)
        assert_close(outputs[1], 0.5**times * outputs[0])


def test_attention_dropout_is_of_training_and_keeps_the_mean(dataset):
    config = GATConfig(name="gat", heads=2, attention_dropout=0.5, **(SMALL | {"num_layers": 1}))
    model = build_model(config, in_channels=13, out_channels=3, compression=FP32)
    graph = attention_edges(dataset.edge_index, dataset.num_nodes)
    exact = model.eval()(dataset.x, graph)
    assert torch.equal(exact, model(dataset.x, graph))
    draws = torch.stack([model.train()(dataset.x, graph, seed=seed).detach() for seed in range(400)])
    error, spread = draws.mean(0) - exact, draws.std(0) / 20
    assert (draws[0] != draws[1]).any() and (error.abs() / spread.clamp(min=1e-6)).max() < 5


def test_unknown_model_is_named():
    with pytest.raises(
        ConfigError, match=r"model.name=mlp: must be one of sage, gcn, gcn2, gat, graphconv, deepergcn, module"
    ):
        build_model(ModelConfig(name="mlp"), in_channels=1, out_channels=1, compression=FP32)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4], CONFIGS[6], CONFIGS[9]], ids=name)
def test_reset_parameters_gives_a_fresh_model(config, dataset):
    def fresh():
        torch.manual_seed(3)
        return build_model(config, in_channels=13, out_channels=3, compression=FP32)

    model = build_model(config, in_channels=13, out_channels=3, compression=FP32)
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    model(dataset.x, graph)  # moves the running statistics
    used = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_parameters()
    assert all(torch.equal(model.get_buffer(key), value) for key, value in fresh().named_buffers())
    weights = [key for key, value in model.named_parameters() if value.dim() > 1]
    assert weights and all((model.get_parameter(key) != used[key]).any() for key in weights)
