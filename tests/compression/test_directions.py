"""Directions are the leading ones of their rows and stay orthonormal; random ones are uniform in what they miss."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from iexact_runner.compression import directions as module
from iexact_runner.compression.directions import (
    coefficients_of,
    leading_directions,
    per_feature,
    residual_directions,
    rows_of,
)
from iexact_runner.compression.seeds import mix


def test_columns_are_the_diagonal_of_their_directions():
    rows, factors = torch.randn(7, 5), torch.tensor([0.5, 2.0, -3.0, 1.0, 8.0])
    assert torch.equal(coefficients_of(rows, factors), rows @ factors.diag())
    assert torch.equal(rows_of(rows, factors), rows @ factors.diag().T)
    assert torch.equal(
        per_feature(rows[0], factors) * factors, (per_feature(rows[0], factors.diag()) * factors.diag()).sum(1)
    )


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


def test_orthonormal_columns_of_a_gpu_are_those_of_qr():
    """Columns whose lengths span 8 orders of magnitude, as those of a product with second moments may."""
    columns = torch.randn(128, 18, generator=torch.Generator().manual_seed(0)) * torch.logspace(4, -4, 18)
    q = module._orthonormal(columns)
    assert_close(q.T @ q, torch.eye(18), tolerance=1e-6)
    expected = torch.linalg.qr(columns.double()).Q.float()
    assert_close((q * expected).sum(0).abs(), torch.ones(18), tolerance=1e-5)
    assert q.dtype == torch.float32 and q.is_contiguous()


def test_columns_that_depend_on_others_become_next_to_zero():
    columns = torch.randn(64, 6)
    columns[:, 4], columns[:, 5] = 2 * columns[:, 1], 0.0
    q = module._orthonormal(columns)
    lengths = q.norm(dim=0)
    assert q.isfinite().all() and lengths[4] < 0.01 and lengths[5] == 0
    assert_close(q[:, :4].T @ q[:, :4], torch.eye(4), tolerance=1e-5)


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
