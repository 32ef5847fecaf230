"""Densities between the lowest and the highest level, and the search for the levels of least rounding variance.

Values are t = h / B in [0, 1], so that a density is the same for every number of bits. Let F be its distribution
function, G the integral of F and K that of G. By integrating by parts, rounding at random between the levels l < u has
the expected variance

    (u - l) (G(u) + G(l)) - 2 (K(u) - K(l)),

twice the error of the trapezoid rule for the convex G. A level x between the neighbours l and u is at its best where
F(x) = (G(u) - G(l)) / (u - l), the mean of F between them. ``docs/bins.md`` derives both.

Shapes: K densities, L levels.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

HISTOGRAM_CELLS = 512
# In units of the range; Newton's steps shrink quadratically, so the error that is left is far smaller.
TOLERANCE = 1e-10
# Of the variance in units of the range squared, by the rounding of its sums.
NOISE = 1e-15
MAX_STEPS = 200


class Curve(Protocol):
    """K densities on [0, 1] and their integrals; functions take and return (K, L)."""

    def integrals(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """Density, F, G and K at t."""

    def quantile(self, share: Array) -> Array:
        """Values of t at which F is ``share``."""

    def start(self, count: int) -> Array:
        """The inner of ``count`` levels to start from."""


class Normal:
    """Normal values around 1/2, not normalised to [0, 1]: what lies outside plays no part in any formula.

    Args:
        sigma: standard deviations (K,) in units of the range.
    """

    def __init__(self, sigma: Array) -> None:
        self._sigma = sigma[:, None]

    @property
    def mass(self) -> Array:
        """Mass (K,) within [0, 1]."""
        from scipy.special import erf

        inside: Array = erf(0.5 / (math.sqrt(2) * self._sigma[:, 0]))
        return inside

    def integrals(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """See :class:`Curve`."""
        from scipy.special import ndtr

        z = (t - 0.5) / self._sigma
        below, bell = ndtr(z), np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        once = self._sigma * (z * below + bell)
        twice = self._sigma**2 / 2 * ((z * z + 1) * below + z * bell)
        return bell / self._sigma, below, once, twice

    def quantile(self, share: Array) -> Array:
        """See :class:`Curve`."""
        from scipy.special import ndtri

        value: Array = 0.5 + self._sigma * ndtri(share)
        return value

    def start(self, count: int) -> Array:
        """Levels as dense as the cube root of the density: the best ones in the limit of many."""
        wide = Normal(math.sqrt(3) * self._sigma[:, 0])
        shares = np.arange(1, count - 1) / (count - 1)
        outside = (1 - wide.mass[:, None]) / 2
        return wide.quantile(outside + wide.mass[:, None] * shares)


class Histogram:
    """One density (K = 1) that is constant in each of equal cells.

    Args:
        masses: of the cells.
    """

    def __init__(self, masses: Array) -> None:
        self._cells = len(masses)
        self._edges = np.linspace(0, 1, self._cells + 1)
        self._density = masses * self._cells
        step = 1 / self._cells
        self._f = np.append(0, np.cumsum(masses))
        self._g = np.append(0, np.cumsum(self._f[:-1] * step + masses * step / 2))
        self._k = np.append(0, np.cumsum(self._g[:-1] * step + self._f[:-1] * step**2 / 2 + masses * step**2 / 6))

    def integrals(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """See :class:`Curve`."""
        cell = np.clip((t * self._cells).astype(int), 0, self._cells - 1)
        past, density = t - self._edges[cell], self._density[cell]
        f, g, k = self._f[cell], self._g[cell], self._k[cell]
        return (
            density,
            f + density * past,
            g + f * past + density * past**2 / 2,
            k + g * past + f * past**2 / 2 + density * past**3 / 6,
        )

    def quantile(self, share: Array) -> Array:
        """See :class:`Curve`."""
        return np.interp(share, self._f, self._edges)

    def start(self, count: int) -> Array:
        """The best levels among the edges of 512 cells or more, by dynamic programming."""
        grid = np.linspace(0, 1, max(self._cells, HISTOGRAM_CELLS) + 1)
        _, _, g, k = self.integrals(grid)
        # cost[i, j]: variance of a bin from grid[i] to grid[j]
        cost = np.subtract.outer(-grid, -grid) * np.add.outer(g, g) - 2 * np.subtract.outer(-k, -k)
        cost[np.tril_indices(len(grid))] = math.inf
        least, choices = cost[0], []
        for _ in range(count - 2):
            sums = least[:, None] + cost
            choices.append(sums.argmin(axis=0))
            least = sums.min(axis=0)
        chosen = [len(grid) - 1]
        for choice in reversed(choices):
            chosen.append(int(choice[chosen[-1]]))
        return grid[chosen[:0:-1]][None]


def variance(curve: Curve, levels: Array) -> Array:
    """Expected variance (K,) at levels (K, L), in units of the range squared."""
    _, _, g, k = curve.integrals(levels)
    widths = np.diff(levels, axis=1)
    total: Array = (widths * (g[:, 1:] + g[:, :-1]) - 2 * np.diff(k, axis=1)).sum(axis=1)
    return total


def minimise(curve: Curve, count: int) -> Array:
    """The best levels (K, count) from 0 to 1, by Newton's method.

    Where a step of it would leave the order or raise the variance, every second level and then the others move to
    their best place between their neighbours, which cannot raise it.
    """
    levels = _with_ends(curve.start(count))
    least = variance(curve, levels)
    for _ in range(MAX_STEPS if count > 2 else 0):
        proposed = _with_ends(levels[:, 1:-1] - _newton_step(curve, levels))
        ordered = (np.diff(proposed, axis=1) > 0).all(axis=1)  # not where a step is NaN
        proposed[~ordered] = levels[~ordered]
        found = variance(curve, proposed)
        good = ordered & (found <= least + NOISE)
        if not good.all():
            swept = _sweep(curve, levels)
            proposed[~good] = swept[~good]
            found = variance(curve, proposed)
        change = np.abs(proposed - levels).max()
        levels, least = proposed, found
        if good.all() and change < TOLERANCE:
            break
    return levels


def _newton_step(curve: Curve, levels: Array) -> Array:
    """Hessian^-1 gradient (K, L - 2) of the variance; the Hessian is tridiagonal."""
    density, f, g, _ = curve.integrals(levels)
    reach = levels[:, 2:] - levels[:, :-2]
    gradient = reach * f[:, 1:-1] - (g[:, 2:] - g[:, :-2])
    diagonal, beside = reach * density[:, 1:-1], -np.diff(f[:, 1:-1], axis=1)
    with np.errstate(all="ignore"):  # a level where the density is 0 has no step: NaN
        for index in range(1, diagonal.shape[1]):
            factor = beside[:, index - 1] / diagonal[:, index - 1]
            diagonal[:, index] -= factor * beside[:, index - 1]
            gradient[:, index] -= factor * gradient[:, index - 1]
        gradient[:, -1] /= diagonal[:, -1]
        for index in range(diagonal.shape[1] - 2, -1, -1):
            gradient[:, index] = (gradient[:, index] - beside[:, index] * gradient[:, index + 1]) / diagonal[:, index]
    return gradient


def _sweep(curve: Curve, levels: Array) -> Array:
    """Levels of no more variance: each of every second inner one at its best for its neighbours, then the others."""
    levels = levels.copy()
    for first in (1, 2):
        _, _, g, _ = curve.integrals(levels)
        best = curve.quantile((g[:, 2:] - g[:, :-2]) / (levels[:, 2:] - levels[:, :-2]))
        levels[:, first:-1:2] = best[:, first - 1 :: 2]
    return levels


def _with_ends(inner: Array) -> Array:
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
