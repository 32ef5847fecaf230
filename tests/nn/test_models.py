"""FP32 training equals plain PyG modules: outputs, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import FP32, assert_close, tiny_dataset
from iexact_runner.config import CompressionConfig, GATConfig, GCN2Config, GCNConfig, ModelConfig, SAGEConfig
from iexact_runner.data.graph import attention_edges
from iexact_runner.errors import ConfigError
from iexact_runner.nn import MODELS, build_model
from iexact_runner.nn.baseline import PyGBaseline, baseline_graph

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
]


def name(config: ModelConfig) -> str:
    changed = [field for field in ("residual",) if getattr(config, field)]
    extra = [] if config.batch_norm else ["no-norm"]
    if isinstance(config, GCN2Config):
        extra += [f"theta={config.theta}", "shared"] if config.shared_weights else [f"theta={config.theta}"]
    return "-".join([config.name, str(config.num_layers), *changed, *extra])


def pair(config, dataset, *, share_maps=False):
    """Our model and PyG's with the same parameters, and what each takes for a graph."""
    torch.manual_seed(0)
    compression = CompressionConfig(scheme="none", share_maps=share_maps)
    model = build_model(config, in_channels=13, out_channels=3, compression=compression)
    baseline = PyGBaseline(config, in_channels=13, out_channels=3)
    ours, theirs = list(model.parameters()), list(baseline.parameters())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    with torch.no_grad():
        for key, value in baseline.named_parameters():
            value.copy_(model.get_parameter(translated(key, config)))
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    return model, baseline, graph, baseline_graph(graph)


def translated(key: str, config: ModelConfig) -> str:
    """Where a parameter of PyG's chain lives in ours."""
    kind, _, rest = key.partition(".")
    if kind in ("lin_in", "lin_out"):
        return key
    index, _, rest = rest.partition(".")
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


def test_unknown_model_is_named():
    with pytest.raises(ConfigError, match=r"model.name=gin: must be one of sage, gcn, gcn2, gat"):
        build_model(ModelConfig(name="gin"), in_channels=1, out_channels=1, compression=FP32)


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
