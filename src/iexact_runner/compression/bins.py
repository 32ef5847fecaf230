"""Levels of least variance for stochastic rounding, for values of a known distribution (i-EXACT, section 3.3).

An h between the levels l < u is rounded with variance (h - l) (u - h); what is expected of it depends on how h is
distributed over [0, B]. ``docs/bins.md`` has the mathematics, :mod:`iexact_runner.compression.curves` the search.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from iexact_runner.compression.codec import BITS, check_levels
from iexact_runner.compression.curves import HISTOGRAM_CELLS, Array, Curve, Histogram, Normal, minimise, variance

# Mass of a histogram that is spread evenly, so that levels have a place of their own where nothing was observed.
UNSEEN = 1e-6


@dataclass(frozen=True)
class Uniform:
    """Values spread evenly over [0, B]."""


@dataclass(frozen=True)
class ClippedNormal:
    """h ~ N(B / 2, sigma**2) clipped to [0, B], with sigma = -(B / 2) / Phi^-1(1 / d).

    The 1 / d of the mass that is clipped at either end sits on a level, so it adds no variance.

    Args:
        d: number of elements that the minimum and maximum were taken over, 2 or more.
    """

    d: int

    def __post_init__(self) -> None:
        _check_count(self.d)


@dataclass(frozen=True)
class TruncatedNormal:
    """The normal distribution of :class:`ClippedNormal` restricted to [0, B]: no mass at the ends.

    Args:
        d: number of elements that the minimum and maximum were taken over, 2 or more.
    """

    d: int

    def __post_init__(self) -> None:
        _check_count(self.d)


@dataclass(frozen=True)
class Empirical:
    """Observed values, as a histogram of equal cells over [0, B] with a constant density in each.

    Args:
        weights: mass of each cell, in any unit.
        inside: share of the values that are not exactly 0 or B; the others sit on a level.
    """

    weights: tuple[float, ...]
    inside: float = 1.0

    def __post_init__(self) -> None:
        if not self.weights or not all(0 <= weight < math.inf for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights={self.weights!r:.60}: must be numbers of 0 or more, not all of them 0")
        if not 0 <= self.inside <= 1:
            raise ValueError(f"inside={self.inside}: must be between 0 and 1")

    @classmethod
    def of(cls, h: npt.ArrayLike, *, top: float, cells: int = HISTOGRAM_CELLS) -> Empirical:
        """The histogram of samples.

        Args:
            h: values in [0, top], of any shape.
            top: B, the highest level.
            cells: number of cells.

        Raises:
            ValueError: if there are no values, or one is not in [0, top].
        """
        values = np.asarray(h, dtype=np.float64).ravel()
        if not values.size or not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"h={values!r:.60}: must be values between 0 and {top}")
        inner = values[(values > 0) & (values < top)]
        if not inner.size:  # only ends: no level between them matters
            return cls((1.0,), inside=0.0)
        counts, _ = np.histogram(inner, bins=cells, range=(0, top))
        return cls(tuple(map(float, counts)), inside=inner.size / values.size)


Distribution = Uniform | ClippedNormal | TruncatedNormal | Empirical


def expected_variance(levels: Sequence[float], *, distribution: Distribution) -> float:
    """Expected variance of stochastic rounding, in units of the code squared; 1/6 for uniform levels and values.

    Args:
        levels: 2, 4, 16 or 256 increasing numbers from 0 to one less than their count.
        distribution: of the values that are rounded.

    Raises:
        ValueError: if the levels are not such numbers; the message names them and what is valid.
    """
    counts = {2**bits: bits for bits in BITS}
    if len(levels) not in counts:
        raise ValueError(f"levels={levels!r:.80}: must be {', '.join(map(str, counts))} in number, not {len(levels)}")
    check_levels(levels, bits=counts[len(levels)])
    top = len(levels) - 1
    curve, share = _curve(distribution)
    return share * top**2 * float(variance(curve, np.array([levels]) / top)[0])


@functools.lru_cache(maxsize=1024)
def optimal_levels(bits: int, *, distribution: Distribution) -> tuple[float, ...]:
    """The 2**bits levels from 0 to B = 2**bits - 1 of least expected variance, to 1e-6.

    Symmetric for all distributions but :class:`Empirical`. Clipping moves mass onto the levels 0 and B only, so the
    clipped and the truncated normal have the same best levels.

    Args:
        bits: bits of a code: 1, 2, 4 or 8.
        distribution: of the values that are rounded.

    Raises:
        ValueError: if ``bits`` is not valid.
    """
    top = _top(bits)
    curve, _ = _curve(distribution)
    levels = minimise(curve, 2**bits)[0]
    if not isinstance(distribution, Empirical):
        levels = _symmetric(levels)
    return tuple(map(float, levels * top))


def cell_masses(distribution: Distribution, *, cells: int) -> Array:
    """Probabilities (cells,) of equal cells over [0, B]; what lies on an end counts in its cell.

    Of the values of an :class:`Empirical` that lie on an end, half count at either.
    """
    curve, share = _curve(distribution)
    _, below, _, _ = curve.integrals(np.linspace(0, 1, cells + 1)[None])
    masses: Array = share * np.diff(below[0])
    at_either_end = (1 - masses.sum()) / 2
    masses[0] += at_either_end
    masses[-1] += at_either_end
    return masses


def normal_sigma(d: npt.ArrayLike, *, bits: int) -> Array:
    """Sigma (K,) = -(B / 2) / Phi^-1(1 / d) of blocks of d (K,) elements, in units of the code; infinite for d = 2."""
    from scipy.special import ndtri  # slow to import, and plain training needs none of it

    with np.errstate(divide="ignore"):
        sigma: Array = _top(bits) / 2 / np.abs(ndtri(1 / np.asarray(d, dtype=np.float64)))
    return sigma


def normal_levels(bits: int, *, sigma: Array) -> Array:
    """The best levels (K, 2**bits) for normal values, clipped or truncated, of each sigma (K,) in units of the code.

    All of them are found at once: far faster than :func:`optimal_levels` for each.

    Raises:
        ValueError: if ``bits`` is not valid, or a sigma is not a finite number above 0.
    """
    top = _top(bits)
    if not ((sigma > 0) & (sigma < math.inf)).all():
        raise ValueError(f"sigma={sigma}: must be finite numbers above 0")
    levels: Array = _symmetric(minimise(Normal(sigma / top), 2**bits)) * top
    return levels


def normal_variances(levels: Array, *, sigma: Array, clipped: bool) -> Array:
    """Expected variance (K,) at levels (K, 2**bits) for normal values of each sigma (K,), in units of the code.

    Args:
        levels: increasing, from 0 to B.
        sigma: standard deviations, the mean being B / 2.
        clipped: whether values beyond [0, B] lie on its ends; else there are none.
    """
    top = levels.shape[1] - 1
    curve = Normal(sigma / top)
    unscaled = variance(curve, levels / top)
    scaled: Array = top**2 * unscaled if clipped else top**2 * unscaled / curve.mass
    return scaled


def _curve(distribution: Distribution) -> tuple[Curve, float]:
    """The density of a distribution between its ends, and the factor that makes its mass there right."""
    match distribution:
        case Empirical(weights, inside):
            masses = np.array(weights)
            return Histogram((1 - UNSEEN) * masses / masses.sum() + UNSEEN / len(masses)), inside
        # Two elements: infinitely wide, so all clipped mass lies on the ends and what is left is even.
        case ClippedNormal(d=2):
            return Histogram(np.ones(1)), 0.0
        case Uniform() | TruncatedNormal(d=2):
            return Histogram(np.ones(1)), 1.0
        case ClippedNormal(d) | TruncatedNormal(d):
            curve = Normal(normal_sigma([d], bits=1))
            return curve, 1.0 if isinstance(distribution, ClippedNormal) else 1 / float(curve.mass[0])


def _symmetric(levels: Array) -> Array:
    """Levels of a symmetric density, without the last bits in which the two halves differ."""
    mirrored: Array = (levels + 1 - levels[..., ::-1]) / 2
    return mirrored


def _top(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"bits={bits}: must be one of {', '.join(map(str, BITS))}")
    return int(2**bits - 1)


def _check_count(d: Any) -> None:
    if not isinstance(d, (int, np.integer)) or d < 2:
        raise ValueError(f"d={d}: must be a whole number of 2 or more")
