"""Every model under compression against its exact twin: forward pass, every gradient, bias, masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import FP32, assert_close, projected, relative_error, tiny_dataset
from iexact_runner.compression.seeds import mix
from iexact_runner.config import DeeperGCNConfig, GATConfig, GCN2Config, GCNConfig, GraphConvConfig, SAGEConfig
from iexact_runner.nn import MODELS, build_model
from iexact_runner.nn.gat import GATConv
from iexact_runner.nn.gcn import GCNConv
from iexact_runner.nn.gcn2 import GCN2Conv
from iexact_runner.schemes import Activation, start_pass
from iexact_runner.schemes.activation import Kept

FIELDS = dict(num_layers=3, hidden_channels=16, dropout=0.4)
CONFIGS = {
    "sage": SAGEConfig(name="sage", **FIELDS),
    "sage-residual": SAGEConfig(name="sage", residual=True, batch_norm=False, **FIELDS),
    "gcn": GCNConfig(name="gcn", **FIELDS),
    "gcn-residual": GCNConfig(name="gcn", residual=True, input_dropout=0.2, **FIELDS),
    "gcn2": GCN2Config(name="gcn2", input_dropout=0.1, **FIELDS),
    "gcn2-residual": GCN2Config(name="gcn2", theta=None, residual=True, **FIELDS),
    "gcn2-shared": GCN2Config(name="gcn2", shared_weights=True, **FIELDS),
    "gat": GATConfig(name="gat", heads=3, residual=True, **FIELDS),
    "gat-arxiv": GATConfig(name="gat", shared_attention=True, edge_dropout=0.5, input_dropout=0.2, **FIELDS),
    "gat-attention": GATConfig(name="gat", heads=2, attention_dropout=0.3, **FIELDS),
    "gcn-linear": GCNConfig(name="gcn", use_linear=True, **FIELDS),
    "graphconv": GraphConvConfig(name="graphconv", **FIELDS),
    "gcn-dropout2": GCNConfig(name="gcn", dropout2=True, input_dropout=0.2, **FIELDS),
    "gcn2-dropout2": GCN2Config(name="gcn2", dropout2=True, residual=True, **FIELDS),
    "sage-linear": SAGEConfig(name="sage", use_linear=True, **FIELDS),
    "deepergcn": DeeperGCNConfig(name="deepergcn", input_dropout=0.1, **FIELDS),
    "deepergcn-plain": DeeperGCNConfig(name="deepergcn", residual=False, batch_norm=False, **FIELDS),
    "deepergcn-full": DeeperGCNConfig(name="deepergcn", t=1.0, semi_grad=False, **FIELDS),
}
GAT_OPTIONS = dict(shared_attention=False, residual=True, attention_dropout=0.0, initial_weights="glorot")
EXACT = projected()


def gradients(config, compression, dataset, *, seed=1):
    """Scores of a training pass and the gradient of each parameter by name."""
    torch.manual_seed(0)
    model = build_model(config, in_channels=13, out_channels=3, compression=compression).train()
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    scores = model(dataset.x, graph, seed=seed)
    F.cross_entropy(scores, dataset.y).backward()
    return scores.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_twin_equals_fp32_where_nothing_is_dropped(name, symmetric):
    """Dropout of the FP32 scheme is torch's own, so the two are compared without it."""
    rates = ("dropout", "input_dropout", "edge_dropout", "attention_dropout")
    fields = {key: 0.0 for key in rates if hasattr(CONFIGS[name], key)}
    config = type(CONFIGS[name])(**(vars(CONFIGS[name]) | fields))
    dataset = tiny_dataset(symmetric=symmetric)
    expected, plain = gradients(config, FP32, dataset)
    scores, exact = gradients(config, EXACT, dataset)
    assert_close(scores, expected)
    largest = max(gradient.norm() for gradient in plain.values())
    for key, gradient in plain.items():
        # A bias before BatchNorm has gradient zero: only rounding is left to compare.
        assert (exact[key] - gradient).norm() < 1e-5 * largest or relative_error(exact[key], gradient) < 1e-4, key


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_eight_bits_give_every_gradient_of_the_exact_twin(name, symmetric):
    """Same masks and the same forward pass to the bit; a bin is 1/255 of a row's range."""
    dataset = tiny_dataset(symmetric=symmetric)
    expected, exact = gradients(CONFIGS[name], EXACT, dataset)
    scores, compressed = gradients(CONFIGS[name], projected(bits=8), dataset)
    assert torch.equal(scores, expected)
    largest = max(gradient.norm() for gradient in exact.values())
    for key, gradient in exact.items():
        assert (compressed[key] - gradient).norm() < 0.02 * gradient.norm() + 0.005 * largest, key


