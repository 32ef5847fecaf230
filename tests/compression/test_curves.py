"""The search for levels: where it starts, what a sweep does, and when it ends."""

from __future__ import annotations

import numpy as np
import pytest

from iexact_runner.compression import curves
from iexact_runner.compression.curves import HISTOGRAM_CELLS, MAX_STEPS, Histogram, Normal, minimise, variance

MASSES = np.linspace(1, 5, HISTOGRAM_CELLS)
SKEWED = Histogram(MASSES / MASSES.sum())
NORMALS = Normal(np.array([0.05, 0.2, 1.0]))


@pytest.mark.parametrize("cells", [HISTOGRAM_CELLS, 3, 700])
def test_search_starts_at_the_best_edges(cells):
    masses = np.linspace(1, 5, cells)
    histogram = Histogram(masses / masses.sum())
    count = max(cells, HISTOGRAM_CELLS)
    edges = np.linspace(0, 1, count + 1)[1:-1]
    trials = np.stack([np.zeros_like(edges), edges, np.ones_like(edges)], axis=1)
    assert histogram.start(3)[0, 0] == edges[variance(histogram, trials).argmin()]
    start = histogram.start(16)[0] * count
    assert start == pytest.approx(start.round(), abs=1e-9) and (np.diff(start) > 0).all() and len(start) == 14


@pytest.mark.parametrize("curve", [SKEWED, NORMALS], ids=["histogram", "normal"])
def test_sweeps_never_raise_the_variance_and_alone_reach_the_best_levels(curve):
    rows = 3 if curve is NORMALS else 1
    levels = np.tile(np.linspace(0, 1, 4), (rows, 1))
    least = variance(curve, levels)
    for _ in range(200):
        levels = curves._sweep(curve, levels)
        found = variance(curve, levels)
        assert (found <= least + 1e-15).all() and (np.diff(levels, axis=1) > 0).all()
        least = found
    assert least == pytest.approx(variance(curve, minimise(curve, 4)), rel=1e-9)


@pytest.mark.parametrize("count", [4, 16])
def test_search_ends_once_nothing_moves(count, monkeypatch):
    steps = []
    newton = curves._newton_step
    monkeypatch.setattr(curves, "_newton_step", lambda *arguments: steps.append(1) or newton(*arguments))
    minimise(NORMALS, count)
    assert 1 < len(steps) < MAX_STEPS / 4
