"""Dealing bytes over maps: the least error under a budget, against all combinations."""

from __future__ import annotations

import itertools
import random

import pytest

from iexact_runner.budget.allocation import Option, allocate, hull


def drawn(generator, *, maps, options):
    return [
        [Option(float(generator.randint(1, 40)), generator.uniform(0.0, 10.0)) for _ in range(options)]
        for _ in range(maps)
    ]


def totals(maps, chosen):
    picked = [options[at] for options, at in zip(maps, chosen, strict=True)]
    return sum(option.bytes for option in picked), sum(option.error for option in picked)


def brute_force(maps, budget):
    found = (totals(maps, chosen) for chosen in itertools.product(*(range(len(options)) for options in maps)))
    return min((error for size, error in found if size <= budget), default=None)


@pytest.mark.parametrize("seed", range(40))
def test_no_combination_of_as_many_bytes_has_less_error(seed):
    generator = random.Random(seed)
    maps = drawn(generator, maps=4, options=6)
    for budget in (10, 30, 60, 90, 160):
        chosen = allocate(maps, budget)
        best = brute_force(maps, budget)
        if chosen is None:
            assert best is None
            continue
        size, error = totals(maps, chosen)
        assert size <= budget
        # Of the bytes that it takes, at the end of a step: nothing is better. Beyond, at most one step is missing.
        steepest = max(
            options[first].error - options[second].error
            for options in maps
            for first, second in itertools.pairwise([*hull(options), hull(options)[-1]])
        )
        assert error <= best + steepest + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_wherever_a_step_ends(seed):
    generator = random.Random(seed)
    maps = drawn(generator, maps=3, options=5)
    slopes = sorted(
        {
            (options[a].error - options[b].error) / (options[b].bytes - options[a].bytes)
            for options in maps
            for a, b in itertools.pairwise(hull(options))
        },
        reverse=True,
    )
    least = sum(options[hull(options)[0]].bytes for options in maps)
    assert allocate(maps, least - 0.5) is None
    for slope in slopes:
        chosen = [_at_slope(options, slope) for options in maps]
        budget, error = totals(maps, chosen)
        assert totals(maps, allocate(maps, budget))[1] == pytest.approx(error)
        assert error == pytest.approx(brute_force(maps, budget))


def _at_slope(options, slope):
    """The option on the hull after all steps that are at least so steep."""
    kept = hull(options)
    at = kept[0]
    for a, b in itertools.pairwise(kept):
        if (options[a].error - options[b].error) / (options[b].bytes - options[a].bytes) >= slope - 1e-12:
            at = b
    return at


def test_more_bytes_for_the_same_error_are_no_option():
    assert hull([Option(1, 3.0), Option(2, 1.0), Option(3, 1.0), Option(2, 1.0)]) == [0, 1]


def test_the_hull_is_convex_and_has_the_ends():
    generator = random.Random(0)
    for _ in range(100):
        (options,) = drawn(generator, maps=1, options=9)
        kept = [options[index] for index in hull(options)]
        assert kept[-1].error == min(option.error for option in options)
        assert kept[0].bytes == min(option.bytes for option in options)
        slopes = [(a.error - b.error) / (b.bytes - a.bytes) for a, b in itertools.pairwise(kept)]
        assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)