@pytest.mark.parametrize("layout", [dict(store_dropout_mask=True), dict(share_maps=True)], ids=["stored", "shared"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layout_does_not_change_masks_or_gradients(name, layout, dataset):
    expected, exact = gradients(CONFIGS[name], EXACT, dataset)
    scores, other = gradients(CONFIGS[name], projected(**layout), dataset)
    assert_close(scores, expected)
    assert_close(torch.cat([g.flatten() for g in other.values()]), torch.cat([g.flatten() for g in exact.values()]))


@pytest.mark.parametrize(
    "fields", [dict(bits=1), dict(bits=2, kept_frac=0.3, col_size=5), dict(kept_frac=0.3)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_exact_under_every_setting(name, fields, dataset):
    expected, _ = gradients(CONFIGS[name], EXACT, dataset)
    scores, compressed = gradients(CONFIGS[name], projected(**fields), dataset)
    assert torch.equal(scores, expected)
    assert all(gradient.isfinite().all() for gradient in compressed.values())


CONVOLUTIONS = {
    "gcn": lambda: GCNConv(13, 5, use_linear=False),
    "gcn2": lambda: GCN2Conv(13, alpha=0.2, theta=0.5, layer=1, shared_weights=False),
    "gat": lambda: GATConv(13, 4, heads=2, **GAT_OPTIONS),
}


@pytest.mark.parametrize(("bits", "kept_frac"), [(1, 1.0), (2, 1.0), (4, 1.0), (None, 0.25), (2, 0.25)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weight_gradients_of_a_convolution_are_unbiased(name, bits, kept_frac):
    """20 fixed functionals, 4 standard errors. GAT's attention vectors are biased and stand with the operation."""
    dataset = tiny_dataset(nodes=41)
    graph = MODELS[name].build_graph(dataset.edge_index, dataset.num_nodes)
    torch.manual_seed(0)
    conv = CONVOLUTIONS[name]()
    names = [key for key, _ in conv.named_parameters() if not key.startswith("att")]
    initial = [torch.randn(41, 13)] if name == "gcn2" else []

    def forward(compression, seed):
        ops = start_pass(compression, training=True, seed=seed)
        return conv(Activation(dataset.x, Kept()), graph, ops, *[Activation(x, Kept()) for x in initial])

    grad = torch.randn_like(forward(FP32, 0))

    def gradient(compression, seed):
        conv.zero_grad()
        forward(compression, seed).backward(grad)
        return torch.cat([conv.get_parameter(key).grad.flatten() for key in names])

    exact = gradient(FP32, 0)
    functionals = torch.randn(20, exact.numel())
    config = projected(bits=bits, kept_frac=kept_frac, col_size=4)
    errors = torch.stack([functionals @ (gradient(config, mix(seed)) - exact) for seed in range(400)])
    standard_error = errors.std(0) / math.sqrt(len(errors))
    assert (errors.mean(0).abs() < 4 * standard_error).all()
    assert errors.abs().mean() > 0.01  # there is noise to average away


@pytest.mark.parametrize("name", CONFIGS)
def test_map_seed_varies_the_maps_and_leaves_the_masks(name, dataset):
    config, compression = CONFIGS[name], projected(bits=2, kept_frac=0.5)
    torch.manual_seed(0)
    model = build_model(config, in_channels=13, out_channels=3, compression=compression).train()
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    scores, grads = [], []
    for map_seed in (None, 1, 2, 2):
        model.zero_grad()
        out = model(dataset.x, graph, seed=1, map_seed=map_seed)
        F.cross_entropy(out, dataset.y).backward()
        scores.append(out.detach())
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert all(torch.equal(scores[0], other) for other in scores[1:])
    assert torch.equal(grads[2], grads[3]) and not torch.equal(grads[1], grads[2])
    assert torch.equal(grads[0], grads[1])  # without one, maps follow the seed of the masks
