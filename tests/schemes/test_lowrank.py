"""The low-rank scheme in whole models: exact forward, exact gradients at full rank, what is kept, what is renewed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close, projected, relative_error, tiny_dataset
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions, followed_directions, leading_directions
from iexact_runner.compression.seeds import mix
from iexact_runner.compression.sketch import SketchLayout
from iexact_runner.config import (
    CompressionConfig,
    DeeperGCNConfig,
    GATConfig,
    GCN2Config,
    GCNConfig,
    GraphConvConfig,
    SAGEConfig,
)
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import MODELS, build_model
from iexact_runner.schemes import lowrank

FIELDS = dict(num_layers=3, hidden_channels=16, dropout=0.4)
CONFIGS = {
    "sage": SAGEConfig(name="sage", **FIELDS),
    "sage-residual": SAGEConfig(name="sage", residual=True, **FIELDS),
    "sage-no-norm": SAGEConfig(name="sage", batch_norm=False, **FIELDS),
    "sage-no-dropout": SAGEConfig(name="sage", **(FIELDS | {"dropout": 0.0})),
    "gcn": GCNConfig(name="gcn", input_dropout=0.2, **FIELDS),
    "gcn2": GCN2Config(name="gcn2", input_dropout=0.1, **FIELDS),
    "gcn2-residual": GCN2Config(name="gcn2", theta=None, residual=True, **FIELDS),
    "gcn2-shared": GCN2Config(name="gcn2", shared_weights=True, **FIELDS),
    "gat": GATConfig(name="gat", heads=3, residual=True, **FIELDS),
    "gat-arxiv": GATConfig(name="gat", shared_attention=True, edge_dropout=0.5, input_dropout=0.2, **FIELDS),
    "gat-attention": GATConfig(name="gat", heads=3, residual=True, attention_dropout=0.3, **FIELDS),
    "gcn-linear": GCNConfig(name="gcn", use_linear=True, **FIELDS),
    "graphconv": GraphConvConfig(name="graphconv", **FIELDS),
    "gcn-dropout2": GCNConfig(name="gcn", dropout2=True, input_dropout=0.2, **FIELDS),
    "gcn2-dropout2": GCN2Config(name="gcn2", dropout2=True, residual=True, **FIELDS),
    "sage-linear": SAGEConfig(name="sage", use_linear=True, **FIELDS),
    "deepergcn": DeeperGCNConfig(name="deepergcn", input_dropout=0.1, **FIELDS),
    "deepergcn-plain": DeeperGCNConfig(name="deepergcn", residual=False, batch_norm=False, **FIELDS),
    "deepergcn-full": DeeperGCNConfig(name="deepergcn", t=1.0, semi_grad=False, **FIELDS),
}
TWIN = projected(share_maps=True)
# The block normalises in one pass of its own, which rounds at every step; torch's need not.
ROUNDING = 1e-6


def low_rank(**fields):
    return CompressionConfig(**(dict(scheme="lowrank", bits=4, rank=8, share_maps=True) | fields))


def make(config, compression):
    torch.manual_seed(0)
    return build_model(config, in_channels=13, out_channels=3, compression=compression).train()


def gradient(model, config, dataset, *, seed=1, map_seed=None):
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    model.zero_grad()
    scores = model(dataset.x, graph, seed=seed, map_seed=map_seed)
    F.cross_entropy(scores, dataset.y).backward()
    return scores.detach(), {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def joined(gradients):
    return torch.cat([part.flatten() for part in gradients.values()])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_directions_without_rounding_give_the_exact_gradient(name, symmetric):
    dataset, config = tiny_dataset(symmetric=symmetric), CONFIGS[name]
    expected, exact = gradient(make(config, TWIN), config, dataset)
    scores, found = gradient(make(config, low_rank(rank=99, bits=None)), config, dataset)
    assert_close(scores, expected, tolerance=ROUNDING)
    largest = max(part.norm() for part in exact.values())
    for key, part in exact.items():
        assert (found[key] - part).norm() < 1e-4 * part.norm() + 1e-5 * largest, key


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_exact_and_more_directions_are_closer(name, dataset):
    config = CONFIGS[name]
    expected, exact = gradient(make(config, TWIN), config, dataset)
    errors = []
    for rank in (1, 4, 16):
        scores, found = gradient(make(config, low_rank(rank=rank, bits=8)), config, dataset)
        assert_close(scores, expected, tolerance=ROUNDING)
        errors.append(relative_error(joined(found), joined(exact)))
    assert errors == sorted(errors, reverse=True) and errors[0] < 1.5 and errors[2] < 0.3, errors


def kept(model, config, dataset):
    graph = MODELS[config.name].build_graph(dataset.edge_index, dataset.num_nodes)
    with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved:
        return saved.kept(model(dataset.x, graph, seed=1))


def test_a_block_keeps_coefficients_a_mask_and_statistics():
    """One sketch of a hidden map for BatchNorm and both products of the next layer; of the features, nothing."""
    dataset, config = tiny_dataset(nodes=1024), CONFIGS["sage"]
    records = kept(make(config, low_rank(col_size=16)), config, dataset)
    coefficients = 1024 * 8 * 4 / 8 + 4 * 1024 / 16
    # Directions and shift, for BatchNorm and for the next layer; BatchNorm's mean is its shift.
    scales = 2 * 4 * 16 * 8 + 4 * 16 + 2 * 4 * 16
    assert sum(record.bytes for record in records) == 2 * (coefficients + 1024 * 16 / 8 + scales)
    assert {record.dtype for record in records if record.shape == (1024, 16)} == {"int4", "mask"}


def test_attention_keeps_the_scores_and_no_features():
    dataset, config = tiny_dataset(nodes=1024), GATConfig(name="gat", heads=3, **FIELDS)
    for record in kept(make(config, low_rank()), config, dataset):
        assert record.op != "AttentionBackward" or record.shape in [(1024, 3), (1024, 1)]


def test_layers_of_gcn2_share_one_sketch_of_the_initial_map():
    dataset = tiny_dataset(nodes=1024)
    totals = []
    for layers in (2, 4):
        config = GCN2Config(name="gcn2", **(FIELDS | {"num_layers": layers}))
        totals.append(sum(record.bytes for record in kept(make(config, low_rank(rank=4)), config, dataset)))
    each = 1024 * 4 * 4 / 8 + 4 * 1024 + 1024 * 16 / 8 + 2 * 4 * 16 * 4 + 4 * 16 + 2 * 4 * 16
    assert totals[1] - totals[0] == 2 * each


@pytest.mark.parametrize("refresh", [1, 3])
def test_directions_are_found_anew_after_as_many_passes_and_follow_the_map_in_between(refresh, dataset, monkeypatch):
    made = []
    for name in ("leading_directions", "followed_directions"):
        monkeypatch.setattr(lowrank, name, recording(made, name))
    config = CONFIGS["sage"]
    model = make(config, low_rank(refresh=refresh, rank=4))
    for number in range(5):
        gradient(model, config, dataset, seed=number)
    kinds, maps = [name for name, _ in made], len(model.directions)
    anew = [kinds[first] == "leading_directions" for first in range(0, len(kinds), maps)]
    assert anew == ([True] * 5 if refresh == 1 else [True, False, False, True, False])
    assert torch.equal(model.directions[0].vectors, made[-maps][1])


def test_intervals_of_a_gpu_become_longer(dataset, monkeypatch):
    monkeypatch.setattr(CompressionConfig, "refresh_on", lambda config, device, *, before=0: min(max(2, 2 * before), 5))
    config = CONFIGS["sage"]
    model = make(config, low_rank(rank=4))
    passes = []
    for number in range(14):
        gradient(model, config, dataset, seed=number)
        passes.append({(state.age, state.interval) for state in model.directions})
    ages = [(age, interval) for interval in (2, 4, 5, 5) for age in range(1, interval + 1)]
    assert passes == [{each} for each in ages[:14]]


def test_columns_of_a_map_are_never_due():
    directions = Directions(vectors=torch.eye(3), age=2, interval=2)
    assert directions.due and not replace(directions, age=1).due
    assert not replace(directions, choice=Choice(None)).due and not Directions().due


def recording(made, name):
    plain = getattr(lowrank, name)

    def recorded(*args, **kwargs):
        directions = plain(*args, **kwargs)
        made.append((name, directions))
        return directions

    return recorded


def test_following_comes_to_the_leading_directions():
    """Orthogonal iteration: the distance shrinks by the ratio of the eigenvalues on both sides of the cut."""
    sample = torch.randn(500, 12) * torch.linspace(3.0, 0.5, 12)
    leading = leading_directions(sample, rank=3, energy=None)
    directions = torch.linalg.qr(torch.randn(12, 3)).Q
    values = torch.linalg.eigvalsh(sample.T @ sample).flip(0)
    distances = []
    for _ in range(40):
        directions = followed_directions(sample, directions)
        assert_close(directions.T @ directions, torch.eye(3))
        distances.append((leading - directions @ (directions.T @ leading)).norm().item())
    assert distances[-1] < 0.01 * distances[0]
    assert distances[15] / distances[10] == pytest.approx((values[3] / values[2]).item() ** 5, rel=0.3)


def test_directions_do_not_enter_checkpoints_and_do_not_change_evaluation(dataset):
    config = CONFIGS["sage"]
    model = make(config, low_rank())
    gradient(model, config, dataset)
    assert model.state_dict().keys() == make(config, TWIN).state_dict().keys()
    twin = copy.deepcopy(model)
    twin.compression = TWIN
    graph = MODELS["sage"].build_graph(dataset.edge_index, dataset.num_nodes)
    assert torch.equal(model.eval()(dataset.x, graph), twin.eval()(dataset.x, graph))


def test_same_seed_same_gradient_and_map_seed_varies_the_rounding_alone(dataset):
    config = CONFIGS["gcn2"]
    runs = [gradient(make(config, low_rank(bits=1)), config, dataset, map_seed=seed) for seed in (1, 1, 2)]
    first, again, other = (joined(found) for _, found in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(runs[0][0], runs[2][0])


def test_a_tensor_seed_gives_the_same_gradient(dataset):
    for name in ("sage", "gcn2", "gat-arxiv"):
        config = CONFIGS[name]
        _, expected = gradient(make(config, low_rank()), config, dataset, seed=5)
        _, found = gradient(make(config, low_rank()), config, dataset, seed=torch.tensor(5))
        assert torch.equal(joined(expected), joined(found)), name


def test_training_pass_without_gradients_works(dataset):
    graph = MODELS["sage"].build_graph(dataset.edge_index, dataset.num_nodes)
    with torch.no_grad():
        assert make(CONFIGS["sage"], low_rank())(dataset.x, graph, seed=1).isfinite().all()


def deviations(config, compression, *, draws=400):
    """Mean error of 20 fixed random functionals of the gradient, in standard errors, and the mean relative error."""
    dataset = tiny_dataset()
    exact = joined(gradient(make(config, TWIN), config, dataset)[1])
    model = make(config, compression)
    found = [joined(gradient(model, config, dataset, map_seed=mix(draw))[1]) - exact for draw in range(draws)]
    functionals = torch.randn(20, exact.numel(), generator=torch.Generator().manual_seed(1))
    errors = torch.stack(found) @ functionals.T
    relative = torch.stack(found).norm(dim=1).mean() / exact.norm()
    return errors.mean(0) / (errors.std(0) / math.sqrt(draws)), relative.item()


@pytest.mark.parametrize("name", ["sage", "sage-residual", "sage-no-norm", "gcn", "gcn2", "gcn2-residual"])
def test_two_residual_sketches_leave_no_bias(name):
    """Rounding left out, for its own bias is of order variance / N, and N is small here."""
    biased, error = deviations(CONFIGS[name], low_rank(rank=3, residual=4, bits=None))
    assert biased.abs().max() < 4.0 and error > 0.1, (biased, error)


def test_one_residual_sketch_in_both_places_would_be_biased(monkeypatch):
    monkeypatch.setattr(SketchLayout, "independent", lambda layout: layout)
    biased, _ = deviations(CONFIGS["sage"], low_rank(rank=1, residual=1, bits=None), draws=3000)
    assert biased.square().mean() > 10.0, biased  # 1 without a bias


def test_more_residual_columns_are_less_noise():
    errors = [deviations(CONFIGS["sage"], low_rank(rank=3, residual=k, bits=None), draws=20)[1] for k in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
