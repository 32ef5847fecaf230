"""Sketches decode to the activations they stand for, run of rows by run of rows."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from iexact_runner.compression import sketch
from iexact_runner.compression.maps import MapFormat
from iexact_runner.compression.seeds import mix, normal_draws
from iexact_runner.compression.signs import SignLayout
from iexact_runner.compression.sketch import (
    ProductLayout,
    ResidentLayout,
    SketchLayout,
    keep_coefficients,
    leading_directions,
    residual_directions,
    sampled_rows,
)
from iexact_runner.kernels import ops

SHAPES = [(1, 1), (37, 63), (101, 100), (64, 128)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several runs of rows even for the smallest maps."""
    monkeypatch.setattr(sketch, "CHUNK_ELEMENTS", 512)
    monkeypatch.setattr(sketch, "LEAST_CHUNK_ROWS", 8)


def form(bits):
    return MapFormat(bits, 1.0, col_size=4, levels=None, max_block_size=None, backend="torch")


def sketch_of(z, *, bits, rank, relu=False, dropout=0.0, seed=7):
    """The layout and tensors of dropout(ReLU(z)), and the activation itself."""
    mean, scale = z.mean(0), 1.0 / (z.std(0, correction=0) + 1.0)
    directions = leading_directions((z - mean) * scale, rank=rank, energy=None)
    (coefficients, tensors), deviation = keep_coefficients(z, mean, scale, directions, form(bits), seed=1)
    scaled = directions * deviation
    value, signs = ops.leaky_relu(z, negative_slope=0.0, backend="torch") if relu else (z, None)
    if dropout:
        value = ops.dropout(value, p=dropout, seed=seed, backend="torch")
    layout = SketchLayout(
        coefficients,
        tuple(z.shape),
        signs=SignLayout() if relu else None,
        dropout=dropout,
        seed=None if torch.is_tensor(seed) else seed,
        backend="torch",
    )
    rest = [part for part in (signs, seed if torch.is_tensor(seed) else None) if part is not None]
    return layout, (*tensors[: coefficients.parts], scaled / scale[:, None], mean, *rest), value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(("dropout", "seed"), [(0.0, 7), (0.4, 7), (0.4, torch.tensor(7))], ids=str)
def test_all_directions_without_rounding_are_the_activation(shape, relu, dropout, seed):
    z = torch.randn(shape) * torch.rand(shape[1]) + torch.randn(shape[1])
    layout, tensors, value = sketch_of(z, bits=None, rank=shape[1], relu=relu, dropout=dropout, seed=seed)
    assert_close(layout.decode(tensors), value, tolerance=1e-4)
    grad = torch.randn(shape[0], 3)
    assert_close(layout.weight_gradient(grad, tensors), grad.T @ value, tolerance=1e-4)
    left, right = layout.inner_product_factors(value, tensors)
    assert_close((left * right).sum(1), value.square().sum(1), tolerance=1e-4)


def test_few_directions_hold_a_map_of_low_rank():
    z = torch.randn(200, 5) @ torch.randn(5, 40) + 3.0
    layout, tensors, value = sketch_of(z, bits=None, rank=5)
    assert_close(layout.decode(tensors), value, tolerance=1e-4)
    errors = []
    for bits in (1, 2, 4, 8):
        layout, tensors, value = sketch_of(z, bits=bits, rank=5)
        errors.append(((layout.decode(tensors) - value).norm() / (value - value.mean(0)).norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


def test_rounding_of_coefficients_is_unbiased():
    z = torch.randn(64, 12)
    mean, directions = z.mean(0), leading_directions(z - z.mean(0), rank=4, energy=None)
    exact = (z - mean) @ directions @ directions.T
    draws = []
    for seed in range(400):
        (layout, tensors), deviation = keep_coefficients(z, mean, torch.ones(12), directions, form(2), seed=seed)
        scaled = directions * deviation
        draws.append(layout.stored(tensors[:3]) @ scaled.T - exact)
    errors = torch.stack(draws).flatten(1) @ torch.randn(64 * 12, 20)
    assert (errors.mean(0).abs() < 4 * errors.std(0) / len(draws) ** 0.5).all()
    assert errors.abs().mean() > 0.01


def test_directions_are_those_of_the_singular_vectors():
    sample = torch.randn(300, 10) * torch.arange(1, 11)
    directions = leading_directions(sample, rank=3, energy=None)
    assert_close(directions.T @ directions, torch.eye(3), tolerance=1e-4)
    expected = torch.linalg.svd(sample).Vh[:3].T
    assert_close(directions @ directions.T, expected @ expected.T, tolerance=1e-3)
    assert leading_directions(sample, rank=99, energy=None).shape == (10, 10)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.85, 2), (0.95, 3), (1.0, 3)])
