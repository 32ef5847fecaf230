"""Sketches decode to the activations they stand for, run of rows by run of rows."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from iexact_runner.compression import sketch
from iexact_runner.compression.directions import leading_directions
from iexact_runner.compression.maps import MapFormat
from iexact_runner.compression.seeds import normal_draws
from iexact_runner.compression.signs import SignLayout
from iexact_runner.compression.sketch import ProductLayout, ResidentLayout, SketchLayout, keep_coefficients
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
    sampled = ((z - mean) * scale) @ directions
    (coefficients, tensors), deviation = keep_coefficients(z, mean, scale, directions, sampled, form(bits), seed=1)
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
    scale, sampled = torch.ones(12), (z - mean) @ directions
    exact = sampled @ directions.T
    draws = []
    for seed in range(400):
        (layout, tensors), deviation = keep_coefficients(z, mean, scale, directions, sampled, form(2), seed=seed)
        scaled = directions * deviation
        draws.append(layout.stored(tensors[:3]) @ scaled.T - exact)
    errors = torch.stack(draws).flatten(1) @ torch.randn(64 * 12, 20)
    assert (errors.mean(0).abs() < 4 * errors.std(0) / len(draws) ** 0.5).all()
    assert errors.abs().mean() > 0.01


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
