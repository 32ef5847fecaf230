"""Measures what each map means for the gradient, and deals a budget of bytes accordingly.

A map that is kept with less error moves the gradient by what its error was worth. One trial keeps all maps as the
preset ``lowrank`` does, two more for each map, or group of maps, keep it with hardly any error and with nearly all of
its signs. What lies between follows from what sampled rows say that each option misses. Two plans, this one and one in
which all maps count the same, are held against the exact gradient; the nearer one is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from iexact_runner.budget.allocation import Option, allocate, hull
from iexact_runner.budget.plan import Plan, PlannedMap
from iexact_runner.budget.sites import Site, Sites, Way
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.errors import ConfigError
from iexact_runner.kept import MIB

# Trials of a map: kept with less error, and with more signs.
TRIALS = 2
# A map is tried with so small a share of what it misses as it is.
NEARLY_EXACT = 0.1
# A plan that keeps more than it may, or much less, is made anew, at most so often.
ATTEMPTS, FULL = 4, 0.97
# Of a budget, what is dealt: other masks leave other signs to be stored.
DEALT = 0.98


logger = logging.getLogger(__name__)


class Trial(Protocol):
    """A training step that is not taken, under the same masks each time."""

    def gradient(self, directions: list[Directions]) -> tuple[Tensor, int]:
        """Its gradient as one vector, and the bytes that were kept, with maps in these states."""

    def exact(self, maps: int) -> Tensor:
        """The gradient with so many maps in FP32, on the host meanwhile."""

    def saved(self, directions: list[Directions]) -> int:
        """The bytes that are kept, from a forward pass alone."""

    def layer(self) -> str:
        """The layer that runs."""


@dataclass
class _Effect:
    """What errors of a map are worth: of a missed share of its energy, of a share of wrong signs; and sign bytes."""

    missed: float = 1.0
    wrong: float = 1.0
    sign_bytes: float = 1.0


def make_plan(
    trial: Trial,
    *,
    budget: float,
    field: str,
    scale: float = 1.0,
    trials: int | None = None,
    reserve: float = 1.0,
    agree: Callable[[Any], Any] = lambda value: value,
) -> Plan:
    """The plan of least expected error that keeps at most ``budget`` bytes.

    Args:
        trial: computes gradients.
        budget: bytes that a step may keep.
        field: of the configuration that says so, for the error.
        scale: what the budget is multiplied by, or what all maps take in FP32 if that is less.
        trials: gradients that may be computed for all maps together, two for each group of maps; None for two a map.
            Of fewer than two no gradient is computed, and a share that is missed of any map counts the same. The
            exact gradient and those of two plans come on top.
        reserve: what stored signs are multiplied by, where later passes reserve more than they need.
        agree: gives all processes that make a plan together one value of what each has measured.

    Raises:
        ConfigError: if the least that the maps can be kept in is more.
    """
    sites, measured = Sites(trial.layer), trials is None or trials >= TRIALS
    base, saved = trial.gradient(sites) if measured else (None, trial.saved(sites))
    maps: list[Site] = agree([site.found() for site in sites if isinstance(site, Site)])
    alike = [_Effect() for _ in maps]
    if scale < 1:
        budget = scale * min(budget, _most(maps, alike, saved, reserve))
    if base is None:
        found = _deal(trial, maps, alike, saved, budget, reserve)
    else:
        groups = _groups(len(maps), None if trials is None else trials // TRIALS)
        effects = [effect for group in groups for effect in _effects(trial, maps, group, base, saved, agree)]
        # Sign bytes are as they were measured, whatever an error is worth.
        alike = [_Effect(sign_bytes=effect.sign_bytes) for effect in effects]
        dealt = [_deal(trial, maps, each, saved, budget, reserve, recorded=effects) for each in (effects, alike)]
        plans, count = [plan for plan in dealt if plan is not None], 1 + TRIALS * len(groups)
        found = _best(trial, plans, base, evaluations=count, agree=agree) if plans else None
    if found is None:
        least = _least(maps, alike, saved, reserve)
        raise ConfigError.of(field, f"{budget / MIB:.2f} MiB", f"a step keeps at least {least / MIB:.2f} MiB")
    return found


def _best(trial: Trial, plans: Sequence[Plan], base: Tensor, *, evaluations: int, agree: Callable[[Any], Any]) -> Plan:
    """The plan whose gradient is the nearest to the exact one, for errors of maps do not quite add up."""
    try:
        exact = trial.exact(len(plans[0].maps))
    except ConfigError as full:  # no room on the host either
        logger.warning(f"takes the plan of the least expected error: {full}")
        return replace(plans[0], gradient_norm=base.norm().item(), evaluations=evaluations)
    norm = agree(exact.norm().item())
    tried = []
    for plan in plans:
        gradient, saved = trial.gradient(plan.directions())
        tried.append((agree((gradient - exact).norm().item()), saved, plan))
    error, saved, plan = min(tried, key=lambda each: each[0])
    count = evaluations + 1 + len(plans)
    measured = error / norm if norm else 0.0
    return replace(plan, saved=saved, gradient_norm=norm, measured_error=measured, evaluations=count)


def _deal(
    trial: Trial,
    maps: Sequence[Site],
    effects: Sequence[_Effect],
    saved: int,
    budget: float,
    reserve: float,
    *,
    recorded: Sequence[_Effect] | None = None,
) -> Plan | None:
    """Deals a budget until what a forward pass keeps is within it, and nearly all of it; None if nothing fits.

    ``saved`` is what is kept as all maps usually are; ``recorded`` are the effects that the plan is recorded with.
    """
    options = _options(maps, effects, reserve)
    known = _options(maps, recorded or effects, reserve)
    beside, limit = saved - _usual(maps, effects), DEALT * budget
    target, enough, above = limit - beside, 0.0, None
    found: Plan | None = None
    for _ in range(ATTEMPTS):
        chosen = allocate(options, target)
        if chosen is None:
            break
        planned = tuple(
            PlannedMap(site.layer, site.shape, site.sketched, site.ways[at].choice, each[at].bytes, each[at].error)
            for site, each, at in zip(maps, known, chosen, strict=True)
        )
        kept = trial.saved([Directions(choice=each.choice) for each in planned])
        if kept > limit:
            above = sum(each.bytes for each in planned)
            target = above - 1.5 * (kept - limit) if found is None else (enough + above) / 2
            continue
        if found is None or kept > found.saved:
            found = Plan(planned, budget, kept)
        if kept >= FULL * limit or all(each.choice.bits is None for each in planned):
            break
        enough, target = target, target + limit - kept if above is None else (target + above) / 2
    return found


def _options(maps: Sequence[Site], effects: Sequence[_Effect], reserve: float) -> list[list[Option]]:
    return [[_option(way, effect, reserve) for way in site.ways] for site, effect in zip(maps, effects, strict=True)]


def _usual(maps: Sequence[Site], effects: Sequence[_Effect]) -> float:
    """Bytes of the maps as they are usually kept."""
    return sum(_option(site.usual, effect, 1.0).bytes for site, effect in zip(maps, effects, strict=True))


def _most(maps: Sequence[Site], effects: Sequence[_Effect], saved: int, reserve: float) -> float:
    """The bytes that a step keeps with all maps in FP32."""
    largest = sum(max(option.bytes for option in each) for each in _options(maps, effects, reserve))
    return saved - _usual(maps, effects) + largest


def _least(maps: Sequence[Site], effects: Sequence[_Effect], saved: int, reserve: float) -> float:
    """The fewest bytes that a step keeps."""
    smallest = sum(each[hull(each)[0]].bytes for each in _options(maps, effects, reserve))
    return saved - _usual(maps, effects) + smallest


def _groups(count: int, most: int | None) -> list[range]:
    """Maps that are tried together: each alone, or as many at once as it takes."""
    size = 1 if most is None else -(-count // max(1, most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _effects(
    trial: Trial, maps: Sequence[Site], group: range, gradient: Tensor, saved: int, agree: Callable[[Any], Any]
) -> list[_Effect]:
    """What errors of the maps of a group are worth, of each the same."""

    def tried(ways: dict[int, Way]) -> tuple[float, int]:
        chosen = [ways.get(index, site.usual).choice for index, site in enumerate(maps)]
        moved, kept = trial.gradient([Directions(choice=choice) for choice in chosen])
        return agree((moved - gradient).square().sum().item()), kept - saved

    signed = {index: _with_signs(maps[index]) for index in group}
    moved, added = tried(signed)
    fewer = sum(maps[index].usual.wrong - way.wrong for index, way in signed.items())
    expected = sum(way.sign_bytes - maps[index].usual.sign_bytes for index, way in signed.items())
    wrong = moved / fewer if fewer > 0 else 0.0
    sign_bytes = min(1.0, max(0.0, added / expected)) if expected > 0 else 0.0
    better = {index: _nearly_exact(maps[index]) for index in group}
    moved, _ = tried(better)
    moved -= wrong * sum(maps[index].usual.wrong - way.wrong for index, way in better.items())
    less = sum(maps[index].usual.missed - way.missed for index, way in better.items())
    missed = max(0.0, moved) / less if less > 0 else 0.0
    return [_Effect(missed, wrong, sign_bytes) for _ in group]


def _with_signs(site: Site) -> Way:
    """As it is usually kept, but with as many signs as possible from a sketch."""
    usual = site.usual
    if not site.sketched:
        return usual
    stored = [way for way in site.ways if way.choice.bits is not None and way.choice.sign_threshold is not None]
    nearest = min(stored, key=lambda way: abs((way.choice.bits or 0) - (usual.choice.bits or 0)))
    level = max(way.choice.sign_threshold or 0.0 for way in stored)
    alike = next(way for way in stored if (way.choice.bits, way.choice.sign_threshold) == (nearest.choice.bits, level))
    choice = Choice(usual.choice.bits, level, alike.choice.sign_share)
    return Way(choice, usual.bytes, alike.sign_bytes, usual.missed, alike.wrong)


def _nearly_exact(site: Site) -> Way:
    """The first option that misses next to nothing."""
    usual = site.usual
    near = (way for way in site.ways if way.missed <= NEARLY_EXACT * usual.missed and way.wrong <= usual.wrong)
    return next(near, site.ways[-1])


def _option(way: Way, effect: _Effect, reserve: float) -> Option:
    # All signs are kept, those of dropped elements too, where a map has any.
    share = float(effect.sign_bytes > 0) if way.choice.sign_threshold is None else effect.sign_bytes * reserve
    return Option(way.bytes + share * way.sign_bytes, effect.missed * way.missed + effect.wrong * way.wrong)
