"""The least total error under a budget of bytes, where each map has options of its own.

Errors of maps add up. Along the lower convex hull of a map's options the error that a byte removes falls, so that
taking the steepest steps of all maps first is optimal at every budget that a step ends on (Shoham and Gersho, 1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to keep a map.

    Args:
        bytes: that it keeps.
        error: that it adds to the squared error of the gradient.
    """

    bytes: float
    error: float


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, the smallest one first; each removes some error."""
    order = sorted(range(len(options)), key=lambda index: (options[index].bytes, options[index].error))
    kept: list[int] = []
    for index in order:
        if kept and options[index].error >= options[kept[-1]].error:
            continue
        while len(kept) > 1 and _slope(options, kept[-2], kept[-1]) <= _slope(options, kept[-2], index):
            kept.pop()
        if kept and options[index].bytes == options[kept[-1]].bytes:
            kept.pop()
        kept.append(index)
    return kept


def allocate(maps: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """Which option each map takes, for at most ``budget`` bytes; None if not even the smallest ones fit.

    After the last step that fits, what is left goes to the options, on a hull or not, that remove most with it.
    """
    hulls = [hull(options) for options in maps]
    place = [0] * len(maps)
    spent = sum(options[kept[0]].bytes for options, kept in zip(maps, hulls, strict=True))
    if spent > budget:
        return None
    steps: list[tuple[float, int]] = []
    for index in range(len(maps)):
        _push(steps, maps[index], hulls[index], place[index], index)
    while steps:
        _, index = heapq.heappop(steps)
        options, kept = maps[index], hulls[index]
        added = options[kept[place[index] + 1]].bytes - options[kept[place[index]]].bytes
        if spent + added <= budget:
            spent += added
            place[index] += 1
            _push(steps, options, kept, place[index], index)
    chosen = [kept[at] for kept, at in zip(hulls, place, strict=True)]
    return _filled(maps, chosen, budget - spent)


def _filled(maps: Sequence[Sequence[Option]], chosen: list[int], rest: float) -> list[int]:
    """Options that take the rest of a budget as well, the one that removes most first."""
    while True:
        best, least = None, 0.0
        for index, options in enumerate(maps):
            now = options[chosen[index]]
            for at, option in enumerate(options):
                if option.bytes - now.bytes <= rest and now.error - option.error > least:
                    best, least = (index, at), now.error - option.error
        if best is None:
            return chosen
        index, at = best
        rest -= maps[index][at].bytes - maps[index][chosen[index]].bytes
        chosen[index] = at


def _push(steps: list[tuple[float, int]], options: Sequence[Option], kept: list[int], at: int, index: int) -> None:
    if at + 1 < len(kept):
        heapq.heappush(steps, (-_slope(options, kept[at], kept[at + 1]), index))


def _slope(options: Sequence[Option], first: int, second: int) -> float:
    """Error that a byte removes between two options."""
    return (options[first].error - options[second].error) / (options[second].bytes - options[first].bytes)
