"""Bits dealt over directions, and the levels of their codes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from iexact_runner.compression.coefficients import CoefficientFormat, deal_bits, distortions
from iexact_runner.kernels.levels import level_table, lloyd_max

# Max, "Quantizing for minimum distortion", 1960, table I: N levels and their mean squared error.
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_the_published_ones(bits):
    levels, error = lloyd_max(bits)
    assert error == pytest.approx(PUBLISHED[bits], rel=3e-3)
    assert (np.diff(levels) > 0).all() and levels == pytest.approx(-levels[::-1])
    inner = [*(levels[1:] + levels[:-1]) / 2]
    pieces = zip(levels, [-np.inf, *inner], [*inner, np.inf], strict=True)
    measured = sum(
        integrate.quad(lambda x, level=level: (x - level) ** 2 * stats.norm.pdf(x), low, high)[0]
        for level, low, high in pieces
    )
    assert measured == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("variances", [[5.0, 1.0, 0.3, 0.02], [1.0, 0.35, 0.12, 0.045], [1.0, 0.12, 0.038, 0.011]])
def test_bits_are_dealt_where_they_remove_most(variances):
    variances, errors = torch.tensor(variances), distortions()
    for total in range(1, 12):
        dealt = deal_bits(variances, total)
        assert dealt.sum() == total

        def left(bits):
            return sum(float(v) * errors[b] for v, b in zip(variances, bits, strict=True))

        best = min(left(bits) for bits in product(range(9), repeat=4) if sum(bits) == total)
        assert left(dealt.tolist()) == pytest.approx(best)


def test_no_direction_has_more_than_eight_bits():
    assert deal_bits(torch.tensor([1e9, 1.0]), 99).tolist() == [8, 8]
    assert deal_bits(torch.tensor([1e9, 1e-9]), 8).tolist() == [8, 0]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_codes_are_the_nearest_levels(backend):
    coefficients, bits = torch.randn(500, 5), torch.tensor([5, 3, 1, 0, 7], dtype=torch.int32)
    layout, tensors = CoefficientFormat(16, False, backend).encode(coefficients, bits, seed=1)
    decoded, table = layout.stored(tensors), level_table(torch.device("cpu"))
    assert tensors[0].shape == (500, 2) and layout.stored_type == "16 bits a node"
    for column, count in enumerate(2**bits):
        levels = table[count : 2 * count]
        nearest = levels[(coefficients[:, column, None] - levels).abs().argmin(1)]
        assert torch.equal(decoded[:, column], nearest)


def test_stochastic_rounding_is_unbiased_between_the_levels():
    coefficients, bits = torch.linspace(-1.4, 1.4, 64).view(-1, 1), torch.tensor([2], dtype=torch.int32)
    form = CoefficientFormat(8, True, "torch")
    draws = torch.stack([decode(form, coefficients, bits, seed=seed) for seed in range(2000)])
    error = draws.mean(0) - coefficients
    assert (error.abs() < 4.5 * draws.std(0) / 2000**0.5 + 1e-6).all()


def decode(form, coefficients, bits, *, seed):
    layout, tensors = form.encode(coefficients, bits, seed=seed)
    return layout.stored(tensors)
