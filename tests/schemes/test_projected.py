"""The projected scheme in a whole SAGE: exact forward, memory by the formula, unbiased gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from conftest import assert_close, projected, tiny_dataset
from iexact_runner.compression.seeds import mix
from iexact_runner.config import CompressionConfig, SAGEConfig
from iexact_runner.data.graph import mean_adjacency
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import build_model
from iexact_runner.nn.sage import SAGEConv
from iexact_runner.schemes import Activation, start_pass
from iexact_runner.schemes.activation import Kept

LAYOUT = dict(bits=2, kept_frac=0.125, max_block_size=1024, store_dropout_mask=True)


def sage(compression, **fields):
    torch.manual_seed(0)
    config = SAGEConfig(name="sage", **({"num_layers": 3, "hidden_channels": 32, "dropout": 0.5} | fields))
    return build_model(config, in_channels=13, out_channels=3, compression=compression)


def gradient(model, dataset, *, seed=1):
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    model.train()
    model.zero_grad()
    scores = model(dataset.x, graph, seed=seed)
    torch.nn.functional.cross_entropy(scores, dataset.y).backward()
    return scores.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_forward_is_exact_and_eight_bits_are_close(dataset):
    """FP32 maps with the same seeded masks are the exact twin."""
    exact_scores, exact = gradient(sage(projected()), dataset)
    scores, compressed = gradient(sage(projected(bits=8)), dataset)
    assert torch.equal(scores, exact_scores)
    assert_close(compressed, exact, tolerance=0.02)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, None])
@pytest.mark.parametrize("kept_frac", [1.0, 0.3])
def test_forward_is_exact_under_every_setting(dataset, bits, kept_frac):
    expected, _ = gradient(sage(projected()), dataset)
    scores, grad = gradient(sage(projected(bits=bits, kept_frac=kept_frac, col_size=5)), dataset)
    assert torch.equal(scores, expected) and grad.isfinite().all()


def test_alpha_changes_the_kept_codes_and_nothing_else(dataset):
    scores, uniform = gradient(sage(projected(bits=2)), dataset)
    uneven_scores, uneven = gradient(sage(projected(bits=2, alpha=0.8)), dataset)
    assert torch.equal(uneven_scores, scores) and not torch.equal(uneven, uniform)
    kept = [sum(record.bytes for record in kept_bytes(projected(bits=2, alpha=a), dataset)) for a in (1.0, 0.8)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_optimal_levels_change_the_kept_codes_and_nothing_else(dataset, bits):
    fields = {"bits": bits, "col_size": 8}
    scores, uniform = gradient(sage(projected(**fields)), dataset)
    optimal_scores, optimal = gradient(sage(projected(**fields, levels="optimal")), dataset)
    assert torch.equal(optimal_scores, scores) and not torch.equal(optimal, uniform)
    sizes = [
        sum(record.bytes for record in kept_bytes(projected(**fields, levels=levels), dataset))
        for levels in ("uniform", "optimal")
    ]
    assert sizes[0] == sizes[1]


def test_automatic_alpha_is_all_optimal_levels_of_two_bits(dataset):
    _, automatic = gradient(sage(projected(bits=2, alpha="auto")), dataset)
    _, optimal = gradient(sage(projected(bits=2, levels="optimal")), dataset)
    assert torch.equal(automatic, optimal)


def test_without_dropout_and_compression_the_gradient_is_that_of_fp32(dataset):
    plain_scores, plain = gradient(sage(CompressionConfig(scheme="none"), dropout=0.0), dataset)
    scores, kept = gradient(sage(projected(), dropout=0.0), dataset)
    assert_close(scores, plain_scores)
    assert_close(kept, plain, tolerance=1e-4)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", ""])
def test_shared_maps_change_memory_but_not_the_result(dataset, residual, batch_norm):
    fields = dict(residual=residual, batch_norm=batch_norm)
    scores, grad = gradient(sage(projected(), **fields), dataset)
    shared_scores, shared = gradient(sage(projected(share_maps=True), **fields), dataset)
    assert_close(shared_scores, scores, tolerance=1e-4)
    assert_close(shared, grad, tolerance=1e-3)


def test_stored_and_regenerated_dropout_masks_are_the_same(dataset):
    _, stored = gradient(sage(projected(store_dropout_mask=True)), dataset)
    _, regenerated = gradient(sage(projected()), dataset)
    assert torch.equal(stored, regenerated)


def test_same_seed_same_gradient_and_another_differs(dataset):
    config = projected(**LAYOUT)
    first, again, other = (gradient(sage(config), dataset, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_tensor_seed_is_saved_like_every_other_tensor(dataset):
    config = projected(bits=2, kept_frac=0.5)
    _, from_int = gradient(sage(config), dataset, seed=5)
    _, from_tensor = gradient(sage(config), dataset, seed=torch.tensor(5))
    assert torch.equal(from_int, from_tensor)


def test_running_statistics_follow_batch_norm(dataset):
    models = [sage(CompressionConfig(scheme="none"), dropout=0.0), sage(projected(**LAYOUT), dropout=0.0)]
    for model in models:
        gradient(model, dataset)
    for plain, compressed in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert_close(compressed.float(), plain.float())


def test_evaluation_is_exact_and_keeps_nothing(dataset):
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    model = sage(projected(**LAYOUT)).eval()
    twin = copy.deepcopy(model)
    twin.compression = CompressionConfig(scheme="none")
    assert torch.equal(model(dataset.x, graph), twin(dataset.x, graph))


def test_training_pass_without_gradients_works(dataset):
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    with torch.no_grad():
        scores = sage(projected(**LAYOUT)).train()(dataset.x, graph, seed=1)
    assert scores.isfinite().all()


def kept_bytes(config, dataset, **fields):
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    model = sage(config, **fields).train()
    excluded = [dataset.x, dataset.y, *graph.tensors()]
    with SavedTensors(model, excluded=excluded) as saved:
        return saved.kept(model(dataset.x, graph, seed=0))


@pytest.mark.parametrize("col_size", [0, 2, 8, 64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_kept_bytes_are_those_of_the_formula(col_size, bits):
    """Two projected maps a layer, two BatchNorm inputs, four masks (section 5 of the specification)."""
    nodes, features, hidden = 1024, 13, 32
    dataset = tiny_dataset(nodes=nodes)
    records = kept_bytes(projected(**(LAYOUT | {"bits": bits}), col_size=col_size), dataset)

    def quantized(columns, width):
        rows = max(1, col_size)
        rows = min(rows, round(1024 / columns)) if rows * columns > 1024 else rows
        return nodes * columns * bits / 8 + 4 * math.ceil(nodes * columns / (rows * columns))

    maps = 2 * quantized(2, features) + 4 * quantized(4, hidden)
    norms = 2 * (quantized(hidden, hidden) + 2 * 4 * hidden)  # with batch mean and deviation
    masks = 4 * nodes * hidden / 8
    assert sum(record.bytes for record in records) == maps + norms + masks


@pytest.mark.parametrize(("input_dropout", "fp32_bytes"), [(0.0, 0), (0.3, 4 * 101 * 13)], ids=["resident", "dropped"])
def test_only_untouched_features_are_free_in_fp32(dataset, input_dropout, fp32_bytes):
    config = projected(bits=2, share_maps=True)
    first = kept_bytes(config, dataset, input_dropout=input_dropout)[0]
    assert (first.op, first.shape, first.bytes_fp32) == ("GraphLinearBackward", (101, 13), fp32_bytes)


def test_switches_of_the_layout_save_what_they_promise():
    nodes, hidden = 1024, 32
    dataset = tiny_dataset(nodes=nodes)
    total = {
        name: sum(record.bytes for record in kept_bytes(projected(**(LAYOUT | change)), dataset))
        for name, change in (
            ("published", {}),
            ("regenerated", {"store_dropout_mask": False}),
            ("shared", {"share_maps": True}),
        )
    }
    assert total["published"] - total["regenerated"] == 2 * nodes * hidden / 8
    small, large = nodes * 2 * 2 / 8 + 4 * nodes, nodes * 4 * 2 / 8 + 4 * nodes
    assert total["published"] - total["shared"] == small + 2 * large
    shared = kept_bytes(projected(**(LAYOUT | {"share_maps": True})), dataset)
    assert sum(record.op == "GraphLinearBackward" for record in shared) == 3


@pytest.mark.parametrize("levels", ["uniform", "optimal"])
def test_sage_layer_gradients_are_unbiased(levels):
    """All parameters of one SAGE layer under INT2 and projection: 20 functionals, 4 standard errors."""
    dataset = tiny_dataset(nodes=61)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    torch.manual_seed(0)
    conv = SAGEConv(13, 5)
    grad = torch.randn(61, 5)

    def layer_gradient(config, seed):
        conv.zero_grad()
        ops = start_pass(config, training=True, seed=seed)
        conv(Activation(dataset.x, Kept()), graph, ops).backward(grad)
        return torch.cat([parameter.grad.flatten() for parameter in conv.parameters()])

    exact = layer_gradient(CompressionConfig(scheme="none"), 0)
    functionals = torch.randn(20, exact.numel())
    config = projected(bits=2, kept_frac=0.25, col_size=4, levels=levels)
    errors = torch.stack([functionals @ (layer_gradient(config, mix(seed)) - exact) for seed in range(600)])
    standard_error = errors.std(0) / math.sqrt(len(errors))
    assert (errors.mean(0).abs() < 4 * standard_error).all()
    assert errors.abs().mean() > 0.1  # there is noise to average away