def test_energy_chooses_the_number_of_directions(energy, rank):
    sample = torch.diag(torch.tensor([7.0, 5.0, 2.0])).repeat(4, 1)  # shares .63, .32, .05
    assert leading_directions(sample, rank=None, energy=energy).size(1) == rank


def test_sampled_rows_are_spread_over_the_map():
    rows = sampled_rows(1050, 100, device=torch.device("cpu"))
    assert rows.numel() == 100 and rows[0] == 0 and rows[-1] == 1039
    assert set(rows.diff().tolist()) == {10, 11}
    assert torch.equal(sampled_rows(5, 100, device=torch.device("cpu")), torch.arange(5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_resident_features_are_exact(shape, dropout):
    features, grad = torch.randn(shape), torch.randn(shape[0], 3)
    layout = ResidentLayout(shape, dropout, 5, "torch")
    value = ops.dropout(features, p=dropout, seed=5, backend="torch") if dropout else features
    assert torch.equal(layout.decode((features,)), value)
    assert_close(layout.weight_gradient(grad, (features,)), grad.T @ value)


def test_product_is_multiplied_again():
    features, weight = torch.randn(101, 13), torch.randn(7, 13)
    layout = ProductLayout(ResidentLayout((101, 13)), (101, 7))
    assert_close(layout.decode((features, weight)), features @ weight.T)
    z = torch.randn(64, 16)
    kept, tensors = form(None).encode(z, seed=0)
    assert_close(
        ProductLayout(kept, (64, 5)).decode((*tensors, weight[:5, :1].expand(5, 16))),
        z @ weight[:5, :1].expand(5, 16).T,
    )


def test_normal_draws_are_normal():
    draws = normal_draws(200_001, seed=5, device=torch.device("cpu"))
    assert draws.shape == (200_001,) and torch.equal(draws, normal_draws(200_001, seed=5, device=draws.device))
    spread = draws.numel() ** -0.5
    assert abs(draws.mean().item()) < 4 * spread and abs(draws.square().mean().item() - 1) < 4 * 2**0.5 * spread
    assert abs(draws.pow(4).mean().item() - 3) < 4 * 96**0.5 * spread


@pytest.mark.parametrize(("rank", "count"), [(0, 3), (3, 1), (3, 4), (3, 9), (12, 4)])
def test_residual_directions_are_uniform_in_what_the_others_miss(rank, count):
    """PRAC's estimate: (D - R) / k times the projection on k orthonormal columns of the complement."""
    width, draws = 12, 3000
    directions = torch.linalg.qr(torch.randn(width, width))[0][:, :rank]
    columns = torch.stack([residual_directions(directions, count, seed=mix(seed)) for seed in range(draws)])
    kept = min(count, width - rank)
    gram = columns.transpose(1, 2) @ columns
    expected = torch.zeros(count, count)
    expected[:kept, :kept] = torch.eye(kept) * (width - rank) / max(1, kept)
    assert_close(gram, expected.expand_as(gram), tolerance=1e-4)
    assert (directions.T @ columns).abs().max() < 1e-4 if rank else True
    products = columns @ columns.transpose(1, 2)
    error = products.mean(0) - (torch.eye(width) - directions @ directions.T)
    assert (error.abs() / (products.std(0) / draws**0.5).clamp(min=1e-5)).max() < 5.0


def test_residual_directions_have_the_least_variance():
    """Of x Q Q^T for a fixed x in the complement: |x|^2 ((D - R) / k - 1); Rademacher columns have more."""
    width, count, draws = 16, 4, 4000
    x = torch.randn(width)
    columns = torch.stack([residual_directions(torch.zeros(width, 0), count, seed=mix(seed)) for seed in range(draws)])
    errors = ((x @ columns).unsqueeze(1) @ columns.transpose(1, 2)).squeeze(1) - x
    variance = errors.square().sum(1)
    expected = x.square().sum() * (width / count - 1)
    assert ((variance.mean() - expected).abs() / (variance.std() / draws**0.5)).item() < 4.0
