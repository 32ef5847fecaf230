"""The expected variance is that of quadrature and of samples, and no other levels have less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize

from iexact_runner.compression import bins, quantize
from iexact_runner.compression.bins import (
    ClippedNormal,
    Empirical,
    TruncatedNormal,
    Uniform,
    expected_variance,
    normal_levels,
    normal_sigma,
    normal_variances,
    optimal_levels,
)
from iexact_runner.kernels import reference

BITS = (1, 2, 4, 8)
HISTOGRAM = Empirical((4.0, 0.0, 1.0, 2.0, 0.0, 1.0), inside=0.75)
DISTRIBUTIONS = (Uniform(), ClippedNormal(2), ClippedNormal(16), TruncatedNormal(5), TruncatedNormal(4096), HISTOGRAM)


def uniform_levels(bits):
    return tuple(range(2**bits))


def density(distribution, top):
    """The density on (0, top), written down independently."""
    match distribution:
        case Uniform() | TruncatedNormal(d=2):
            return lambda h: 1 / top
        case ClippedNormal(d=2):
            return lambda h: 0.0
        case Empirical(weights, inside):
            cells, total = len(weights), sum(weights)
            return lambda h: inside * weights[min(int(h / top * cells), cells - 1)] / total * cells / top
        case ClippedNormal(d) | TruncatedNormal(d):
            sigma = -(top / 2) / stats.norm.ppf(1 / d)
            share = 1.0 if isinstance(distribution, ClippedNormal) else 1 - 2 / d
            return lambda h: stats.norm.pdf(h, top / 2, sigma) / share


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize("levels", [(0, 1), (0, 1, 2, 3), (0.0, 0.3, 2.5, 3.0), (0, *np.arange(0.9, 14.5), 15)])
def test_variance_is_the_integral(distribution, levels):
    levels, top = list(levels), len(levels) - 1
    pdf, total = density(distribution, top), 0.0
    kinks = [top * cell / 6 for cell in range(1, 6)]
    for low, high in itertools.pairwise(levels):
        points = [kink for kink in kinks if low < kink < high]
        total += quad(lambda h: (h - low) * (high - h) * pdf(h), low, high, points=points or None)[0]  # noqa: B023
    assert expected_variance(levels, distribution=distribution) == pytest.approx(total, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("d", "alpha", "variance"), [(16, 1.050, 0.14424), (128, 1.102, 0.14933), (1024, 1.139, 0.13446)]
)
def test_two_bits_agree_with_the_published_fit_and_with_a_grid(d, alpha, variance):
    levels = optimal_levels(2, distribution=ClippedNormal(d))
    found = expected_variance(levels, distribution=ClippedNormal(d))
    assert levels[1] == pytest.approx(alpha, abs=1e-3) and found == pytest.approx(variance, abs=1e-3)
    grid = np.linspace(0.5, 1.49, 9901)  # steps of 1e-4
    fits = [expected_variance((0, a, 3 - a, 3), distribution=ClippedNormal(d)) for a in grid]
    assert abs(grid[np.argmin(fits)] - levels[1]) < 1e-4 and min(fits) >= found - 1e-15


@pytest.mark.parametrize("d", [3, 16, 1024, 10**9])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_general_minimiser_finds_less_variance(bits, d):
    distribution, top = ClippedNormal(d), 2**bits - 1
    levels = np.array(optimal_levels(bits, distribution=distribution))

    def variance(gaps):  # any positive gaps are increasing levels
        inner = np.cumsum(np.exp(gaps)) / np.exp(gaps).sum() * top
        return expected_variance([0.0, *inner[:-1], float(top)], distribution=distribution)

    least = minimize(variance, np.zeros(top), method="BFGS", options={"gtol": 1e-9}).fun
    assert expected_variance(levels, distribution=distribution) == pytest.approx(least, rel=1e-7)


@pytest.mark.parametrize("d", [3, 16, 1024])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_level_is_where_the_gradient_vanishes(bits, d):
    """To 1e-6: by Newton's method the error of a level is H^-1 times the gradient, here of mpmath's precision."""
    mpmath = pytest.importorskip("mpmath")
    top = 2**bits - 1
    levels = optimal_levels(bits, distribution=ClippedNormal(d))
    assert levels == pytest.approx([top - level for level in reversed(levels)], abs=1e-9)
    sigma = float(normal_sigma(d, bits=bits))
    with mpmath.workdps(40):
        z = [(mpmath.mpf(level) - mpmath.mpf(top) / 2) / sigma for level in levels]
        below = [mpmath.ncdf(value) for value in z]
        once = [sigma * (value * share + mpmath.npdf(value)) for value, share in zip(z, below, strict=True)]
        reach = [high - low for low, high in zip(levels, levels[2:], strict=False)]
        gradient = [
            width * share - (high - low)
            for width, share, low, high in zip(reach, below[1:], once, once[2:], strict=False)
        ]
        shares = [float(high - low) for low, high in itertools.pairwise(below)]
        density = [float(mpmath.npdf(value) / sigma) for value in z[1:-1]]
    hessian = np.diag(np.array(reach) * density) - np.diag(shares[1:-1], 1) - np.diag(shares[1:-1], -1)
    assert np.abs(np.linalg.solve(hessian, np.array(gradient, dtype=float))).max() < 1e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize("cells", [1, 6])
def test_masses_of_cells_are_integrals_of_the_density_and_the_ends(distribution, cells):
    pdf = density(distribution, 1)
    edges = np.linspace(0, 1, cells + 1)
    inside = np.array([quad(pdf, low, high, limit=500)[0] for low, high in itertools.pairwise(edges)])
    ends = 1 - inside.sum()
    expected = inside.copy()
    expected[0] += ends / 2
    expected[-1] += ends / 2
    assert bins.cell_masses(distribution, cells=cells) == pytest.approx(expected, abs=2e-6)


def test_uniform_values_have_uniform_levels():
    for bits in BITS:
        levels = optimal_levels(bits, distribution=Uniform())
        assert levels == pytest.approx(uniform_levels(bits), abs=1e-6)
        assert expected_variance(uniform_levels(bits), distribution=Uniform()) == pytest.approx(1 / 6)


def test_clipping_changes_the_variance_but_not_the_levels():
    for d in (2, 16, 300):
        clipped, truncated = ClippedNormal(d), TruncatedNormal(d)
        levels = optimal_levels(4, distribution=clipped)
        assert levels == optimal_levels(4, distribution=truncated)
        ratio = 1 - 2 / d
        assert expected_variance(levels, distribution=clipped) == pytest.approx(
            ratio * expected_variance(levels, distribution=truncated)
        )


def test_all_block_sizes_at_once_equal_one_after_the_other():
    sizes = np.array([4, 7, 100, 2048])
    for bits in BITS:
        sigma = normal_sigma(sizes, bits=bits)
        levels = normal_levels(bits, sigma=sigma)
        assert levels.shape == (4, 2**bits)
        for clipped, family in ((True, ClippedNormal), (False, TruncatedNormal)):
            variances = normal_variances(levels, sigma=sigma, clipped=clipped)
            for d, row, variance in zip(sizes, levels, variances, strict=True):
                assert row == pytest.approx(optimal_levels(bits, distribution=family(int(d))), abs=1e-6)
                assert variance == pytest.approx(expected_variance(list(row), distribution=family(int(d))))


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 5.0])
def test_levels_of_very_narrow_and_very_wide_values(sigma):
    levels = normal_levels(2, sigma=np.array([sigma]))
    grid = np.linspace(0.3, 1.4999, 20001)
    trials = np.stack([np.zeros_like(grid), grid, 3 - grid, np.full_like(grid, 3)], axis=1)
    fits = normal_variances(trials, sigma=np.full_like(grid, sigma), clipped=True)
    assert abs(grid[fits.argmin()] - levels[0, 1]) < 1e-4


@pytest.mark.parametrize("weights", [(1, 2, 3), (5, 0, 0, 0, 1, 0, 3), (0, 0, 1, 0), (9, 1, 0, 0, 0, 0, 1, 9)], ids=str)
def test_levels_of_a_histogram_beat_every_pair_on_a_grid(weights):
    distribution = Empirical(tuple(map(float, weights)))
    levels = optimal_levels(2, distribution=distribution)
    grid = np.linspace(0, 3, 121)[1:-1]
    least = min(
        expected_variance((0, low, high, 3), distribution=distribution) for low, high in itertools.combinations(grid, 2)
    )
    assert expected_variance(levels, distribution=distribution) < least + 1e-9
    for bits in (4, 8):  # also where nothing was observed, levels increase
        best = optimal_levels(bits, distribution=distribution)
        assert expected_variance(best, distribution=distribution) <= expected_variance(
            uniform_levels(bits), distribution=distribution
        )


def test_histogram_of_samples_knows_its_ends():
    samples = np.array([0.0, 0.0, 3.0, 0.1, 1.6, 1.7, 1.8, 2.9])
    found = Empirical.of(samples, top=3, cells=3)
    assert found == Empirical((1.0, 3.0, 1.0), inside=5 / 8)
    assert Empirical.of([0.0, 3.0], top=3).inside == 0
    assert expected_variance((0, 1, 2, 3), distribution=Empirical.of([0.0, 3.0], top=3)) == 0


def test_histogram_of_normal_samples_has_nearly_the_levels_of_the_normal():
    rng = np.random.default_rng(0)
    h = np.clip(rng.normal(1.5, normal_sigma(1024, bits=2), 400_000), 0, 3)
    levels = optimal_levels(2, distribution=Empirical.of(h, top=3))
    assert levels == pytest.approx(optimal_levels(2, distribution=ClippedNormal(1024)), abs=0.01)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", [16, 1024])
def test_measured_variance_is_the_expected_one(bits, d):
    """Of the quantizer itself, on blocks of samples of the clipped normal that include both ends: within 2%."""
    top = 2**bits - 1
    rng = np.random.default_rng(d)
    h = np.clip(rng.normal(top / 2, normal_sigma(d, bits=bits), (300_000,)), 0, top)
    h[0], h[-1] = 0, top  # then zero is 0 and the scale 1, exactly
    x = torch.from_numpy(h).float()
    for levels in (uniform_levels(bits), optimal_levels(bits, distribution=ClippedNormal(d))):
        form = {"bits": bits, "block_size": x.numel(), "levels": levels}
        kept = quantize(x, **form, seed=1, backend="torch")
        assert kept.zero.item() == 0 and kept.scale.item() == 1
        decoded = reference.dequantize(kept.codes, kept.zero, kept.scale, **form, shape=x.shape, dtype=x.dtype)
        measured = (decoded - x).double().square().mean().item()
        assert measured == pytest.approx(expected_variance(levels, distribution=ClippedNormal(d)), rel=0.02)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_to_the_best_levels_is_unbiased(bits):
    """Twenty fixed functionals of the decoded map, four standard errors."""
    x = torch.randn(64, 32)
    levels = optimal_levels(bits, distribution=ClippedNormal(256))
    probes = torch.randn(20, x.numel(), generator=torch.Generator().manual_seed(7)).double()
    form = {"bits": bits, "block_size": 256, "levels": levels if bits > 1 else None}
    draws = []
    for seed in range(200):
        stored = reference.quantize(x, **form, seed=seed)
        decoded = reference.dequantize(*stored, **form, shape=tuple(x.shape), dtype=x.dtype)
        draws.append(probes @ (decoded - x).double().flatten())
    errors = torch.stack(draws)
    standard_error = errors.std(dim=0) / len(errors) ** 0.5
    assert (errors.mean(dim=0).abs() < 4 * standard_error).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_variance((0, 2, 1, 3), distribution=Uniform()), "must be increasing"),
        (lambda: expected_variance((0, 1, 1, 3), distribution=Uniform()), r"levels=\(0.0, 1.0, 1.0, 3.0\)"),
        (lambda: expected_variance((0.5, 1, 2, 3), distribution=Uniform()), "must start at 0 and end at 3"),
        (lambda: expected_variance((0, 1, 2, 4), distribution=Uniform()), "must start at 0 and end at 3"),
        (lambda: expected_variance((0, 1, 3), distribution=Uniform()), r"levels=\(0, 1, 3\): must be 2, 4, 16, 256"),
        (lambda: expected_variance((0, float("nan"), 2, 3), distribution=Uniform()), "must be increasing"),
        (lambda: optimal_levels(3, distribution=Uniform()), "bits=3: must be one of 1, 2, 4, 8"),
        (lambda: ClippedNormal(1), "d=1: must be a whole number of 2 or more"),
        (lambda: TruncatedNormal(-4), "d=-4: must be"),
        (lambda: ClippedNormal(16.5), "d=16.5: must be"),
        (lambda: Empirical(()), r"weights=\(\): must be numbers of 0 or more"),
        (lambda: Empirical((1.0, -1.0)), r"weights=\(1.0, -1.0\)"),
        (lambda: Empirical((0.0, 0.0)), "not all of them 0"),
        (lambda: Empirical((1.0,), inside=1.5), "inside=1.5: must be between 0 and 1"),
        (lambda: Empirical.of([1.0, 4.0], top=3), "must be values between 0 and 3"),
        (lambda: Empirical.of([float("nan")], top=3), "must be values between 0 and 3"),
        (lambda: normal_levels(2, sigma=np.array([0.0])), "must be finite numbers above 0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_best_levels_are_computed_once(monkeypatch):
    first = optimal_levels(8, distribution=ClippedNormal(777))
    monkeypatch.setattr(bins, "minimise", None)
    assert optimal_levels(8, distribution=ClippedNormal(777)) is first
